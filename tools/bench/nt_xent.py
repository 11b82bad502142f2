"""Time NT-Xent, forward and backward, beside lightly's: seconds, extra memory, gradient error against float64.

Both have a process of their own, one rank each, and compute in turns. A call is forward and backward, from
unnormalised features to their gradients. lightly is left out where it is not installed; it may lie in a folder of its
own (pip install --no-deps --target DIR lightly), which PYTHONPATH names.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from clipdist.errors import UserError, run_main
from clipdist.losses.nt_xent import nt_xent
from tools.bench import harness
from tools.bench.peak_memory import MemoryGrowth, trim_heap
from tools.bench.peers.losses import lightly_loss
from tools.bench.processes import BenchProcesses, threads_per_rank

EXAMPLES = """  python tools/bench/nt_xent.py
  python tools/bench/nt_xent.py --samples 2048 --d 256 --repeats 5 --impl clipdist --json"""
LABELS = {"clipdist": "clipdist nt_xent", "lightly": "lightly NTXentLoss"}
ERROR_SAMPLES = 1024  # up to which gradients are compared with float64
NOISE = 1.0  # of the second view beside the first: a loss well above 0, as in training


@dataclass(frozen=True)
class ViewsJob:
    """What one process computes."""

    impl: str
    samples: int
    d: int
    temperature: float
    threads: int


@dataclass(frozen=True)
class ViewsStep:
    """One call: seconds, processor seconds, and by how many bytes memory grew (None: cannot be measured here)."""

    time_s: float
    cpu_s: float
    extra_bytes: int | None


class ViewsLoss:
    """One implementation: its views, and the loss on them."""

    def __init__(self, job: ViewsJob) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.views = job, draw_views(job, job.samples)
        self.loss = lightly_loss(job.temperature) if job.impl == "lightly" else self._own_loss

    def _own_loss(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return nt_xent(first, second, self.job.temperature)[0]

    def gradient_error(self) -> float:
        """Return the relative error of the gradients at up to ERROR_SAMPLES samples: the dense formula in float64."""
        views = draw_views(self.job, min(self.job.samples, ERROR_SAMPLES))
        found = torch.autograd.grad(self.loss(*views), views)
        leaves = [x.detach().double().requires_grad_() for x in views]
        unit = F.normalize(torch.cat(leaves), dim=1)
        logits = (unit @ unit.T / self.job.temperature).fill_diagonal_(-torch.inf)
        partner = torch.arange(len(logits)).roll(len(logits) // 2)
        exact = torch.cat(torch.autograd.grad(F.cross_entropy(logits, partner), leaves))
        return float((torch.cat(found).double() - exact).norm() / exact.norm())

    def step(self) -> ViewsStep:
        """Call the loss."""
        trim_heap()
        memory, began = MemoryGrowth("cpu"), time.process_time()
        time_s, _ = harness.timed(lambda: self.loss(*self.views).backward())
        step = ViewsStep(time_s, time.process_time() - began, memory.peak())
        for view in self.views:
            view.grad = None
        return step


def draw_views(job: ViewsJob, samples: int) -> list[torch.Tensor]:
    """Draw two views [samples, d], unnormalised, the same in every process."""
    draw = torch.Generator().manual_seed(7)
    first = torch.randn(samples, job.d, generator=draw)
    second = first + NOISE * torch.randn(samples, job.d, generator=draw)
    return [first.requires_grad_(), second.requires_grad_()]


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.number("--samples", 8192, "N", "samples of two views each", least=2)
    parser.number("--d", 128, "D", "features")
    parser.number("--temperature", 0.1, "T", "of the loss", least=1 / 70)
    parser.number("--repeats", 5, "R", "rounds over all implementations")
    parser.add_argument("--impl", nargs="+", choices=LABELS, help="(all that are installed)")
    return parser.parse()


def main() -> int:
    args = parse_args()
    there = [impl for impl in LABELS if impl == "clipdist" or importlib.util.find_spec(impl)]
    if args.impl and not set(args.impl) <= set(there):
        raise UserError("--impl lightly: is not installed: pip install --no-deps --target DIR lightly; PYTHONPATH=DIR")
    threads = threads_per_rank(1)
    with ExitStack() as started:
        context = multiprocessing.get_context("spawn")
        sides = {}
        for impl in dict.fromkeys(args.impl or there):
            job = ViewsJob(impl, args.samples, args.d, args.temperature, threads)
            sides[impl] = started.enter_context(BenchProcesses(context, ViewsLoss, job)).started()
        errors = {impl: side.ask("gradient_error") for impl, side in sides.items()}
        load = os.getloadavg()[0]
        steps = {impl: partial(side.ask, "step") for impl, side in sides.items()}
        results = harness.take_turns(steps, args.repeats, warmup=1)
    rows = [as_row(impl, results, errors) for impl in sides]
    lines = [
        f"# NT-Xent, forward and backward: {2 * args.samples} views, d={args.d}, fp32, cpu",
        "",
        *harness.provenance("cpu", threads, *[impl for impl in sides if impl != "clipdist"]),
        f"- load of the machine before the rounds: {load:.1f}; temperature {args.temperature:g}",
        f"- median of {args.repeats} rounds, in each of which every implementation ran once, and of their ratios",
        "- memory is the largest of the rounds",
        f"- gradient error: against float64, at {min(args.samples, ERROR_SAMPLES)} samples",
        "",
        *table(rows),
    ]
    return harness.finish(args, lines, {"rows": rows, "load": load})


def as_row(impl: str, results: dict[str, list[ViewsStep]], errors: dict[str, float]) -> dict[str, Any]:
    own, peers = results[impl], results.get("lightly", [])
    extra, peer_extra = (max((x.extra_bytes for x in steps if x.extra_bytes), default=None) for steps in (own, peers))
    pairs = list(zip(own, peers))
    return {
        "impl": LABELS[impl],
        "time_s": statistics.median(step.time_s for step in own),
        "times_s": [step.time_s for step in own],
        "cpu_s": statistics.median(step.cpu_s for step in own),
        "time_ratio": statistics.median(x.time_s / y.time_s for x, y in pairs) if pairs else None,
        "cpu_ratio": statistics.median(x.cpu_s / y.cpu_s for x, y in pairs) if pairs else None,
        "extra_bytes": extra,
        "memory_ratio": extra / peer_extra if extra and peer_extra else None,
        "grad_error": errors[impl],
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    header = ["implementation", "time, s", "/ lightly's", "processor, s", "/ lightly's", "extra MiB", "/ lightly's"]
    header += ["gradient error", "turns, s"]
    cells = [
        [
            row["impl"],
            format(row["time_s"], ".3f"),
            harness.optional(row["time_ratio"], ".2f"),
            format(row["cpu_s"], ".3f"),
            harness.optional(row["cpu_ratio"], ".2f"),
            harness.optional(row["extra_bytes"] and row["extra_bytes"] / 2**20, ".1f"),
            harness.optional(row["memory_ratio"], ".4f"),
            format(row["grad_error"], ".1e"),
            harness.by_round(row["times_s"], ".2f"),
        ]
        for row in rows
    ]
    return harness.markdown_table(header, cells)


if __name__ == "__main__":
    run_main(main)
