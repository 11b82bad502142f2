"""Measure drop path: the image tower's forward and backward pass at some rates, beside that of all samples.

Drawn images, all rates in turn, in one process with one thread. Times are of the processor: other programs on the
machine change them less than they change what a clock shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import os
import statistics
import time
from collections.abc import Callable
from itertools import count

from clipdist.config import load_config
from clipdist.errors import run_main
from tools.bench import harness

RATES = (0.0, 0.1, 0.2, 0.4)
EXAMPLES = """  python tools/bench/drop_path.py model.name=ViT-S-16 --images 16"""


def main() -> int:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the model (ViT-S-16)")
    parser.number("--images", 16, "N", "images of a pass")
    parser.number("--rounds", 5, "R", "timed passes of each rate")
    args = parser.parse()
    load = os.getloadavg()[0]
    passes = {rate: timed(rate, args.overrides, args.images) for rate in RATES}
    seconds = harness.take_turns({str(rate): run for rate, run in passes.items()}, args.rounds, warmup=1)
    ratios = {name: statistics.median(harness.ratios(own, seconds["0.0"])) for name, own in seconds.items()}
    lines = ["| rate | s | time beside rate 0 | 1 - rate |", "|---|---|---|---|"]
    for rate in RATES:
        spent = statistics.median(seconds[str(rate)])
        lines.append(f"| {rate} | {spent:.2f} | {ratios[str(rate)]:.3f} | {1 - rate:.1f} |")
    lines.append("")
    lines.append(f"{args.images} images a pass, medians of {args.rounds} passes; load of the machine {load:.1f}")
    return harness.finish(args, lines, {"ratio": ratios})


def timed(rate: float, overrides: list[str], images: int) -> Callable[[], float]:
    """Return a function that runs a forward and a backward pass, and returns its processor seconds."""
    import torch

    from clipdist.data.batch import IMAGE, Batch
    from clipdist.models.build import build_model

    torch.set_num_threads(1)
    config = load_config(None, ["model.name=ViT-S-16", f"model.drop_path={rate}", *overrides])
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, with_text=False).train()
    shape = (images, *model.spec.transform.shape)
    pixels, ids = torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(images)
    batch = Batch({IMAGE: pixels}, torch.zeros(images, 0, dtype=torch.int64), {}, ids, ids)
    steps = count()

    def run() -> float:
        began = time.process_time()
        outputs = model(image=pixels, kept=model.draw_kept(config.train.seed, next(steps), batch, [IMAGE]))
        outputs[IMAGE].sum().backward()
        return time.process_time() - began

    return run


if __name__ == "__main__":
    run_main(main)
