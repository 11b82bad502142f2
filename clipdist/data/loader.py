"""Load the batches of one rank, read and decoded ahead by threads.

Batches are addressed by their global position alone: the loader has no state that depends on epochs, restarts or rank
counts.
"""

from __future__ import annotations

import hashlib
import sys
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from clipdist import config
from clipdist.data.augment import UNIFORMS, Augmentation, View, apply_colour, colour_parameters, train_views
from clipdist.data.bad_sample import BadSample
from clipdist.data.batch import CAPTION, EMPTY, IMAGE, MODALITIES, NEGATIVE, Batch
from clipdist.data.catalog import Catalog
from clipdist.data.fetch import safe_name
from clipdist.data.locked_features import LockedFeatures
from clipdist.data.members import CAPTIONS
from clipdist.data.order import Draws, Order, OrderKey, mix, next_position, sample_uniforms
from clipdist.data.prefetch import Prefetcher, check_cache, shards_at_once
from clipdist.data.reader import Reader, StoredSample, open_reader
from clipdist.data.tokens import Tokenizer, token_kind, unpack_tokens
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


class _Text(NamedTuple):
    """A text of a sample, or the features of a locked tower for it."""

    content: str | torch.Tensor  # or fp32 [w]
    group: int
    ids: torch.Tensor | None = None  # int64 [L], if the shard contains them
    role: int = CAPTION


class _RawSample(NamedTuple):
    """The image of a sample and the drawn texts, or the features of locked towers for them."""

    image: bytes | torch.Tensor  # encoded; or fp32 [w]
    texts: list[_Text]  # empty if there are none and images are used without captions


class _Texts(NamedTuple):
    """Several texts each of some samples: counts by sample, then tokens [m, L] (or features), groups and roles [m]."""

    counts: torch.Tensor
    tokens: torch.Tensor
    groups: torch.Tensor
    roles: torch.Tensor


class _Part(NamedTuple):
    """What a thread found: (sample id, reason) of bad samples, and the texts where samples have several."""

    bad: list[tuple[int, str]]
    texts: _Texts | None


