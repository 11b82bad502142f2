"""One rank of the proof that a run is the weighted sum of its objectives: CLIP beside CLIP in two weighted parts."""

from __future__ import annotations

from dataclasses import replace

import torch

from clipdist.config import load_config
from clipdist.data.batch import Batch, pair_batch
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine, StepResult
from clipdist.models.dual_encoder import build_model
from clipdist.objectives.clip import ClipObjective

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


def main() -> None:
    with joined_ranks("cpu") as dist_env:
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
