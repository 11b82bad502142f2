"""Small runs in; the memory that the plan predicts for each, and that real training steps take, as a table out.

Every cell starts fresh processes on this machine's CPU, one a rank, and measures how far their resident memory grows
over what it is after the imports, at its highest, building and two training steps included (the second step has the
optimiser's state). The prediction is made before, by clipdist.estimate, without a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
import os
import platform
import shlex
import socket
import subprocess
from dataclasses import asdict, dataclass

from clipdist.config import REPOSITORY, Config, load_config
from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

EXAMPLES = """examples:
  python tools/bench/plan.py
  python tools/bench/plan.py --only stage3 --out plan.md
  python tools/bench/plan.py --keep-freed --only "stage1 fp32"

glibc keeps most of what is freed for later, so that a process grows to more than it ever uses at one time. The cells
run with MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 MALLOC_ARENA_MAX=1, which gives it back at once;
--keep-freed leaves glibc as it is."""
STEPS = 2
TIME_LIMIT_S = 500
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
VIT = ["model.name=ViT-S-32-alt", "train.global_batch=8"]
WIDE = ["model.name=ViT-S-32-alt", "train.global_batch=32"]
CELLS = {
    **{f"stage{s} fp32": (1, [*VIT, f"engine.zero_stage={s}"]) for s in range(4)},
    **{f"stage{s} bf16": (1, [*VIT, f"engine.zero_stage={s}", "train.precision=bf16"]) for s in range(4)},
    **{f"stage{s} fp32 2 ranks": (2, [*VIT, f"engine.zero_stage={s}"]) for s in range(4)},
    **{
        f"stage{s} bf16 micro-batches": (
            1,
            [*VIT, f"engine.zero_stage={s}", "train.precision=bf16", "train.micro_batch=4"],
        )
        for s in range(4)
    },
    "batch 32 fp32": (1, WIDE),
    "batch 32 fp32 checkpointing": (1, [*WIDE, "engine.activation_checkpointing=true"]),
    "batch 32 fp32 micro-batches": (1, [*WIDE, "train.micro_batch=8"]),
    **{
        f"RN50 stage{s} fp32": (1, ["model.name=RN50", "train.global_batch=8", f"engine.zero_stage={s}"])
        for s in (0, 1, 3)
    },
    "RN50 bf16": (1, ["model.name=RN50", "train.global_batch=8", "train.precision=bf16"]),
}


@dataclass(frozen=True)
class Row:
    """One cell: bytes of the rank that took the most; error in per cent of the measured."""

    cell: str
    ranks: int
    settings: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return 100 * (self.predicted / self.measured - 1)


def main() -> int:
    args = parse_args()
    if args.rank:
        print(json.dumps(grown(load_config(None, args.rank))))
        return 0
    chosen = {name: cell for name, cell in CELLS.items() if not args.only or any(word in name for word in args.only)}
    if not chosen:
        raise UserError(f"--only {shlex.join(args.only)}: no such cell; there are {', '.join(CELLS)}")
    rows = []
    for name, (ranks, words) in chosen.items():
        rows.append(run_cell(name, ranks, words, args.keep_freed))
        print(f"{name}: {rows[-1].error:+.1f} %", file=sys.stderr, flush=True)
        if args.out:
            args.out.write_text(report(args, rows) + "\n", encoding="utf-8")  # what is measured is not lost
    print(report(args, rows))
    if args.json:
        print(json.dumps({"rows": [asdict(row) | {"error_percent": row.error} for row in rows]}))
    return 0


def run_cell(name: str, ranks: int, words: list[str], keep_freed: bool) -> Row:
    """
    Raises:
        RuntimeError: a rank failed.
    """
    from clipdist.estimate import make_estimate

    settings = [*words, "device=cpu", *([] if any("precision" in word for word in words) else ["train.precision=fp32"])]
    predicted = make_estimate(load_config(None, settings), world=ranks).memory.total
    environment = {**os.environ, **({} if keep_freed else GIVE_BACK), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", *settings],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{name}: a rank ended with {[process.returncode for process in processes]}")
    return Row(name, ranks, " ".join(words), predicted, max(int(text.splitlines()[-1]) for text in outputs))


def grown(config: Config) -> int:
    """Trains two steps as one rank. Returns by how many bytes resident memory grew at the most."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401  what is imported counts as the baseline
    import open_clip  # noqa: F401
    import torch

    from clipdist.distributed.rank import joined_ranks
    from clipdist.engine.step import Engine
    from clipdist.evals.audit import DrawnPairs
    from clipdist.losses.make import make_loss
    from clipdist.models.dual_encoder import build_model

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = proc_bytes("VmRSS")
    with joined_ranks("cpu") as dist_env:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss)
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        pairs = DrawnPairs(config, model.spec).pairs(0)
        share = len(pairs.image) // dist_env.world_size
        rows = slice(dist_env.rank * share, (dist_env.rank + 1) * share)
        assert pairs.group_id is not None
        batch = [x[rows].clone() for x in (pairs.image, pairs.tokens, pairs.valid, pairs.group_id)]
        engine = Engine(model, make_loss(config.loss), config, dist_env)
        for step in range(STEPS):
            engine.train_step(*batch, step=step, lr=config.optim.lr)
        peak = proc_bytes("VmHWM")
    return peak - before


def proc_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def report(args: argparse.Namespace, rows: list[Row]) -> str:
    """Markdown: what it was measured with, and the table."""
    import torch

    within = sum(abs(row.error) <= 15 for row in rows)
    return "\n".join(
        [
            "# Memory of a rank: the plan beside real steps",
            "",
            f"    python tools/bench/plan.py {shlex.join(sys.argv[1:])}".rstrip(),
            "",
            f"- commit: {commit()}",
            f"- hardware: {hardware('cpu', 1)}",
            f"- torch {torch.__version__}, Python {platform.python_version()}",
            "- growth of resident memory over the imported baseline at its highest, building and two steps included",
            f"- glibc {'as it is' if args.keep_freed else 'gives back what is freed at once: ' + ' '.join(GIVE_BACK)}",
            f"- within 15 %: {within} of {len(rows)}",
            "",
            "| cell | settings | ranks | predicted, MB | measured, MB | error |",
            "|---|---|--:|--:|--:|--:|",
            *[
                f"| {r.cell} | {r.settings} | {r.ranks} | {r.predicted / 1e6:.0f} | {r.measured / 1e6:.0f}"
                f" | {r.error:+.1f} % |"
                for r in rows
            ],
        ]
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The plan's memory beside the memory of real training steps, on the CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose names hold one of the words")
    parser.add_argument("--keep-freed", action="store_true", help="leave glibc's memory as training has it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as markdown, too, after every cell")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rank", nargs="+", default=[], help=argparse.SUPPRESS)  # one process of a cell
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
