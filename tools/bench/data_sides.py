"""What the processes of the data benchmark measure: clipdist's loader, open_clip_train's, and bare decoding."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import psutil
import torch

from clipdist.config import Data
from clipdist.data import augment
from clipdist.data.bad_sample import MAX_PIXELS, BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.loader import Loader, open_loader
from clipdist.data.order import OrderKey, choose_streams, sample_uniforms
from clipdist.data.reader import Reader
from clipdist.data.texts import group_id
from clipdist.data.tokens import BPETokenizer, token_kind
from clipdist.data.views import image_view
from clipdist.data.vocabulary import BPE_VOCABULARY
from clipdist.errors import UserError
from tools.bench.harness import timed
from tools.bench.peers.data import CROP_SCALE, STAGE_SAMPLES, LoadingJob, batches

CEILING_BYTES = 256 << 20  # of encoded images in memory
CEILING_IMAGES = 2048
CEILING_WARMUP_S = 0.5
STAGE_REPEATS = 3
WAIT_BATCHES = 20
CONTEXT_LENGTH = 77


def steady_rate(take: Callable[[], int], seconds: float, skip: int, at_once: int) -> float:
    """Return samples/s over a window of about `seconds`, whole numbers of `at_once` batches.

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


class ClipdistLoading:
    """clipdist's Loader, as a training process of one rank has it."""

    def __init__(self, job: LoadingJob) -> None:
        self.job = job
        tokenizer = make_tokenizer()
        self.imported_bytes = own_bytes()
        self.loader = make_loader(job, Catalog.open(job.shards), tokenizer)
        self.window()

    def window(self) -> float:
        return steady_rate(lambda: len(self.loader.next()), self.job.seconds, self.loader.cfg.prefetch + 1, 1)

    def wait_share(self, step_s: float) -> float:
        """Return the share of the time spent in next(), by a consumer that rests `step_s` seconds after each."""
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


class OpenClipLoading:
    """open_clip_train's DataLoader."""

    def __init__(self, job: LoadingJob) -> None:
        self.job = job
        self.batches = batches(job)
        self.take()

    def take(self) -> int:
        return len(next(self.batches)[0])

    def window(self) -> float:
        # A worker prepares two batches ahead, torch's default.
        return steady_rate(self.take, self.job.seconds, skip=3 * self.job.workers, at_once=self.job.workers)


class BareDecoding:
    """The same images in memory, decoded and resized in as many threads, nothing else."""

    def __init__(self, job: LoadingJob) -> None:
        self.job = job
        self.images, self.uniforms = load_images(job)

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
        torch.set_num_threads(1)
        views, out = [view_of(self.job)], [empty_image(self.job)]
        for number in itertools.cycle(range(thread, len(self.images), self.job.threads)):
            augment.train_views(self.images[number], views, self.uniforms[[number]], out)
            done[thread] += 1
            if stop.is_set():
                return


class ClipdistStages:
    """What each stage of clipdist computes for, with one decoding thread."""

    def __init__(self, job: LoadingJob) -> None:
        torch.set_num_threads(1)
        self.job = replace(job, threads=1)

    def seconds(self) -> dict[str, float]:
        """Return seconds per sample, by stage; "other" is what is left: putting together, handing over."""
        images, uniforms = (rows[:STAGE_SAMPLES] for rows in load_images(self.job))
        tokenizer, views, out = make_tokenizer(), [view_of(self.job)], [empty_image(self.job)]
        loader = make_loader(self.job, Catalog.open(self.job.shards), tokenizer)
        kind = token_kind(tokenizer)
        repeats = range(1 + STAGE_REPEATS)  # each with captions of its own: ids of those that return are kept
        rows = [np.arange(STAGE_SAMPLES * n, STAGE_SAMPLES * (n + 1)) % self.job.samples for n in repeats]
        captions = iter([[sample.captions()[0] for sample in loader.reader.samples(own)] for own in rows])

        def read() -> None:
            for sample in loader.reader.samples(np.arange(STAGE_SAMPLES)):
                sample.captions()
                sample.image()
                sample.read(kind)

        def decode() -> None:
            for data, drawn in zip(images, uniforms):
                augment.decode_for(data, views, [drawn.tolist()], MAX_PIXELS)

        def decode_and_resize() -> None:
            for data, drawn in zip(images, uniforms):
                augment.train_views(data, views, drawn[None], out)

        def tokens() -> None:
            own = next(captions)
            tokenizer(own)
            list(map(group_id, own))

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


