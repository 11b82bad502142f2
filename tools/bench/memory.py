"""A micro-batch in; peak memory of a training step at growing global batches out, beside steps over the whole batch.

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
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

from clipdist.config import Config, load_config
from clipdist.errors import UserError, run_main
from clipdist.monitor.provenance import commit, hardware

EXAMPLES = """examples:
  python tools/bench/memory.py
  python tools/bench/memory.py --micro-batch 16 --times 1 4 16 --precision fp32 --out memory.md
  python tools/bench/memory.py model.name=configs/models/vit_tiny_flickr8k.json --micro-batch 8 --times 1 4 16
  python tools/bench/memory.py model.name=ViT-B-16 device=cuda --micro-batch 128 --precision bf16 --json

A whole batch is left out where it would take more than half of the memory that is free, going by the one before it.
On a GPU memory is what torch allocates there; on a CPU the process' resident memory (Linux)."""
MODEL = "configs/models/tiny_vit.json"
OWNED = ("train.global_batch", "train.micro_batch", "train.precision")
WARMUP_STEPS = 2
# DeepSpeed allocates a bucket of 5e8 gradients otherwise, whatever the model: it would hide all else on a GPU.
BUCKET = "engine.deepspeed.zero_optimization.reduce_bucket_size=10000000"


@dataclass(frozen=True)
class Row:
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


def main() -> int:
    args = parse_args()
    check(args)
    rows = measure(args)
    text = report(args, rows)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
    return 0


def cell_config(args: argparse.Namespace, precision: str, global_batch: int, micro_batch: int) -> Config:
    sizes = [f"train.global_batch={global_batch}", f"train.micro_batch={micro_batch}", f"train.precision={precision}"]
    return load_config(None, [f"model.name={MODEL}", BUCKET, "data.streams=0", *args.overrides, *sizes])


def check(args: argparse.Namespace) -> None:
    """Resolves the device, and refuses what cannot be measured before anything starts.

    Raises:
        UserError: as it says.
    """
    if args.micro_batch < 1 or min(args.times) < 1:
        raise UserError(f"--micro-batch {args.micro_batch} --times {shown(args.times)}: must be at least 1")
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
    if args.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise UserError("device=cpu: peak memory needs /proc/self/clear_refs (Linux), which cannot be written here")


def measure(args: argparse.Namespace) -> list[Row]:
    os.environ["DS_ACCELERATOR"] = args.device
    # glibc: what is freed goes back to the system at once, so that the next peak counts all of its pages.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    context = multiprocessing.get_context("forkserver")
    # A process forked after the imports starts at once; with CUDA none may be forked from one that has looked for it.
    context.set_forkserver_preload(["deepspeed", "open_clip", "clipdist.evals.audit"] if args.device == "cpu" else [])
    rows = []
    for precision in args.precision:
        whole: Row | None = None
        for factor in args.times:
            batch = factor * args.micro_batch
            rows.append(run_cell(context, args, precision, batch, args.micro_batch))
            if factor == 1:
                whole = rows[-1]  # one micro-batch is the whole batch
                continue
            if whole is None or fits(args.device, whole, batch):
                whole = run_cell(context, args, precision, batch, 0)
                rows.append(whole)
            else:
                rows.append(Row(precision, batch, 0, None, 0, None))
    return rows


def fits(device: str, smaller: Row, batch: int) -> bool:
    if smaller.peak_bytes is None:
        return False
    return smaller.peak_bytes * batch / smaller.global_batch < free_bytes(device) / 2


def free_bytes(device: str) -> int:
    if device == "cuda":
        words = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) << 20
    return proc_bytes("/proc/meminfo", "MemAvailable")


# One cell


def run_cell(context: ForkServerContext, args: argparse.Namespace, precision: str, batch: int, micro: int) -> Row:
    what = f"micro-batches of {micro}" if micro else "whole"
    print(f"{precision}, global batch {batch}, {what} ...", end=" ", file=sys.stderr, flush=True)
    config = cell_config(args, precision, batch, micro)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(theirs, config, args.device))
    process.start()
    theirs.close()
    try:
        kind, answer = ours.recv()
    except EOFError:
        process.join()
        kind, answer = "fault", f"its process ended with exit code {process.exitcode} (out of memory?)"
    finally:
        process.join()
    if kind == "user":
        raise UserError(answer)
    if kind == "fault":
        raise RuntimeError(f"{precision}, global batch {batch}, {what}: {answer}")
    peak, width, seconds = answer
    print(f"{mib(peak)} MiB, {seconds:.1f} s", file=sys.stderr, flush=True)
    size = {"fp32": 4, "bf16": 2, "fp16": 2}[precision]
    return Row(precision, batch, micro, peak, 2 * batch * width * (size + 4) if micro else 0, seconds)


