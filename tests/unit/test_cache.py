"""The shard cache: one download a node, a bound that holds, open entries that stay, and the dead cleaned up after."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from storage import Storage, Thing

from clipdist.data.cache import ShardCache
from clipdist.data.fetch import Fetcher
from clipdist.errors import Fault, UserError

KB = 1000
QUICK = Fetcher(retry_s=0.5, stall_s=5)


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Storage()
    for i in range(8):
        server.things[f"/{i}.tar"] = Thing(data(i))
    yield server
    server.close()


def data(i: int) -> bytes:
    return random.Random(i).randbytes(10 * KB)


def cache(folder: Path, limit_kb: float = 1000, fetcher: Fetcher = QUICK, **settings) -> ShardCache:
    return ShardCache(folder / "cache", int(limit_kb * KB), fetcher, **{"room_wait_s": 0.2, **settings})


def read(descriptor: int) -> bytes:
    """All bytes; closes the descriptor."""
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def held(folder: Path) -> int:
    total = 0
    for path in (folder / "cache").iterdir():
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
            total += path.stat().st_size
    return total


def wait_until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def other_process(tmp_path: Path, code: str) -> subprocess.Popen:
    """Runs `code` with `cache`, a cache of the same folder."""
    head = f"""
import os, random, sys, time
from pathlib import Path
from clipdist.data.cache import ShardCache
from clipdist.data.fetch import Fetcher
cache = ShardCache(Path({str(tmp_path / "cache")!r}), 35_000, Fetcher(retry_s=5), room_wait_s=10)
"""
    return subprocess.Popen([sys.executable, "-c", head + code], stdout=subprocess.PIPE, text=True)


def test_the_second_open_needs_no_request(storage, tmp_path):
    shards = cache(tmp_path)
    for _ in range(2):
        assert read(shards.open(storage.url("/1.tar"), 10 * KB)) == data(1)
    assert storage.count("/1.tar") == 1
    assert read(cache(tmp_path).open(storage.url("/1.tar"))) == data(1)  # after a restart too
    assert storage.count("/1.tar") == 1


def test_descriptors_are_read_only_and_the_folder_private(storage, tmp_path):
    descriptor = cache(tmp_path).open(storage.url("/1.tar"))
    with pytest.raises(OSError, match="Bad file"):
        os.write(descriptor, b"x")
    os.close(descriptor)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_the_least_recently_used_go_first(storage, tmp_path):
    shards = cache(tmp_path, 35)
    for i in (0, 1, 2, 0, 3):  # 3 puts 1 out
        assert read(shards.open(storage.url(f"/{i}.tar"))) == data(i)
    assert held(tmp_path) == 30 * KB
    for i in (0, 2, 3, 1):
        assert read(shards.open(storage.url(f"/{i}.tar"))) == data(i)
    assert [storage.count(f"/{i}.tar") for i in range(4)] == [1, 2, 1, 1]


@pytest.mark.parametrize("there_before", [False, True])
def test_open_entries_are_not_evicted(storage, tmp_path, there_before):
    shards = cache(tmp_path, 25)
    if there_before:
        os.close(shards.open(storage.url("/0.tar")))
    first = shards.open(storage.url("/0.tar"))
    for i in range(1, 5):
        os.close(shards.open(storage.url(f"/{i}.tar")))
    os.close(shards.open(storage.url("/0.tar")))
    assert storage.count("/0.tar") == 1
    assert read(first) == data(0)


def test_no_room_is_a_fault_that_says_what_to_set(storage, tmp_path):
    shards = cache(tmp_path, 25)
    descriptors = [shards.open(storage.url(f"/{i}.tar")) for i in range(2)]
    with pytest.raises(Fault, match=r"2e-05 GB are in use.*data\.cache_gb.*data\.streams.*data\.window"):
        shards.open(storage.url("/2.tar"))
    assert held(tmp_path) == 20 * KB
    os.close(descriptors[0])
    assert read(shards.open(storage.url("/2.tar"))) == data(2)
    os.close(descriptors[1])


def test_open_waits_for_room(storage, tmp_path):
    shards = cache(tmp_path, 15, room_wait_s=10)
    first = shards.open(storage.url("/0.tar"))
    timer = threading.Timer(0.2, os.close, [first])
    timer.start()
    assert read(shards.open(storage.url("/1.tar"))) == data(1)
    timer.join()


def test_a_shard_larger_than_the_cache_evicts_nothing(storage, tmp_path):
    shards = cache(tmp_path, 15, room_wait_s=60)
    os.close(shards.open(storage.url("/0.tar")))
    storage.things["/big.tar"] = Thing(bytes(16 * KB))
    with pytest.raises(Fault, match=r"data\.cache_gb"):
        shards.open(storage.url("/big.tar"))
    os.close(shards.open(storage.url("/0.tar")))
    assert storage.count("/0.tar") == 1


def test_unknown_lengths_stay_within_the_bound(storage, tmp_path):
    shards = cache(tmp_path, 15)
    storage.things["/big.tar"] = Thing(bytes(16 * KB), length=False)
    with pytest.raises(Fault, match=r"data\.cache_gb"):
        shards.open(storage.url("/big.tar"))
    assert held(tmp_path) == 0
    storage.things["/small.tar"] = Thing(bytes(14 * KB), length=False)
    assert read(shards.open(storage.url("/small.tar"))) == bytes(14 * KB)


def test_another_size_is_stale(storage, tmp_path):
    shards = cache(tmp_path)
    old = shards.open(storage.url("/0.tar"), 10 * KB)
    storage.things["/0.tar"] = Thing(b"new")
    assert read(shards.open(storage.url("/0.tar"), 3)) == b"new"
    assert read(old) == data(0)
    assert held(tmp_path) == 3


def test_a_lower_limit_and_dead_parts_are_seen_to_at_the_start(storage, tmp_path):
    shards = cache(tmp_path)
    for i in range(3):
        os.close(shards.open(storage.url(f"/{i}.tar")))
    part = tmp_path / "cache" / f"part-{'0' * 32}-a.tar"
    part.write_bytes(bytes(500))
    mine = tmp_path / "cache" / "thesis.tar"
    mine.write_bytes(bytes(2 * KB))
    os.utime(mine, (0, 0))
    cache(tmp_path, 15)
    assert not part.exists()
    assert held(tmp_path) == 12 * KB
    assert mine.exists()


@pytest.mark.parametrize(
    "path", ["/../../../etc/x.tar", "/a b/%2e%2e/..", "/" + "long" * 90, "/x.tar?../../y", "/é\n/"]
)
def test_odd_urls_stay_inside(storage, tmp_path, path):
    source = tmp_path / "source.tar"
    source.write_bytes(b"data")
    before = sorted(tmp_path.iterdir())
    shards = cache(tmp_path, fetcher=Fetcher(retry_s=0.1, stall_s=1))
    with contextlib.suppress(UserError):
        os.close(shards.open(storage.url(path)))
    assert read(shards.open(str(source))) == b"data"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cache", *before]
    assert all(entry.is_file() for entry in (tmp_path / "cache").iterdir())


def test_names_hold_no_secrets(storage, tmp_path):
    storage.things["/a.tar?key=sesame"] = Thing(b"data")
    url = storage.url("/a.tar?key=sesame").replace("//", "//ann:sesame@")
    assert read(cache(tmp_path).open(url)) == b"data"
    (name,) = (path.name for path in (tmp_path / "cache").glob("whole-*"))
    assert name.endswith("-a.tar")
    assert "sesame" not in name


def test_prefetch(storage, tmp_path):
    shards = cache(tmp_path)
    shards.prefetch(storage.url("/0.tar"))
    wait_until(lambda: len(list((tmp_path / "cache").glob("whole-*"))) == 1)
    assert read(shards.open(storage.url("/0.tar"))) == data(0)
    assert storage.count("/0.tar") == 1
    shards.close()


def test_open_takes_over_what_prefetch_began_or_has_not(storage, tmp_path):
    shards = cache(tmp_path, threads=1)
    for i in range(5):
        storage.things[f"/{i}.tar"].pause_s = 0.01
        shards.prefetch(storage.url(f"/{i}.tar"))
    for i in (4, 0, 1, 2, 3):
        assert read(shards.open(storage.url(f"/{i}.tar"))) == data(i)
        assert storage.count(f"/{i}.tar") == 1
    shards.close()


def test_errors_of_a_prefetch_surface_at_open(storage, tmp_path):
    shards = cache(tmp_path)
    shards.prefetch(storage.url("/none.tar"))
    wait_until(lambda: storage.count("/none.tar") == 1)
    with pytest.raises(UserError, match=r"none\.tar: no such object"):
        shards.open(storage.url("/none.tar"))
    assert storage.count("/none.tar") == 1
    storage.things["/none.tar"] = Thing(b"there now")
    assert read(shards.open(storage.url("/none.tar"))) == b"there now"
    shards.close()


def test_a_prefetch_spares_what_was_prefetched_and_not_opened(storage, tmp_path):
    shards = cache(tmp_path, 25)
    for i in range(2):
        shards.prefetch(storage.url(f"/{i}.tar"))
        wait_until(lambda: not shards._ahead)
    shards.prefetch(storage.url("/2.tar"))  # no room: nothing happens
    wait_until(lambda: not shards._ahead)
    assert held(tmp_path) == 20 * KB
    os.close(shards.open(storage.url("/0.tar")))
    shards.prefetch(storage.url("/3.tar"))  # in place of 0, which has been opened
    wait_until(lambda: not shards._ahead)
    for i in (1, 3):
        os.close(shards.open(storage.url(f"/{i}.tar")))
        assert storage.count(f"/{i}.tar") == 1
    os.close(shards.open(storage.url("/2.tar")))  # an open() is more than advice
    shards.close()


def test_close_ends_a_prefetch(storage, tmp_path):
    shards = cache(tmp_path, fetcher=Fetcher(retry_s=60, stall_s=60))
    storage.things["/0.tar"].statuses = [503] * 1000
    shards.prefetch(storage.url("/0.tar"))
    wait_until(lambda: storage.count("/0.tar") >= 2)
    shards.close()
    assert held(tmp_path) == 0
    shards.prefetch(storage.url("/1.tar"))
    assert storage.count("/1.tar") == 0


def test_threads_share_one_download(storage, tmp_path):
    shards = cache(tmp_path)
    storage.things["/0.tar"].pause_s = 0.02
    with ThreadPoolExecutor(8) as pool:
        for descriptor in pool.map(shards.open, [storage.url("/0.tar")] * 8):
            assert read(descriptor) == data(0)
    assert storage.count("/0.tar") == 1


def test_processes_share_one_download(storage, tmp_path):
    storage.things["/0.tar"].pause_s = 0.1
    code = f"print(len(os.read(cache.open({storage.url('/0.tar')!r}), 99999)))"
    processes = [other_process(tmp_path, code) for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in processes] == ["10000\n"] * 2
    assert storage.count("/0.tar") == 1


def test_a_killed_downloader_is_taken_over(storage, tmp_path):
    storage.things["/0.tar"].stall_at, storage.things["/0.tar"].stalls = 5 * KB, 1
    process = other_process(tmp_path, f"cache.open({storage.url('/0.tar')!r})")
    wait_until(lambda: storage.count("/0.tar") == 1)
    shards = cache(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shards.open, storage.url("/0.tar"), 10 * KB)
        time.sleep(0.2)
        assert storage.count("/0.tar") == 1
        assert not waiting.done()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert read(waiting.result(10)) == data(0)
    assert storage.count("/0.tar") == 2
    assert not list((tmp_path / "cache").glob("part-*"))


def test_the_bound_holds_among_threads_and_processes(storage, tmp_path):
    urls = [storage.url(f"/{i}.tar") for i in range(8)]
    code = f"""
