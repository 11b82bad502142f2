"""Time how long the consolidated index of many shards takes to open, its memory, and the ids of a step.

The index is made in a temporary folder: real parts for a few shards, stubs for the others, which no start reads.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import hashlib
import multiprocessing
from collections.abc import Iterator
from functools import partial

import numpy as np
from tqdm import tqdm

from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import SUFFIX, Part, make_part, write_parts
from clipdist.data.index import ShardIndex
from clipdist.data.order import Order, OrderKey
from clipdist.errors import Fault, UserError, run_main
from tools.bench import harness
from tools.bench.peak_memory import proc_bytes
from tools.bench.processes import BenchProcesses

EXAMPLES = """  python tools/bench/catalog.py --shards 100000 --samples-per-shard 10000 --json"""
GLOBAL_BATCH, STREAMS, WINDOWS = 32_768, 64, (0, 20_000)
STEPS = 50  # random positions whose ids are timed
TOUCHED = 2_000_000  # ids of one epoch that are looked at for repeats, about
REAL_PARTS = 4
_STUB = b"a part that is never read"


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    parser.number("--shards", 100_000, "N", "")
    parser.number("--samples-per-shard", 10_000, "N", "about")
    return parser.parse()


def main() -> int:
    args = parse_args()
    counts = shard_counts(args.shards, args.samples_per_shard)
    samples = int(counts.sum())
    if samples < GLOBAL_BATCH:
        raise UserError(f"{samples} samples are fewer than a global batch of {GLOBAL_BATCH}")
    with harness.workspace() as folder:
        path = folder / f"all{SUFFIX}"
        write_parts(path, make_parts(counts))
        record = {"shards": len(counts), "samples": samples, "file_bytes": path.stat().st_size}
        # A fresh process: nothing of what made the file is in its memory.
        with BenchProcesses(multiprocessing.get_context("spawn"), OpenedCatalog, path) as process:
            record |= process.ask("measure")
    return harness.finish(args, report(record), record)


def shard_counts(shards: int, about: int) -> np.ndarray:
    """Draw int64 [S]: as uneven as shards of downloads that partly failed."""
    return np.random.default_rng(0).integers(max(1, about * 9 // 10), about * 11 // 10 + 1, shards)


def make_parts(counts: np.ndarray) -> Iterator[Part]:
    for number, count in enumerate(tqdm(counts.tolist(), desc="write", unit="shard", disable=None)):
        tar = f"https://example.org/shards/{number:06d}.tar"
        if number < REAL_PARTS:
            yield make_part(real_index(tar, count))
        else:
            yield Part(tar, count, hashlib.blake2b(tar.encode(), digest_size=16).digest(), _STUB)


def real_index(tar: str, count: int) -> ShardIndex:
    """Make an index of three members a sample, of sizes as in the web's corpora."""
    size = np.random.default_rng(count).integers(1, 60_000, (count, 3))
    blocks = -(-size // 512) + 1
    offset = (np.cumsum(blocks).reshape(count, 3) - blocks + 1) * 512
    keys = np.array([f"{row:09d}" for row in range(count)])
    return ShardIndex(tar, keys, ("jpg", "txt", "json"), offset, size, int(blocks.sum() + 2) * 512)


class OpenedCatalog:
    """What a process finds that opens the index at `path` and draws from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def measure(self) -> dict[str, object]:
        """Raise a Fault where an order repeats a sample."""
        before = proc_bytes("VmRSS")
        open_s, catalog = harness.timed(lambda: Catalog.open([str(self.path)]))
        fingerprint_s, fingerprint = harness.timed(catalog.fingerprint)
        memory = proc_bytes("VmHWM") - before
        tables = min(REAL_PARTS, len(catalog.shards))
        tables_s, _ = harness.timed(lambda: [catalog.table(number) for number in range(tables)])
        return {
            "open_s": round(open_s, 3),
            "fingerprint_s": round(fingerprint_s, 3),
            "fingerprint": fingerprint,
            "table_s": round(tables_s / tables, 5),
            "orders": [measure_order(catalog.starts, window) for window in WINDOWS],
            "open_memory_bytes": memory,
            "all_memory_bytes": proc_bytes("VmHWM") - before,
        }


def measure_order(starts: np.ndarray, window: int) -> dict[str, object]:
    """Time a step's ids at random positions of one epoch, and check that no sample comes twice in it."""
    key = OrderKey(seed=1, global_batch=GLOBAL_BATCH, streams=STREAMS, window=window)
    order = Order(starts, key)
    first_s, _ = harness.timed(lambda: order.ids(0))
    positions = np.random.default_rng(window).integers(0, order.steps_per_epoch, STEPS).tolist()
    times = [harness.timed(partial(order.ids, position))[0] for position in positions]
    return {
        "window": window,
        "first_s": round(first_s, 4),
        "step_s": round(float(np.median(times)), 5),
        "step_most_s": round(max(times), 5),
        "checked_ids": check_epoch(order),
    }


def check_epoch(order: Order) -> int:
    """Draw steps that fill whole windows, and others from all over the epoch; every id must be in range and new.

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
    """Check that a window is a permutation of its places: its ids are a few runs of neighbours, one per shard."""
    window = order.key.window
    if not window or steps * GLOBAL_BATCH // STREAMS < window:
        return
    rows = np.stack([order.ids(step).reshape(STREAMS, -1) for step in range(steps)], axis=1).reshape(STREAMS, -1)
    smallest = int(np.diff(order.starts).min())
    for ids in np.sort(rows[:, :window], axis=1):
        runs = 1 + int((np.diff(ids) != 1).sum())
        if runs > window // smallest + 3:  # a shard begun, one left, and the turn of the cyclic offset
            raise Fault(f"window {window}: has holes: {runs} runs of samples")


def report(record: dict) -> list[str]:
    rows = []
    for order in record["orders"]:
        times = [f"{order[name] * 1e3:.2f}" for name in ("first_s", "step_s", "step_most_s")]
        rows.append([str(order["window"]), *times, str(order["checked_ids"])])
    return [
        f"# {record['shards']} shards, {record['samples']} samples",
        "",
        f"- open {record['open_s']:.2f} s, fingerprint {record['fingerprint_s']:.2f} s,"
        f" {record['open_memory_bytes'] / 1e6:.0f} MB; a file of {record['file_bytes'] / 1e6:.1f} MB",
        f"- with the orders and their check {record['all_memory_bytes'] / 1e6:.0f} MB",
        f"- members of one shard: {record['table_s'] * 1e3:.1f} ms",
        "",
        *harness.markdown_table(["window", "first ms", "step ms", "slowest ms", "ids checked"], rows, left=0),
        "",
        *harness.provenance("cpu", 1),
    ]


if __name__ == "__main__":
    run_main(main)
