"""Time the losses, forward and backward, beside open_clip's, and on a GPU beside memeff's.

Seconds, extra memory, gradient error against float64, and, with several ranks over gloo on this machine, bytes on the
wire.

Every implementation has processes of its own (one per rank), which live for the whole run and compute in turns: one
call of each, then the next round. A call is forward and backward, from unnormalised features to their gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import importlib.util
import math
import multiprocessing
import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING, Any

from clipdist.errors import Fault, UserError, run_main
from clipdist.losses.wire import BYTES, clipdist_bytes, open_clip_bytes
from tools.bench import harness
from tools.bench.processes import BenchProcesses, threads_per_rank

if TYPE_CHECKING:
    from tools.bench.loss_ranks import LossJob, LossStep

EXAMPLES = """  python tools/bench/loss.py --n 2048 --d 512 --repeats 5
  python tools/bench/loss.py --n 2048 --dtype bf16 --device cpu --world 1 2 4 --out runs/bench_loss
  python tools/bench/loss.py --n 32768 --dtype bf16 --op infonce --impl kernel open_clip --json"""
OPS = ("infonce", "sigmoid")
OWN = ("tiles", "kernel")
IMPLS = (*OWN, "open_clip", "memeff")
MODEL_WORLDS = (2, 4, 8, 64, 512, 4096)


@dataclass
class LossRow:
    """One line of the result; the steps of an implementation's ranks end up here."""

    job: LossJob
    steps: list[list[LossStep]] = field(default_factory=list)
    grad_error: float | None = None
    note: str = ""
    fault: bool = False

    def most(self, name: str, of: Callable[[list[Any]], Any]) -> Any:
        """Take of every round the rank with the most, and return what `of` makes of the rounds; None: not measured."""
        rounds = [[getattr(step, name) for step in ranks] for ranks in self.steps]
        there = rounds and not any(None in ranks for ranks in rounds)
        return of([max(ranks) for ranks in rounds]) if there else None

    def prepare(self, ranks: BenchProcesses) -> None:
        """Call the loss for the first time, and compare its gradients."""
        harness.say(f"W={self.job.world} {self.job.ops[0]}, {self.job.label}: first call")
        replies = self.ask(ranks, "prepare")
        if self.note:
            return
        self.grad_error = math.sqrt(sum(off for off, _ in replies) / sum(whole for _, whole in replies))
        if not math.isfinite(self.grad_error):
            self.grad_error = None
            self.fail(Fault("its gradients are not finite"))

    def step(self, ranks: BenchProcesses) -> None:
        if not self.note:
            steps = self.ask(ranks, "step")
            self.steps += [steps] if steps else []

    def ask(self, ranks: BenchProcesses, method: str) -> list[Any]:
        try:
            return ranks.ask_all(method)
        except UserError as error:
            self.fail(error)
            return []

    def fail(self, error: UserError) -> None:
        self.note, self.steps = str(error), []
        self.fault = isinstance(error, Fault) and self.job.impl in OWN

    def as_json(self) -> dict[str, Any]:
        job = self.job
        return {
            "impl": job.label,
            "op": job.ops[0],
            "n": job.n,
            "d": job.d,
            "dtype": job.dtype,
            "world": job.world,
            "time_s": self.most("time_s", statistics.median),
            "extra_bytes": self.most("extra_bytes", max),
            "grad_error": self.grad_error,
            "wire_bytes": self.most("wire_bytes", statistics.median) if job.world > 1 else None,
        }


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.number("--n", 4096, "N", "pairs of the global batch")
    parser.number("--d", 512, "D", "features")
    parser.add_argument("--dtype", default="fp32", choices=BYTES, help="of the features (fp32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--world", type=int, nargs="+", default=[1], metavar="W", help="numbers of ranks (1)")
    parser.number("--repeats", 5, "R", "rounds over all implementations")
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS, help="(both)")
    parser.add_argument("--impl", nargs="+", choices=IMPLS, help="(all that run here)")
    return parser.parse(out="FOLDER", out_text="write table.md")