urls = {urls!r}
rng = random.Random(os.getpid())
for _ in range(60):
    i = rng.randrange(8)
    if rng.random() < 0.3:
        cache.prefetch(urls[rng.randrange(8)])
    descriptor = cache.open(urls[i])
    assert os.pread(descriptor, 99999, 0) == random.Random(i).randbytes(10_000)
    os.close(descriptor)
cache.close()
"""
    (tmp_path / "cache").mkdir()
    processes = [other_process(tmp_path, code) for _ in range(2)]
    shards = cache(tmp_path, 35, room_wait_s=10)

    def visit(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(30):
            i = rng.randrange(8)
            assert read(shards.open(urls[i], 10 * KB)) == data(i)

    with ThreadPoolExecutor(2) as pool:
        visits = [pool.submit(visit, seed) for seed in range(2)]
        while any(process.poll() is None for process in processes) or not all(done.done() for done in visits):
            with shards._locked():  # between evictions and growth, not in their midst
                assert held(tmp_path) <= 35 * KB
            time.sleep(0.005)
        for done in visits:
            done.result()
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        process.communicate()


class FullDisk(Fetcher):
    """The disk is full until `free` says otherwise: a real one cannot be filled in a test."""

    free = staticmethod(lambda: False)

    def fetch(self, url, to, size=None, room=None):
        if not self.free():
            raise OSError(errno.ENOSPC, "No space left on device")
        super().fetch(url, to, size, room)


def test_a_full_disk_evicts_and_tries_again(storage, tmp_path):
    filled = cache(tmp_path)
    for i in range(3):
        os.close(filled.open(storage.url(f"/{i}.tar")))
    disk = FullDisk(retry_s=0.5)
    object.__setattr__(disk, "free", lambda: held(tmp_path) <= 10 * KB)
    assert read(cache(tmp_path, fetcher=disk).open(storage.url("/4.tar"))) == data(4)
    assert held(tmp_path) == 20 * KB
    object.__setattr__(disk, "free", lambda: False)
    with pytest.raises(Fault, match="the disk is full"):
        cache(tmp_path, fetcher=disk).open(storage.url("/5.tar"))
    assert not list((tmp_path / "cache").glob("part-*"))


def test_a_limit_beyond_the_disk(tmp_path):
    with pytest.raises(UserError, match=r"data\.cache_gb: 1e\+09 GB is more than"):
        ShardCache(tmp_path / "cache", 10**18, QUICK)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache: cannot be written"):
        cache(tmp_path)