class Loader:
    """An infinite iterator over one rank's batches, from global batch `start` on.

    Args:
        views: of every image.
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
        tokenizer: Tokenizer,
        order: Order,
        cfg: config.Data,
        *,
        views: Sequence[View],
        rank: int,
        world: int,
        images_only: bool = False,
        start: int = 0,
        skipped: Sequence[Sequence[int]] = (),
        locked: Mapping[str, LockedFeatures] | None = None,
        pin: bool = False,
    ) -> None:
        self.locked = locked or {}
        self.reader, self.tokenizer, self.order, self.cfg = reader, tokenizer, order, cfg
        self.views, self.images_only = views, images_only
        self.rank, self.world, self.pin = rank, world, pin
        self.waited_s = 0.0
        self._stored_ids = reader.members.captions == CAPTIONS  # those of other captions would be wrong
        self._no_text = _Text("", group_id(""))
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
        texts = [part.texts for part in parts if part.texts is not None]
        return self._place_texts(replace(batch, bad=[pair for part in parts for pair in part.bad]), texts)

    @property
    def memory_bytes(self) -> int:
        """Memory of the prefetched batches in bytes."""
        rows = self.order.key.global_batch // self.world
        image, text = (self.locked[name].width * 4 if name in self.locked else 0 for name in MODALITIES)
        image = image or 3 * sum(view.size**2 for view in self.views)
        text = (text or 8 * self.tokenizer.context_length) * self.cfg.planned_texts
        return self.cfg.prefetch * rows * (image + text + 17)

    def close(self) -> None:
        """Stop the threads and close the reader within two seconds; threads that hang in a read are abandoned."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._pool.close(0.0)
        self.reader.stop()
        self._pool.close(_CLOSE_S)
        self.reader.close()

    def _submit(self) -> None:
        """Submit the next batch to the threads."""
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
            images={view.name: self._empty_images(b, view) for view in self.views},
            tokens=self._empty_tokens(b),
            valid={name: torch.zeros(b, dtype=torch.bool, pin_memory=self.pin) for name in MODALITIES},
            sample_id=torch.from_numpy(draws.ids),
            group_id=torch.zeros(b, dtype=torch.int64, pin_memory=self.pin),
            colour={name: parameters for name, parameters in colour.items() if parameters is not None},
        )

    def _empty_images(self, b: int, view: View) -> torch.Tensor:
        if "image" in self.locked:
            return torch.zeros(b, self.locked["image"].width, pin_memory=self.pin)
        return self._pixels((b, view.size, view.size, 3)).permute(0, 3, 1, 2)  # channels_last is fastest for resize()

    def _empty_tokens(self, b: int) -> torch.Tensor:
        if "text" in self.locked:
            return torch.zeros(b, self.locked["text"].width, pin_memory=self.pin)
        return torch.zeros(b, self.tokenizer.context_length, dtype=torch.int64, pin_memory=self.pin)

    def _pixels(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return uninitialised memory for images, uint8; reuse that of earlier batches that is no longer referenced.

        The page faults of new memory (one per 4 KiB) would take 10 % of the time for large images.
        """
        if self.pin:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)  # torch caches pinned memory
        for memory, references in zip(self._memory, _references(self._memory)):
            if references == _UNUSED and memory.shape == shape:
                return torch.from_numpy(memory)  # every tensor on it, views included, references it
        self._memory.append(np.empty(shape, dtype=np.uint8))
        return torch.from_numpy(self._memory[-1])

    def _fill(self, batch: Batch, draws: Draws, rows: slice) -> _Part:
        """Read, decode and tokenise some rows in a thread."""
        ids = draws.ids[rows].tolist()
        views = 1 + UNIFORMS * len(self.views)  # the numbers of a view do not depend on later views
        more = self.cfg.planned_texts - 1  # texts that are drawn, but for the first
        uniforms = sample_uniforms(self.cfg.seed, draws.epochs[rows], draws.ids[rows], views + more)
        view_uniforms = uniforms[:, 1:views].reshape(len(ids), len(self.views), UNIFORMS)
        of_captions = np.delete(uniforms, slice(1, views), axis=1).tolist()
        samples: list[_RawSample | str] = [self._read(sample_id, u) for sample_id, u in zip(ids, of_captions)]
        images = list(zip(*(batch.images[view.name][rows].split(1) for view in self.views)))
        for row, sample in enumerate(samples):
            if isinstance(sample, _RawSample):
                try:
                    if isinstance(sample.image, bytes):
                        train_views(sample.image, self.views, view_uniforms[row], images[row], self.cfg.max_pixels)
                    else:
                        images[row][0].copy_(sample.image)
                except BadSample as error:
                    samples[row] = error.reason
            if isinstance(samples[row], str):
                for pixels in images[row]:
                    pixels.zero_()
        texts = [sample.texts if isinstance(sample, _RawSample) else [] for sample in samples]
        batch.valid["image"][rows] = torch.tensor([isinstance(sample, _RawSample) for sample in samples])
        batch.valid["text"][rows] = torch.tensor(
            [any(len(text.content) > 0 and text.role == CAPTION for text in own) for own in texts]
        )
        found = None
        if self.cfg.several_texts:
            found = self._several_texts(texts)
        else:
            single = [own[0] if own else self._no_text for own in texts]
            self._fill_texts(batch.tokens[rows], single)
            batch.group_id[rows] = torch.tensor([text.group for text in single])
        for number, view in enumerate(self.views):
            self._change_colour(batch, view, rows, view_uniforms[:, number])
        bad = [(sample_id, sample) for sample_id, sample in zip(ids, samples) if isinstance(sample, str)]
        return _Part(bad, found)

    def _read(self, sample_id: int, uniforms: list[float]) -> _RawSample | str:
        """Read a sample and draw of its captions; return the reason if it cannot be used.

        Args:
            uniforms: numbers in [0, 1) that select captions, one for each.

        Raises:
            Fault: the shard cannot be read.
        """
        try:
            stored = self.reader.sample(sample_id) if len(self.locked) < len(MODALITIES) else None
            texts = self._draw_texts(sample_id, stored, uniforms)
            if "image" in self.locked or stored is None:
                return _RawSample(self.locked["image"].rows(sample_id)[0].features, texts)
            return _RawSample(stored.image(), texts)
        except BadSample as error:
            return error.reason
        except AWAY as error:  # of a reader that does not retry
            tar = safe_name(self.reader.catalog.shards[self.reader.catalog.locate(sample_id)[0]].tar)
            raise Fault(f"{tar}: cannot be read any more ({reason(tar, error)})") from None

    def _draw_texts(self, sample_id: int, stored: StoredSample | None, uniforms: list[float]) -> list[_Text]:
        """Return captions of a sample, and then negatives."""
        captions = self._draw_captions(sample_id, stored, uniforms[: self.cfg.planned_captions])
        if not self.cfg.negatives or stored is None:
            return captions
        texts = stored.find_negatives().texts
        chosen = _drawn(uniforms[self.cfg.planned_captions :], len(texts))
        return captions + [_Text(texts[number], group_id(texts[number]), role=NEGATIVE) for number in chosen]

    def _draw_captions(self, sample_id: int, stored: StoredSample | None, uniforms: list[float]) -> list[_Text]:
        """Return captions of a sample, or their features; none if it has none and its image can be used without."""
        if stored is None or "text" in self.locked:
            try:
                rows = self.locked["text"].rows(sample_id)
            except BadSample:
                if not self.images_only:
                    raise
                return []
            return [_Text(*rows[number]) for number in self._choose(uniforms, len(rows))]
        captions = self._captions(stored)
        data = stored.read(self._token_kind) if self._stored_ids and captions else None
        ids = None if data is None else unpack_tokens(data, len(captions), self.tokenizer.context_length)
        return [
            _Text(captions[number], group_id(captions[number]), None if ids is None else ids[number])
            for number in self._choose(uniforms, len(captions))
        ]

    def _choose(self, uniforms: list[float], captions: int) -> list[int]:
        """Return the numbers of the captions that a step uses."""
        if self.cfg.caption in ("first", "all"):
            return list(range(captions))[: 1 if self.cfg.caption == "first" else None]
        return _drawn(uniforms, captions)

    def _captions(self, sample: StoredSample) -> list[str]:
        """Return the captions of a sample; [] if it has none and its image can be used without.

        Raises:
            BadSample: it has none, and needs one.
        """
        try:
            return sample.captions()
        except BadSample:
            if not self.images_only:
                raise
            return []

    def _several_texts(self, texts: list[list[_Text]]) -> _Texts:
        flat = [text for own in texts for text in own]
        tokens = self._empty_tokens(len(flat))
        if flat:
            self._fill_texts(tokens, flat)
        groups = torch.tensor([text.group for text in flat], dtype=torch.int64)
        roles = torch.tensor([text.role for text in flat], dtype=torch.uint8)
        return _Texts(torch.tensor([len(own) for own in texts]), tokens, groups, roles)

    def _place_texts(self, batch: Batch, parts: list[_Texts]) -> Batch:
        """Return the batch with several texts of each image: [b, K, ...], K the most that an image has here."""
        if not parts:
            return batch
        counts, tokens, groups, roles = (torch.cat(column) for column in zip(*parts))
        shape = (len(counts), max(1, int(counts.max())))
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        places = torch.arange(len(tokens)) - (counts.cumsum(0) - counts)[rows]
        empty = self._empty_tokens(1)
        self._fill_texts(empty, [self._no_text])
        placed = []
        for values, fill in ((tokens, empty), (groups, self._no_text.group), (roles, EMPTY)):
            out = torch.empty(*shape, *values.shape[1:], dtype=values.dtype, pin_memory=self.pin)
            out[:] = fill
            out[rows, places] = values
            placed.append(out)
        return replace(batch, tokens=placed[0], group_id=placed[1], roles=placed[2])

    def _fill_texts(self, out: torch.Tensor, texts: list[_Text]) -> None:
        """Write the texts' tokens, or features; where there is no text, the tokens of an empty one, or zeros."""
        if "text" not in self.locked:
            out.copy_(self._tokens([text.content for text in texts if isinstance(text.content, str)], texts))
        for row, text in zip(out, texts):
            if isinstance(text.content, torch.Tensor):
                row.copy_(text.content)

    def _tokens(self, captions: list[str], texts: list[_Text]) -> torch.Tensor:
        """Return token ids, int64 [len(captions), L]: those stored in the shard for this tokenizer, else computed."""
        stored = {row: text.ids for row, text in enumerate(texts) if text.ids is not None}
        # A damaged member without a checksum may contain ids outside the vocabulary.
        usable = {row: ids for row, ids in stored.items() if 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary}
        if not usable:
            return self.tokenizer(captions)
        missing = [row for row in range(len(captions)) if row not in usable]
        tokens = torch.empty(len(captions), self.tokenizer.context_length, dtype=torch.int64)
        if missing:
            tokens[missing] = self.tokenizer([captions[row] for row in missing])
        for row, ids in usable.items():
            tokens[row] = ids
        return tokens

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
    tokenizer: Tokenizer,
    cfg: config.Data,
    *,
    views: Sequence[View],
    rank: int,
    world: int,
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


def _drawn(uniforms: list[float], count: int) -> list[int]:
    """Return numbers below `count`, drawn without replacement: one for each of the uniforms, or all in some order."""
    left = list(range(count))
    return [left.pop(int(uniform * len(left))) for uniform in uniforms[:count]]


def _references(arrays: list[np.ndarray]) -> list[int]:
    """Return the reference counts of arrays in a list."""
    return [sys.getrefcount(memory) for memory in arrays]


_UNUSED = _references([np.empty(0)])[
    0
]  # the count of an array that only a list references; depends on Python's version


def image_view(cfg: config.Data, size: int) -> View:
    """Return the view that CLIP trains on, `size` pixels a side."""
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
    """Hash a caption to an int64, ignoring case, spacing and closing punctuation."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).lower().split()).rstrip(" .!?,;:")
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little", signed=True)


def default_threads() -> int:
    """Return the CPU cores of this rank, at most 8."""
    return min(8, cores_of_rank())