def check(args: argparse.Namespace) -> None:
    """Resolve the device and the implementations, and refuses what cannot be measured, before anything starts.

    Raises:
        UserError: as it says.
    """
    args.op, args.world = list(dict.fromkeys(args.op)), sorted(set(args.world))
    if args.world[0] < 1 or args.n % math.lcm(*args.world):
        raise UserError(f"--world {shlex.join(map(str, args.world))}: each must divide n={args.n}")
    from clipdist.distributed.rank import resolve_device

    args.device = resolve_device(args.device)
    if args.device == "cuda" and args.world[-1] > 1:
        raise UserError(f"--world {args.world[-1]}: more ranks than one are processes on a CPU; add --device cpu")
    fused = args.device == "cuda" and importlib.util.find_spec("triton") is not None
    lacks = {} if fused else dict.fromkeys(("kernel", "memeff"), "needs a CUDA device that torch sees, and Triton")
    if importlib.util.find_spec("memeff") is None:
        lacks.setdefault("memeff", "is not installed: pip install memeff")
    for impl in args.impl or []:
        if impl in lacks:
            raise UserError(f"--impl {impl}: {lacks[impl]}")
    args.impl = list(dict.fromkeys(args.impl or [impl for impl in IMPLS if impl not in lacks]))
    if args.impl == ["memeff"] and "infonce" not in args.op:
        raise UserError("--impl memeff: has InfoNCE alone; add --op infonce")


def main() -> int:
    args = parse_args()
    check(args)
    from tools.bench.loss_ranks import LossJob, MatrixProduct

    rows: list[LossRow] = []
    units: list[float] = []
    with harness.workspace() as folder:
        threads = threads_per_rank(1)
        product = LossJob("product", tuple(args.op), args.n, args.d, args.dtype, args.device, threads, folder)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["clipdist.losses.infonce", "clipdist.losses.sigmoid", "tools.bench.loss_ranks", "tools.bench.peers.losses"]
        )
        with BenchProcesses(context, MatrixProduct, product) as unit:
            harness.say("float64 gradients to compare with")
            unit.ask("prepare")
            for world in args.world:
                jobs = [
                    replace(product, impl=impl, ops=(op,), world=world, threads=threads_per_rank(world))
                    for op in args.op
                    for impl in args.impl
                    if (op, impl) != ("sigmoid", "memeff")
                ]
                measured, units_s = measure(context, jobs, unit, args.repeats)
                rows += measured
                units += units_s
    unit_s = statistics.median(units)
    record = {"rows": [row.as_json() for row in rows], "unit_s": unit_s, "notes": notes(args, rows)}
    harness.finish(args, report(args, rows, unit_s), record, "table.md")
    return 1 if any(row.fault for row in rows) else 0


def measure(
    context: ForkServerContext, jobs: list[LossJob], unit: BenchProcesses, repeats: int
) -> tuple[list[LossRow], list[float]]:
    """Return the rows of one world size, and the seconds that a product took in each round."""
    from tools.bench.loss_ranks import LossRank

    units: list[float] = []
    with contextlib.ExitStack() as started:
        rows = [LossRow(job) for job in jobs]
        sides: dict[str, Callable[[], None]] = {}
        for row in rows:
            tracebacks = row.job.impl in OWN
            workers = BenchProcesses(context, LossRank, row.job, world=row.job.world, tracebacks=tracebacks)
            ranks = started.enter_context(workers)
            row.prepare(ranks)
            sides[f"{row.job.ops} {row.job.impl}"] = partial(row.step, ranks)
        harness.take_turns(sides | {"product": lambda: units.append(unit.ask("step").time_s)}, repeats)
    return rows, units


