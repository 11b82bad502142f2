"""Load the batches of one rank, decoded ahead in threads.

An epoch, a restart and a change of rank counts are all the same to it: it is asked for global batch number `position`.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from clipdist import config
from clipdist.data.augment import UNIFORMS, Augmentation, View, apply_colour, colour_parameters, train_views
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import IMAGE, MODALITIES, Batch
from clipdist.data.cache import ranks_per_node
from clipdist.data.catalog import Catalog
from clipdist.data.fetch import safe_name
from clipdist.data.order import Draws, Order, OrderKey, mix, next_position, sample_uniforms
from clipdist.data.prefetch import Prefetcher, check_cache, shards_at_once
from clipdist.data.reader import Reader, StoredSample, open_reader
from clipdist.data.tokens import Tokenizer, token_kind, unpack_tokens
from clipdist.data.workers import Workers
from clipdist.errors import Fault
from clipdist.storage import AWAY, reason

_PARTS_PER_THREAD = 4  # a batch is cut finer than threads, so that none waits long for the slowest
_SLICE_S = 0.1  # of a wait that may be interrupted
_CLOSE_S = 0.8  # for decoding threads to end; one that hangs in a read is left behind
_ROW = 47  # the key of row hashes
HASH_MODULUS = 1 << 47  # of ids_hash: the sum over 2^15 ranks fits into an int64


class Interrupted(Exception):
    """Somebody asked for the end while no batch was ready. The loader is as before: its next batch is the same."""


def ids_hash(sample_id: torch.Tensor, first_row: int) -> torch.Tensor:
    """A number that tells whether the same samples lie in the same rows, however these are divided among ranks.

    Args:
        sample_id: int64 [b]; best before Batch.to, since the work is done on the CPU.
        first_row: of the global batch, that this rank's rows begin with: rank * b.

    Returns:
        int64, shape []: a sum of the rows' hashes modulo HASH_MODULUS. The sum over ranks, modulo HASH_MODULUS, does
        not depend on their number.
    """
    rows = np.arange(first_row, first_row + len(sample_id), dtype=np.int64)
    total = mix(mix(_ROW, rows), sample_id.cpu().numpy()).sum(dtype=np.uint64)  # wraps at 2^64, a multiple
    return torch.tensor(int(total) % HASH_MODULUS, dtype=torch.int64)


class _Read(NamedTuple):
    image: bytes
    caption: str  # empty where there is none, and the image is of use alone
    ids: torch.Tensor | None  # int64 [L], where the shard holds them


class Loader:
    """Iterates over one rank's batches from global batch `start` on, for ever.

    Args:
        views: what is made of every image.
        images_alone: whether an image without a caption is of use; else its row counts as bad.
        skipped: ranges [first, end) of positions that are left out: neither drawn nor fetched.
        pin: put batches into pinned memory, for copies to a GPU, and leave the colours to it.
    Attributes:
        waited_s: seconds that the consumer has waited for data, in total.
        memory_bytes: of the batches that are prepared ahead.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        order: Order,
        cfg: config.Data,
        *,
        views: Sequence[View],
        rank: int,
        world: int,
        images_alone: bool = False,
        start: int = 0,
        skipped: Sequence[Sequence[int]] = (),
        pin: bool = False,
    ) -> None:
        self.reader, self.tokenizer, self.order, self.cfg = reader, tokenizer, order, cfg
        self.views, self.images_alone = views, images_alone
        self.rank, self.world, self.pin = rank, world, pin
        self.waited_s = 0.0
        self._token_kind, self._vocabulary = token_kind(tokenizer), tokenizer.vocab_size
        self._next, self._skipped = next_position(start, skipped), skipped
        self._threads = cfg.threads or default_threads()
        self._pool = Workers(self._threads, "decode", lambda: torch.set_num_threads(1))
        self._ahead: deque[tuple[Batch, list[Future]]] = deque()
        self._memory: list[np.ndarray] = []
        self._prefetcher = Prefetcher(reader, order, rank, world, self._next, skipped) if reader.is_cached() else None

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    @property
    def position(self) -> int:
        """Of the batch that next() gives next; after an error, of the batch that could not be had."""
        return self._ahead[0][0].position if self._ahead else self._next

    def next(self, interrupted: Callable[[], bool] | None = None) -> Batch:
        """The next batch. An error in a decoding thread is raised here, with its cause, and closes the loader.

        Args:
            interrupted: asked while the batch is waited for; one that is ready is given in any case.

        Raises:
            Interrupted: `interrupted` gave True.
            Fault: a shard cannot be read, and patience is at its end.
        """
        while len(self._ahead) < self.cfg.prefetch:
            self._submit()
        batch, futures = self._ahead[0]
        began = time.perf_counter()
        try:
            bad = _results(futures, interrupted)
        except Interrupted:
            raise
        except BaseException:  # nobody will take the batches that other threads still wait for
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - began
        self._ahead.popleft()
        if self._prefetcher is not None:
            self._prefetcher.advance(batch.position)
        return replace(batch, bad=bad)

    @property
    def memory_bytes(self) -> int:
        rows = self.order.key.global_batch // self.world
        pixels = sum(view.size**2 for view in self.views)
        return self.cfg.prefetch * rows * (3 * pixels + 8 * self.tokenizer.context_length + 17)

    def close(self) -> None:
        """Ends the threads, and closes the reader: within two seconds, threads that hang in a read are left behind."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.close(0.0)
        self.reader.stop()
        self._pool.close(_CLOSE_S)
        self.reader.close()

    def _submit(self) -> None:
        draws = self.order.draws(self._next, self.rank, self.world)
        batch = self._empty_batch(draws)
        parts = np.array_split(np.arange(len(draws.ids)), min(len(draws.ids), self._threads * _PARTS_PER_THREAD))
        futures = [self._pool.submit(self._fill, batch, draws, slice(part[0], part[-1] + 1)) for part in parts]
        self._ahead.append((batch, futures))
        self._next = next_position(self._next + 1, self._skipped)

    def _empty_batch(self, draws: Draws) -> Batch:
        b = len(draws.ids)
        zeros = np.zeros((b, UNIFORMS))
        colour = {view.name: colour_parameters(zeros, view.augmentation) for view in self.views if self.pin}
        return Batch(
            position=self._next,
            # channels last, as the resize gives them
            images={v.name: self._pixels((b, v.size, v.size, 3)).permute(0, 3, 1, 2) for v in self.views},
            tokens=torch.zeros(b, self.tokenizer.context_length, dtype=torch.int64, pin_memory=self.pin),
            valid={name: torch.zeros(b, dtype=torch.bool, pin_memory=self.pin) for name in MODALITIES},
            sample_id=torch.from_numpy(draws.ids),
            group_id=torch.zeros(b, dtype=torch.int64, pin_memory=self.pin),
            colour={name: parameters for name, parameters in colour.items() if parameters is not None},
        )

    def _pixels(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory for images, uint8, into which the threads write. What nobody holds any more is taken again.

        Fresh memory costs a page fault every 4 KiB, which on large images is a tenth of the time.
        """
        if self.pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch keeps pinned memory for the next one
        for memory, references in zip(self._memory, _references(self._memory)):
            if references == _UNUSED and memory.shape == shape:
                return torch.from_numpy(memory)  # every tensor on it, views included, holds a reference to it
        self._memory.append(np.empty(shape, dtype=np.uint8))
        return torch.from_numpy(self._memory[-1])

    def _fill(self, batch: Batch, draws: Draws, rows: slice) -> list[tuple[int, str]]:
        """Runs in a thread: reads, decodes and tokenises some rows. Returns what could not be used, and why."""
        ids = draws.ids[rows].tolist()
        count = 1 + UNIFORMS * len(self.views)  # more views change nothing in the numbers of the first ones
        uniforms = sample_uniforms(self.cfg.seed, draws.epochs[rows], draws.ids[rows], count)
        of_view = uniforms[:, 1:].reshape(len(ids), len(self.views), UNIFORMS)
        read: list[_Read | str] = [self._read(sample_id, u) for sample_id, u in zip(ids, uniforms[:, 0].tolist())]
        images = list(zip(*(batch.images[view.name][rows].split(1) for view in self.views)))
        for row, found in enumerate(read):
            if isinstance(found, _Read):
                try:
                    train_views(found.image, self.views, of_view[row], images[row], self.cfg.max_pixels)
                except BadSample as error:
                    read[row] = error.reason
            if isinstance(read[row], str):
                for pixels in images[row]:
                    pixels.zero_()
        captions = [found.caption if isinstance(found, _Read) else "" for found in read]
        batch.tokens[rows] = self._tokens(captions, read)
        batch.valid["image"][rows] = torch.tensor([isinstance(found, _Read) for found in read])
        batch.valid["text"][rows] = torch.tensor([bool(caption) for caption in captions])
        batch.group_id[rows] = torch.tensor([group_id(caption) for caption in captions])
        for number, view in enumerate(self.views):
            self._change_colour(batch, view, rows, of_view[:, number])
        return [(sample_id, found) for sample_id, found in zip(ids, read) if isinstance(found, str)]

    def _read(self, sample_id: int, uniform: float) -> _Read | str:
        """A sample's image and the caption that is drawn for it, or why it cannot be used.

        Raises:
            Fault: the shard cannot be read any more.
        """
        try:
            sample = self.reader.sample(sample_id)
            captions = self._captions(sample)
            chosen = int(uniform * len(captions)) if self.cfg.caption == "random" else 0
            data = sample.read(self._token_kind)
            ids = None if data is None else unpack_tokens(data, len(captions), self.tokenizer.context_length)
            return _Read(sample.image(), captions[chosen], None if ids is None else ids[chosen])
        except BadSample as error:
            return error.reason
        except AWAY as error:  # of a reader without patience
            tar = safe_name(self.reader.catalog.shards[self.reader.catalog.locate(sample_id)[0]].tar)
            raise Fault(f"{tar}: cannot be read any more ({reason(tar, error)})") from None

    def _captions(self, sample: StoredSample) -> list[str]:
        """
        Raises:
            BadSample: there are none, and an image is of no use alone.
        """
        try:
            return sample.captions()
        except BadSample:
            if not self.images_alone:
                raise
            return [""]

    def _tokens(self, captions: list[str], read: list[_Read | str]) -> torch.Tensor:
        """int64 [len(captions), L]: the ids that the shard holds for this very tokenizer, else made here."""
        stored = {
            row: found.ids for row, found in enumerate(read) if isinstance(found, _Read) and found.ids is not None
        }
        # An embedding fails on ids that a damaged member may hold where no checksum tells.
        sound = {row: ids for row, ids in stored.items() if 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary}
        if not sound:
            return self.tokenizer(captions)
        missing = [row for row in range(len(captions)) if row not in sound]
        tokens = torch.empty(len(captions), self.tokenizer.context_length, dtype=torch.int64)
        if missing:
            tokens[missing] = self.tokenizer([captions[row] for row in missing])
        for row, ids in sound.items():
            tokens[row] = ids
        return tokens

    @staticmethod
    def _change_colour(batch: Batch, view: View, rows: slice, uniforms: np.ndarray) -> None:
        parameters = colour_parameters(uniforms, view.augmentation)
        if parameters is None:
            return
        if view.name in batch.colour:
            batch.colour[view.name][rows] = parameters
        else:
            images = batch.images[view.name]
            images[rows] = apply_colour(images[rows], parameters)


