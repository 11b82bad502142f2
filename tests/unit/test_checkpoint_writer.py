"""Writing a checkpoint while the storage fails: a full disk, a folder that is gone for a while, a rank that cannot."""

from __future__ import annotations

import errno
import os
import subprocess
import threading

import pytest
import torch

from clipdist.checkpoint import writer as checkpoint
from clipdist.checkpoint.format import MANIFEST, Manifest, Piece, checkpoint_dir, list_checkpoints
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.writer import CheckpointWriter, SaveFailed, write_part

NUMEL = 1 << 18  # of fp32: 1 MiB


def pieces(step, rank=0, world=1):
    return [Piece("param/a", (world * NUMEL,), rank * NUMEL, torch.full((NUMEL,), float(step)))]


def save(run_dir, step, rank=0, world=1, retry_s=0.0, attempt="t"):
    writer = CheckpointWriter(run_dir, RetentionPolicy(last=2), rank, retry_s)
    writer.write(pieces(step, rank, world), Manifest(step, step, step, world, {}, {}, {}), f"{attempt}-{step}")


def good(run_dir):
    """Steps of the complete checkpoints, each of them verified and compared."""
    for folder in list_checkpoints(run_dir):
        reader = CheckpointReader(folder)
        reader.verify()
        assert reader.read("param/a").eq(reader.manifest.step).all()
    return [CheckpointReader(folder).manifest.step for folder in list_checkpoints(run_dir)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small file system can be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(small_disk):
    save(small_disk, 1)
    write_part(checkpoint_dir(small_disk, 9), 0, pieces(9) + [Piece("param/b", (NUMEL,), 0, torch.zeros(NUMEL))], "x")
    save(small_disk, 2)  # 3 of 4 MiB were taken, 2 by a writer that was interrupted
    assert good(small_disk) == [1, 2]
    assert not checkpoint_dir(small_disk, 9).exists()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 << 19))  # half a MiB is left
    with pytest.raises(SaveFailed, match="No space left"):
        save(small_disk, 3, retry_s=0.3)
    assert good(small_disk) == [1, 2]
    assert not checkpoint_dir(small_disk, 3).exists()
    ballast.unlink()
    save(small_disk, 4)
    assert good(small_disk) == [2, 4]


def test_a_disk_that_is_full_for_a_moment_is_waited_for(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(7 << 19))
    timer = threading.Timer(0.4, ballast.unlink)
    timer.start()
    save(small_disk, 1, retry_s=60)
    timer.join()
    assert good(small_disk) == [1]


def test_a_run_folder_that_vanishes_and_comes_back(tmp_path):
    run_dir, away = tmp_path / "run", tmp_path / "away"
    run_dir.mkdir()
    save(run_dir, 1)
    run_dir.rename(away)
    with pytest.raises(SaveFailed, match="gone"):
        save(run_dir, 2, retry_s=0.3)
    assert not run_dir.exists()  # nothing was written in its place
    timer = threading.Timer(0.5, away.rename, (run_dir,))
    timer.start()
    save(run_dir, 3, retry_s=60)
    timer.join()
    assert good(run_dir) == [1, 3]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.ETIMEDOUT])
def test_what_fails_for_a_while_is_tried_again(tmp_path, monkeypatch, code):
    """Every sync of a save fails once: of data, notes, folders and the manifest."""
    fsync, failed = os.fsync, []

    def failing(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path not in failed:
            failed.append(path)
            raise OSError(code, os.strerror(code), path)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    monkeypatch.setattr("clipdist.checkpoint.writer.FIRST_PAUSE_S", 0.01)
    save(tmp_path, 1, retry_s=60)
    assert good(tmp_path) == [1]
    names = {os.path.basename(path) for path in failed}
    assert {
        "rank-00000.safetensors",
        "rank-00000.json.tmp",
        "manifest.json.tmp",
        "step-00000001",
        "checkpoints",
    } <= names


def test_nothing_is_tried_again_in_a_hurry(tmp_path):
    writer = CheckpointWriter(tmp_path / "gone", RetentionPolicy(), 0, retry_s=600)
    threading.Timer(0.2, writer.hurry.set).start()
    with pytest.raises(SaveFailed, match="gone"):
        writer.write(pieces(1), Manifest(1, 1, 1, 1, {}, {}, {}), "t")


def test_the_others_hear_of_a_rank_that_cannot_write(tmp_path, monkeypatch):
    save_all(tmp_path, 1)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "_write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad")))
        with pytest.raises(SaveFailed, match="bad"):
            save(tmp_path, 2, rank=1, world=2)
    with pytest.raises(SaveFailed, match=r"rank 1: .*bad"):
        save(tmp_path, 2, rank=0, world=2)
    assert not checkpoint_dir(tmp_path, 2).exists()
    assert good(tmp_path) == [1]


def test_a_rank_that_is_never_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr("clipdist.checkpoint.writer.OTHERS_S", 0.1)
    with pytest.raises(SaveFailed, match=r"rank-00001.*did not come"):
        save(tmp_path, 2, rank=0, world=2)
    assert not checkpoint_dir(tmp_path, 2).exists()


def test_a_step_that_fails_when_saved_again_stays_as_it_was(tmp_path, monkeypatch):
    save_all(tmp_path, 1)
    before = sorted(path.name for path in checkpoint_dir(tmp_path, 1).iterdir())
    monkeypatch.setattr("clipdist.checkpoint.writer.OTHERS_S", 0.1)
    with pytest.raises(SaveFailed):
        save(tmp_path, 1, rank=0, world=2, attempt="again")
    assert good(tmp_path) == [1]
    assert sorted(path.name for path in checkpoint_dir(tmp_path, 1).iterdir()) == before
    assert MANIFEST in before


def save_all(run_dir, step):
    for rank in (1, 0):
        save(run_dir, step, rank, world=2)
