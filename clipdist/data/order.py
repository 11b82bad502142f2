"""The order of samples: (seed, epoch, step, rank) in, sample ids out. A pure function; its state is one integer.

An epoch's shards, permuted, form one sequence of N samples, begun at a cyclic offset and cut into V equal streams;
within a stream, windows of w samples are permuted. Step k takes the next B/V samples of every stream, rank r takes rows
r*B/W .. (r+1)*B/W of that. So a global batch depends on (seed, epoch, k) alone: not on ranks, threads or restarts, and
resuming replays nothing. Every sample comes at most once an epoch, exactly N mod B are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ORDER_VERSION = 1
_SHARDS, _OFFSET, _WINDOW, _SAMPLE = range(4)  # what a random stream is for: part of its key


@dataclass(frozen=True)
class OrderKey:
    """All that the order depends on beside the shards. Kept in the checkpoint."""

    seed: int
    global_batch: int  # B
    streams: int  # V
    window: int  # w; 0: the whole stream


class Order:
    """Which samples make up global batch `position`, counted over all epochs.

    Args:
        starts: int64 [S+1], cumulative sample counts of the shards.
        key: B, V, w and the seed; V must divide B, and B must not exceed N.
    """

    def __init__(self, starts: np.ndarray, key: OrderKey) -> None:
        self.key = key
        self.starts = np.asarray(starts, dtype=np.int64)
        self.n = int(self.starts[-1])
        if key.global_batch % key.streams:
            raise ValueError(f"{key.streams} streams do not divide a global batch of {key.global_batch}")
        if self.n < key.global_batch:
            raise ValueError(f"{self.n} samples are fewer than a global batch of {key.global_batch}")
        self.steps_per_epoch = self.n // key.global_batch
        self._epoch = -1

    def ids(self, position: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Sample ids int64 [B/W] of one rank's rows of global batch `position`; W must divide B."""
        batch, streams = self.key.global_batch, self.key.streams
        epoch, step = divmod(position, self.steps_per_epoch)
        per_rank, per_stream = batch // world, batch // streams
        rows = np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64)
        stream, place = rows // per_stream, step * per_stream + rows % per_stream
        place = self._permute_windows(epoch, stream, place)
        return self._sample_ids(epoch, stream * (self.steps_per_epoch * per_stream) + place)

    def _permute_windows(self, epoch: int, stream: np.ndarray, place: np.ndarray) -> np.ndarray:
        length = self.steps_per_epoch * (self.key.global_batch // self.key.streams)
        window = self.key.window or length
        number, inside = place // window, place % window
        size = np.minimum(window, length - number * window)  # the last window may be shorter
        key = _mix(_mix(_mix(_mix(self.key.seed, _WINDOW), epoch), stream), number)
        return number * window + permute(inside, size, key)

    def _sample_ids(self, epoch: int, place: np.ndarray) -> np.ndarray:
        """Places in the epoch's sequence to sample ids, through the permuted shards and the cyclic offset."""
        if epoch != self._epoch:
            key = _mix(_mix(self.key.seed, _SHARDS), epoch)
            shards = len(self.starts) - 1
            self._shards = permute(np.arange(shards), np.full(shards, shards), np.full(shards, key))
            sizes = np.diff(self.starts)[self._shards]
            self._ends = np.cumsum(sizes)
            self._first = self.starts[:-1][self._shards] - (self._ends - sizes)
            self._offset = int(_mix(_mix(self.key.seed, _OFFSET), epoch) % np.uint64(self.n))
            self._epoch = epoch
        place = (place + self._offset) % self.n
        return place + self._first[np.searchsorted(self._ends, place, side="right")]


def choose_streams(global_batch: int, world: int) -> int:
    """V for a first start: the largest divisor of B, at most max(W, 64), that W divides.

    Many streams mix the shards well; a power of two lets other rank counts go on without sharing shards.
    """
    fits = [v for v in range(1, max(world, 64) + 1) if global_batch % v == 0 and v % world == 0]
    return fits[-1] if fits else world


def sample_random(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: crop, and which of its captions."""
    key = int(_mix(_mix(_mix(seed, _SAMPLE), epoch), sample_id))
    return np.random.Generator(np.random.Philox(key=key))


def permute(x: np.ndarray, n: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0 .. n-1, elementwise and without a table: O(1) memory for any n.

    A balanced Feistel network over the next even power of two, walked along its cycle until the value is below n
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Args:
        x, n: int64 [m] with 0 <= x < n.  key: uint64 [m] (or one for all).
    """
    n = np.broadcast_to(np.asarray(n, dtype=np.int64), x.shape)
    key = np.broadcast_to(np.asarray(key, dtype=np.uint64), x.shape)
    bits = np.maximum(np.ceil(np.log2(np.maximum(n, 2))).astype(np.int64), 2)
    half = ((bits + 1) // 2).astype(np.uint64)
    out = _feistel(x.astype(np.uint64), half, key)
    while True:
        outside = np.flatnonzero(out.astype(np.int64) >= n)
        if not len(outside):
            return out.astype(np.int64)
        out[outside] = _feistel(out[outside], half[outside], key[outside])


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for round_number in range(4):
        left, right = right, left ^ (_mix(_mix(key, round_number), right) & mask)
    return (left << half) | right


def _mix(state: int | np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """Combines two integers into a well-mixed uint64 (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = _uint64(state) * np.uint64(0x9E3779B97F4A7C15) + _uint64(value) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _uint64(value: int | np.ndarray) -> np.ndarray:
    if isinstance(value, int):
        return np.asarray(value & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64)
