"""Shards in; samples/s of clipdist's data engine beside open_clip_train's pipeline and beside bare decoding out.

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
import io
import itertools
import json
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import TYPE_CHECKING, Any

import psutil

from clipdist.data.catalog import Catalog
from clipdist.errors import Fault, UserError, run_main
from clipdist.monitor.provenance import commit, hardware
from tools.bench.peers.data import STAGES, Pipeline, Webdataset, get_webdataset

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from clipdist.config import Data
    from clipdist.data.augment import Augmentation
    from clipdist.data.loader import Loader
    from clipdist.data.tokens import BPETokenizer
    from clipdist.datasets.shard_writer import Sample

EXAMPLES = """examples:
  python tools/bench/data.py data/flickr8k/train
  python tools/bench/data.py --make-640x480 runs/pictures_640x480
  python tools/bench/data.py runs/pictures_640x480 --output 224 --dct --out bench.md --json

open_clip_train gets as many worker processes as suit it best among 1, T, T+1 and 2T, where T is --threads."""
STEP_FACTOR = 1.25  # a training step takes so many times what clipdist needs for a batch, unless --step-ms says more
LATE = 0.9  # of an epoch: where a resumed run starts
CEILING_BYTES = 256 << 20  # of encoded pictures in memory
CEILING_PICTURES = 2048
CEILING_WARMUP_S = 0.5
STAGE_SAMPLES = 128
STAGE_REPEATS = 3
WAIT_BATCHES = 20
PICTURE_SHARDS = 8  # of the pictures that the tool makes
PICTURE_SIZE = (640, 480)
FIELDS = 12  # of noise, from which all pictures are put together
SHAPES = 6
LUMA_CONTRAST, CHROMA_CONTRAST = (20, 40), 12  # grey levels; the first is drawn for every picture
FALL_OFF = 1.35  # amplitude 1 / f^this: with it the files are as large as photographs of this size
CONTEXT_LENGTH = 77


@dataclass(frozen=True)
class Job:
    """What every side is given."""

    shards: tuple[str, ...]
    samples: int
    output: int
    crop_scale: float
    dct: bool
    threads: int
    batch: int
    seconds: float
    webdataset: Path | None
    workers: int = 1  # of open_clip_train


@dataclass
class Results:
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
        return statistics.median(self.rates[side])

    def ratios(self, side: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.rates[side], self.rates[other], strict=True)]


def main() -> int:
    arguments = parse_arguments()
    if arguments.make_640x480:
        make_pictures(arguments.make_640x480, arguments.pictures)
        return 0
    catalog = Catalog.open(arguments.shards, "SHARDS")
    check(catalog, arguments)
    webdataset = get_webdataset(arguments.peer_webdataset)
    job = Job(
        shards=tuple(os.path.abspath(shard.tar) for shard in catalog.shards),
        samples=len(catalog),
        output=arguments.output,
        crop_scale=arguments.crop_scale,
        dct=arguments.dct,
        threads=arguments.threads,
        batch=arguments.batch,
        seconds=arguments.seconds,
        webdataset=webdataset.folder,
    )
    results = measure(job, arguments)
    text = report(job, results, webdataset)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(summary(results)))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="The data engine beside open_clip_train's own pipeline (open_clip_torch 3.3.0).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "shards", nargs="*", metavar="SHARDS", help="folders, tars or patterns, on a disk of this machine"
    )
    parser.add_argument("--output", type=int, default=112, metavar="PIXELS", help="side of the pictures given (112)")
    parser.add_argument("--crop-scale", type=float, default=0.9, metavar="S", help="share of area kept at least (0.9)")
    parser.add_argument("--dct", action="store_true", help="clipdist decodes JPEGs at reduced scale (data.dct_scaling)")
    parser.add_argument(
        "--threads", type=int, default=cores, metavar="T", help=f"decoding threads; cores here: {cores}"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="windows of each side (5)")
    parser.add_argument("--seconds", type=float, default=6, metavar="S", help="length of a window (6)")
    parser.add_argument("--batch", type=int, default=256, metavar="B", help="samples per batch (256)")
    parser.add_argument("--starts", type=int, default=5, metavar="N", help="starts at either place (5)")
    parser.add_argument(
        "--step-ms", type=float, default=0, metavar="MS", help="time of a step; default: 1.25 x a batch's"
    )
    parser.add_argument(
        "--peer-webdataset", default="0.2.86", metavar="VERSION", help="for open_clip_train; installed once (0.2.86)"
    )
    parser.add_argument(
        "--make-640x480", type=Path, metavar="DIR", help="write JPEGs to measure with into DIR, and end"
    )
    parser.add_argument("--pictures", type=int, default=2000, metavar="N", help="how many of them (2000)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as markdown, too")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    arguments = parser.parse_args()
    if bool(arguments.shards) == bool(arguments.make_640x480):
        parser.error("SHARDS: name some, or --make-640x480 DIR, which writes some")
    for name, low, high in (
        ("output", 1, 4096),
        ("threads", 1, 1024),
        ("rounds", 1, 1000),
        ("seconds", 0.1, 3600),
        ("batch", 1, 1 << 20),
        ("starts", 1, 1000),
        ("step_ms", 0, 1e6),
        ("pictures", PICTURE_SHARDS, 10_000 * PICTURE_SHARDS),
    ):
        if not low <= getattr(arguments, name) <= high:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must lie in {low} .. {high}")
    if not 0 < arguments.crop_scale <= 1:
        parser.error(f"--crop-scale {arguments.crop_scale}: must lie in (0, 1]")
    return arguments


def check(catalog: Catalog, arguments: argparse.Namespace) -> None:
    if catalog.is_remote():
        raise UserError("SHARDS: the comparison is of shards on a disk of this machine; copy them there")
    if len(catalog) < arguments.batch:
        raise UserError(f"SHARDS: {len(catalog)} samples, fewer than --batch {arguments.batch}; give more, or lower it")
    if len(catalog) < STAGE_SAMPLES:
        raise UserError(f"SHARDS: {len(catalog)} samples; {STAGE_SAMPLES} are needed at least")


def measure(job: Job, arguments: argparse.Namespace) -> Results:
    results = Results(loads=[os.getloadavg()[0]])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipdist.data.loader", "torch", "psutil"])
    with contextlib.ExitStack() as sides:
        ceiling = sides.enter_context(side(context, Ceiling, job))  # the first: it looks whether all can be decoded
        ours = sides.enter_context(side(context, Ours, job))
        probe_workers(context, job, results)
        peer = sides.enter_context(side(context, Peer, replace(job, workers=results.workers)))
        rounds(results, {"clipdist": ours, "open_clip": peer, "ceiling": ceiling}, arguments.rounds)
        results.step_s = arguments.step_ms / 1e3 or STEP_FACTOR * job.batch / results.rate("clipdist")
        with ours.alone([peer, ceiling]):
            results.wait_share = ours.ask("wait_share", results.step_s)
        say(f"waiting  {percent(results.wait_share)} of the time")
    measure_stages(context, job, results)
    measure_starts(context, job, results, arguments.starts)
    return results


def probe_workers(context: ForkServerContext, job: Job, results: Results) -> None:
    """One window for each count of open_clip_train's worker processes that may be the best."""
    for workers in sorted({1, job.threads, job.threads + 1, 2 * job.threads}):
        with side(context, Peer, replace(job, workers=workers)) as peer:
            results.probes[workers] = peer.ask("window")
        say(f"open_clip with {workers} workers {results.probes[workers]:9.1f} samples/s")
    results.workers = max(results.probes, key=results.probes.__getitem__)


