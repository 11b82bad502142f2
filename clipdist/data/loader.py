"""Load the batches of one rank, read and decoded ahead by threads.

Batches are addressed by their global position alone: the loader has no state that depends on epochs, restarts or rank
counts.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from clipdist import config
from clipdist.data.augment import (
    UNIFORMS,
    VIEW_UNIFORMS,
    View,
    apply_colour,
    colour_parameters,
    fill_views,
    filter_uniforms,
)
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import CAPTION, MODALITIES, Batch
from clipdist.data.catalog import Catalog
from clipdist.data.fetch import safe_name
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.order import Draws, Order, OrderKey, mix, next_position, sample_uniforms
from clipdist.data.prefetch import Prefetcher, check_cache, shards_at_once
from clipdist.data.reader import Reader, StoredSample, open_reader
from clipdist.data.stages import BatchStage, kept_patches
from clipdist.data.texts import SeveralTexts, Text, Texts
from clipdist.data.tokens import Tokenizer
from clipdist.data.workers import Workers
from clipdist.distributed.node import cores_of_rank
from clipdist.errors import Fault
from clipdist.storage import AWAY, reason

_PARTS_PER_THREAD = 4  # parts of a batch, for load balancing
_SLICE_S = 0.1  # interval of checks for an interruption
_CLOSE_S = 0.8  # timeout for decoding threads to end; those that hang in a read are abandoned
_ROW = 47  # the key of row hashes
HASH_MODULUS = 1 << 47  # of ids_hash: the sum over 2^15 ranks fits into an int64


class Interrupted(Exception):
    """Waiting for a batch was interrupted. The loader is unchanged: its next batch is the same."""


def ids_hash(sample_id: torch.Tensor, first_row: int) -> torch.Tensor:
    """Hash the sample ids and row numbers of this rank's part of a global batch.

    Args:
        sample_id: int64 [b]; preferably on the CPU, where it is hashed.
        first_row: of this rank in the global batch: rank * b.

    Returns:
        int64, shape []: the sum of the rows' hashes modulo HASH_MODULUS. The sum over ranks, modulo HASH_MODULUS, does
        not depend on the number of ranks.
    """
    rows = np.arange(first_row, first_row + len(sample_id), dtype=np.int64)
    total = mix(mix(_ROW, rows), sample_id.cpu().numpy()).sum(dtype=np.uint64)  # wraps at a multiple of HASH_MODULUS
    return torch.tensor(int(total) % HASH_MODULUS, dtype=torch.int64)


class _RawSample(NamedTuple):
    """The image of a sample and the drawn texts, or the features of locked towers for them."""

    image: bytes | torch.Tensor  # encoded; or fp32 [w]
    texts: list[Text]  # empty if there are none and images are used without captions


class _Part(NamedTuple):
    """What a thread found: (sample id, reason) of bad samples, and the texts where samples have several."""

    bad: list[tuple[int, str]]
    texts: SeveralTexts | None


class Loader:
    """An infinite iterator over one rank's batches, from global batch `start` on.

    Args:
        tokenizer: None: no captions are read; tokens are then [b, 0].
        views: of every image.
        stages: what batches are made of from which position on, the first of them from 0; empty: `views` and
            `tokenizer` throughout. Those are the largest of the stages'.
        images_only: whether an image without a caption can be used; otherwise its row is bad.
        skipped: ranges [first, end) of positions to skip: their samples are neither drawn nor fetched.
        locked: features that take the place of the images, or of the captions' tokens, by modality.
        pin: allocate batches in pinned memory for copies to a GPU, which then applies the colour changes.

    Attributes:
        waited_s: total seconds that next() has waited for data.
        memory_bytes: of the prefetched batches.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer | None,
        order: Order,
        cfg: config.Data,
        *,
        views: Sequence[View],
        rank: int,
        world: int,
        stages: Sequence[BatchStage] = (),
        images_only: bool = False,
        start: int = 0,
        skipped: Sequence[Sequence[int]] = (),
        locked: Mapping[str, LockedFeatures] | None = None,
        pin: bool = False,
    ) -> None:
        self.locked = locked or {}
        self.reader, self.tokenizer, self.order, self.cfg = reader, tokenizer, order, cfg
        self.views = views
        self._stages = stages or [BatchStage(0, views, tokenizer)]
        self.rank, self.world, self.pin = rank, world, pin
        self.waited_s = 0.0
        self._reads_shards = len(self.locked) < len(MODALITIES)
        self._texts = None
        if tokenizer is not None:
            self._texts = Texts(
                reader.members,
                tokenizer,
                cfg,
                shorter=[stage.tokenizer for stage in self._stages if stage.tokenizer],
                images_only=images_only,
                locked=self.locked.get("text"),
                pin=pin,
            )
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
        """The position of the batch that next() will return; after an error, of the batch that failed."""
        return self._ahead[0][0].position if self._ahead else self._next

    def next(self, interrupted: Callable[[], bool] | None = None) -> Batch:
        """Return the next batch. Errors of decoding threads are raised here, and close the loader.

        Args:
            interrupted: polled while waiting; a batch that is ready is returned in any case.

        Raises:
            Interrupted: `interrupted` returned True.
            Fault: a shard cannot be read, and the retry time is over.
        """
        while len(self._ahead) < self.cfg.prefetch:
            self._submit()
        batch, futures = self._ahead[0]
        began = time.perf_counter()
        try:
            parts = _results(futures, interrupted)
        except Interrupted:
            raise
        except BaseException:
            self.close()
            raise
        finally:
            self.waited_s += time.perf_counter() - began
        self._ahead.popleft()
        if self._prefetcher is not None:
            self._prefetcher.advance(batch.position)
        batch = replace(batch, bad=[pair for part in parts for pair in part.bad])
        texts = [part.texts for part in parts if part.texts is not None]
        return self._texts.place(batch, texts) if self._texts and texts else batch

    @property
    def memory_bytes(self) -> int:
        """Memory of the prefetched batches in bytes."""
        rows = self.order.key.global_batch // self.world
        image, text = (self.locked[name].width * 4 if name in self.locked else 0 for name in MODALITIES)
        image = image or sum(math.prod(view.shape) for view in self.views)
        text = (text or 8 * _context_length(self.tokenizer)) * self.cfg.planned_texts
        return self.cfg.prefetch * rows * (image + text + 17)

    def close(self) -> None:
        """Stop the threads and close the reader within two seconds; threads that hang in a read are abandoned."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.close(0.0)
        self.reader.stop()
        self._pool.close(_CLOSE_S)
        self.reader.close()

    def _stage(self, position: int) -> BatchStage:
        return next(stage for stage in reversed(self._stages) if stage.first <= position)

    def _submit(self) -> None:
        """Submit the next batch to the threads."""
        draws = self.order.draws(self._next, self.rank, self.world)
        batch = self._empty_batch(draws)
        parts = np.array_split(np.arange(len(draws.ids)), min(len(draws.ids), self._threads * _PARTS_PER_THREAD))
        futures = [self._pool.submit(self._fill, batch, draws, slice(part[0], part[-1] + 1)) for part in parts]
        self._ahead.append((batch, futures))
        self._next = next_position(self._next + 1, self._skipped)

    def _empty_batch(self, draws: Draws) -> Batch:
        b, stage = len(draws.ids), self._stage(self._next)
        zeros = np.zeros((b, VIEW_UNIFORMS))
        deferred = [view for view in stage.views if self.pin and view.defers_colour]
        colour = {view.name: colour_parameters(zeros, view.augmentation) for view in deferred}
        return Batch(
            position=self._next,
            images={view.name: self._empty_images(b, view) for view in stage.views},
            tokens=(
                self._texts.empty(b, _context_length(stage.tokenizer))
                if self._texts
                else torch.zeros(b, 0, dtype=torch.int64)
            ),
            valid={name: torch.zeros(b, dtype=torch.bool, pin_memory=self.pin) for name in MODALITIES},
            sample_id=torch.from_numpy(draws.ids),
            group_id=torch.zeros(b, dtype=torch.int64, pin_memory=self.pin),
            patches=torch.zeros(b, stage.kept, dtype=torch.int64, pin_memory=self.pin) if stage.kept else None,
            colour={name: parameters for name, parameters in colour.items() if parameters is not None},
        )

    def _empty_images(self, b: int, view: View) -> torch.Tensor:
        if "image" in self.locked:
            return torch.zeros(b, self.locked["image"].width, pin_memory=self.pin)
        pixels = self._pixels((b, *view.shape))
        return pixels.permute(0, 3, 1, 2) if pixels.dim() == 4 else pixels  # channels_last is fastest for resize()

    def _pixels(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uninitialised memory for images, uint8; reuse that of earlier batches that is no longer referenced.

        The page faults of new memory (one per 4 KiB) would take 10 % of the time for large images.
        """
        if self.pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch caches pinned memory
        if len(self.views) == 1:  # that of an earlier stage is freed with its last batch
            self._memory = [memory for memory in self._memory if memory.shape == shape]
        for memory, references in zip(self._memory, _references(self._memory)):
            if references == _UNUSED and memory.shape == shape:
                return torch.from_numpy(memory)  # every tensor on it, views included, references it
        self._memory.append(np.empty(shape, dtype=np.uint8))
        return torch.from_numpy(self._memory[-1])

    def _fill(self, batch: Batch, draws: Draws, rows: slice) -> _Part:
        """Read, decode and tokenise some rows in a thread."""
        ids, stage = draws.ids[rows], self._stage(batch.position)
        views = 1 + UNIFORMS * len(self.views)  # the numbers of a view do not depend on later views
        more = self.cfg.planned_texts - 1  # texts that are drawn, but for the first
        uniforms = sample_uniforms(self.cfg.seed, draws.epochs[rows], ids, views + more)
        view_uniforms = uniforms[:, 1:views].reshape(len(ids), len(self.views), UNIFORMS)
        filters = filter_uniforms(self.cfg.seed, draws.epochs[rows], ids, len(self.views))
        view_uniforms = np.concatenate([view_uniforms, filters], axis=2)
        samples = self._read(ids, np.delete(uniforms, slice(1, views), axis=1).tolist())
        self._fill_images(batch, rows, stage.views, samples, view_uniforms)
        texts = [[] if isinstance(sample, str) else sample.texts for sample in samples]
        batch.valid["image"][rows] = torch.tensor([not isinstance(sample, str) for sample in samples])
        batch.valid["text"][rows] = torch.tensor(
            [any(len(text.content) > 0 and text.role == CAPTION for text in own) for own in texts]
        )
        found = None
        if self._texts and self.cfg.several_texts:
            found = self._texts.several(texts, batch.tokens.shape[-1])
        elif self._texts:
            self._texts.fill_single(batch, rows, texts)
        if batch.patches is not None:
            batch.patches[rows] = kept_patches(self.cfg.seed, draws.epochs[rows], ids, stage)
        for number, view in enumerate(stage.views):
            if view.defers_colour:
                self._change_colour(batch, view, rows, view_uniforms[:, number])
        return _Part([(i, sample) for i, sample in zip(ids.tolist(), samples) if isinstance(sample, str)], found)

    def _fill_images(
        self,
        batch: Batch,
        rows: slice,
        views: Sequence[View],
        samples: list[_RawSample | str],
        uniforms: np.ndarray,
    ) -> None:
        """Write the images of some rows, or their features; replace a sample that cannot be used by the reason."""
        outs = [batch.images[view.name][rows] for view in views]
        if "image" in self.locked:
            for out, sample in zip(outs[0], samples):
                if isinstance(sample, _RawSample):
                    out.copy_(sample.image)
            return
        images = [sample.image if isinstance(sample, _RawSample) else None for sample in samples]
        encoded = [image if isinstance(image, bytes) else None for image in images]
        for row, why in fill_views(encoded, views, uniforms, outs, self.cfg.max_pixels).items():
            samples[row] = why

    def _read(self, ids: np.ndarray, uniforms: list[list[float]]) -> list[_RawSample | str]:
        """Read samples and draw of their captions; give the reason in place of one that cannot be used.

        Args:
            ids: int64 [n].
            uniforms: numbers in [0, 1) that select captions, by sample.

        Raises:
            Fault: a shard cannot be read.
        """
        stored: list[StoredSample | None] = [None] * len(ids)
        if self._reads_shards:
            with contextlib.suppress(*AWAY):  # of a reader that does not retry: _read_one says which shard
                stored = [*self.reader.samples(ids)]
        return [self._read_one(*sample) for sample in zip(ids.tolist(), stored, uniforms)]

    def _read_one(self, sample_id: int, stored: StoredSample | None, uniforms: list[float]) -> _RawSample | str:
        try:
            if stored is None and self._reads_shards:
                stored = self.reader.sample(sample_id)
            texts = self._texts.draw(sample_id, stored, uniforms) if self._texts else []
            if "image" in self.locked or stored is None:
                return _RawSample(self.locked["image"].rows(sample_id)[0].features, texts)
            return _RawSample(stored.image(), texts)
        except BadSample as error:
            return error.reason
        except AWAY as error:  # of a reader that does not retry
            tar = safe_name(self.reader.catalog.shards[self.reader.catalog.locate(sample_id)[0]].tar)
            raise Fault(f"{tar}: cannot be read any more ({reason(tar, error)})") from None

    @staticmethod
    def _change_colour(batch: Batch, view: View, rows: slice, uniforms: np.ndarray) -> None:
        """Change the colours of some rows of a view, or store the parameters for Batch.to."""
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
    tokenizer: Tokenizer | None,
    cfg: config.Data,
    *,
    views: Sequence[View],
    rank: int,
    world: int,
    stages: Sequence[BatchStage] = (),
    images_only: bool = False,
    start: int = 0,
    skipped: Sequence[Sequence[int]] = (),
    locked: Mapping[str, LockedFeatures] | None = None,
    pin: bool = False,
) -> Loader:
    """Return a loader with its order and reader. Arguments: see Loader.

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
        stages=stages,
        images_only=images_only,
        start=start,
        skipped=skipped,
        locked=locked,
        pin=pin,
    )


def _results(futures: list[Future[_Part]], interrupted: Callable[[], bool] | None) -> list[_Part]:
    """Return the results of all futures in order, or raise the first error at once. See Loader.next."""
    while True:
        done, waiting = wait(futures, _SLICE_S if interrupted else None, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not waiting:
            break
        if interrupted is not None and interrupted():
            raise Interrupted
    return [future.result() for future in futures]


def _context_length(tokenizer: Tokenizer | None) -> int:
    return tokenizer.context_length if tokenizer else 0


def _references(arrays: list[np.ndarray]) -> list[int]:
    """Return the reference counts of arrays in a list."""
    return [sys.getrefcount(memory) for memory in arrays]


_UNUSED = _references([np.empty(0)])[
    0
]  # the count of an array that only a list references; depends on Python's version


def default_threads() -> int:
    """Return the CPU cores of this rank, at most 8."""
    return min(8, cores_of_rank())
