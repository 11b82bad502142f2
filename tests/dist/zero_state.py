"""One rank of two: builds engines of tiny_vit in several stages and precisions and takes a step with each. Prints JSON:
[stage, precision, optimiser, bytes of fp32 weights and moments, bytes of the weights that the module reads] of each;
and of objectives on views [stage, section, bytes of averages, of the teacher's copy, of state, sent in step 2]."""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from clipdist.config import load_config
from clipdist.distributed.rank import DistEnv, joined_ranks
from clipdist.engine.step import Engine
from clipdist.engine.zero import Zero
from clipdist.evals.audit import RandomBatches
from clipdist.losses.wire import written_bytes
from clipdist.models.build import build_model
from clipdist.objectives.make import make_objectives, prepare_model

CELLS = [(stage, form, "adamw") for stage, form in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"))]
CELLS += [(3, "fp32", "adamw"), (3, "bf16", "adamw"), (1, "fp32", "muon"), (3, "bf16", "muon")]

VIEWED = [  # heads so wide that what is small besides does not count
    (1, "{clip: null, simclr: {}}"),
    (1, "{clip: null, moco: {queue: 1024}}"),
    (2, "{clip: null, byol: {}}"),
    (0, "{clip: null, dino: {prototypes: 4096, local: {size: 16}, local_views: 2}}"),
    (1, "{clip: null, dino: {prototypes: 4096, local: {size: 16}, local_views: 2, balance: sinkhorn}}"),
]


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


def viewed_bytes(stage: int, section: str, dist_env: DistEnv) -> list[Any]:
    words = [f"engine.zero_stage={stage}", "train.precision=fp32", "train.global_batch=8", "device=cpu"]
    config = load_config(None, ["model.name=configs/models/tiny_vit.json", *words, f"objectives={section}"])
    torch.manual_seed(0)
    model = build_model(config.model, with_text=False)
    objectives = make_objectives(config.objectives, model.spec.image_size)
    prepare_model(model, objectives)
    batch = RandomBatches(config, model.spec).batch(0).rows(dist_env.rank * 4, dist_env.rank * 4 + 4)
    engine = Engine(model, objectives, config, dist_env, steps=2)
    engine.train_step(batch, step=0, lr=1e-4)
    before = written_bytes()
    engine.train_step(batch, step=1, lr=1e-4)
    sent = written_bytes() - before
    teacher = engine.moving_teacher and engine.moving_teacher._module
    copied = [*teacher.parameters(), *teacher.buffers()] if teacher else []
    averages = [*engine.ema._averages.values()] if engine.ema else []
    state = [tensor for own in engine.state.values() for tensor in own.values()]
    return [stage, section, *(sum(tensor.nbytes for tensor in held) for held in (averages, copied, state)), sent]


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
        viewed = [viewed_bytes(stage, section, dist_env) for stage, section in VIEWED]
    if int(os.environ["RANK"]) == 0:
        print(json.dumps([found, viewed]))


if __name__ == "__main__":
    main()