def rounds(results: Results, sides: dict[str, Side], count: int) -> None:
    """Windows in turn; each round begins with another side."""
    names = list(sides)
    for number in range(count):
        for name in names[number % 3 :] + names[: number % 3]:
            with sides[name].alone(sides.values()):
                rate = sides[name].ask("window")
            results.rates.setdefault(name, []).append(rate)
            say(f"round {number + 1}  {name:<12}{rate:9.1f} samples/s")
        results.loads.append(os.getloadavg()[0])
        results.grown_bytes.append(sides["clipdist"].ask("grown_bytes"))


def measure_stages(context: ForkServerContext, job: Job, results: Results) -> None:
    for name, make in (("clipdist", OurStages), ("open_clip", PeerStages)):
        with side(context, make, job) as process:
            results.stages[name] = process.ask("seconds")
        say(f"stages   {name}: {sum(results.stages[name].values()) * 1e6:.0f} us per sample")


def measure_starts(context: ForkServerContext, job: Job, results: Results, count: int) -> None:
    """Fresh processes, at the two places in turn."""
    for number in range(count):
        places = [("first", 0.0), ("late", LATE)]
        for name, share in places[:: 1 - 2 * (number % 2)]:
            with side(context, Start, job) as process:
                construct_s, first_batch_s = process.ask("seconds", share)
            results.starts.setdefault(name, []).append(first_batch_s)
            results.starts.setdefault("construct", []).append(construct_s)
    say("starts   " + ", ".join(f"{name} {statistics.median(s):.3f} s" for name, s in results.starts.items()))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# A side, from outside and from inside.


