"""Compare the memory that the plan predicts for small runs with the memory that real training steps take, on the CPU.

Every cell starts fresh processes, one a rank, and measures how far their resident memory grows over what it is after
the imports, at its highest, building and two training steps included (the second step has the optimiser's state). The
prediction is made before, by clipdist.estimate, without a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import multiprocessing
import os
import shlex
from dataclasses import asdict, dataclass

from clipdist.config import load_config
from clipdist.errors import UserError, run_main
from tools.bench import harness
from tools.bench.peak_memory import RETURN_FREED, require_resettable
from tools.bench.processes import BenchProcesses

EXAMPLES = """  python tools/bench/plan.py
  python tools/bench/plan.py --only stage3 --out plan.md
  python tools/bench/plan.py --keep-freed --only "stage1 fp32"

glibc keeps most of what is freed for later, so that a process grows to more than it ever uses at one time. The cells
run with MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=65536 MALLOC_ARENA_MAX=1, which gives it back at once;
--keep-freed leaves glibc as it is."""
STEPS = 2
TIME_LIMIT_S = 500
VIT = ["model.name=ViT-S-32-alt", "train.global_batch=8"]
WIDE = ["model.name=ViT-S-32-alt", "train.global_batch=32"]
RN50 = ["model.name=RN50", "train.global_batch=8"]
BF16 = "train.precision=bf16"


def each_stage(name: str, *words: str, ranks: int = 1) -> dict[str, tuple[int, list[str]]]:
    """Return {title: (ranks, settings)} of a cell for every ZeRO stage."""
    return {f"stage{stage} {name}": (ranks, [*VIT, f"engine.zero_stage={stage}", *words]) for stage in range(4)}


# Without a text tower; of DINO a head and crops as large as they are to the tower in the paper
TAUGHT = {
    "SimCLR": "{clip: null, simclr: {}}",
    "SLIP": "{simclr: {head: [2048, 2048, 128]}}",
    "MoCo": "{clip: null, moco: {queue: 8192}}",
    "MoCo 3": "{clip: null, moco: {queue: 0, head: [2048, 2048, 256], predictor: [2048, 256]}}",
    "BYOL": "{clip: null, byol: {}}",
    "DINO": "{clip: null, dino: {prototypes: 16384, local: {size: 96}, local_views: 4}}",
}


def each_objective() -> dict[str, tuple[int, list[str]]]:
    """Return cells of all objectives on views: each at one stage, and three of them at the others and in other ways."""
    found: dict[str, tuple[int, list[str]]] = {}
    for number, (name, section) in enumerate(TAUGHT.items()):
        words = [*VIT, f"objectives={section}"]
        ways: dict[str, tuple[int, list[str]]] = {f"stage{number % 3}": (1, [f"engine.zero_stage={number % 3}"])}
        if name in ("SimCLR", "BYOL", "DINO"):
            ways |= {f"stage{stage}": (1, [f"engine.zero_stage={stage}"]) for stage in (0, 2, 3)}
            ways |= {f"stage{stage} 2 ranks": (2, [f"engine.zero_stage={stage}"]) for stage in (1, 3)}
            ways["stage1 bf16 micro-batches"] = (1, [BF16, "train.micro_batch=4"])
        found |= {f"{name} {way}": (ranks, [*words, *more]) for way, (ranks, more) in ways.items()}
    rn50 = [*RN50, "objectives={clip: null, byol: {}}"]
    return found | {"RN50 BYOL stage1": (1, rn50)}


CELLS = {
    **each_stage("fp32"),
    **each_stage("bf16", BF16),
    **each_stage("fp32 2 ranks", ranks=2),
    **each_stage("bf16 micro-batches", BF16, "train.micro_batch=4"),
    "batch 32 fp32": (1, WIDE),
    "batch 32 fp32 checkpointing": (1, [*WIDE, "engine.activation_checkpointing=true"]),
    "batch 32 fp32 micro-batches": (1, [*WIDE, "train.micro_batch=8"]),
    **{f"RN50 stage{stage} fp32": (1, [*RN50, f"engine.zero_stage={stage}"]) for stage in (0, 1, 3)},
    "RN50 bf16": (1, [*RN50, BF16]),
    **each_objective(),
}


@dataclass(frozen=True)
class PlanCell:
    """One cell: bytes of the rank that took the most; error in per cent of the measured."""

    cell: str
    ranks: int
    settings: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return 100 * (self.predicted / self.measured - 1)


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose names hold one of the words")
    parser.add_argument("--keep-freed", action="store_true", help="leave glibc's memory as training has it")
    return parser.parse(out_text="write the table as markdown, too, after every cell")


def main() -> int:
    args = parse_args()
    chosen = {name: cell for name, cell in CELLS.items() if not args.only or any(word in name for word in args.only)}
    if not chosen:
        raise UserError(f"--only {shlex.join(args.only)}: no such cell; there are {', '.join(CELLS)}")
    require_resettable("tools/bench/plan.py")
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **({} if args.keep_freed else RETURN_FREED)}
    cells: list[PlanCell] = []
    for name, (ranks, words) in chosen.items():
        cells.append(run_cell(name, ranks, words))
        harness.say(f"{name}: {cells[-1].error:+.1f} %")
        if args.out:
            harness.write_lines(args.out, report(args, cells))  # what is measured is not lost
    return harness.finish(args, report(args, cells), {"rows": [asdict(c) | {"error_percent": c.error} for c in cells]})


def run_cell(name: str, ranks: int, words: list[str]) -> PlanCell:
    """Predict and measure one cell.

    Raises:
        Fault: a rank failed, or did not end in time.
    """
    from clipdist.estimate import make_estimate
    from tools.bench.steps import StepMemory

    precision = [] if any("precision" in word for word in words) else ["train.precision=fp32"]
    config = load_config(None, [*words, "device=cpu", *precision])
    predicted = make_estimate(config, world=ranks).memory.total
    context = multiprocessing.get_context("spawn")
    with BenchProcesses(context, StepMemory, (config, "cpu"), world=ranks, title=name) as processes:
        grown = processes.ask_all("whole_run", STEPS, limit_s=TIME_LIMIT_S)
    return PlanCell(name, ranks, " ".join(words), predicted, max(grown))


def report(args: argparse.Namespace, cells: list[PlanCell]) -> list[str]:
    """Return Markdown: what it was measured with, and the table."""
    within = sum(abs(cell.error) <= 15 for cell in cells)
    rows = [
        [c.cell, c.settings, str(c.ranks), f"{c.predicted / 1e6:.0f}", f"{c.measured / 1e6:.0f}", f"{c.error:+.1f} %"]
        for c in cells
    ]
    return [
        "# Memory of a rank: the plan beside real steps",
        "",
        *harness.provenance("cpu", 1),
        "- growth of resident memory over the imported baseline at its highest, building and two steps included",
        f"- glibc {'as it is' if args.keep_freed else 'gives back what is freed at once: ' + ' '.join(RETURN_FREED)}",
        f"- within 15 %: {within} of {len(cells)}",
        "",
        *harness.markdown_table(["cell", "settings", "ranks", "predicted, MB", "measured, MB", "error"], rows, left=2),
    ]


if __name__ == "__main__":
    run_main(main)
