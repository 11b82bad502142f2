"""One rank of the proof that steps of every optimiser are those of whole tensors in float64. Muon's cells: muon.py.

Each cell takes three steps from the engine's reduced gradients, with clipping by tensor, a weight decay that rises and
parameters that are held for two steps. Prints as JSON, by cell, the relative errors of the change of fp32 master
weights of every parameter, and of the moments.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import muon as muon_cells
import torch
import torch.distributed as dist
from gradients import allow_fp16
from guarded import data, everything
from torch import Tensor

from clipdist.checkpoint.format import Manifest, checkpoint_dir
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.config import Config, load_config
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine import muon
from clipdist.engine.optim import NO_DECAY, weight_decay
from clipdist.engine.step import Engine
from clipdist.models.build import build_model
from clipdist.models.load import load_trained
from clipdist.objectives.make import make_objectives

STEPS, BATCH, SAVED, HELD_FOR = 3, 16, 1, 2
RATES = {"lars": 3.0, "lamb": 1e-2, "adamw": 1e-2, "sgd": 1.0}
VIT, RESNET = "configs/models/tiny_vit.json", "configs/models/tiny_rn.json"
HELD = dict.fromkeys(("text.transformer.resblocks.0.mlp.c_fc.weight", "text.ln_final.bias"), HELD_FOR)
SPLIT = ("engine.deepspeed.zero_optimization={stage3_param_persistence_threshold: 0, sub_group_size: 20000}",)
Cell = tuple[str, int, str, str, tuple[str, ...]]
CELLS: dict[int, list[Cell]] = {  # by rank count; make exact takes all of a table, too
    1: [("lars", 0, "fp32", VIT, ()), ("lamb", 1, "fp32", RESNET, ()), ("lamb", 3, "fp32", VIT, SPLIT)],
    2: [
        *(("lars", stage, ("fp32", "bf16")[stage % 2], (RESNET, VIT)[stage % 2], ()) for stage in range(4)),
        *(("lamb", stage, ("bf16", "fp32")[stage % 2], VIT, ()) for stage in range(4)),
        *(("adamw", stage, ("fp32", "bf16")[stage % 2], VIT, ()) for stage in range(4)),
        ("sgd", 2, "fp32", VIT, ()),
        ("lars", 1, "bf16", VIT, ("train.micro_batch=4",)),  # DeepSpeed's BF16_Optimizer
        ("adamw", 0, "bf16", VIT, ("train.micro_batch=4",)),
        ("adamw", 0, "fp16", VIT, ()),
        ("lamb", 3, "fp16", VIT, ()),
        ("muon", 2, "fp32", VIT, ()),  # held matrices and moments alone: muon.py has the steps
    ],
    4: [("lamb", 0, "fp32", VIT, ()), ("lamb", 2, "fp32", RESNET, ()), ("lars", 3, "fp32", VIT, SPLIT)],
}
RESUMED = {("lars", 2), ("lamb", 3), ("adamw", 0), ("adamw", 1), ("muon", 2)}
if ALL := bool(os.environ.get("EXACT_ALL")):
    for cells in CELLS.values():
        table = product(("lars", "lamb", "sgd", "adamw"), range(4), ("fp32", "bf16"), (VIT, RESNET), ((),))
        cells += [cell for cell in table if cell not in cells]


class Whole:
    """Weights and moments of one process, whole, in float64."""

    def __init__(self, cfg: Any, weights: dict[str, Tensor], ndim: dict[str, int]) -> None:
        self.cfg, self.taken = cfg, 0
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.decays = {n for n in weights if ndim[n] > 1 and not any(word in n for word in NO_DECAY)}
        self.moments = {n: [torch.zeros_like(w), torch.zeros_like(w)] for n, w in self.weights.items()}
        self.counts = dict.fromkeys(weights, 0)

    def step(self, gradients: dict[str, Tensor], decay: float) -> None:
        for name, gradient in gradients.items():
            gradient = gradient.double()
            gradient = gradient * min(1.0, self.cfg.clip_each / (float(gradient.norm()) + 1e-6))
            if self.taken >= HELD.get(name, 0):
                self.counts[name] += 1
                update = getattr(self, f"_{self.cfg.name}")(name, gradient, decay if name in self.decays else 0.0)
                self.weights[name] -= RATES[self.cfg.name] * update
        self.taken += 1

    def _sgd(self, name: str, gradient: Tensor, decay: float) -> Tensor:
        return self.moments[name][0].mul_(self.cfg.beta1).add_(gradient + decay * self.weights[name])

    def _lars(self, name: str, gradient: Tensor, decay: float) -> Tensor:
        weight = self.weights[name]
        if name in self.decays and (weight.norm() == 0 or gradient.norm() == 0):
            decay = 0.0
        elif name in self.decays:
            rate = 1e-3 * weight.norm() / (gradient.norm() + decay * weight.norm())
            return self.moments[name][0].mul_(self.cfg.beta1).add_(rate * (gradient + decay * weight))
        return self._sgd(name, gradient, decay)

    def _adamw(self, name: str, gradient: Tensor, decay: float) -> Tensor:
        first, second = self.moments[name]
        beta1, beta2, count = self.cfg.beta1, self.cfg.beta2, self.counts[name]
        first.mul_(beta1).add_((1 - beta1) * gradient)
        second.mul_(beta2).add_((1 - beta2) * gradient**2)
        size = (second / (1 - beta2**count)).sqrt() + self.cfg.eps
        return first / (1 - beta1**count) / size + decay * self.weights[name]

    def _lamb(self, name: str, gradient: Tensor, decay: float) -> Tensor:
        update, weight = self._adamw(name, gradient, decay), self.weights[name]
        return update * weight.norm() / update.norm() if name in self.decays and weight.norm() else update


def make_engine(
    config: Config, dist_env: DistEnv, reader: CheckpointReader | None = None
) -> tuple[Engine, Any, dict[str, int]]:
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    if reader:
        load_trained(model, reader.folder, reader.manifest)
    ndim = {name: parameter.ndim for name, parameter in model.named_parameters()}
    spec = model.spec
    draw = partial(
        data, dist_env.rank, dist_env.world_size, context=spec.context_length, vocabulary=spec.tokenizer["vocab_size"]
    )
    objectives = make_objectives(config.objectives, model.spec.image_size)
    objectives[0].held = HELD
    engine = Engine(model, objectives, config, dist_env)
    return engine, partial(draw, side=spec.image_size), ndim


def train(engine: Engine, draw: Any, config: Config, steps: range, whole: Whole | None = None) -> None:
    """Take steps; the reference takes them, too."""
    zero = engine.zero
    names = list(zero.numel(trained_only=True))
    for step in steps:
        gradients: dict[str, Tensor] = {}

        def note(gradients: dict[str, Tensor] = gradients) -> None:
            found = zero.gather(zero.gradient, names) if whole else {}
            gradients |= {name: gradient / zero.loss_scale for name, gradient in found.items()}

        engine.before_update = note
        decay = weight_decay(config.optim, step, STEPS)
        rate = RATES.get(config.optim.name, 1e-2)
        while not engine.train_step(draw(step), step=step, lr=rate, weight_decay=decay).applied:
            assert zero.fp16  # whose scale finds its level
        if whole:
            whole.step(gradients, decay)


def run_cell(cell: Cell, folder: Path, dist_env: DistEnv) -> dict[str, float]:
    name, stage, precision, model, more = cell
    words = [f"model.name={model}", f"engine.zero_stage={stage}", f"train.precision={precision}", *more]
    words += [f"optim.name={name}", "optim.weight_decay=0.3", "optim.weight_decay_end=0.8", "optim.grad_clip=0"]
    config = load_config(None, [*words, "optim.clip_each=0.05", f"train.global_batch={BATCH}"])
    engine, draw, ndim = make_engine(config, dist_env)
    zero = engine.zero
    names = list(zero.numel(trained_only=True))
    masters = partial(zero.gather, lambda fragment: fragment.master, names)
    before = masters()
    whole = Whole(config.optim, before, ndim) if name in RATES else None
    held = [n for n in names if n in HELD]
    assert len(held) == len(HELD)
    train(engine, draw, config, range(SAVED), whole)
    save(engine, config, checkpoint_dir(folder, SAVED), dist_env)
    train(engine, draw, config, range(SAVED, HELD_FOR), whole)
    now = masters()
    assert all(torch.equal(now[n], before[n]) for n in held)
    assert not any(zero.moments(fragment) for fragment in zero.fragments() if fragment.name in HELD)
    train(engine, draw, config, range(HELD_FOR, STEPS), whole)
    after = masters()
    assert not any(torch.equal(after[n], before[n]) for n in held)
    assert zero.save_numel()[0] == sum(piece.data.numel() for piece in zero.live_pieces())
    errors = errors_of(engine, whole, before, after, names) if whole else {}
    expected = everything(engine)
    engine.close()
    if dist_env.world_size == 2 and (ALL or (name, stage) in RESUMED) and precision != "fp16" and not more:
        reader = CheckpointReader(checkpoint_dir(folder, SAVED))
        engine = make_engine(config, dist_env, reader)[0]
        engine.restore(reader)
        train(engine, draw, config, range(SAVED, STEPS))
        found = everything(engine)
        assert found.keys() == expected.keys()
        assert [n for n, tensor in found.items() if not torch.equal(tensor, expected[n])] == []
        engine.close()
    return errors


def errors_of(
    engine: Engine, whole: Whole, before: dict[str, Tensor], after: dict[str, Tensor], names: list[str]
) -> dict[str, float]:
    errors = {}
    for n in names:
        moved = whole.weights[n] - before[n].double()
        # A tenth of Adam's usual step at least: the gradient of a key's bias is 0 but for rounding.
        usual = 0.1 * moved.numel() ** 0.5 if whole.cfg.name in ("lamb", "adamw") else 1e-3
        size = max(float(moved.norm()), 1e-3 * float(before[n].norm()), usual * RATES[whole.cfg.name])
        errors[n] = float((after[n].double() - whole.weights[n]).norm()) / size
    for number, moment in enumerate(("exp_avg", "exp_avg_sq")):
        if whole.cfg.name in ("lamb", "adamw") or number == 0:
            found = engine.zero.gather(lambda fragment: engine.zero.moments(fragment)[moment], names)  # noqa: B023
            ours = torch.cat([found[n].double() for n in names])
            theirs = torch.cat([whole.moments[n][number] for n in names])
            errors[moment] = float((ours - theirs).norm() / theirs.norm())
    return errors


def save(engine: Engine, config: Config, folder: Path, dist_env: DistEnv) -> None:
    world = dist_env.world_size
    write_part(folder, dist_env.rank, [*engine.live_pieces(), *engine.zero.buffer_pieces()], "once")
    if dist_env.rank == 0:
        state = {"scaler": engine.zero.scaler_state()}
        write_manifest(folder, Manifest(SAVED, SAVED, BATCH, world, asdict(config), {}, state), "once")
    dist.barrier()


def main() -> None:
    found, folder = {}, Path(sys.argv[1])
    muon.ROUND = 5000  # several rounds
    allow_fp16()
    with joined_ranks("cpu") as dist_env:
        two = dist_env.world_size == 2
        for cell in [*muon_cells.CELLS, *(muon_cells.CELLS_OF_TWO if two else [])]:
            found["muon " + " ".join(map(str, cell))] = muon_cells.run_cell(*cell, dist_env)
            gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time
        for number, one in enumerate(CELLS[dist_env.world_size]):
            found["held " + " ".join(map(str, one))] = run_cell(one, folder / str(number), dist_env)
            gc.freeze()
        if dist_env.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
