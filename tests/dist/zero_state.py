"""One rank of two: builds engines of tiny_vit in several stages and precisions and takes a step with each. Prints JSON:
[stage, precision, optimiser, bytes of fp32 weights and moments, bytes of the weights that the module reads] of each."""

from __future__ import annotations

import json
import os

import torch

from clipdist.config import load_config
from clipdist.distributed.rank import joined_ranks
from clipdist.engine.step import Engine
from clipdist.engine.zero import Zero
from clipdist.evals.audit import RandomBatches
from clipdist.models.dual_encoder import build_model
from clipdist.objectives.make import make_objectives

CELLS = [(stage, form, "adamw") for stage, form in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"))]
CELLS += [(3, "fp32", "adamw"), (3, "bf16", "adamw"), (1, "fp32", "muon"), (3, "bf16", "muon")]


def state_bytes(zero: Zero, stage: int, precision: str) -> int:
    """Moments, and the weights that are stepped where they are not the module's own."""
    total, optimizer, engine = 0, zero._base_optimizer, zero._deepspeed
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            total += moment_bytes(optimizer.state[parameter])
            total += 0 if (stage, precision) == (0, "fp32") else parameter.nbytes
    if stage == 3:  # whose groups are filled during the step alone
        flats = engine.optimizer.fp32_partitioned_groups_flat
        total = sum(flat.nbytes + moment_bytes(optimizer.state[flat]) for flat in flats)
        own = {p.data_ptr() for p in engine.optimizer.fp16_partitioned_groups_flat}
        total -= sum(flat.nbytes for flat in flats if flat.data_ptr() in own)
    return total


def moment_bytes(state: dict) -> int:
    return sum(state[moment].nbytes for moment in ("exp_avg", "exp_avg_sq") if moment in state)


def main() -> None:
    found = []
    with joined_ranks("cpu") as dist_env:
        for stage, precision, optimizer in CELLS:
            words = [f"engine.zero_stage={stage}", f"train.precision={precision}", "train.global_batch=8", "device=cpu"]
            words.append(f"optim.name={optimizer}")
            config = load_config(None, ["model.name=configs/models/tiny_vit.json", *words])
            torch.manual_seed(0)
            model = build_model(config.model, config.objectives.clip)
            batch = RandomBatches(config, model.spec).batch(0).rows(dist_env.rank * 4, dist_env.rank * 4 + 4)
            engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
            engine.train_step(batch, step=0, lr=1e-4)
            weights = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.zero.module.parameters())
            found.append([stage, precision, optimizer, state_bytes(engine.zero, stage, precision), weights])
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
