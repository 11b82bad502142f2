"""Compute which samples a rank reads: a pure function of (seed, epoch, step, rank); its state is one integer.

An epoch's shards, permuted, form one sequence of N samples, begun at a cyclic offset and cut into V equal streams;
within a stream, windows of w samples are permuted. Step k takes the next B/V samples of every stream, rank r takes rows
r*B/W .. (r+1)*B/W of that. So a global batch depends on (seed, epoch, k) alone: not on ranks, threads or restarts, and
resuming replays nothing. Every sample comes at most once an epoch, exactly N mod B are left out.

A mixture draws from several such sequences, each with epochs of its own, by a schedule that is as even as it can be.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from clipdist.config import Config
from clipdist.data.catalog import INDEX_MEMORY_BYTES, Catalog

ORDER_VERSION = 2
REMOTE_STREAMS = 16  # V of remote shards at most, where there are not more ranks: each stream fills the cache
MOST_PARTS = 1 << 16  # a mixture's weights are whole parts of at most so many: the length of its schedule
_SHARDS, _OFFSET, _WINDOW, _SAMPLE, _SOURCE = range(5)  # what a random number is for: part of its key


@dataclass(frozen=True)
class OrderKey:
    """All that the order depends on besides the shards. Kept in the checkpoint."""

    seed: int
    global_batch: int  # B
    streams: int  # V
    window: int  # w; 0: the whole stream
    parts: tuple[int, ...] = ()  # of a mixture: source i makes up parts[i] of every sum(parts) draws; (): no mixture


class Draws(NamedTuple):
    """One rank's rows of a global batch: sample ids int64 [b], and the epoch that each is drawn in, int64 [b]."""

    ids: np.ndarray
    epochs: np.ndarray


def next_position(position: int, skipped: Sequence[Sequence[int]]) -> int:
    """Return the first position from `position` on that lies in none of the ranges [first, end).

    Args:
        skipped: in any order; they may overlap, and be empty.
    """
    for first, end in sorted((first, end) for first, end in skipped):
        if first <= position < end:
            position = end
    return position


