"""One rank of the proof that a run is the weighted sum of its objectives: CLIP beside CLIP in two weighted parts."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from clipdist.config import REPOSITORY, load_config
from clipdist.data.batch import Batch, pair_batch
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine, StepResult
from clipdist.models.build import build_model
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.make import prepare_model

BATCH, STEPS = 16, 3


def rows(dist_env: DistEnv, step: int) -> Batch:
    """This rank's rows of a drawn global batch; one has no caption."""
    draw = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, 500, (BATCH, 16), generator=draw)
    valid = torch.ones(BATCH, dtype=torch.bool)
    valid[3] = False
    share = BATCH // dist_env.world_size
    batch = pair_batch(image, tokens, valid, torch.arange(BATCH))
    return batch.rows(dist_env.rank * share, (dist_env.rank + 1) * share)


def trained(weights: dict[str, float], micro: int, dist_env: DistEnv) -> tuple[list[torch.Tensor], StepResult]:
    """The fp32 weights that this rank holds after some steps with these parts of CLIP, and the last step's result."""
    words = ["model.name=configs/models/tiny_vit.json", "engine.zero_stage=2", f"train.global_batch={BATCH}"]
    config = load_config(None, [*words, f"train.micro_batch={micro}", "optim.grad_clip=0"])
    torch.manual_seed(0)
    model = build_model(config.model, config.clip)
    objectives = [ClipObjective(replace(config.clip, weight=weight)) for weight in weights.values()]
    for name, objective in zip(weights, objectives):
        objective.name = name
    engine = Engine(model, objectives, config, dist_env)
    for step in range(STEPS):
        result = engine.train_step(rows(dist_env, step), step=step, lr=1e-3)
    held = [piece.data.clone() for piece in engine.zero.live_pieces() if piece.name.startswith("param/")]
    engine.close()
    return held, result


def example() -> type:
    """The objective that docs/objectives.md writes."""
    text = (REPOSITORY / "docs/objectives.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 40
    found: dict[str, type] = {}
    exec(compile(code, "docs/objectives.md", "exec"), found)
    return found["SimSiam"]


def trained_by_example(micro: int, dist_env: DistEnv) -> list[torch.Tensor]:
    """The losses of the global batch of some steps with it. All rows are alike, so that BatchNorm's groups are, too."""
    words = ["model.name=configs/models/tiny_vit.json", f"train.global_batch={BATCH}", f"train.micro_batch={micro}"]
    config = load_config(None, words)
    torch.manual_seed(0)
    model = build_model(config.model, with_text=False)
    objective = example()(model.spec.image_size)
    prepare_model(model, [objective])
    engine, values = Engine(model, [objective], config, dist_env), []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        pair = [torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=draw) for _ in objective.views]
        own = rows(dist_env, step)
        images = {view.name: image.repeat(len(own) // 4, 1, 1, 1) for view, image in zip(objective.views, pair)}
        valid = {name: torch.ones_like(one) for name, one in own.valid.items()}
        batch = replace(own, images=images, tokens=own.tokens[:, :0], valid=valid)
        values.append(all_reduce_sum(engine.train_step(batch, step=step, lr=1e-3).value) / dist_env.world_size)
    engine.close()
    return values


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        whole, cached = (trained_by_example(micro, dist_env) for micro in (0, 4))
        assert 1e-3 < abs(whole[-1]) <= 1
        torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-5)
        for micro in (0, 4):
            whole, one = trained({"clip": 1.0}, micro, dist_env)
            parts, two = trained({"first": 0.25, "second": 0.75}, micro, dist_env)
            for ours, theirs in zip(parts, whole, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(two.value, one.value)
            assert two.terms.keys() == {"first", "second"}
            torch.testing.assert_close(two.terms["second"].sum, one.terms["clip"].sum)
            weighted = sum(term.weight * term.sum for term in two.terms.values())
            torch.testing.assert_close(weighted, two.value)
            assert [term.weight for term in two.terms.values()] == [0.25, 0.75]


if __name__ == "__main__":
    main()