class Side:
    """A process that holds an object, and a pipe to call its methods."""

    def __init__(self, context: ForkServerContext, make: Callable[[Job], Any], job: Job) -> None:
        self.name = make.__name__
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, job))
        self.process.start()
        theirs.close()
        self.receive()

    def ask(self, method: str, *words: Any) -> Any:
        self.pipe.send((method, words))
        return self.receive()

    @contextlib.contextmanager
    def alone(self, others: Iterable[Side]) -> Iterator[None]:
        """The others stand still, their worker processes too, which would go on preparing batches for seconds."""
        rest = [process for other in others if other is not self for process in other.tree()]
        for process in rest:
            process.suspend()
        try:
            yield
        finally:
            for process in rest:
                process.resume()

    def tree(self) -> list[psutil.Process]:
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def receive(self) -> Any:
        """
        Raises:
            UserError: the process found the input bad.
            Fault: it failed; its traceback stands on stderr.
        """
        try:
            kind, answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise Fault(f"the process of {self.name} ended, exit code {self.process.exitcode}") from None
        if kind != "done":
            raise UserError(answer) if kind == "user" else Fault(f"{self.name}: {answer}")
        return answer

    def end(self, grace_s: float = 10) -> None:
        self.pipe.close()  # a process that waits for a call ends by itself
        self.process.join(grace_s)
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def side(context: ForkServerContext, make: Callable[[Job], Any], job: Job) -> Iterator[Side]:
    process = Side(context, make, job)
    try:
        yield process
    finally:
        process.end()


def serve(pipe: Connection, make: Callable[[Job], Any], job: Job) -> None:
    """Makes the object and answers calls until the other end is closed: ("done", result), ("user" or "fault", line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    held: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                if held is None:
                    held = make(job)
                    pipe.send(("done", None))
                method, words = pipe.recv()
                pipe.send(("done", getattr(held, method)(*words)))
            except UserError as error:
                pipe.send(("user", str(error)))
            except (EOFError, BrokenPipeError):
                raise
            except Exception as error:
                traceback.print_exc()
                pipe.send(("fault", f"{type(error).__name__}: {error}"))
            if held is None:
                return
    if hasattr(held, "close"):
        held.close()


def steady_rate(take: Callable[[], int], seconds: float, skip: int, at_once: int) -> float:
    """Samples/s over a window of about `seconds`, whole numbers of `at_once` batches.

    Args:
        take: gives a batch, returns its size.
        skip: batches before the window: those that were prepared while others worked.
        at_once: batches that come together, as those of so many worker processes do.
    """
    for _ in range(skip):
        take()
    began, samples = time.perf_counter(), 0
    while True:
        samples += sum(take() for _ in range(at_once))
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return samples / elapsed


# What the processes measure.


class Ours:
    """clipdist's Loader, as a training process of one rank has it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        tokenizer = make_tokenizer()
        self.imported_bytes = own_bytes()
        self.loader = make_loader(job, Catalog.open(job.shards), tokenizer)
        self.window()

    def window(self) -> float:
        return steady_rate(lambda: len(self.loader.next().valid), self.job.seconds, self.loader.cfg.prefetch + 1, 1)

    def wait_share(self, step_s: float) -> float:
        """Share of the time spent in next(), by a consumer that rests `step_s` seconds after each."""
        inside = 0.0
        started = time.perf_counter()
        for _ in range(WAIT_BATCHES):
            began = time.perf_counter()
            self.loader.next()
            inside += time.perf_counter() - began
            time.sleep(step_s)
        return inside / (time.perf_counter() - started)

    def grown_bytes(self) -> int:
        return own_bytes() - self.imported_bytes

    def close(self) -> None:
        self.loader.close()


