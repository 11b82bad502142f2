"""Memory and time of the vocabulary projection and the loss of captions, beside open_clip's projection and CoCaLoss."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import resource
import subprocess
import time

import torch

from clipdist.errors import run_main

EXAMPLES = "example: python tools/bench/captions.py --rows 32 --tokens 76 --width 512 --words 49408"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES)
    for name, default in (("rows", 32), ("tokens", 76), ("width", 512), ("words", 49408), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)  # of a process of its own: a peak never falls
    return parser.parse_args()


def measure(args: argparse.Namespace) -> str:
    """Return a row of the table: extra memory, and the fastest of the repeats."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    draw = torch.Generator().manual_seed(0)
    shape = args.rows, args.tokens, args.width
    hidden = torch.randn(shape, generator=draw).to(args.device, dtype).requires_grad_()
    weight = (torch.randn(args.width, args.words, generator=draw) * args.width**-0.5).to(args.device, dtype)
    weight.requires_grad_()
    labels = torch.randint(1, args.words, shape[:2], generator=draw).to(args.device)
    if args.side == "clipdist":
        from clipdist.losses.captions import caption_loss

        def step() -> torch.Tensor:
            return caption_loss(hidden.flatten(0, 1), weight, labels.flatten()) / labels.numel()
    else:
        from open_clip.loss import CoCaLoss

        captions = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0)

        def step() -> torch.Tensor:
            return captions(None, None, hidden @ weight, labels, None)[1]

    before, seconds, value = _peak(args.device), [], 0.0
    for _ in range(args.repeats):
        start = time.perf_counter()
        loss = step()
        loss.backward()
        value = float(loss.detach())
        seconds.append(time.perf_counter() - start)
        hidden.grad = weight.grad = None
    extra = (_peak(args.device) - before) / 1e6
    return f"| {args.side} | {extra:,.0f} MB | {min(seconds):.2f} s | {value:.5f} |"


def _peak(device: str) -> int:
    """Return the most bytes that this process has held so far: of the GPU, or of memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    args = parse_args()
    if args.side:
        print(measure(args))
        return
    print("| projection, loss, backward pass | peak of memory above inputs | time | loss |\n|---|---|---|---|")
    for side in ("open_clip", "clipdist"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True)


if __name__ == "__main__":
    run_main(main)
