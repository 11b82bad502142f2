"""One rank that takes a first step of Adam with optim.layer_decay, in several stages and precisions.

Prints as JSON, by cell, the largest change of every parameter's fp32 master weights, in units of the learning rate:
Adam's first step is the sign of the gradient times the rate.
"""

from __future__ import annotations

import gc
import json

import torch
from guarded import data

from clipdist.config import load_config
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine
from clipdist.models.build import build_model
from clipdist.objectives.make import make_objectives

LR = 1e-3
CELLS = [(0, "fp32", ()), (1, "fp32", ()), (2, "fp32", ()), (3, "fp32", ()), (0, "bf16", ()), (3, "bf16", ())]
CELLS += [(1, "bf16", ("train.micro_batch=4",))]


def run_cell(stage: int, precision: str, more: tuple[str, ...], dist_env: DistEnv) -> dict[str, float]:
    words = [f"engine.zero_stage={stage}", f"train.precision={precision}", *more]
    words += ["optim.layer_decay=0.5", "optim.weight_decay=0", "optim.eps=1e-30", "optim.grad_clip=0"]
    config = load_config(None, ["model.name=configs/models/tiny_vit.json", "train.global_batch=16", *words])
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
    names = list(engine.zero.numel())
    before = engine.zero.gather(lambda fragment: fragment.master, names)
    spec = model.spec
    batch = data(dist_env.rank, 2, 0, spec.context_length, spec.tokenizer["vocab_size"], spec.image_size)
    engine.train_step(batch, step=0, lr=LR)
    after = engine.zero.gather(lambda fragment: fragment.master, names)
    engine.close()
    return {name: float((after[name] - before[name]).abs().max()) / LR for name in names}


def main() -> None:
    found = {}
    with joined_ranks("cpu") as dist_env:
        for cell in CELLS:
            found[" ".join(map(str, cell))] = run_cell(*cell, dist_env)
            gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time
        if dist_env.rank == 0:
            print(json.dumps(found))


if __name__ == "__main__":
    main()
