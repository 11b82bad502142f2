"""Training through the cache: room for all that is read at one time, nothing fetched in vain, an end that comes."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from pairs import Lengths, write_pairs
from storage import FOREVER, Storage, Thing

from clipdist.config import Data
from clipdist.data.cache import MOST_CACHE_BYTES, ShardCache
from clipdist.data.catalog import Catalog, Shard
from clipdist.data.consolidated import make_part, write_parts
from clipdist.data.fetch import Fetcher
from clipdist.data.index import scan_shard
from clipdist.data.loader import open_loader
from clipdist.data.order import Order, OrderKey
from clipdist.data.prefetch import Prefetcher, shards_at_once
from clipdist.data.reader import open_reader
from clipdist.data.views import image_view
from clipdist.errors import UserError


def staging(folder: Path, catalog: Catalog, shards: float) -> Data:
    """Local shards taken through a cache that holds so many of them."""
    size = max(catalog.table(number).tar_bytes for number in range(len(catalog.shards)))
    return Data(stage=True, cache=str(folder / "cache"), cache_gb=(shards * size + 1) / 1e9, threads=2)


def imaginary(counts: list[int], sources: list[tuple[int, int]]) -> Catalog:
    return Catalog(
        [Shard(f"{i}.tar", count, b"", lambda: pytest.fail("read")) for i, count in enumerate(counts)], sources
    )


@pytest.mark.parametrize("parts", [(), (1, 1), (3, 1, 1, 1)])
def test_what_is_read_at_one_time(parts):
    each = 120 // max(1, len(parts))
    catalog = imaginary([100] * 120, [(first, first + each) for first in range(0, 120, each)])
    key = OrderKey(0, 32, 8, 100, parts)
    order = Order(catalog.starts, key, catalog.sources)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for position in range(100):
        for shard in np.unique(order.ids(position) // 100).tolist():
            first.setdefault(shard, position)
            last[shard] = position
    most = max(sum(first[s] <= position <= last[s] for s in first) for position in range(100))
    assert most <= shards_at_once(catalog, key, 1) <= 3 * most


def test_no_more_shards_than_there_are():
    catalog = imaginary([100] * 6, [(0, 2), (2, 6)])
    assert shards_at_once(catalog, OrderKey(0, 32, 16, 0), 1) == 6
    assert shards_at_once(catalog, OrderKey(0, 32, 16, 0, (1, 1)), 1) == 6


def test_reading_front_to_back_takes_a_small_cache(tmp_path):
    catalog = Catalog.open([str(write_pairs(tmp_path / "data", 120, per_shard=10))])
    reader = open_reader(catalog, staging(tmp_path, catalog, 4))
    reader.cache.room_wait_s = 0.1
    assert all(reader.sample(sample_id).captions() for sample_id in range(len(catalog)))
    reader.close()


def test_a_prefetcher_that_fell_behind_fetches_nothing_that_is_done_with(tmp_path, monkeypatch):
    catalog = Catalog.open([str(write_pairs(tmp_path / "data", 160, per_shard=10))])
    reader = open_reader(catalog, staging(tmp_path, catalog, 16))
    order = Order(catalog.starts, OrderKey(0, 10, 1, 10))
    wanted = [set((order.ids(position) // 10).tolist()) for position in range(16)]
    asked: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def prefetch(shard: int) -> None:
        asked.append(shard)
        begun.set()
        go_on.wait()

    monkeypatch.setattr(reader, "prefetch", prefetch)
    prefetcher = Prefetcher(reader, order, 0, 1, 0)
    begun.wait()
    prefetcher.advance(12)
    go_on.set()
    while not wanted[15] <= set(asked):
        assert prefetcher._thread.is_alive()
        time.sleep(0.01)
    prefetcher.close()
    reader.close()
    assert set(asked) <= wanted[0].union(*wanted[12:], *(order.ids(p) // 10 for p in range(16, 20)))


def test_a_prefetcher_looks_beyond_a_skipped_range_and_not_into_it(tmp_path, monkeypatch):
    catalog = Catalog.open([str(write_pairs(tmp_path / "data", 320, per_shard=10))])
    reader = open_reader(catalog, staging(tmp_path, catalog, 40))
    order = Order(catalog.starts, OrderKey(0, 10, 1, 10))
    drawn: list[int] = []
    ids = order.ids
    monkeypatch.setattr(order, "ids", lambda position, *args: drawn.append(position) or ids(position, *args))
    prefetcher = Prefetcher(reader, order, 0, 1, 2, skipped=[[3, 20]])
    try:
        _wait_until(lambda: len(drawn) >= 5)
    finally:
        prefetcher.close()
        reader.close()
    assert drawn == [2, 20, 21, 22, 23]


def _wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_staged_shard_that_was_replaced_is_staged_anew(tmp_path):
    tar = write_pairs(tmp_path / "data", 10, per_shard=10) / "00000.tar"
    catalog = Catalog.open([str(tar)])
    cfg = staging(tmp_path, catalog, 2)
    reader = open_reader(catalog, cfg)
    before = reader.sample(0).image()
    reader.close()
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(before, before[::-1]))  # of the same size, members and all
    os.utime(tar, ns=(0, 1))
    tar.with_name("00000.tar.idx.npz").unlink()
    reader = open_reader(Catalog.open([str(tar)]), cfg)
    assert reader.sample(0).image() == before[::-1]
    reader.close()


def test_equal_relative_names_in_two_folders_are_two_shards(tmp_path, monkeypatch):
    pictures = []
    cfg = Data(stage=True, cache=str(tmp_path / "cache"), cache_gb=0.001)
    for folder, count in (("a", 10), ("b", 9)):
        tar = write_pairs(tmp_path / folder / "data", 10, per_shard=10, bad={0: folder.encode() * count * 10})
        (tar / "00000.tar.idx.npz").unlink()
        os.utime(tar / "00000.tar", ns=(0, 1))
        monkeypatch.chdir(tmp_path / folder)
        reader = open_reader(Catalog.open(["data"]), cfg)
        pictures.append(reader.sample(0).image())
        reader.close()
    assert pictures == [b"a" * 100, b"b" * 90]


def test_what_is_there_when_its_prefetch_is_asked_for_stays(tmp_path):
    names = [str(tmp_path / name) for name in "abc"]
    for name in names:
        Path(name).write_bytes(name[-1:].encode() * 1000)
    cache = ShardCache(tmp_path / "cache", 2000, Fetcher())
    for name in names[:2]:
        os.close(cache.open(name, 1000))
    for name in (names[0], names[2]):  # a is there and was read longest ago; c needs room
        cache.prefetch(name, 1000)
        _settle(cache)
    there = {path.name[-1] for path in (tmp_path / "cache").glob("whole-*")}
    cache.close()
    assert there == {"a", "c"}


def _settle(cache: ShardCache) -> None:
    """Waits for the prefetches that were begun."""
    for future in list(cache._ahead.values()):
        future.result()


def test_an_error_ends_the_fetches_of_other_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = write_pairs(tmp_path / "data", 40, per_shard=20)
    server = Storage()
    indices = []
    for number in range(2):
        path = f"/0000{number}.tar"
        indices.append(dataclasses.replace(scan_shard(folder / path[1:]), tar=server.url(path)))
    server.things["/00000.tar"] = Thing(b"", statuses=[503] * 10_000)
    write_parts(tmp_path / "two.index.zip", map(make_part, indices))
    catalog = Catalog.open([str(tmp_path / "two.index.zip")])
    cfg = Data(cache=str(tmp_path / "cache"), cache_gb=0.001, retry_s=FOREVER, threads=4)
    loader = open_loader(catalog, OrderKey(0, 20, 20, 20), Lengths(), cfg, views=[image_view(cfg, 8)], rank=0, world=1)
    try:
        with pytest.raises(UserError, match=r"00001\.tar: no such object"):
            deque(loader, maxlen=0)
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "prefetch"))]
    finally:
        server.things["/00000.tar"].statuses.clear()
        server.close()
    loader.close()


def test_a_cache_of_no_given_size_takes_half_of_the_disk_at_most(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    cache = ShardCache(tmp_path / "not" / "there" / "yet", 0, Fetcher())
    assert 0 < cache.limit_bytes <= min(MOST_CACHE_BYTES, free // 2 + (1 << 30))
    cache.close()
