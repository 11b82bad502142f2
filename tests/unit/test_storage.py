"""storage.py: a file is replaced whole or stays, a lock has one holder. And joined_ranks without a launcher."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist

from clipdist.distributed.collectives import all_gather_uneven, gather_json, sum_over_ranks
from clipdist.distributed.rank import joined_ranks
from clipdist.storage import lock, replacing, write_text


def interrupted_write(path, as_folder=False):
    with replacing(path) as temporary:
        if as_folder:
            temporary.mkdir()
        (temporary / "file" if as_folder else temporary).write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{}, {"durable": True}, {"shared": True}])
def test_a_file_is_replaced(tmp_path, settings):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path, **settings) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)

    def refuse(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        write_text(path, "new", durable=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_is_put_in_place_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(folder, as_folder=True)
    assert os.listdir(tmp_path) == []
    with replacing(folder) as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert os.listdir(folder) == ["file"]


def test_a_lock_has_one_holder_and_is_waited_for(tmp_path):
    path = tmp_path / ".lock"
    with open(path, "w") as first, open(path) as second:
        lock(first)
        began = time.monotonic()
        with pytest.raises(BlockingIOError):
            lock(second, shared=True, wait_s=0.3)
        assert time.monotonic() - began >= 0.3
        threading.Timer(0.3, first.close).start()
        lock(second, wait_s=60)


def test_a_process_without_a_launcher_is_a_group_of_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for error in (None, ValueError):
        try:
            with joined_ranks("cpu") as dist_env:
                assert (dist_env.rank, dist_env.world_size) == (0, 1)
                assert dist.get_world_size() == 1
                assert gather_json({"a": [1]}) == [{"a": [1]}]
                ours = dist.get_rank() + sum_over_ranks(all_gather_uneven(torch.ones(3))[0])
                assert ours.tolist() == [1, 1, 1]
                if error:
                    raise error
        except ValueError:
            pass
        assert not dist.is_initialized()
        assert "RANK" not in os.environ
