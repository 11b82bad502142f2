"""Measure the peak memory of a training step at growing global batches: in micro-batches, and whole.

With train.micro_batch a step keeps one micro-batch's activations at a time, and of the other pairs their features alone
(docs/loss.md): its peak must not grow with the global batch by more than they do. Every cell of the table is a process
of its own, one rank, whose third step is measured: the optimiser's state exists by then, and so does the batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import multiprocessing
import os
import subprocess
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerContext

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main
from tools.bench import harness
from tools.bench.peak_memory import RETURN_FREED, proc_bytes, require_resettable
from tools.bench.processes import BenchProcesses

EXAMPLES = """  python tools/bench/memory.py
  python tools/bench/memory.py --micro-batch 16 --times 1 4 16 --precision fp32 --out memory.md
  python tools/bench/memory.py model.name=configs/models/vit_tiny_flickr8k.json --micro-batch 8 --times 1 4 16
  python tools/bench/memory.py model.name=ViT-B-16 device=cuda --micro-batch 128 --precision bf16 --json

A whole batch is left out where it would take more than half of the memory that is free, going by the one before it.
On a GPU memory is what torch allocates there; on a CPU the process' resident memory (Linux)."""
MODEL = "configs/models/tiny_vit.json"
OWNED = ("train.global_batch", "train.micro_batch", "train.precision")
WARMUP_STEPS = 2
VALUE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# DeepSpeed allocates a bucket of 5e8 gradients otherwise, whatever the model: it would hide all else on a GPU.
BUCKET = "engine.deepspeed.zero_optimization.reduce_bucket_size=10000000"


@dataclass(frozen=True)
class MemoryCell:
    """One cell: a global batch, in micro-batches or (micro_batch 0) whole.

    Attributes:
        peak_bytes: growth during the third step over what was there before it. None: not run, it would not fit.
        feature_bytes: what stays of all pairs while the micro-batches run: features of both towers in the training's
            precision, and their gradients in fp32; 0 for a whole batch, where they are a part of the activations.
        time_s: of that step.
    """

    precision: str
    global_batch: int
    micro_batch: int
    peak_bytes: int | None
    feature_bytes: int
    time_s: float | None


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings; model.name is {MODEL}")
    parser.add_argument("--micro-batch", type=int, default=32, metavar="M", help="pairs of one forward pass (32)")
    parser.add_argument(
        "--times", type=int, nargs="+", default=[1, 4, 16, 64], metavar="K", help="global batches, in M (1 4 16 64)"
    )
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=VALUE_BYTES, help="(fp32 bf16)")
    return parser.parse()


def main() -> int:
    args = parse_args()
    check(args)
    cells = measure(args)
    return harness.finish(args, report(args, cells), {"rows": [asdict(cell) for cell in cells]})


def cell_config(args: argparse.Namespace, precision: str, global_batch: int, micro_batch: int) -> Config:
    sizes = [f"train.global_batch={global_batch}", f"train.micro_batch={micro_batch}", f"train.precision={precision}"]
    return load_config(None, [f"model.name={MODEL}", BUCKET, "data.streams=0", *args.overrides, *sizes])


def check(args: argparse.Namespace) -> None:
    """Resolve the device, and refuse what cannot be measured before anything starts.

    Raises:
        UserError: as it says.
    """
    if args.micro_batch < 1 or min(args.times) < 1:
        times = " ".join(map(str, args.times))
        raise UserError(f"--micro-batch {args.micro_batch} --times {times}: must be at least 1")
    for word in args.overrides:
        if word.partition("=")[0] in OWNED:
            raise UserError(f"{word}: this program sets it itself; see --micro-batch, --times and --precision")
    args.times = sorted(set(args.times))
    args.precision = list(dict.fromkeys(args.precision))
    config = cell_config(args, "auto", args.micro_batch, args.micro_batch)

    from clipdist.distributed.rank import resolve_device, resolve_precision
    from clipdist.models.spec import resolve_spec

    args.device = resolve_device(config.device)
    for precision in args.precision:
        resolve_precision(precision, args.device)
    resolve_spec(config.model)
    if args.device == "cpu":
        require_resettable("device=cpu")


