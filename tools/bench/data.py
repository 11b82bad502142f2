"""Measure samples/s of clipdist's data engine, beside bare decoding and open_clip_train's pipeline.

Each side has a process of its own, which lives for the whole run and works in turns: one window of some seconds each,
then the next round; while one works, the others rest on the few batches that they have prepared. A window begins
when those are used up.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # its own folder has files that others are named like
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import contextlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.context import ForkServerContext
from statistics import median
from typing import Any

from clipdist.data.catalog import Catalog
from clipdist.data.index import IMAGE_KINDS
from clipdist.errors import UserError, run_main, writing
from tools.bench import harness
from tools.bench.peers.data import (
    CROP_SCALE,
    STAGE_SAMPLES,
    STAGES,
    InstalledWebdataset,
    LoadingJob,
    OpenClipStages,
    get_webdataset,
)
from tools.bench.processes import BenchProcesses

EXAMPLES = """  python tools/bench/data.py data/flickr8k/train
  python tools/bench/data.py --make-640x480 runs/pictures_640x480
  python tools/bench/data.py runs/pictures_640x480 --output 224 --dct --out bench.md --json

open_clip_train gets as many worker processes as suit it best among 1, T, T+1 and 2T, where T is --threads."""
STEP_FACTOR = 1.25  # a training step takes so many times what clipdist needs for a batch
LATE = 0.9  # of an epoch: where a resumed run starts
IMAGE_SHARDS = 8  # of the images that the tool makes


@dataclass
class LoadingResults:
    """Empty or 0: not measured (yet)."""

    rates: dict[str, list[float]] = field(default_factory=dict)  # side -> samples/s by round
    probes: dict[int, float] = field(default_factory=dict)  # open_clip_train's samples/s by workers
    workers: int = 0  # the best of them
    loads: list[float] = field(default_factory=list)  # of the machine: before the run, then after every round
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # side -> stage -> seconds per sample
    starts: dict[str, list[float]] = field(default_factory=dict)  # "first", "late", "construct" -> seconds
    grown_bytes: list[int] = field(default_factory=list)  # clipdist's, over the imported process, after every round
    step_s: float = 0.0
    wait_share: float = 0.0

    def rate(self, side: str) -> float:
        return median(self.rates[side])

    def ratios(self, side: str, other: str) -> list[float]:
        return harness.ratios(self.rates[side], self.rates[other])


def parse_args() -> argparse.Namespace:
    parser = harness.BenchmarkParser(__doc__, EXAMPLES)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "shards", nargs="*", metavar="SHARDS", help="folders, tars or patterns, on a disk of this machine"
    )
    parser.number("--output", 112, "PIXELS", "side of the pictures given", most=4096)
    parser.add_argument("--dct", action="store_true", help="clipdist decodes JPEGs at reduced scale (data.dct_scaling)")
    parser.number("--threads", cores, "T", "decoding threads; default: cores here", most=1024)
    parser.number("--rounds", 5, "R", "windows of each side", most=1000)
    parser.number("--seconds", 6.0, "S", "length of a window", least=0.1, most=3600)
    parser.number("--batch", 256, "B", "samples per batch", most=1 << 20)
    parser.number("--starts", 5, "N", "starts at either place", most=1000)
    parser.add_argument(
        "--peer-webdataset", default="0.2.86", metavar="VERSION", help="for open_clip_train; installed once (0.2.86)"
    )
    parser.add_argument(
        "--make-640x480", type=Path, metavar="DIR", help="write JPEGs to measure with into DIR, and end"
    )
    parser.number("--pictures", 2000, "N", "how many of them", least=IMAGE_SHARDS, most=10_000 * IMAGE_SHARDS)
    args = parser.parse()
    if bool(args.shards) == bool(args.make_640x480):
        parser.error("SHARDS: name some, or --make-640x480 DIR, which writes some")
    return args


def main() -> int:
    args = parse_args()
    if args.make_640x480:
        make_images(args.make_640x480, args.pictures)
        return 0
    catalog = Catalog.open(args.shards, "SHARDS")
    check(catalog, args)
    webdataset = get_webdataset(args.peer_webdataset)
    job = LoadingJob(
        shards=tuple(os.path.abspath(shard.tar) for shard in catalog.shards),
        samples=len(catalog),
        output=args.output,
        dct=args.dct,
        threads=args.threads,
        batch=args.batch,
        seconds=args.seconds,
        webdataset=webdataset.folder,
    )
    results = measure(job, args)
    return harness.finish(args, report(job, results, webdataset), summary(results))


def check(catalog: Catalog, args: argparse.Namespace) -> None:
    if catalog.is_remote():
        raise UserError("SHARDS: the comparison is of shards on a disk of this machine; copy them there")
    if len(catalog) < args.batch:
        raise UserError(f"SHARDS: {len(catalog)} samples, fewer than --batch {args.batch}; give more, or lower it")
    if len(catalog) < STAGE_SAMPLES:
        raise UserError(f"SHARDS: {len(catalog)} samples; {STAGE_SAMPLES} are needed at least")


def measure(job: LoadingJob, args: argparse.Namespace) -> LoadingResults:
    from tools.bench import data_sides

    results = LoadingResults(loads=[os.getloadavg()[0]])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipdist.data.loader", "torch", "psutil"])
    with contextlib.ExitStack() as started:

        def start(make: Callable[[LoadingJob], Any], of_side: LoadingJob = job) -> BenchProcesses:
            return started.enter_context(BenchProcesses(context, make, of_side)).started()

        ceiling = start(data_sides.BareDecoding)  # the first: it looks whether all can be decoded
        ours = start(data_sides.ClipdistLoading)
        probe_workers(context, job, results)
        peer = start(data_sides.OpenClipLoading, replace(job, workers=results.workers))
        measure_rates(results, {"clipdist": ours, "open_clip": peer, "ceiling": ceiling}, args.rounds)
        results.step_s = STEP_FACTOR * job.batch / results.rate("clipdist")
        with ours.alone([peer, ceiling]):
            results.wait_share = ours.ask("wait_share", results.step_s)
        harness.say(f"waiting  {harness.percent(results.wait_share)} of the time")
    for name, make in (("clipdist", data_sides.ClipdistStages), ("open_clip", OpenClipStages)):
        with BenchProcesses(context, make, job) as process:
            results.stages[name] = process.ask("seconds")
        harness.say(f"stages   {name}: {sum(results.stages[name].values()) * 1e6:.0f} us per sample")
    measure_starts(context, job, results, args.starts)
    return results


def probe_workers(context: ForkServerContext, job: LoadingJob, results: LoadingResults) -> None:
    """Measure one window for each count of open_clip_train's worker processes that may be the best."""
    from tools.bench.data_sides import OpenClipLoading

    for workers in sorted({1, job.threads, job.threads + 1, 2 * job.threads}):
        with BenchProcesses(context, OpenClipLoading, replace(job, workers=workers)) as peer:
            results.probes[workers] = peer.ask("window")
        harness.say(f"open_clip with {workers} workers {results.probes[workers]:9.1f} samples/s")
    results.workers = max(results.probes, key=results.probes.__getitem__)


