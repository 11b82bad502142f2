"""One rank of the proof that a step left out was never taken: every cell, one after another in the same processes.

Each cell trains twice over the same steps: with accidents and a guard, and without either, where the steps of the
accidents are never called. Weights, moments, counters and running statistics must then be the same to the last bit.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from clipdist.config import load_config
from clipdist.data.batch import Batch, pair_batch
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine
from clipdist.errors import Fault
from clipdist.fault_tolerance.guard import Guard
from clipdist.models.build import build_model
from clipdist.objectives.clip import ClipObjective, LossFunction
from clipdist.objectives.make import make_objectives, prepare_model

BATCH, STEPS = 16, 18
VIT, RESNET = "configs/models/tiny_vit.json", "configs/models/tiny_rn.json"  # the ResNet has running statistics
# stage, precision, micro-batch, model, the optimiser if it is not AdamW, and an objective beside CLIP
CELLS: list[tuple[Any, ...]] = [
    (0, "fp32", 0, RESNET),
    (1, "fp32", 0, VIT),
    (2, "fp32", 0, VIT),
    (3, "fp32", 0, RESNET),
    (1, "fp32", 4, RESNET),
    (2, "bf16", 0, VIT),
    (0, "bf16", 4, VIT),
    (1, "bf16", 4, VIT),
    (2, "fp32", 0, VIT, "muon"),
    (1, "fp32", 4, RESNET, "adamw", "moco"),  # a teacher, its statistics, and a queue
    (3, "fp32", 0, RESNET, "adamw", "moco"),
]
MOCO = "{head: [24, 12], queue: 40, momentum: 0.9}"
# What goes wrong at which step, and the words that say so. One rank alone is hit, but for the steep gradient.
ACCIDENTS = {
    0: ("nan gradient", "the gradient is not finite: that of"),  # there are no moments yet
    2: ("nan gradient", "the gradient is not finite: that of"),
    4: ("nan features", "features are not finite: rank 1:"),
    5: ("nan loss", "the loss is not finite: nan"),
    15: ("high loss", "deviations above"),
    16: ("steep gradient", "the update of the image tower is"),
}


class Accidents:
    """Does to a model and its loss what is due at self.step; "" is nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.due = ""

    def watch(self, engine: Engine) -> None:
        layers = engine.zero.module.visual.modules()
        first = next(layer for layer in layers if isinstance(layer, torch.nn.Conv2d))
        first.weight.register_hook(self._gradient)
        first.register_forward_hook(self._output)

    def loss(self, loss: LossFunction) -> LossFunction:
        def with_accidents(*features: Any, **rows: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, statistics = loss(*features, **rows)
            more = {"nan loss": float("nan"), "high loss": 100.0}.get(self.due, 0.0)
            return value + (more if self.rank == 1 else 0.0), statistics

        return with_accidents

    def _gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.due == "nan gradient" and self.rank == 1:
            gradient = gradient.clone()
            gradient[(0,) * gradient.ndim] = float("nan")
        return gradient * 1e4 if self.due == "steep gradient" else gradient

    def _output(self, layer: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if self.due == "nan features" and self.rank == 1 else output


def data(rank: int, world: int, step: int, context: int, vocabulary: int, side: int) -> Batch:
    """This rank's rows of the global batch of a step."""
    draw = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, 500, (BATCH, context), generator=draw)
    tokens[:, -1] = vocabulary - 1
    batch = pair_batch(image, tokens, torch.ones(BATCH, dtype=torch.bool), torch.arange(BATCH))
    return batch.rows(rank * BATCH // world, (rank + 1) * BATCH // world)


def train(cell: tuple[Any, ...], dist_env: DistEnv, guarded: bool) -> tuple[Engine, dict[int, Any]]:
    """The engine after all steps, and the results by step."""
    stage, precision, micro, model_name, *more = cell
    optimizer, beside = more[:1], more[1:]
    words = [
        f"model.name={model_name}",
        f"engine.zero_stage={stage}",
        f"train.precision={precision}",
        f"train.global_batch={BATCH}",
        f"train.micro_batch={micro}",
        "guard.window=10",
        "optim.grad_clip=0",
        f"train.ema={0 if beside else 0.9}",
        *(f"objectives={{clip: {{}}, moco: {MOCO}}}" for _ in beside),
        *(f"optim.name={name}" for name in optimizer),
    ]
    if stage == 3:
        words.append("engine.deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}")
    config = load_config(None, words)
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    spec = model.spec
    accidents = Accidents(dist_env.rank)
    objective = ClipObjective(config.objectives.clip)
    objective.function = accidents.loss(objective.function)
    others = make_objectives(config.objectives, spec.image_size)[1:]
    prepare_model(model, (objective, *others))
    engine = Engine(model, (objective, *others), config, dist_env, steps=STEPS)
    accidents.watch(engine)
    guard = Guard(config.guard) if guarded else None
    calls: list[int] = []
    results = {}
    for step in range(STEPS):
        if not guarded and step in ACCIDENTS:
            continue
        accidents.due = ACCIDENTS[step][0] if guarded and step in ACCIDENTS else ""
        engine.before_update = lambda step=step: calls.append(step)  # type: ignore[misc]
        rows = data(
            dist_env.rank, dist_env.world_size, step, spec.context_length, spec.tokenizer["vocab_size"], spec.image_size
        )
        views = (
            {view.name: image.flip(-1) for view in others[0].views for image in rows.images.values()} if beside else {}
        )
        rows = replace(rows, images=rows.images | views)
        results[step] = engine.train_step(rows, step=step, lr=1e-4 * (1 + step), guard=guard)
    assert calls == [step for step in range(STEPS) if step not in ACCIDENTS], calls
    if guard:
        assert guard.skipped_total == len(ACCIDENTS)
        check_results(results)
        check_stop(engine, accidents, rows)
    return engine, results


def check_results(results: dict[int, Any]) -> None:
    for step, result in results.items():
        if step not in ACCIDENTS:
            assert (result.applied, result.skipped) == (True, ""), (step, result.skipped)
            assert step == 1 or set(result.update_sizes) == {"image", "text"}, step  # the first has no moments to read
            assert all(0 < size < 8 for size in result.update_sizes.values()), result.update_sizes
            continue
        assert not result.applied
        assert ACCIDENTS[step][1] in result.skipped, (step, result.skipped)


def check_stop(engine: Engine, accidents: Accidents, rows: Batch) -> None:
    """guard.nonfinite=stop ends the run instead, on every rank, and nothing has changed."""
    before = everything(engine)
    engine.skip_nonfinite, accidents.due = False, "nan gradient"
    with pytest.raises(Fault, match="the gradient is not finite: that of visual"):
        engine.train_step(rows, step=STEPS, lr=1.0, guard=Guard(load_config(None, []).guard))
    check_same(before, everything(engine))


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of what this rank holds: masters, moments, their counters, the module's weights and buffers, average."""
    found: dict[str, torch.Tensor] = {}
    for fragment in engine.zero.fragments():
        found[f"master {fragment.name}"] = fragment.master.clone()
        for name, value in engine.zero._base_optimizer.state[fragment.flat].items() if fragment.trained else ():
            whole = not torch.is_tensor(value) or value.numel() == 1
            found[f"{name} {fragment.name}"] = torch.as_tensor(value).clone() if whole else fragment.of(value).clone()
        # Stage 3 fills a parameter's last share up with whatever lies there.
        shared = getattr(fragment.parameter, "ds_tensor", None)
        module = fragment.parameter if shared is None else shared[: fragment.numel]
        found[f"module {fragment.name}"] = module.detach().clone()
    for name, buffer in engine.zero.module.named_buffers():
        found[f"buffer {name}"] = buffer.clone()
    for piece in engine.ema.live_pieces() if engine.ema else ():
        found[piece.name] = piece.data.clone()
    for objective, state in engine.state.items():
        found |= {f"state of {objective}: {name}": tensor.clone() for name, tensor in state.items()}
    if engine.moving_teacher and engine.moving_teacher._module is not None:
        found |= {f"teacher {name}": p.clone() for name, p in engine.moving_teacher._module.named_parameters()}
    return found


def check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not wrong, f"{len(wrong)} of {len(found)} differ: {wrong[:5]}"


def run_cell(cell: tuple[Any, ...], dist_env: DistEnv) -> None:
    def result(guarded: bool) -> tuple[dict[str, torch.Tensor], dict[int, Any]]:
        engine, results = train(cell, dist_env, guarded)
        state = everything(engine)
        engine.close()
        return state, results

    found, with_guard = result(guarded=True)
    expected, without = result(guarded=False)
    assert any(name.startswith("exp_avg_sq") for name in expected)
    check_same(found, expected)
    for step, taken in without.items():
        assert torch.equal(taken.value, with_guard[step].value), step


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        for cell in CELLS:
            try:
                run_cell(cell, dist_env)
            except Exception as error:
                raise AssertionError(f"cell {cell}: {error}") from error
            gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time


if __name__ == "__main__":
    main()
