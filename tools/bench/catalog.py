"""A number of shards in; how long their consolidated index takes to open, its memory, and the time of the order, out.

The index is made in a temporary folder: real parts for a few shards, stubs for the others, which no start reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import psutil
from tqdm import tqdm

from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import SUFFIX, Part, make_part, write_parts
from clipdist.data.index import ShardIndex
from clipdist.data.order import Order, OrderKey
from clipdist.errors import Fault, UserError, run_main

EXAMPLE = """example:
  python tools/bench/catalog.py --shards 100000 --samples-per-shard 10000 --json"""
GLOBAL_BATCH, STREAMS, WINDOWS = 32_768, 64, (0, 20_000)
STEPS = 50  # random positions whose ids are timed
TOUCHED = 2_000_000  # ids of one epoch that are looked at for repeats, about
REAL_PARTS = 4
_STUB = b"a part that is never read"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=100_000, metavar="N", help="(100000)")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="about (10000)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    for name in ("shards", "samples_per_shard"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be at least 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    counts = shard_counts(arguments.shards, arguments.samples_per_shard)
    if counts.sum() < GLOBAL_BATCH:
        raise UserError(f"{counts.sum()} samples are fewer than a global batch of {GLOBAL_BATCH}")
    with tempfile.TemporaryDirectory(prefix="clipdist-") as folder:
        path = Path(folder) / f"all{SUFFIX}"
        write_parts(path, make_parts(counts))
        result: dict[str, object] = {
            "shards": len(counts),
            "samples": int(counts.sum()),
            "file_bytes": path.stat().st_size,
        }
        # A fresh process: nothing of what made the file is in its memory.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            result |= pool.submit(measure, path).result()
    print(table(result))
    if arguments.json:
        print(json.dumps(result))


def shard_counts(shards: int, about: int) -> np.ndarray:
    """int64 [S]: as uneven as shards of downloads that partly failed."""
    return np.random.default_rng(0).integers(max(1, about * 9 // 10), about * 11 // 10 + 1, shards)


def make_parts(counts: np.ndarray) -> Iterator[Part]:
    for number, count in enumerate(tqdm(counts.tolist(), desc="write", unit="shard", disable=None)):
        tar = f"https://example.org/shards/{number:06d}.tar"
        if number < REAL_PARTS:
            yield make_part(real_index(tar, count))
        else:
            yield Part(tar, count, hashlib.blake2b(tar.encode(), digest_size=16).digest(), _STUB)


def real_index(tar: str, count: int) -> ShardIndex:
    """Three members a sample, of sizes as in the web's corpora."""
    size = np.random.default_rng(count).integers(1, 60_000, (count, 3))
    blocks = -(-size // 512) + 1
    offset = (np.cumsum(blocks).reshape(count, 3) - blocks + 1) * 512
    keys = np.array([f"{row:09d}" for row in range(count)])
    return ShardIndex(tar, keys, ("jpg", "txt", "json"), offset, size, int(blocks.sum() + 2) * 512)


def measure(path: Path) -> dict[str, object]:
    """Opens the index and draws from it; raises Fault where an order repeats a sample."""
    process = psutil.Process()
    before = process.memory_info().rss
    began = time.perf_counter()
    catalog = Catalog.open([str(path)])
    opened = time.perf_counter()
    fingerprint = catalog.fingerprint()
    finished = time.perf_counter()
    memory = peak_rss() - before
    for number in range(min(REAL_PARTS, len(catalog.shards))):
        catalog.table(number)
    tabled = time.perf_counter()
    return {
        "open_s": round(opened - began, 3),
        "fingerprint_s": round(finished - opened, 3),
        "fingerprint": fingerprint,
        "table_s": round((tabled - finished) / min(REAL_PARTS, len(catalog.shards)), 5),
        "orders": [measure_order(catalog.starts, window) for window in WINDOWS],
        "open_memory_bytes": memory,
        "all_memory_bytes": peak_rss() - before,
    }


def peak_rss() -> int:
    """The largest resident size that this process has had, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Fault("/proc/self/status does not tell the peak of memory")


def measure_order(starts: np.ndarray, window: int) -> dict[str, object]:
    """Seconds of a step's ids at random positions of one epoch, and a check that no sample comes twice in it."""
    began = time.perf_counter()
    order = Order(starts, OrderKey(seed=1, global_batch=GLOBAL_BATCH, streams=STREAMS, window=window))
    order.ids(0)
    first = time.perf_counter() - began
    steps = order.steps_per_epoch
    times = []
    for position in np.random.default_rng(window).integers(0, steps, STEPS).tolist():
        began = time.perf_counter()
        order.ids(position)
        times.append(time.perf_counter() - began)
    checked = check_epoch(order)
    return {
        "window": window,
        "first_s": round(first, 4),
        "step_s": round(float(np.median(times)), 5),
        "step_most_s": round(max(times), 5),
        "checked_ids": checked,
    }


def check_epoch(order: Order) -> int:
    """Draws steps that fill whole windows, and others from all over the epoch; every id must be in range and new.

    Returns:
        How many ids were looked at.

    Raises:
        Fault: an id comes twice, or is none; or a stream's first window holds other samples than its places say.
    """
    steps, per_stream = order.steps_per_epoch, GLOBAL_BATCH // STREAMS
    beginning = min(steps, -(-(order.key.window or per_stream) // per_stream))
    spread = np.linspace(0, steps - 1, min(steps, TOUCHED // GLOBAL_BATCH)).astype(int)
    positions = sorted({*range(beginning), *spread.tolist()})
    ids = np.concatenate([order.ids(position) for position in positions])
    if ids.min() < 0 or ids.max() >= order.n or len(np.unique(ids)) != len(ids):
        raise Fault(f"window {order.key.window}: an id comes twice in an epoch, or is none")
    check_windows(order, beginning)
    return len(ids)


def check_windows(order: Order, steps: int) -> None:
    """A window is a permutation of its places: its ids are a few runs of neighbours, one for each shard it touches."""
    window = order.key.window
    if not window or steps * GLOBAL_BATCH // STREAMS < window:
        return
    rows = np.stack([order.ids(step).reshape(STREAMS, -1) for step in range(steps)], axis=1).reshape(STREAMS, -1)
    smallest = int(np.diff(order.starts).min())
    for ids in np.sort(rows[:, :window], axis=1):
        runs = 1 + int((np.diff(ids) != 1).sum())
        if runs > window // smallest + 3:  # a shard begun, one left, and the turn of the cyclic offset
            raise Fault(f"window {window}: has holes: {runs} runs of samples")


def table(result: dict) -> str:
    lines = [
        f"{result['shards']} shards, {result['samples']} samples",
        f"open {result['open_s']:.2f} s, fingerprint {result['fingerprint_s']:.2f} s, "
        f"{result['open_memory_bytes'] / 1e6:.0f} MB",
        f"with the orders and their check {result['all_memory_bytes'] / 1e6:.0f} MB",
        f"members of one shard: {result['table_s'] * 1e3:.1f} ms",
        f"{'window':>8}{'first ms':>12}{'step ms':>12}{'slowest ms':>12}{'ids checked':>14}",
    ]
    for row in result["orders"]:
        times = "".join(f"{row[name] * 1e3:>12.2f}" for name in ("first_s", "step_s", "step_most_s"))
        lines.append(f"{row['window']:>8}{times}{row['checked_ids']:>14}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