def open_loader(
    catalog: Catalog,
    key: OrderKey,
    tokenizer: Tokenizer,
    cfg: config.Data,
    *,
    views: Sequence[View],
    rank: int,
    world: int,
    images_alone: bool = False,
    start: int = 0,
    skipped: Sequence[Sequence[int]] = (),
    pin: bool = False,
) -> Loader:
    """A loader with its order and reader. See Loader.

    Raises:
        UserError: the cache of remote shards cannot be written, or is too small.
    """
    reader = open_reader(catalog, cfg, shards_at_once(catalog, key, world))
    if reader.cache is not None:
        check_cache(catalog, key, world, reader.cache)
    order = Order(catalog.starts, key, catalog.sources)
    return Loader(
        reader,
        tokenizer,
        order,
        cfg,
        views=views,
        rank=rank,
        world=world,
        images_alone=images_alone,
        start=start,
        skipped=skipped,
        pin=pin,
    )


def _results(futures: list[Future], interrupted: Callable[[], bool] | None) -> list[tuple[int, str]]:
    """What all of them give, in order; or the first error, without waiting for the others. See Loader.next."""
    while True:
        done, waiting = wait(futures, _SLICE_S if interrupted else None, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not waiting:
            break
        if interrupted is not None and interrupted():
            raise Interrupted
    return [pair for future in futures for pair in future.result()]


def _references(kept: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(memory) for memory in kept]


_UNUSED = _references([np.empty(0)])[0]  # of what only a list holds; how many that is differs among Python's versions


def image_view(cfg: config.Data, size: int) -> View:
    """The view that CLIP trains on: a square of `size` pixels."""
    brightness, contrast, saturation, hue = cfg.jitter or (0.0, 0.0, 0.0, 0.0)
    augmentation = Augmentation(
        crop_scale_min=cfg.crop_scale_min,
        dct_scaling=cfg.dct_scaling,
        flip=cfg.flip,
        jitter=(brightness, contrast, saturation, hue),
        jitter_probability=cfg.jitter_probability,
        grayscale=cfg.grayscale,
    )
    return View(IMAGE, size, augmentation)


def group_id(caption: str) -> int:
    """int64 hash of a caption without regard to case, spacing and closing punctuation."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).lower().split()).rstrip(" .!?,;:")
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little", signed=True)


def default_threads() -> int:
    """Cores of this process divided among the ranks on this machine; at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks_per_node()))