class FirstBatch:
    """A process that has imported everything and done nothing."""

    def __init__(self, job: LoadingJob) -> None:
        self.job = job
        self.tokenizer = make_tokenizer()

    def seconds(self, share: float) -> tuple[float, float]:
        """Return seconds (to construct catalog and loader; from the catalog to the first batch at this share)."""
        opened_s, catalog = timed(lambda: Catalog.open(self.job.shards))
        loader_s, loader = timed(lambda: make_loader(self.job, catalog, self.tokenizer, share))
        batch_s, _ = timed(loader.next)
        loader.close()
        return opened_s + loader_s, loader_s + batch_s


def per_sample(stage: Callable[[], None]) -> float:
    """Return seconds of this thread's computing: the median of some repeats, after one that counts for nothing."""
    times = []
    for _ in range(1 + STAGE_REPEATS):
        began = time.thread_time()
        stage()
        times.append(time.thread_time() - began)
    return statistics.median(times[1:]) / STAGE_SAMPLES


def own_bytes() -> int:
    """Return the memory of this process that belongs to no file: libraries that are mapped in later do not count."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


def settings(job: LoadingJob) -> Data:
    return Data(crop_scale_min=CROP_SCALE, dct_scaling=job.dct, threads=job.threads)


def view_of(job: LoadingJob) -> augment.View:
    return image_view(settings(job), job.output)


def make_tokenizer() -> BPETokenizer:
    """Make CLIP's, as open_clip_train has it."""
    return BPETokenizer(BPE_VOCABULARY, CONTEXT_LENGTH)


def make_loader(job: LoadingJob, catalog: Catalog, tokenizer: BPETokenizer, share: float = 0.0) -> Loader:
    """Open the loader at this share of the first epoch."""
    key = OrderKey(seed=0, global_batch=job.batch, streams=choose_streams(job.batch, 1), window=0)
    start = int(share * (len(catalog) // job.batch))
    views = [view_of(job)]
    return open_loader(catalog, key, tokenizer, settings(job), views=views, rank=0, world=1, start=start)


def load_images(job: LoadingJob) -> tuple[list[bytes], np.ndarray]:
    """Read encoded images and their uniform numbers, as training would draw them in epoch 0.

    Raises:
        UserError: one cannot be decoded. open_clip_train leaves such samples out, clipdist keeps their rows.
    """
    reader = Reader(Catalog.open(job.shards))
    images: list[bytes] = []
    uniforms = sample_uniforms(0, np.int64(0), np.arange(min(job.samples, CEILING_IMAGES)), augment.UNIFORMS)
    views, out, room = [view_of(job)], [empty_image(job)], CEILING_BYTES
    for sample_id, drawn in enumerate(uniforms):
        try:
            images.append(reader.sample(sample_id).image())
            augment.train_views(images[-1], views, drawn[None], out)
        except BadSample as error:
            name = f"{reader.shard_name(sample_id)}: {reader.key(sample_id)}"
            raise UserError(f"SHARDS: {name}: {error.reason}; measure with samples that can all be used") from None
        room -= len(images[-1])
        if room < 0 and len(images) >= STAGE_SAMPLES:
            break
    reader.close()
    return images, uniforms


def empty_image(job: LoadingJob) -> torch.Tensor:
    """Return uint8 [3, size, size], channels last in memory: what train_views writes into fastest."""
    return torch.zeros(job.output, job.output, 3, dtype=torch.uint8).permute(2, 0, 1)
