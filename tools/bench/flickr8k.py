"""Train on Flickr8k, and tell retrieval on its validation split, samples/s and memory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import signal
import statistics
import subprocess
import time
from typing import Any

from clipdist.config import load_config
from clipdist.errors import EXIT_INTERRUPTED, Fault, UserError, run_main
from clipdist.storage import json_lines
from tools.bench import harness
from tools.bench.processes import repository_environment, threads_per_rank

DEFAULT_RECIPE = "configs/flickr8k_rn50.yaml"
SAVE_S = 20  # for a run that is stopped to save, before it is killed
METRICS = ("t2i_r1", "t2i_r5", "t2i_r10", "i2t_r1", "i2t_r5", "i2t_r10")
EXAMPLES = """  python tools/bench/flickr8k.py data/flickr8k
  python tools/bench/flickr8k.py Flickr8k_Dataset.zip Flickr8k_text.zip --minutes 5 --out bench.md train.epochs=10

SOURCE is a folder with train/ and val/, or what tools/shard_flickr8k.py takes, which then makes shards of it."""


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.add_argument("words", nargs="+", metavar="SOURCE", help="and settings of the recipe (section.key=value)")
    parser.add_argument("--config", default=DEFAULT_RECIPE, help=f"recipe ({DEFAULT_RECIPE})")
    text = "stop training so many after the start of this command; 0: the recipe's length"
    parser.number("--minutes", 0.0, "M", text, least=0)
    args = parser.parse()
    args.overrides = [word for word in args.words if "=" in word and not Path(word).exists()]
    args.sources = [word for word in args.words if word not in args.overrides]
    for source in args.sources:
        if not Path(source).exists():
            raise UserError(f"SOURCE {source}: does not exist")
    if not args.sources:
        parser.error("SOURCE: name the shards, or the downloaded files")
    return args


def main() -> int:
    args = parse_args()
    stop_at = time.monotonic() + 60 * args.minutes if args.minutes else None
    config = load_config(args.config, args.overrides)
    with harness.workspace() as folder:
        shards = find_shards(args.sources, folder)
        train_s, finished = harness.timed(lambda: train(args, shards, folder, stop_at))
        records = list(json_lines(folder / "flickr8k/metrics.jsonl"))
    from clipdist.distributed.rank import resolve_device

    record = summary(records, train_s, finished, config.train.global_batch)
    return harness.finish(args, report(args, record, config.model.name, resolve_device(config.device)), record)


def find_shards(sources: list[str], folder: Path) -> Path:
    """Return the folder of train/ and val/; made by tools/shard_flickr8k.py if the source is no such folder."""
    given = Path(sources[0])
    if len(sources) == 1 and (given / "train").is_dir() and (given / "val").is_dir():
        return given
    out = folder / "shards"
    command = [sys.executable, str(harness.ROOT / "tools/shard_flickr8k.py"), *sources, "--out", str(out)]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"SOURCE {' '.join(sources)}: tools/shard_flickr8k.py cannot make shards of it, see above")
    return out


def train(args: argparse.Namespace, shards: Path, folder: Path, stop_at: float | None) -> bool:
    """Train; return whether to the end. A run that has not ended at `stop_at` (monotonic) is told to save and leave.

    Raises:
        Fault: training failed.
    """
    common = {"data.train": shards / "train", "data.val": shards / "val", "run.root": folder, "run.name": "flickr8k"}
    words = [*args.overrides, *(f"{name}={value}" for name, value in common.items()), "train.resume=never"]
    command = [sys.executable, str(harness.ROOT / "clipdist/train.py"), "--config", args.config, *words]
    with subprocess.Popen(command, env=repository_environment(), stdout=sys.stderr) as process:
        try:
            code = wait(process, stop_at and max(0.0, stop_at - time.monotonic()))
        finally:
            process.kill()
    if code not in (0, EXIT_INTERRUPTED, -signal.SIGKILL):
        raise Fault(f"training ended with exit code {code}, see above")
    return code == 0


def wait(process: subprocess.Popen, limit_s: float | None) -> int:
    """Return the exit code of the process. Past the limit it is told to save, and killed where that takes long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit_s)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(SAVE_S)
    process.kill()
    return process.wait()


def summary(records: list[dict[str, Any]], train_s: float, finished: bool, batch: int) -> dict[str, Any]:
    """Return the JSON line: R@K of the last validation in percent; None where nothing was validated or logged."""
    steps = [record for record in records if record["type"] == "train"]
    validated = [record for record in records if record["type"] == "val"]
    rates = [record["samples_per_s"] for record in steps[1:]]  # the first includes what the start prepares
    last = validated[-1] if validated else {}
    return {
        "finished": finished,
        "train_s": train_s,
        "steps": steps[-1]["step"] if steps else 0,
        "validated_step": last.get("step"),
        "samples_per_s": statistics.median(rates) if rates else None,
        "memory_gb": steps[-1]["memory_gb"] if steps else None,
        "batch": batch,
        **{name: last.get(name) for name in METRICS},
    }


def report(args: argparse.Namespace, record: dict[str, Any], model: str, device: str) -> list[str]:
    cells = [
        [side, *(harness.optional(record[f"{prefix}_r{k}"], ".1f") for k in (1, 5, 10))]
        for side, prefix in (("text to image", "t2i"), ("image to text", "i2t"))
    ]
    ended = "to its end" if record["finished"] else f"stopped after {args.minutes:g} minutes, its schedule unfinished"
    return [
        "# Training on Flickr8k",
        "",
        *harness.markdown_table(["validation split, %", "R@1", "R@5", "R@10"], cells),
        "",
        f"- training: {model} by {args.config}, batch {record['batch']}, {record['steps']} steps in"
        f" {record['train_s']:.0f} s with start and validation, {ended}; validated at step {record['validated_step']}",
        f"- {harness.optional(record['samples_per_s'], '.0f')} samples/s while it trains, peak memory"
        f" {harness.optional(record['memory_gb'], '.1f')} GB",
        *harness.provenance(device, threads_per_rank(1), "deepspeed", "open_clip_torch"),
    ]


if __name__ == "__main__":
    run_main(main)
