"""Batches: an order and a reader in, the rows of one rank out, decoded ahead in threads.

An epoch, a restart and a change of rank counts are all the same to it: it is asked for global batch number `position`.
"""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from clipdist import config
from clipdist.data.decode import BadSample, train_image
from clipdist.data.order import Order, sample_random
from clipdist.data.reader import Reader

Tokenizer = Callable[[list[str]], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """One rank's rows of a global batch. A row whose sample cannot be used has zero pixels and valid = False."""

    position: int  # number of the global batch, counted over all epochs
    image: torch.Tensor  # uint8 [b, 3, H, W]
    tokens: torch.Tensor  # int64 [b, L]
    valid: torch.Tensor  # bool [b]
    sample_id: torch.Tensor  # int64 [b]
    group_id: torch.Tensor  # int64 [b]: equal captions are one group
    bad: list[tuple[int, str]] = field(default_factory=list)  # (sample id, reason)

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("image", "tokens", "valid", "sample_id", "group_id")
        }
        return Batch(position=self.position, bad=self.bad, **moved)


class Loader:
    """Iterates over one rank's batches from global batch `start` on, for ever.

    Args:
        image_size: side of the square pictures, pixels.
        pin: put batches into pinned memory, for copies to a GPU.
    Attributes:
        waited_s: seconds that the consumer has waited for data, in total.
    """

    def __init__(
        self,
        reader: Reader,
        tokenizer: Tokenizer,
        order: Order,
        cfg: config.Data,
        *,
        image_size: int,
        rank: int,
        world: int,
        start: int = 0,
        pin: bool = False,
    ) -> None:
        self.reader, self.tokenizer, self.order, self.cfg = reader, tokenizer, order, cfg
        self.image_size, self.rank, self.world, self.pin = image_size, rank, world, pin
        self.waited_s = 0.0
        self._next = start
        self._threads = cfg.threads or default_threads()
        self._pool = ThreadPoolExecutor(self._threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._ahead: deque[tuple[int, np.ndarray, list[Future]]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next()

    def next(self) -> Batch:
        """The next batch. An error in a decoding thread is raised here, with its cause."""
        while len(self._ahead) < self.cfg.prefetch:
            self._submit()
        position, ids, futures = self._ahead.popleft()
        began = time.perf_counter()
        chunks = [future.result() for future in futures]
        self.waited_s += time.perf_counter() - began
        batch = Batch(
            position=position,
            image=torch.cat([chunk.image for chunk in chunks]),
            tokens=torch.cat([chunk.tokens for chunk in chunks]),
            valid=torch.cat([chunk.valid for chunk in chunks]),
            sample_id=torch.from_numpy(ids),
            group_id=torch.cat([chunk.group_id for chunk in chunks]),
            bad=[pair for chunk in chunks for pair in chunk.bad],
        )
        return _pinned(batch) if self.pin else batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        ids = self.order.ids(self._next, self.rank, self.world)
        parts = np.array_split(ids, min(len(ids), self._threads * 2))
        futures = [self._pool.submit(self._load, self._next, part) for part in parts]
        self._ahead.append((self._next, ids, futures))
        self._next += 1

    def _load(self, position: int, ids: np.ndarray) -> Batch:
        """Runs in a thread: reads, decodes and tokenises a few samples."""
        epoch = position // self.order.steps_per_epoch
        images = torch.zeros(len(ids), 3, self.image_size, self.image_size, dtype=torch.uint8)
        captions, bad = [""] * len(ids), []
        for row, sample_id in enumerate(ids.tolist()):
            random = sample_random(self.cfg.seed, epoch, sample_id)
            try:
                choices = self.reader.captions(sample_id)
                chosen = int(random.integers(len(choices))) if self.cfg.caption == "random" else 0
                data = self.reader.image(sample_id)
                size, least, limit = self.image_size, self.cfg.crop_scale_min, self.cfg.max_pixels
                images[row] = train_image(data, size, random, least, limit)
                captions[row] = choices[chosen]
            except BadSample as error:
                bad.append((sample_id, error.reason))
        return Batch(
            position=position,
            image=images,
            tokens=self.tokenizer(captions),
            valid=torch.tensor([bool(caption) for caption in captions]),
            sample_id=torch.from_numpy(ids),
            group_id=torch.tensor([group_id(caption) for caption in captions], dtype=torch.int64),
            bad=bad,
        )


def group_id(caption: str) -> int:
    """int64 hash of a caption without regard to case, spacing and closing punctuation."""
    normal = " ".join(unicodedata.normalize("NFKC", caption).lower().split()).rstrip(" .!?,;:")
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little", signed=True)


def default_threads() -> int:
    """Cores of this process divided among the ranks on this machine; at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    return max(1, min(8, len(os.sched_getaffinity(0)) // ranks))


def _pinned(batch: Batch) -> Batch:
    names = ("image", "tokens", "valid", "sample_id", "group_id")
    tensors = {name: getattr(batch, name).pin_memory() for name in names}
    return Batch(position=batch.position, bad=batch.bad, **tensors)