def measure(args: argparse.Namespace) -> list[MemoryCell]:
    os.environ |= {"DS_ACCELERATOR": args.device, **RETURN_FREED}
    context = multiprocessing.get_context("forkserver")
    # A process forked after the imports starts at once; with CUDA none may be forked from one that has looked for it.
    context.set_forkserver_preload(["tools.bench.steps"] if args.device == "cpu" else [])
    cells = []
    for precision in args.precision:
        whole: MemoryCell | None = None
        for factor in args.times:
            batch = factor * args.micro_batch
            cells.append(run_cell(context, args, precision, batch, args.micro_batch))
            if factor == 1:
                whole = cells[-1]  # one micro-batch is the whole batch
                continue
            if whole is None or fits(args.device, whole, batch):
                whole = run_cell(context, args, precision, batch, 0)
                cells.append(whole)
            else:
                cells.append(MemoryCell(precision, batch, 0, None, 0, None))
    return cells


def fits(device: str, smaller: MemoryCell, batch: int) -> bool:
    if smaller.peak_bytes is None:
        return False
    return smaller.peak_bytes * batch / smaller.global_batch < free_bytes(device) / 2


def free_bytes(device: str) -> int:
    if device == "cuda":
        words = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    return proc_bytes("MemAvailable", "/proc/meminfo")


def run_cell(
    context: ForkServerContext, args: argparse.Namespace, precision: str, batch: int, micro: int
) -> MemoryCell:
    from tools.bench.steps import StepMemory

    what = f"{precision}, global batch {batch}, {f'micro-batches of {micro}' if micro else 'whole'}"
    job = cell_config(args, precision, batch, micro), args.device
    with BenchProcesses(context, StepMemory, job, tracebacks=False, title=what) as process:
        peak, width, seconds = process.ask("one_step", WARMUP_STEPS)
    harness.say(f"{what}: {mib(peak)} MiB, {seconds:.1f} s")
    features = 2 * batch * width * (VALUE_BYTES[precision] + 4) if micro else 0
    return MemoryCell(precision, batch, micro, peak, features, seconds)


def report(args: argparse.Namespace, cells: list[MemoryCell]) -> list[str]:
    """Return Markdown: what it was measured with, and the table."""
    import torch

    config = cell_config(args, "auto", args.micro_batch, args.micro_batch)
    rows = []
    for cell in cells:
        if cell.micro_batch:
            whole = [c for c in cells if (c.precision, c.global_batch) == (cell.precision, cell.global_batch)][-1]
            micro = [mib(cell.peak_bytes), mib(cell.feature_bytes), harness.optional(cell.time_s, ".2f")]
            told = [*micro, mib(whole.peak_bytes), harness.optional(whole.time_s, ".2f")]
            rows.append([cell.precision, str(cell.global_batch), *told])
    header = ["precision", "global batch", "micro-batches: peak, MiB", "of these features, MiB", "time, s"]
    return [
        f"# Peak memory of a training step in micro-batches of {args.micro_batch}",
        "",
        *harness.provenance(args.device, torch.get_num_threads()),
        f"- {config.model.name}, {config.clip.loss}, ZeRO {config.engine.zero_stage}, one rank; the third step's growth"
        " over what was there before it (the batch's pixels among it)",
        "- features: of both towers, in the training's precision, and their gradients in fp32",
        "- gradients, and what DeepSpeed and the optimiser need beside them, are a constant part of every peak",
        *["- times say little: memory is given back to the system at once, for exact peaks"] * (args.device == "cpu"),
        "",
        *harness.markdown_table([*header, "whole batch: peak, MiB", "time, s"], rows),
    ]


def mib(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / (1 << 20):.1f}"


if __name__ == "__main__":
    run_main(main)
