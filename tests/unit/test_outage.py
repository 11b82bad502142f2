"""Storage that goes away under a loader: it comes back, or does not; and nothing keeps a process from ending."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pairs import Lengths, write_pairs

from clipdist.config import Data
from clipdist.data import reader as reader_module
from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import make_part, write_parts
from clipdist.data.index import load_index
from clipdist.data.loader import Batch, Interrupted, Loader, open_loader
from clipdist.data.order import OrderKey
from clipdist.data.reader import Reader
from clipdist.data.views import image_view
from clipdist.errors import Fault


def open_pairs(source: Path, **settings) -> Loader:
    cfg = Data(**{"threads": 2, "retry_s": 30, "prefetch": 1, **settings})
    key = OrderKey(0, 10, 1, 10)
    return open_loader(Catalog.open([str(source)]), key, Lengths(), cfg, views=[image_view(cfg, 8)], rank=0, world=1)


def drain(loader: Loader, interrupted: Callable[[], bool] | None = None) -> list[Batch]:
    """Batches until one does not come; the error is that of the last."""
    batches = []
    try:
        while True:
            batches.append(loader.next(interrupted))
    except (Fault, Interrupted) as error:
        error.batches = batches
        raise


def same(ours: Batch, theirs: Batch) -> bool:
    tensors = [(batch.images["image"], batch.tokens, batch.valid["text"], batch.sample_id) for batch in (ours, theirs)]
    return ours.position == theirs.position and all(map(torch.equal, *tensors))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pairs(tmp_path / "data", 60, per_shard=6)


def move_back_after(folder: Path, seconds: float) -> threading.Timer:
    """Moves the folder away now, and back later."""
    away = folder.with_name("away")
    folder.rename(away)
    timer = threading.Timer(seconds, lambda: away.rename(folder))
    timer.start()
    return timer


def end_of_wait(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


@pytest.mark.parametrize("way", ["folder", "stage", "consolidated"])
def test_batches_are_the_same_when_it_comes_back(folder, tmp_path, way, capfd):
    settings = {"stage": True, "cache": str(tmp_path / "cache"), "cache_gb": 2e-4} if way == "stage" else {}
    source = folder
    if way == "consolidated":
        source = folder / "all.index.zip"
        write_parts(source, map(make_part, [load_index(tar) for tar in sorted(folder.glob("*.tar"))]))
    undisturbed, disturbed = open_pairs(source), open_pairs(source, **settings)
    assert same(disturbed.next(), undisturbed.next())
    timer = move_back_after(folder, 2)
    ours = [disturbed.next() for _ in range(5)]
    timer.join()
    assert all(same(batch, undisturbed.next()) for batch in ours)
    said = capfd.readouterr().err
    assert "cannot be read (" in said
    assert "can be read again after" in said
    shards = [line.split(": ")[1] for line in said.splitlines() if "cannot be read" in line]
    assert len(set(shards)) == len(shards)
    undisturbed.close()
    disturbed.close()


def test_patience_ends_with_the_shards_name(folder):
    loader = open_pairs(folder, retry_s=0.5)
    loader.next()
    folder.rename(folder.with_name("away"))
    with pytest.raises(Fault, match=r"data/0000\d\.tar: cannot be read, tried for 0\.5 s .*No such file") as caught:
        drain(loader)
    assert loader.position == 1 + len(caught.value.batches)
    assert len(str(caught.value).splitlines()) == 1
    loader.close()
    loader.close()


def test_an_interruption_ends_the_wait_and_no_more(folder):
    loader, undisturbed = open_pairs(folder), open_pairs(folder)
    assert same(loader.next(), undisturbed.next())
    away = folder.rename(folder.with_name("away"))
    with pytest.raises(Interrupted) as caught:
        drain(loader, lambda: True)
    away.rename(folder)
    assert all(same(batch, undisturbed.next()) for batch in caught.value.batches)  # what is ready comes in any case
    assert loader.position == undisturbed.position
    assert same(loader.next(lambda: False), undisturbed.next())
    loader.close()
    undisturbed.close()


def test_a_stale_descriptor_is_replaced(folder, monkeypatch):
    reader = Reader(Catalog.open([str(folder)]), retry_s=5)
    before = reader.sample(0).image()
    (stale,) = (held.number for held in reader._open.values())
    pread = os.pread

    def pread_of_remounted(descriptor: int, size: int, offset: int) -> bytes:
        if descriptor == stale and not opened_again:
            raise OSError(116, "Stale file handle")
        return pread(descriptor, size, offset)

    opened_again: list[str] = []
    opening = os.open
    monkeypatch.setattr(reader_module.os, "pread", pread_of_remounted)
    monkeypatch.setattr(
        reader_module.os, "open", lambda path, *flags: opened_again.append(str(path)) or opening(path, *flags)
    )
    assert reader.sample(0).image() == before
    assert any(path.endswith("00000.tar") for path in opened_again)
    reader.close()


@pytest.mark.parametrize("what", ["size", "time"])
def test_a_shard_that_was_changed_meanwhile_is_refused(folder, what):
    reader = Reader(Catalog.open([str(folder)]), retry_s=5)
    tar = folder / "00000.tar"
    if what == "size":
        stat = tar.stat()
        with open(tar, "ab") as file:
            file.write(bytes(512))
        os.utime(tar, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    else:
        os.utime(tar, ns=(1, 1))
    with pytest.raises(Fault, match=r"00000\.tar: has changed since it was opened"):
        reader.sample(0).image()
    assert reader.sample(6).image()  # of another shard
    reader.close()


def test_a_copy_of_another_time_is_not_refused(folder):
    write_parts(folder / "all.index.zip", map(make_part, [load_index(tar) for tar in sorted(folder.glob("*.tar"))]))
    os.utime(folder / "00000.tar", ns=(1, 1))
    catalog = Catalog.open([str(folder / "all.index.zip")])
    reader = Reader(catalog, retry_s=5)
    assert reader.sample(0).image()
    catalog._tables.clear()  # as when many other tables were wanted
    reader.close()
    reader = Reader(catalog, retry_s=5)
    assert reader.sample(0).image()
    reader.close()


def test_closing_does_not_wait_for_a_read_that_hangs(folder, monkeypatch):
    loader = open_pairs(folder)
    loader.next()
    released = threading.Event()
    monkeypatch.setattr(loader.reader, "samples", lambda sample_ids: released.wait(60))
    with pytest.raises(Interrupted):
        drain(loader, lambda: True)
    assert end_of_wait(loader.close) < 10  # of the 60 that the read takes; two seconds on an idle machine
    released.set()


HANGS = """
import sys, threading, time
from clipdist.data.workers import Workers
workers = Workers(2, "test")
workers.submit(threading.Event().wait)
assert workers.submit(lambda: 42).result() == 42
if sys.argv[1] == "close":
    workers.close(0.1)
print("left", flush=True)
"""


@pytest.mark.parametrize("way", ["close", "leave"])
def test_a_process_ends_although_a_thread_hangs(way):
    done = subprocess.run([sys.executable, "-c", HANGS, way], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
