"""One rank that counts what a training step waits for: first known waits, then the cells of the first word, as JSON.

Rank 0 prints a JSON line for each: {"cell", "waits": [package, line and what, how often]}.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from deepspeed import comm as deepspeed_comm
from gradients import BATCH, allow_fp16, make_batch, with_views
from waits import DEVICE, Waits

from clipdist.config import load_config
from clipdist.data.batch import Batch
from clipdist.distributed.rank import DistEnv, joined_ranks, upload
from clipdist.engine.step import Engine
from clipdist.fault_tolerance.guard import Guard
from clipdist.models.build import build_model
from clipdist.objectives.make import make_objectives, prepare_model

STEPS = 10  # of the run, of which few are taken


def known(waits: Waits) -> None:
    """Twelve waits, and as many calls that are none."""
    host = torch.arange(4.0)
    mask = host > 1
    x = host.to(DEVICE)  # 1
    with waits.counting():
        waits.mark(host, host=True)
        waits.mark(mask, host=True)
        float(x[0]), bool(x.any()), x.tolist(), x.cpu()  # 4
        x.nonzero(), x.unique(), x[x > 1], x[[0, 2]]  # 8
        torch.tensor([1.0], device=DEVICE), host.to(DEVICE), x.to("cpu"), x[mask.nonzero()[:, 0]]  # 12
        float(host[0]), host.tolist(), host.unique(), host[[0]], host[mask], host.cpu()
        upload([1.0], torch.float32, DEVICE), host.to(DEVICE, non_blocking=True), x.to(torch.float64)
        x * 2.0, x[torch.arange(2, device=DEVICE)], torch.where(x > 1, x, 0.0)


def run_cell(cell: dict[str, Any], dist_env: DistEnv) -> Counter[tuple[str, str]]:
    """The waits of the third step that is taken: with a repeated caption, jitter, and a logit scale of 100."""
    config = load_config(
        None,
        [
            f"model.name=configs/models/{cell['model']}.json",
            f"objectives={cell['objectives']}",
            f"train.global_batch={BATCH}",
            f"train.micro_batch={cell['micro']}",
            f"train.precision={cell['precision']}",
            f"engine.zero_stage={cell['stage']}",
            f"train.ema={0 if 'null' in cell['objectives'] else 0.9}",
            *cell["more"],
        ],
    )
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip, with_text=config.objectives.read_text)
    objectives = make_objectives(config.objectives, model.spec.image_size)
    prepare_model(model, objectives)
    share = BATCH // dist_env.world_size
    rows = with_views(make_batch(model.spec), objectives, model.spec.reads_text)
    rows = rows.rows(dist_env.rank * share, (dist_env.rank + 1) * share)
    rows = replace(rows, colour=dict.fromkeys(rows.images, colours(share)))
    engine = Engine(model, objectives, config, replace(dist_env, device=DEVICE), steps=STEPS)
    guard = Guard(config.guard) if cell["guarded"] else None
    applied = 0
    while applied < 3:  # the first has no moments yet, stage 3 learns its order; in fp16 the scale finds its level
        waits = Waits()
        with waits.counting():
            batch = on_host(rows, waits).to(DEVICE)
            applied += engine.train_step(batch, step=applied, lr=1e-4, guard=guard).applied
    engine.close()
    return waits.found


def colours(rows: int) -> torch.Tensor:
    """Changes of brightness and hue in every row; one image made grey, one blurred, one solarised."""
    parameters = torch.tensor([1.2, 1.0, 1.0, 0.1, 3.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]).repeat(rows, 1)
    parameters[1:4, 8:] = torch.eye(3)
    return parameters


def on_host(batch: Batch, waits: Waits) -> Batch:
    def note(tensor: torch.Tensor) -> torch.Tensor:
        waits.mark(tensor, host=True)
        return tensor

    return batch.each(note)


def report(cell: Any, found: Counter[tuple[str, str]]) -> None:
    print(json.dumps({"cell": cell, "waits": [[*where, count] for where, count in found.items()]}), flush=True)


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        allow_fp16()
        waits = Waits()
        known(waits)
        if dist_env.rank == 0:
            report("known", waits.found)
        for cell in json.loads(sys.argv[1]):
            found = run_cell(cell, dist_env)
            if dist_env.rank == 0:
                report(cell, found)
            gc.freeze()  # ZeRO-3 collects garbage at its start: not for a second over what was imported, every time
        deepspeed_comm.barrier()


if __name__ == "__main__":
    main()
