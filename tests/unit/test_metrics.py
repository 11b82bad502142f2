"""What a run tells of itself, on a disk that is full, away or broken: nothing is garbled, and nothing ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdist.errors import Fault
from clipdist.monitor import board as board_module
from clipdist.monitor import line_file as module
from clipdist.monitor.line_file import LineFile
from clipdist.monitor.metrics import Metrics, Progress


class Disk:
    """Takes `room` bytes, then refuses with `code`."""

    def __init__(self, monkeypatch):
        self.room, self.code, self._write = 10**9, errno.ENOSPC, os.write
        monkeypatch.setattr(module.os, "write", self.write)

    def write(self, descriptor, data):
        taken = data[: self.room]
        if not taken:
            raise OSError(self.code, os.strerror(self.code))
        self.room -= len(taken)
        return self._write(descriptor, taken)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_lines_wait_for_room_and_come_in_order(tmp_path, disk, capsys, code):
    path, disk.code = tmp_path / "lines", code
    file = LineFile(path)
    for number in range(100):
        if number == 20:
            disk.room = 4  # a line is cut short
        if number == 50:
            disk.room = 30  # some go, the next is cut short
        if number == 80:
            disk.room = 10**9
        file.write(f"line {number}\n")
    assert path.read_text().splitlines() == [f"line {number}" for number in range(100)]
    file.close()
    said = capsys.readouterr().err
    assert said.count("cannot be written") == said.count("can be written again") == 1
    assert os.strerror(code) in said
    assert "lost" not in said


def test_what_was_cut_short_is_removed_at_once_when_it_can_be(tmp_path, disk):
    path = tmp_path / "lines"
    file = LineFile(path)
    file.write("first\n")
    disk.room = 3
    file.write("second\n")
    file.write("third\n")
    assert path.read_text() == "first\n"


def test_too_many_lines_are_counted(tmp_path, disk, monkeypatch, capsys):
    monkeypatch.setattr(module, "MOST_WAITING", 5)
    file = LineFile(tmp_path / "lines")
    disk.room = 0
    for number in range(12):
        file.write(f"{number}\n")
    disk.room = 4
    file.close()
    assert (tmp_path / "lines").read_text() == "7\n8\n"
    assert "10 records are lost (No space left on device)" in capsys.readouterr().err


def test_a_folder_that_goes_is_not_made_anew(tmp_path, disk):
    folder = tmp_path / "run"
    folder.mkdir()
    file = LineFile(folder / "lines")
    disk.room, disk.code = 0, errno.ESTALE
    file.write("a\n")
    folder.rename(tmp_path / "away")
    folder.mkdir()  # an empty mount point
    disk.room = 10**9
    file.write("b\n")
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    file.write("c\n")
    assert (folder / "lines").read_text() == "a\nb\nc\n"


def test_a_long_line_that_was_cut_short_is_removed(tmp_path):
    path = tmp_path / "lines"
    path.write_text("whole\n" + "x" * 200_000)
    file = LineFile(path)
    file.write("next\n")
    assert path.read_text() == "whole\nnext\n"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small file system can be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's thread
def test_a_full_disk_ends_no_run(small_disk, monkeypatch, capsys):
    monkeypatch.setattr(board_module, "AGAIN_S", 0.0)
    metrics = Metrics(small_disk, rank=0)
    metrics.settings({"a": 1}, "a: 1")
    for step in range(1, 301):
        if step == 100:
            fill(small_disk / "fill")
        if step == 200:
            (small_disk / "fill").unlink()
        metrics.write("train", step, step, loss=float(step), text="x" * 100)
    metrics.write("event", 300, 300, event="skip", reason="none")
    metrics.outcome({"loss": 1.0})
    metrics.close()
    lines = (small_disk / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 301), 300]
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl: cannot be written (No space left on device)") == 1
    assert said.count("TensorBoard's events cannot be written") == 1
    shown = [scalar.step for scalar in shown_losses(small_disk)]
    assert set(range(1, 90)) | set(range(201, 301)) <= set(shown)


def fill(path):
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def shown_losses(folder):
    """As TensorBoard reads them, file by file."""
    found = []
    for path in sorted(folder.glob("events.*")):
        accumulator = EventAccumulator(str(path)).Reload()
        if "train/loss" in accumulator.Tags()["scalars"]:
            found += accumulator.Scalars("train/loss")
    return found


def test_records_past_the_resumed_step_go(tmp_path):
    metrics = Metrics(tmp_path, rank=0)
    for step in (1, 2, 3):
        metrics.write("val", step, step)
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"type": "train", \xff')  # cut short, and no text
    metrics = Metrics(tmp_path, rank=0, start_step=2)
    assert metrics.validated_at == 2
    metrics.write("val", 3, 3)
    metrics.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_at_the_start_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"type": "val", "step": 1}\n')

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(Fault, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
        Metrics(tmp_path, rank=0)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_log_that_takes_nothing_ends_no_run(monkeypatch):
    progress = Progress(10, 0, rank=0)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        progress.say("x" * 100_000)
        progress.show(1, {"loss": 1.0})
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()  # the test's stream did refuse
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