class Order:
    """Which samples make up global batch `position`, counted over all epochs.

    Args:
        starts: int64 [S+1], cumulative sample counts of the shards.
        key: B, V, w and the seed; V must divide B, and B must not exceed N.
        sources: of a mixture, the range of shards (first, end) of every source, in the order of key.parts.
    """

    def __init__(self, starts: np.ndarray, key: OrderKey, sources: Sequence[tuple[int, int]] = ()) -> None:
        self.key = key
        self.starts = np.asarray(starts, dtype=np.int64)
        self.n = int(self.starts[-1])
        if key.global_batch % key.streams:
            raise ValueError(f"{key.streams} streams do not divide a global batch of {key.global_batch}")
        if self.n < key.global_batch:
            raise ValueError(f"{self.n} samples are fewer than a global batch of {key.global_batch}")
        self.steps_per_epoch = self.n // key.global_batch
        if not key.parts:
            length = self.steps_per_epoch * key.global_batch
            self._sequence = Streams(self.starts, key.seed, key.streams, key.window, length)
            return
        if len(sources) != len(key.parts):
            raise ValueError(f"{len(key.parts)} parts for {len(sources)} sources")
        self._schedule = schedule(key.parts)
        self._sources = []
        for number, (first, end) in enumerate(sources):
            starts = self.starts[first : end + 1]
            samples = int(starts[-1] - starts[0])
            streams = min(key.streams, samples)
            seed = int(mix(mix(key.seed, _SOURCE), number))
            self._sources.append(Streams(starts, seed, streams, key.window, samples // streams * streams))

    def draws(self, position: int, rank: int = 0, world: int = 1) -> Draws:
        """Return one rank's rows of global batch `position`; W must divide B."""
        per_rank = self.key.global_batch // world
        first, end = rank * per_rank, (rank + 1) * per_rank
        if self.key.parts:
            return Draws(*(rows[first:end] for rows in self._mixed(position)))
        epoch, step = divmod(position, self.steps_per_epoch)
        per_stream = self.key.global_batch // self.key.streams
        stream = np.arange(first // per_stream, -(-end // per_stream))
        first_row = np.maximum(stream * per_stream, first)  # of each stream; a rank may begin within one
        count = np.minimum((stream + 1) * per_stream, end) - first_row
        ids = self._sequence.ids(epoch, stream, first_row - stream * per_stream + step * per_stream, count)
        return Draws(ids, np.full(per_rank, epoch, dtype=np.int64))

    def ids(self, position: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Return the sample ids of `draws`, int64 [B/W]."""
        return self.draws(position, rank, world).ids

    def _mixed(self, position: int) -> Draws:
        """Return a whole global batch of a mixture, its rows in the order of the streams: so a rank reads few shards.

        Draw j of a source is the next sample of its stream j mod V, so the draws of a step are spread over all streams.
        """
        batch = self.key.global_batch
        begins = self._schedule.counts(position * batch).tolist()
        ends = self._schedule.counts((position + 1) * batch).tolist()
        parts = []
        for streams, begin, end in zip(self._sources, begins, ends):
            while begin < end:  # a small source may begin a new epoch within a batch
                epoch, first = divmod(begin, streams.length)
                last = min(streams.length, first + end - begin)
                stream = np.arange(streams.count)
                start = -(-(first - stream) // streams.count)  # the first place of each whose draw is in first .. last
                count = -(-(last - stream) // streams.count) - start
                ids = streams.ids(epoch, stream, start, count)
                share_of_streams = np.repeat((stream * (1 << 15) // streams.count).astype(np.uint16), count)
                parts.append((ids, np.full(len(ids), epoch, dtype=np.int64), share_of_streams))
                begin += last - first
        ids, epochs, share_of_streams = (np.concatenate(column) for column in zip(*parts))
        rows = np.argsort(share_of_streams, kind="stable")
        return Draws(ids[rows], epochs[rows])


class Streams:
    """The V streams of one sequence of shards: (epoch, stream, place in it) -> sample id.

    Args:
        starts: int64 [S+1], sample ids at which the shards begin, and where the last one ends.
        count: V.  window: w; 0: the whole stream.
        length: samples that an epoch takes in all, a multiple of V and at most N.
    """

    def __init__(self, starts: np.ndarray, seed: int, count: int, window: int, length: int) -> None:
        self.starts, self.seed, self.count, self.length = starts, seed, count, length
        self.n = int(starts[-1] - starts[0])
        self.per_stream = length // count
        self.window = window or self.per_stream
        self._epoch = lru_cache(maxsize=2)(self._lay_out)  # the one that is read, and the next one, fetched ahead

    def ids(self, epoch: int, stream: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Return the ids int64 [sum of count] of the places start[i] .. start[i] + count[i] of every stream[i]."""
        stream, number, begin, count = self._cut_at_windows(stream, start, count)
        keys = mix(mix(mix(mix(self.seed, _WINDOW), epoch), stream), number)
        sizes = np.minimum(self.window, self.per_stream - number * self.window)  # a stream's last window may be shorter
        ends = np.cumsum(count)
        inside = np.arange(ends[-1]) - np.repeat(ends - count - (begin - number * self.window), count)
        place = permute(inside, sizes, keys, count)
        place += np.repeat(stream * self.per_stream + number * self.window, count)
        return self._epoch(epoch).sample_ids(place)

    def _cut_at_windows(self, stream: np.ndarray, start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cut runs at windows. Return (stream, number of the window, first place, count) of each, none empty."""
        rows = np.flatnonzero(count)
        stream, start, end = stream[rows], start[rows], (start + count)[rows]
        first = start // self.window
        pieces = (end - 1) // self.window - first + 1
        run = np.repeat(np.arange(len(rows)), pieces)
        number = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = np.maximum(start[run], number * self.window)
        return stream[run], number, begin, np.minimum(end[run], (number + 1) * self.window) - begin

    def _lay_out(self, epoch: int) -> _Epoch:
        """Permute the shards of an epoch, and draw the offset at which they begin."""
        shards = len(self.starts) - 1
        key = mix(mix(self.seed, _SHARDS), epoch)
        order = permute(np.arange(shards), np.array([shards]), np.atleast_1d(key), np.array([shards]))
        sizes = np.diff(self.starts)[order]
        ends = np.cumsum(sizes)
        offset = int(mix(mix(self.seed, _OFFSET), epoch) % np.uint64(self.n))
        return _Epoch(self.n, offset, ends, self.starts[:-1][order] - (ends - sizes))


class _Epoch(NamedTuple):
    """The shards of one epoch in their order, begun at a cyclic offset."""

    n: int
    offset: int
    ends: np.ndarray  # int64 [S], places at which the shards end
    first: np.ndarray  # int64 [S], what is to be added to a place to give a sample id

    def sample_ids(self, place: np.ndarray) -> np.ndarray:
        """Return the sample ids, int64 [m], of places [m] in the sequence, counted from the offset."""
        place = place + self.offset
        place[place >= self.n] -= self.n
        return place + self.first[np.searchsorted(self.ends, place, side="right")]


def choose_streams(global_batch: int, world: int, most: int = 64) -> int:
    """Choose V for a first start: the largest divisor of B, at most max(W, `most`), that W divides.

    Many streams mix the shards well; a power of two lets other rank counts go on without sharing shards. Remote shards
    want fewer, since every stream keeps shards of its own in the cache.
    """
    fits = [v for v in range(1, max(world, most) + 1) if global_batch % v == 0 and v % world == 0]
    return fits[-1] if fits else world


def whole_parts(weights: Sequence[float]) -> tuple[int, ...]:
    """Turn weights into whole parts: exactly where their sum is small, else the nearest of MOST_PARTS; none gets 0.

    The weights count as the decimals that were written: 0.1 is one tenth.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    scale = np.lcm.reduce([weight.denominator for weight in exact], dtype=object)
    parts = [int(weight * scale) for weight in exact]
    common = np.gcd.reduce(parts, dtype=object)
    parts = [part // common for part in parts]
    total = sum(parts)
    if total > MOST_PARTS:
        parts = [max(1, round(Fraction(part * MOST_PARTS, total))) for part in parts]
    return tuple(parts)


class MixtureSchedule(NamedTuple):
    """Which source each draw of a mixture is taken from, as counts of the draws before it. See `schedule`."""

    parts: np.ndarray  # int64 [K]
    before: np.ndarray  # int32 [sum(parts), K]: draws of each source among the first t of a period

    def counts(self, draws: int) -> np.ndarray:
        """Return how many of the first `draws` are of each source, int64 [K]."""
        periods, rest = divmod(draws, len(self.before))
        return periods * self.parts + self.before[rest]


def schedule(parts: Sequence[int]) -> MixtureSchedule:
    """Schedule a mixture: of every first n draws source i has n * parts[i] / sum(parts), give or take less than 1.

    The j-th draw of a source of share p may come from place floor((j-1)/p) on and must be done by ceil(j/p): earliest
    deadline first meets all of them (Baruah et al., "Proportionate progress", Algorithmica 15, 1996).
    """
    total = sum(parts)
    before = np.zeros((total, len(parts)), dtype=np.int32)
    counts = [0] * len(parts)
    ready: list[tuple[int, int]] = []  # (deadline, source) of draws that may be taken now
    waiting = [(0, source) for source in range(len(parts))]  # (place from which the source's next draw may be taken)
    for place in range(total):
        before[place] = counts
        while waiting and waiting[0][0] <= place:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(counts[source] + 1) * total // parts[source]), source))
        _, source = heapq.heappop(ready)
        counts[source] += 1
        heapq.heappush(waiting, (counts[source] * total // parts[source], source))
    return MixtureSchedule(np.array(parts, dtype=np.int64), before)


def sample_uniforms(seed: int, epochs: np.ndarray, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """Return the random numbers of samples in their epochs, float64 [m, count] in [0, 1): crop, colour, caption."""
    keys = mix(mix(mix(seed, _SAMPLE), epochs), sample_ids)
    bits = mix(keys[:, None], np.arange(count, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def permute(x: np.ndarray, n: np.ndarray, key: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Permute 0 .. n-1 by a key, elementwise and without a table: O(1) memory for any n.

    A Feistel network of four rounds over the next power of two, walked along its cycle until the value is below n
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Args:
        x: int64 [m], of which the next runs[i] elements are permuted with key[i] and lie in 0 .. n[i]-1.
        n: int64 [r], at most 2^62.  key: uint64 [r].  runs: int64 [r], summing up to m.
    """
    bits = np.array([max(2, (int(size) - 1).bit_length()) for size in n.tolist()])
    low_bits = bits // 2
    masks = [(1 << half) - 1 for half in (bits - low_bits, low_bits)]
    round_keys = [mix(key, number) & np.uint64(0xFFFFFFFF) for number in range(4)]
    per_element = [np.repeat(low_bits, runs)]
    per_element += [np.repeat(values.astype(np.uint32), runs) for values in (*masks, *round_keys)]
    limit = np.repeat(n, runs)
    out = _feistel(x, *per_element)
    rows = np.flatnonzero(out >= limit)
    while len(rows):
        out[rows] = _feistel(out[rows], *(values[rows] for values in per_element))
        rows = rows[out[rows] >= limit[rows]]
    return out


def _feistel(
    x: np.ndarray, low: np.ndarray, high_mask: np.ndarray, low_mask: np.ndarray, *keys: np.ndarray
) -> np.ndarray:
    """One pass of the network: x is `high << low | right`, both changed in turn by a hash of the other."""
    high = (x >> low).astype(np.uint32)
    right = x.astype(np.uint32)
    right &= low_mask
    for number in (0, 2):
        high ^= _hash(right, keys[number], high_mask)
        right ^= _hash(high, keys[number + 1], low_mask)
    out = high.astype(np.int64)
    out <<= low
    out |= right
    return out


def _hash(x: np.ndarray, key: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Hash uint32 to uint32 (the finaliser lowbias32 of Wellons' hash prospector, keyed), of which `mask` stays."""
    z = x ^ key
    z ^= z >> np.uint32(16)
    z *= np.uint32(0x21F0AAAD)
    z ^= z >> np.uint32(15)
    z += key  # the key enters twice: a single mask would only relabel the inputs of one fixed function
    z *= np.uint32(0x735A2D97)
    z ^= z >> np.uint32(15)
    z &= mask
    return z


def mix(state: int | np.ndarray, value: int | np.ndarray) -> np.ndarray:
    """Combine two integers into a well-mixed uint64 (the finaliser of SplitMix64, Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = _uint64(state) * np.uint64(0x9E3779B97F4A7C15) + _uint64(value) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _uint64(value: int | np.ndarray) -> np.ndarray:
    if isinstance(value, int):
        return np.asarray(value & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64)


def first_order(config: Config, catalog: Catalog, world: int) -> OrderKey:
    """Return the order of a first start: V streams and windows of w samples as configured, else chosen here."""
    batch, data = config.train.global_batch, config.data
    cached = data.stage or catalog.is_remote()
    streams = data.streams or choose_streams(batch, world, *([REMOTE_STREAMS] if cached else []))
    per_shard = max(1, len(catalog) // max(1, len(catalog.shards)))
    window = data.window or (per_shard if cached else local_window(catalog, streams, per_shard))
    return OrderKey(data.seed, batch, streams, window, whole_parts(data.weights) if data.weights else ())


def local_window(catalog: Catalog, streams: int, per_shard: int) -> int:
    """Return w: 0, the whole stream, if all tables of members fit into memory; else few enough to load them in turn.

    With windows of w samples V streams touch V * (ceil(w / shard) + 1) tables at one time; were all of them wanted at
    random, each read would begin with the reading of a table.
    """
    table = catalog.table(0)
    per_sample = max(1.0, table.bytes_in_memory() / max(1, len(table)))
    fits = int(INDEX_MEMORY_BYTES / per_sample)
    if len(catalog) <= fits:
        return 0
    return max(1000, fits // (streams * len(catalog.sources)) - 2 * per_shard)