def report(args: argparse.Namespace, rows: list[LossRow], unit_s: float) -> list[str]:
    packages = ["open_clip_torch", *(["triton"] if args.device == "cuda" else []), *({"memeff"} & set(args.impl))]
    lines = [
        f"# Losses, forward and backward: n={args.n}, d={args.d}, {args.dtype}, {args.device}",
        "",
        *harness.provenance(args.device, threads_per_rank(1), *packages),
        f"- median of {args.repeats} rounds, in each of which every implementation ran once; memory is the largest",
        f"- 1 unit: one {args.n} x {args.n} x {args.d} product in {args.dtype} in one process, {unit_s:.4g} s",
        "- W: processes on this machine over gloo; time and memory are those of the rank that needs most",
        "",
    ]
    cells = []
    for row in rows:
        r, peer = row.as_json(), peer_of(row, rows)
        time_s, extra = r["time_s"], r["extra_bytes"]
        cells.append(
            [
                r["op"],
                r["impl"],
                str(r["world"]),
                harness.optional(time_s, ".4g"),
                harness.optional(divided(time_s, unit_s), ".2f"),
                harness.optional(divided(time_s, peer["time_s"]), ".2f"),
                harness.optional(divided(extra, 1 << 20), ".1f"),
                harness.optional(divided(extra, peer["extra_bytes"]), ".3f"),
                harness.optional(r["grad_error"], ".1e"),
                harness.optional(divided(r["wire_bytes"], 1e6), ".3f"),
            ]
        )
    header = ["op", "implementation", "W", "time, s", "units", "time / open_clip's", "extra MiB"]
    header += ["memory / open_clip's", "gradient error", "sent, MB per rank"]
    lines += [*harness.markdown_table(header, cells, left=2), ""]
    lines += [*(f"- {note}" for note in notes(args, rows)), "", *wire_table(args, rows)]
    return lines


def notes(args: argparse.Namespace, rows: list[LossRow]) -> list[str]:
    found = [f"W={row.job.world} {row.job.ops[0]}, {row.job.label}: {row.note}" for row in rows if row.note]
    compared = rows[0].job.error_pairs()
    if compared < args.n:
        found.append(f"gradient error: at n={compared}, against float64")
    if "memeff" in args.impl:
        found.append("memeff: its temperature is a constant, without a gradient; one process on one GPU only")
    if args.device == "cpu" and args.dtype != "fp32":
        found.append(
            f"a CPU without {args.dtype} arithmetic is slow at it: open_clip and the unit multiply in {args.dtype}, "
            "clipdist in fp32; these times say nothing of a GPU"
        )
    if args.dtype == "fp16":
        found.append("fp16: the loss is scaled by n before backward, the gradients are scaled back")
    return found


def wire_table(args: argparse.Namespace, rows: list[LossRow]) -> list[str]:
    """Return the model for many world sizes at this global batch, and what was measured beside it."""
    rows_of_table = []
    for op in args.op:
        for world in sorted({*MODEL_WORLDS, *args.world} - {1}):
            if args.n % world:
                continue
            b = args.n // world
            ours, theirs = (model(op, world, b, args.d, args.dtype) for model in (clipdist_bytes, open_clip_bytes))
            of_world = [row for row in rows if row.job.world == world and row.job.ops[0] == op]
            own = next((row.as_json()["wire_bytes"] for row in of_world if row.job.impl in OWN), None)
            peer = next((row.as_json()["wire_bytes"] for row in of_world if row.job.impl == "open_clip"), None)
            modelled = [f"{ours / 1e6:.3f}", f"{theirs / 1e6:.3f}", f"{ours / theirs:.3f}"]
            measured = [harness.optional(divided(x, 1e6), ".3f") for x in (own, peer)] + [
                harness.optional(divided(own, peer), ".3f")
            ]
            rows_of_table.append([op, str(world), str(b), *modelled, *measured])
    header = ["op", "W", "pairs per rank", "clipdist", "open_clip", "ratio"]
    return [
        f"Sent per rank and step, MB: the model of clipdist.losses.wire for each W that divides n={args.n}; measured:",
        "",
        *harness.markdown_table([*header, "measured: clipdist", "open_clip", "ratio"], rows_of_table),
    ]


def peer_of(row: LossRow, rows: list[LossRow]) -> dict[str, Any]:
    """Return open_clip's row of the same op and world; nothing in it where there is none."""
    same = [r for r in rows if (r.job.impl, r.job.ops, r.job.world) == ("open_clip", row.job.ops, row.job.world)]
    return same[0].as_json() if same else {"time_s": None, "extra_bytes": None}


def divided(x: float | None, y: float | None) -> float | None:
    return None if x is None or not y else x / y


if __name__ == "__main__":
    run_main(main)