def measure_rates(results: LoadingResults, sides: dict[str, BenchProcesses], rounds: int) -> None:
    """Measure windows in turn, each side alone."""

    def window(name: str) -> float:
        with sides[name].alone(sides.values()):
            rate = sides[name].ask("window")
        harness.say(f"{name:<12}{rate:9.1f} samples/s")
        return rate

    def after_round() -> None:
        results.loads.append(os.getloadavg()[0])
        results.grown_bytes.append(sides["clipdist"].ask("grown_bytes"))

    results.rates = harness.take_turns({name: partial(window, name) for name in sides}, rounds, after_round=after_round)


def measure_starts(context: ForkServerContext, job: LoadingJob, results: LoadingResults, count: int) -> None:
    """Start fresh processes at the beginning and late in an epoch, in turn."""
    from tools.bench.data_sides import FirstBatch

    def start(share: float) -> tuple[float, float]:
        with BenchProcesses(context, FirstBatch, job).started() as process:
            return process.ask("seconds", share)

    times = harness.take_turns({"first": partial(start, 0.0), "late": partial(start, LATE)}, count)
    results.starts = {name: [first_batch_s for _, first_batch_s in pairs] for name, pairs in times.items()}
    results.starts["construct"] = [construct_s for pairs in times.values() for construct_s, _ in pairs]
    harness.say("starts   " + ", ".join(f"{name} {median(s):.3f} s" for name, s in results.starts.items()))