def serve(pipe: Connection, config: Config, device: str) -> None:
    """In a process of its own. Sends ("done", (peak bytes, features, seconds)), ("user", line) or ("fault", line)."""
    try:
        pipe.send(("done", third_step(config, device)))
    except UserError as error:
        pipe.send(("user", str(error)))
    except Exception as error:
        pipe.send(("fault", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def third_step(config: Config, device: str) -> tuple[int, int, float]:
    import torch

    from clipdist.distributed.rank import joined_ranks
    from clipdist.engine.step import Engine
    from clipdist.evals.audit import DrawnPairs
    from clipdist.losses.make import make_loss
    from clipdist.models.dual_encoder import build_model

    with contextlib.redirect_stdout(sys.stderr), joined_ranks(device) as dist_env:
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, config.loss)
        if config.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        pairs = DrawnPairs(config, model.spec).pairs(0)
        image, tokens, valid = (x.to(dist_env.device) for x in (pairs.image, pairs.tokens, pairs.valid))
        group_id = None if pairs.group_id is None else pairs.group_id.to(dist_env.device)
        del pairs
        engine = Engine(model.to(dist_env.device), make_loss(config.loss), config, dist_env)
        for step in range(WARMUP_STEPS):
            result = engine.train_step(image, tokens, valid, group_id, step=step, lr=config.optim.lr)
        width = result.features[0].shape[1]
        del result
        peak = PeakMemory(device)
        began = time.perf_counter()
        engine.train_step(image, tokens, valid, group_id, step=WARMUP_STEPS, lr=config.optim.lr)
        grown = peak.growth()
        seconds = time.perf_counter() - began
    return grown, width, seconds


class PeakMemory:
    """How far memory in use grows from here on: resident memory on a CPU, the allocator's on a GPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
        self.start = proc_bytes("/proc/self/status", "VmRSS")

    def growth(self) -> int:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.start
        return max(0, proc_bytes("/proc/self/status", "VmHWM") - self.start)


def proc_bytes(file: str, name: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{file} has no {name}")


# What is told


def report(args: argparse.Namespace, rows: list[Row]) -> str:
    """Markdown: what it was measured with, and the table."""
    config = cell_config(args, "auto", args.micro_batch, args.micro_batch)
    lines = [
        f"# Peak memory of a training step in micro-batches of {args.micro_batch}",
        "",
        f"    python tools/bench/memory.py {shlex.join(sys.argv[1:])}".rstrip(),
        "",
        *environment(args.device),
        f"- {config.model.name}, {config.loss.name}, ZeRO {config.engine.zero_stage}, one rank; the third step's growth"
        " over what was there before it (the batch's pixels among it)",
        "- features: of both towers, in the training's precision, and their gradients in fp32",
        "- gradients, and what DeepSpeed and the optimiser need beside them, are a constant part of every peak",
        *["- times say little: memory is given back to the system at once, for exact peaks"] * (args.device == "cpu"),
        "",
        "| precision | global batch | micro-batches: peak, MiB | of these features, MiB | time, s "
        "| whole batch: peak, MiB | time, s |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if not row.micro_batch:
            continue
        alike = [r for r in rows if (r.precision, r.global_batch) == (row.precision, row.global_batch)]
        whole = alike[-1]
        cells = [mib(row.peak_bytes), mib(row.feature_bytes), seconds(row), mib(whole.peak_bytes), seconds(whole)]
        lines.append(f"| {row.precision} | {row.global_batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mib(size: int | None) -> str:
    return "does not fit" if size is None else f"{size / (1 << 20):.1f}"


def seconds(row: Row) -> str:
    return "-" if row.time_s is None else f"{row.time_s:.2f}"


def shown(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def environment(device: str) -> list[str]:
    import torch

    return [
        f"- commit: {commit()}",
        f"- hardware: {hardware(device, torch.get_num_threads())}",
        f"- torch {torch.__version__}, Python {platform.python_version()}",
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Peak memory of a training step at growing global batches: in micro-batches, and whole.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings; model.name is {MODEL}")
    parser.add_argument("--micro-batch", type=int, default=32, metavar="M", help="pairs of one forward pass (32)")
    parser.add_argument(
        "--times", type=int, nargs="+", default=[1, 4, 16, 64], metavar="K", help="global batches, in M (1 4 16 64)"
    )
    parser.add_argument(
        "--precision", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16", "fp16"), help="(fp32 bf16)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as markdown, too")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_main(main)