class Peer:
    """open_clip_train's DataLoader."""

    def __init__(self, job: Job) -> None:
        from tools.bench.peers.data import batches

        self.job = job
        self.batches = batches(pipeline_of(job))
        self.take()

    def take(self) -> int:
        return len(next(self.batches)[0])

    def window(self) -> float:
        # A worker prepares two batches ahead, torch's default.
        return steady_rate(self.take, self.job.seconds, skip=3 * self.job.workers, at_once=self.job.workers)


class Ceiling:
    """The same pictures in memory, decoded and resized in as many threads, nothing else."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pictures, self.uniforms = load_pictures(job)

    def window(self) -> float:
        done, stop = [0] * self.job.threads, threading.Event()
        workers = [threading.Thread(target=self.work, args=(i, done, stop)) for i in range(self.job.threads)]
        for worker in workers:
            worker.start()
        time.sleep(CEILING_WARMUP_S)
        began, before = time.perf_counter(), sum(done)
        time.sleep(self.job.seconds)
        rate = (sum(done) - before) / (time.perf_counter() - began)
        stop.set()
        for worker in workers:
            worker.join()
        return rate

    def work(self, thread: int, done: list[int], stop: threading.Event) -> None:
        import torch

        from clipdist.data.augment import train_image

        torch.set_num_threads(1)
        how, size, out = augmentation_of(self.job), self.job.output, empty_picture(self.job)
        for number in itertools.cycle(range(thread, len(self.pictures), self.job.threads)):
            train_image(self.pictures[number], size, self.uniforms[number], how, out=out)
            done[thread] += 1
            if stop.is_set():
                return


class OurStages:
    """What each stage of clipdist computes for, with one decoding thread."""

    def __init__(self, job: Job) -> None:
        import torch

        torch.set_num_threads(1)
        self.job = replace(job, threads=1)

    def seconds(self) -> dict[str, float]:
        """Per sample, by stage. "other" is what is left of the loader's: putting together, handing over."""
        from clipdist.data import augment
        from clipdist.data.decode import MAX_PIXELS
        from clipdist.data.loader import group_id
        from clipdist.data.tokens import token_kind

        pictures, uniforms = (rows[:STAGE_SAMPLES] for rows in load_pictures(self.job))
        tokenizer, how, size, out = (
            make_tokenizer(),
            augmentation_of(self.job),
            self.job.output,
            empty_picture(self.job),
        )
        loader = make_loader(self.job, Catalog.open(self.job.shards), tokenizer)
        kind, captions = token_kind(tokenizer), [loader.reader.captions(row)[0] for row in range(STAGE_SAMPLES)]

        def read() -> None:
            for row in range(STAGE_SAMPLES):
                loader.reader.captions(row)
                loader.reader.image(row)
                loader.reader.read(row, kind)

        def decode() -> None:
            for data, drawn in zip(pictures, uniforms):
                augment._crop(data, size, drawn.tolist(), how, MAX_PIXELS)  # train_image without the resize

        def decode_and_resize() -> None:
            for data, drawn in zip(pictures, uniforms):
                augment.train_image(data, size, drawn, how, out=out)

        def tokens() -> None:
            tokenizer(captions)
            list(map(group_id, captions))

        times = {stage.__name__: per_sample(stage) for stage in (read, decode, decode_and_resize, tokens)}
        for _ in range(loader.cfg.prefetch + 1):
            loader.next()
        began, batches = time.process_time(), max(2, 2 * STAGE_SAMPLES // self.job.batch)
        for _ in range(batches):
            loader.next()
        whole = (time.process_time() - began) / (batches * self.job.batch)
        loader.close()
        times["resize"] = times.pop("decode_and_resize") - times["decode"]
        return {**times, "other": whole - sum(times.values())}


class PeerStages:
    """The same of open_clip_train."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def seconds(self) -> dict[str, float]:
        from tools.bench.peers.data import stage_seconds

        return stage_seconds(pipeline_of(self.job), STAGE_SAMPLES)


class Start:
    """A process that has imported everything and done nothing."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokenizer = make_tokenizer()

    def seconds(self, share: float) -> tuple[float, float]:
        """(to construct catalog, reader, order and loader; from the catalog to the first batch at this place)."""
        began = time.perf_counter()
        catalog = Catalog.open(self.job.shards)
        opened = time.perf_counter()
        loader = make_loader(self.job, catalog, self.tokenizer, share)
        constructed = time.perf_counter()
        loader.next()
        first = time.perf_counter()
        loader.close()
        return constructed - began, first - opened


def per_sample(stage: Callable[[], None]) -> float:
    """Seconds of this thread's computing: the median of some repeats, after one that counts for nothing."""
    times = []
    for _ in range(1 + STAGE_REPEATS):
        began = time.thread_time()
        stage()
        times.append(time.thread_time() - began)
    return statistics.median(times[1:]) / STAGE_SAMPLES


def own_bytes() -> int:
    """Memory of this process that belongs to no file: libraries that are mapped in later do not count."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def settings(job: Job) -> Data:
    from clipdist.config import Data

    return Data(crop_scale_min=job.crop_scale, dct_scaling=job.dct, threads=job.threads)


def augmentation_of(job: Job) -> Augmentation:
    from clipdist.data.loader import augmentation

    return augmentation(settings(job))


def make_tokenizer() -> BPETokenizer:
    """CLIP's, as open_clip_train has it."""
    from clipdist.data.tokens import BPE_VOCABULARY, BPETokenizer

    return BPETokenizer(BPE_VOCABULARY, CONTEXT_LENGTH)


def make_loader(job: Job, catalog: Catalog, tokenizer: BPETokenizer, share: float = 0.0) -> Loader:
    """At this share of the first epoch."""
    from clipdist.data.loader import open_loader
    from clipdist.data.order import OrderKey, choose_streams

    key = OrderKey(seed=0, global_batch=job.batch, streams=choose_streams(job.batch, 1), window=0)
    start = int(share * (len(catalog) // job.batch))
    return open_loader(catalog, key, tokenizer, settings(job), image_size=job.output, rank=0, world=1, start=start)


def load_pictures(job: Job) -> tuple[list[bytes], np.ndarray]:
    """Encoded pictures and their uniform numbers, as training would draw them in epoch 0.

    Raises:
        UserError: one cannot be decoded. open_clip_train leaves such samples out, clipdist keeps their rows.
    """
    import numpy as np

    from clipdist.data.augment import UNIFORMS, train_image
    from clipdist.data.decode import BadSample
    from clipdist.data.order import sample_uniforms
    from clipdist.data.reader import Reader

    reader = Reader(Catalog.open(job.shards))
    pictures: list[bytes] = []
    uniforms = sample_uniforms(0, np.int64(0), np.arange(min(job.samples, CEILING_PICTURES)), UNIFORMS)
    how, room = augmentation_of(job), CEILING_BYTES
    for sample_id, drawn in enumerate(uniforms):
        try:
            pictures.append(reader.image(sample_id))
            train_image(pictures[-1], job.output, drawn, how)
        except BadSample as error:
            name = f"{reader.shard_name(sample_id)}: {reader.key(sample_id)}"
            raise UserError(f"SHARDS: {name}: {error.reason}; measure with samples that can all be used") from None
        room -= len(pictures[-1])
        if room < 0 and len(pictures) >= STAGE_SAMPLES:
            break
    reader.close()
    return pictures, uniforms


def empty_picture(job: Job) -> torch.Tensor:
    """uint8 [3, size, size], channels last in memory: what train_image writes into fastest."""
    import torch

    return torch.zeros(job.output, job.output, 3, dtype=torch.uint8).permute(2, 0, 1)


def pipeline_of(job: Job) -> Pipeline:
    return Pipeline(
        shards=job.shards,
        samples=job.samples,
        size=job.output,
        crop_scale_min=job.crop_scale,
        batch=job.batch,
        workers=job.workers,
        webdataset=job.webdataset,
    )


# Pictures to measure with.


def make_pictures(folder: Path, count: int) -> None:
    """Writes captioned JPEGs of 640x480, of 60 to 100 KB like photographs, into shards.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    from clipdist.datasets.shard_writer import shard_name, shard_sizes, write_shard, write_side_files

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"--make-640x480 {folder}: is not empty; choose another folder")
        fields, facts, first = noise_fields(), [], 0
        for shard, size in enumerate(shard_sizes(count, -(-count // PICTURE_SHARDS))):
            samples = (make_sample(fields, shard, row, first + row) for row in range(size))
            facts.append(write_shard(folder / shard_name(shard), samples))
            first += size
            say(f"{first} of {count} pictures")
        write_side_files(folder, "bench-640x480", facts)
    except OSError as error:
        raise UserError(f"--make-640x480 {folder}: cannot be written ({error.strerror})") from None
    total = sum(shard.size_bytes for shard in facts)
    print(f"{folder}: {count} pictures in {len(facts)} shards, {total / 1e6:.1f} MB")


def noise_fields() -> np.ndarray:
    """float32 [n, 480, 640] of mean 0 and deviation 1, periodic, with a spectrum like that of photographs."""
    import numpy as np

    width, height = PICTURE_SIZE
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = np.inf
    white = np.random.default_rng(0).standard_normal((FIELDS, height, width))
    fields = np.fft.irfft2(np.fft.rfft2(white) / f**FALL_OFF, s=(height, width))
    return (fields / fields.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def make_sample(fields: np.ndarray, shard: int, row: int, number: int) -> Sample:
    """Picture `number`: noise in other places and other mixtures every time, shapes over it, five captions."""
    import numpy as np

    from clipdist.datasets import scenes
    from clipdist.datasets.shard_writer import Sample, sample_key

    rng = np.random.default_rng(number)
    luma, *chroma = (moved(field, rng) for field in fields[rng.permutation(FIELDS)[:3]])
    tints = CHROMA_CONTRAST * np.stack([chroma[0], -chroma[0] - chroma[1], chroma[1]], axis=-1)
    pixels = 128 + rng.uniform(*LUMA_CONTRAST) * luma[..., None] + tints
    image = draw_shapes(np.clip(pixels, 0, 255).astype(np.uint8), rng)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=scenes.JPEG_QUALITY)
    captions, key = scenes.write_captions(scenes.sample_scene(rng), rng), sample_key(shard, row)
    record = json.dumps({"key": key, "captions": captions}).encode()
    members = {"jpg": file.getvalue(), "txt": captions[0].encode(), "json": record}
    return Sample(key, members, {"width": image.width, "height": image.height})


def moved(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    import numpy as np

    return np.roll(field, rng.integers(0, field.shape).tolist(), axis=(0, 1))


def draw_shapes(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Half transparent ellipses and boxes: edges, and areas of one colour."""
    from PIL import Image, ImageDraw

    image = Image.fromarray(pixels)
    over = image.copy()
    draw = ImageDraw.Draw(over)
    for number in range(SHAPES):
        x, y = (int(rng.integers(side)) for side in image.size)
        width, height = (int(rng.integers(20, side // 2)) for side in image.size)
        fill = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if number % 2 else draw.rectangle)((x, y, x + width, y + height), fill=fill)
    return Image.blend(image, over, 0.5)


# What is told.


def summary(results: Results) -> dict[str, Any]:
    """The JSON line: rates in samples/s, times in seconds, shares and ratios as fractions, all medians."""
    ours = results.stages["clipdist"]
    return {
        "ours": results.rate("clipdist"),
        "open_clip": results.rate("open_clip"),
        "ratio": statistics.median(results.ratios("clipdist", "open_clip")),
        "ceiling": results.rate("ceiling"),
        "of_ceiling": statistics.median(results.ratios("clipdist", "ceiling")),
        "wait_share": results.wait_share,
        "step_s": results.step_s,
        "resume_ratio": statistics.median(results.starts["late"]) / statistics.median(results.starts["first"]),
        "start_s": statistics.median(results.starts["construct"]),
        "first_batch_s": statistics.median(results.starts["first"]),
        "shares": {stage: ours[stage] / sum(ours.values()) for stage in STAGES},
        "stage_us": {name: {stage: 1e6 * s for stage, s in stages.items()} for name, stages in results.stages.items()},
        "open_clip_workers": results.workers,
        "grown_bytes": results.grown_bytes,
        "load": results.loads,
    }


def report(job: Job, results: Results, webdataset: Webdataset) -> str:
    """Markdown: tables, then what they were measured with."""
    told = summary(results)
    probes = ", ".join(f"{workers}: {rate:.0f}" for workers, rate in results.probes.items())
    lines = ["# The data engine beside open_clip_train's", "", *rate_table(results), ""]
    lines += [f"clipdist / {name}: {spread(results.ratios('clipdist', name))}" for name in ("open_clip", "ceiling")]
    lines += ["", "Microseconds of computing per sample, by stage:", "", *stage_table(results), ""]
    lines += [
        "Read is the tar or the index, and the captions; resize is the crop too, and for open_clip_train the conversion"
        " to normalised float32, which clipdist leaves to the device; other is all else, for open_clip_train stacking.",
        "",
        f"- start: {told['start_s']:.3f} s to construct; first batch after {told['first_batch_s']:.3f} s, at"
        f" {percent(LATE)} of the epoch {told['resume_ratio']:.2f} times that; medians of"
        f" {len(results.starts['first'])} fresh processes each",
        f"- waiting: {percent(results.wait_share)} of the time, at {1e3 * results.step_s:.0f} ms a step",
        "- memory over the imported process, by round: "
        + " ".join(f"{grown / 1e6:.0f}" for grown in results.grown_bytes)
        + " MB",
        f"- open_clip_train's workers: {probes} samples/s; {results.workers} are taken",
        f"- command: `{shlex.join(['python', 'tools/bench/data.py', *sys.argv[1:]])}`",
        f"- commit: {commit()}",
        f"- hardware: {hardware('cpu', job.threads)}; load {results.loads[0]:.2f} before, then"
        f" {' '.join(f'{load:.2f}' for load in results.loads[1:])}",
        f"- versions: {versions()}; webdataset {webdataset.said}",
        f"- data: {job.samples} pictures in {len(job.shards)} shards, {mean_picture_kb(job):.1f} KB each; output"
        f" {job.output}, crop scale {job.crop_scale:g}, batch {job.batch}{', DCT-scaled decoding' if job.dct else ''}",
    ]
    return "\n".join(lines)


def rate_table(results: Results) -> list[str]:
    titles = {
        "clipdist": "clipdist",
        "open_clip": f"open_clip_train, {results.workers} workers",
        "ceiling": "decode and resize alone",
    }
    rows = [["", "samples/s, median", "rounds"]]
    for name, title in titles.items():
        rows.append([title, f"{results.rate(name):.1f}", " ".join(f"{rate:.1f}" for rate in results.rates[name])])
    return table(rows)


def stage_table(results: Results) -> list[str]:
    rows = [["", "clipdist", "share", "open_clip_train", "share"]]
    whole = {name: sum(stages.values()) for name, stages in results.stages.items()}
    for stage in STAGES:
        cells = [stage]
        for name in ("clipdist", "open_clip"):
            seconds = results.stages[name][stage]
            cells += [f"{1e6 * seconds:.0f}", percent(seconds / whole[name])]
        rows.append(cells)
    ours, theirs = (f"{1e6 * whole[name]:.0f}" for name in ("clipdist", "open_clip"))
    return table([*rows, ["all", ours, "", theirs, ""]])


def table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f}, by round {' '.join(f'{value:.3f}' for value in values)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def versions() -> str:
    packages = ("clipdist", "torch", "open_clip_torch", "pillow", "simplejpeg")
    return f"{', '.join(f'{name} {version(name)}' for name in packages)}; Python {platform.python_version()}"


def mean_picture_kb(job: Job) -> float:
    from clipdist.data.index import PICTURE_KINDS

    total = 0
    catalog = Catalog.open(job.shards)
    for number in range(len(catalog.shards)):
        index = catalog.table(number)
        columns = [column for column, kind in enumerate(index.kinds) if kind in PICTURE_KINDS]
        total += int(index.size[:, columns].sum())
    return total / len(catalog) / 1e3


if __name__ == "__main__":
    run_main(main)