def make_images(folder: Path, count: int) -> None:
    """Write captioned JPEGs of 640x480, of 60 to 100 KB like photographs, into shards.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    from clipdist.datasets.shard_writer import shard_sizes
    from tools.bench.images import PhotographLike, write_drawn_shards

    with writing(f"--make-640x480 {folder}"):
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--make-640x480 {folder}: is not empty; choose another folder")
        sizes = shard_sizes(count, -(-count // IMAGE_SHARDS))
        facts = write_drawn_shards(folder, "bench-640x480", sizes, PhotographLike().draw)
    total = sum(shard.size_bytes for shard in facts)
    print(f"{folder}: {count} pictures in {len(facts)} shards, {total / 1e6:.1f} MB")


def summary(results: LoadingResults) -> dict[str, Any]:
    """Return the JSON line: rates in samples/s, times in seconds, shares and ratios as fractions, all medians."""
    ours = results.stages["clipdist"]
    return {
        "ours": results.rate("clipdist"),
        "open_clip": results.rate("open_clip"),
        "ratio": median(results.ratios("clipdist", "open_clip")),
        "ceiling": results.rate("ceiling"),
        "of_ceiling": median(results.ratios("clipdist", "ceiling")),
        "wait_share": results.wait_share,
        "step_s": results.step_s,
        "resume_ratio": median(results.starts["late"]) / median(results.starts["first"]),
        "start_s": median(results.starts["construct"]),
        "first_batch_s": median(results.starts["first"]),
        "shares": {stage: ours[stage] / sum(ours.values()) for stage in STAGES},
        "stage_us": {name: {stage: 1e6 * s for stage, s in stages.items()} for name, stages in results.stages.items()},
        "open_clip_workers": results.workers,
        "grown_bytes": results.grown_bytes,
        "load": results.loads,
    }


def report(job: LoadingJob, results: LoadingResults, webdataset: InstalledWebdataset) -> list[str]:
    """Return Markdown: tables, then what they were measured with."""
    told = summary(results)
    probes = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in results.probes.items())
    lines = ["# The data engine beside open_clip_train's", "", *rate_table(results), ""]
    for name in ("open_clip", "ceiling"):
        compared = results.ratios("clipdist", name)
        lines.append(f"clipdist / {name}: {median(compared):.3f}, by round {harness.by_round(compared, '.3f')}")
    lines += ["", "Microseconds of computing per sample, by stage:", "", *stage_table(results), ""]
    lines += [
        "Read is the tar or the index, and the captions; resize is the crop too, and for open_clip_train the conversion"
        " to normalised float32, which clipdist leaves to the device; other is all else, for open_clip_train stacking."
        " The stages are those of a first epoch: later clipdist has the captions and ids of a small set in memory.",
        "",
        f"- start: {told['start_s']:.3f} s to construct; first batch after {told['first_batch_s']:.3f} s, at"
        f" {harness.percent(LATE)} of the epoch {told['resume_ratio']:.2f} times that; medians of"
        f" {len(results.starts['first'])} fresh processes each",
        f"- waiting: {harness.percent(results.wait_share)} of the time, at {1e3 * results.step_s:.0f} ms a step",
        "- memory over the imported process, by round: "
        + harness.by_round([grown / 1e6 for grown in results.grown_bytes], ".0f")
        + " MB",
        f"- open_clip_train's workers: {probes} samples/s; {results.workers} are taken",
        *harness.provenance("cpu", job.threads, "open_clip_torch", "pillow", "simplejpeg"),
        f"- load {results.loads[0]:.2f} before, then {harness.by_round(results.loads[1:], '.2f')}",
        f"- webdataset {webdataset.said}",
        f"- data: {job.samples} pictures in {len(job.shards)} shards, {mean_image_kb(job):.1f} KB each; output"
        f" {job.output}, crop scale {CROP_SCALE}, batch {job.batch}{', DCT-scaled decoding' if job.dct else ''}",
    ]
    return lines


def rate_table(results: LoadingResults) -> list[str]:
    titles = {
        "clipdist": "clipdist",
        "open_clip": f"open_clip_train, {results.workers} workers",
        "ceiling": "decode and resize alone",
    }
    rows = [
        [title, f"{results.rate(name):.1f}", harness.by_round(results.rates[name], ".1f")]
        for name, title in titles.items()
    ]
    return harness.markdown_table(["", "samples/s, median", "rounds"], rows)


def stage_table(results: LoadingResults) -> list[str]:
    rows = []
    whole = {name: sum(stages.values()) for name, stages in results.stages.items()}
    for stage in STAGES:
        cells = [stage]
        for name in ("clipdist", "open_clip"):
            seconds = results.stages[name][stage]
            cells += [f"{1e6 * seconds:.0f}", harness.percent(seconds / whole[name])]
        rows.append(cells)
    ours, theirs = (f"{1e6 * whole[name]:.0f}" for name in ("clipdist", "open_clip"))
    header = ["", "clipdist", "share", "open_clip_train", "share"]
    return harness.markdown_table(header, [*rows, ["all", ours, "", theirs, ""]])


def mean_image_kb(job: LoadingJob) -> float:
    total = 0
    catalog = Catalog.open(job.shards)
    for number in range(len(catalog.shards)):
        index = catalog.table(number)
        columns = [column for column, kind in enumerate(index.kinds) if kind in IMAGE_KINDS]
        total += int(index.size[:, columns].sum())
    return total / len(catalog) / 1e3


if __name__ == "__main__":
    run_main(main)
