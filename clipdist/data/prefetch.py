"""Prefetch shards: walk the order ahead of the loader, and have the cache fetch what will be read soon."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import numpy as np

from clipdist.data.cache import ShardCache
from clipdist.data.catalog import Catalog
from clipdist.data.order import Order, OrderKey, next_position
from clipdist.data.reader import Reader, typical_bytes
from clipdist.distributed.node import ranks_per_node
from clipdist.errors import UserError
from clipdist.storage import AWAY

_CLOSE_S = 0.3  # for the thread to end, which may hang in the reading of an index


class Prefetcher:
    """A thread that stays ahead of one rank's loader, by as many shards as this rank's part of the cache holds.

    Args:
        skipped: ranges of positions that the loader leaves out.
    """

    def __init__(
        self, reader: Reader, order: Order, rank: int, world: int, start: int, skipped: Sequence[Sequence[int]] = ()
    ) -> None:
        self._reader, self._order, self._rank, self._world = reader, order, rank, world
        self._skipped = skipped
        assert reader.cache is not None
        share = reader.cache.limit_bytes / ranks_per_node()
        self._room = max(1, int(0.9 * share / typical_bytes(reader.catalog)))  # shards; some left for those that go out
        key = order.key
        self._horizon = 2 * -(-key.window * key.streams // key.global_batch) + 2  # steps: this window, and the next
        self._consumed, self._closed = start, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._walk, name="prefetch", daemon=True, args=(start,))
        self._thread.start()

    def advance(self, position: int) -> None:
        """Note that global batch `position` has been taken."""
        with self._changed:
            self._consumed = position
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _walk(self, position: int) -> None:
        last_wanted: dict[int, int] = {}  # shard -> the last position known to read it
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or position <= self._furthest())  # noqa: B023
                if self._closed:
                    return
                position = max(position, self._consumed)  # where it fell behind: what is done with is not fetched
            position = next_position(position, self._skipped)
            starts = self._reader.catalog.starts
            ids = self._order.ids(position, self._rank, self._world)
            for shard in np.unique(starts.searchsorted(ids, side="right") - 1).tolist():
                if shard not in last_wanted:
                    with self._changed:
                        self._changed.wait_for(lambda: self._closed or self._fits(last_wanted))
                        if self._closed:
                            return
                    with contextlib.suppress(*AWAY, UserError):  # the loader will wait, or say so
                        self._reader.prefetch(shard)
                last_wanted[shard] = position
            position += 1

    def _furthest(self) -> int:
        """Return the last position to look at; beyond a skipped range where the loader is next."""
        return next_position(self._consumed + 1, self._skipped) - 1 + self._horizon

    def _fits(self, last_wanted: dict[int, int]) -> bool:
        """Return whether one more shard has room; forget those that the loader is done with."""
        for shard in [shard for shard, position in last_wanted.items() if position < self._consumed]:
            del last_wanted[shard]
        return len(last_wanted) < self._room


def shards_at_once(catalog: Catalog, key: OrderKey, world: int) -> int:
    """Return of how many shards a rank reads at one time.

    Of every source these are V/W streams, each in a window that touches some shards.
    """
    shards = 0
    for first, end in catalog.sources if key.parts else [(0, len(catalog.shards))]:
        counts = np.diff(catalog.starts[first : end + 1])
        mean = max(1, int(counts[counts > 0].mean()))
        window = key.window or int(counts.sum()) // key.streams
        shards += min(len(counts), -(-key.streams // world) * (-(-window // mean) + 2))
    return shards


def check_cache(catalog: Catalog, key: OrderKey, world: int, cache: ShardCache) -> None:
    """Check that the cache holds the shards that are read at one time.

    Raises:
        UserError: the cache is too small for the shards that the ranks of a node read at one time.
    """
    shards = min(len(catalog.shards), shards_at_once(catalog, key, world) * min(ranks_per_node(), world))
    need = shards * typical_bytes(catalog)
    if need > cache.limit_bytes:
        size = typical_bytes(catalog) / 1e9
        raise UserError(
            f"data.cache_gb={cache.limit_bytes / 1e9:g}: {shards} shards of about {size:.2g} GB are read at one"
            f" time on a node; set it to {need / 1e9:.2g} at least, or lower data.streams={key.streams} or"
            f" data.window={key.window}"
        )
