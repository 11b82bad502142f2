"""What a run writes of itself, on a disk that is full, away or broken: nothing is garbled, and nothing ends."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipdist.config import load_config
from clipdist.errors import Fault, UserError
from clipdist.monitor import metrics as metrics_module
from clipdist.monitor.loggers import Loggers
from clipdist.monitor.metrics import Metrics, Progress


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]


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
def test_a_full_disk_costs_lines_and_ends_no_run(small_disk, monkeypatch, capsys):
    monkeypatch.setattr(metrics_module, "TENSORBOARD_RETRY_S", 0.0)
    metrics = Metrics(small_disk, rank=0)
    metrics.settings({"a": 1}, "a: 1")
    for step in range(1, 301):
        if step == 100:
            fill(small_disk / "fill")
        if step == 200:
            (small_disk / "fill").unlink()
        metrics.write("train", step, step, loss=float(step), text="x" * 100)
    metrics.write("event", 300, 300, event="skip", reason="none")
    metrics.outcome()
    metrics.close()
    written = steps(small_disk)  # every line is whole
    assert written == sorted(written)
    assert {*range(1, 100), *range(200, 301)} <= set(written)
    assert len(written) < 300
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written (No space left on device): make room, or repair it") == 1
    assert said.count("TensorBoard's events cannot be written") == 1
    assert len(said.splitlines()) == 2
    shown = [scalar.step for scalar in shown_losses(small_disk)]
    assert set(range(1, 90)) | set(range(201, 301)) <= set(shown)


def test_a_line_that_the_disk_cuts_short_is_removed(small_disk):
    metrics = Metrics(small_disk, rank=0)
    metrics.write("train", 1, 1)
    fill(small_disk / "fill")
    metrics.write("train", 2, 2, text="x" * 10_000)  # what fits on the page of line 1 is written
    before = (small_disk / "metrics.jsonl").read_bytes()
    assert len(before.splitlines()) == 1
    assert before.endswith(b"}\n")
    (small_disk / "fill").unlink()
    metrics.write("train", 3, 3)
    metrics.close()
    assert steps(small_disk) == [1, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_goes_is_not_made_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = Metrics(folder, rank=0)
    metrics.write("train", 1, 1, loss=1.0)
    folder.rename(tmp_path / "away")
    folder.mkdir()  # an empty mount point
    metrics.write("train", 2, 2, loss=2.0)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    (tmp_path / "away").rename(folder)
    metrics.write("train", 3, 3, loss=3.0)
    metrics.close()
    assert steps(folder) == [1, 3]
    assert [point.step for point in shown_losses(folder)] == [1, 3]
    assert "metrics.jsonl cannot be written (No such file or directory)" in capsys.readouterr().err


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
        file.write(b'{"type": "train", \xff' + b"x" * 200_000)  # cut short, and no text
    metrics = Metrics(tmp_path, rank=0, start_step=2)
    assert metrics.validated_at == 2
    metrics.write("val", 3, 3)
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3]


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
        progress.log("x" * 100_000)
        progress.show(1, {"loss": 1.0})
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()  # the test's stream did refuse
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


LOGGERS = Path(__file__).parents[1] / "loggers"  # modules that stand in for the packages


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A function that logs a short run named by the words, and returns what the packages were called with."""
    monkeypatch.syspath_prepend(LOGGERS)
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("LOGGER_CALLS", str(tmp_path / "calls"))

    def run(*losses, ended_well=True, name="one", start_step=0):
        (tmp_path / "calls").write_text("")
        address = "https://user:secret@host/x.tar?sig=secret"
        words = [
            f"run.root={tmp_path}",
            f"run.name={name}",
            "run.logger=[wandb,mlflow,trackio]",
            f"data.train={address}",
        ]
        config = load_config(None, words)
        config.run.dir.mkdir(exist_ok=True)
        metrics = Metrics(config.run.dir, 0, start_step, Loggers(config))
        metrics.settings({}, "")
        for step, loss in enumerate(losses, start=start_step + 1):
            metrics.write("train", step, step, loss=loss)
            metrics.write("event", step, step, event="skip")
        metrics.image("val/retrieval", Image.new("RGB", (8, 4)), 1)
        if ended_well:
            metrics.outcome()
        metrics.close()
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    yield run
    for name in ("wandb", "mlflow", "trackio"):
        sys.modules.pop(name, None)


def of(calls, name):
    return [call for call in calls if call["call"] == name]


def test_loggers_go_on_with_the_run_that_they_began(logged, tmp_path):
    first = logged(3.0, 2.0, ended_well=False)
    (begun,) = of(first, "wandb.init")
    assert (begun["project"], begun["name"], begun["dir"]) == ("clipdist", "one", str(tmp_path / "one"))
    assert begun["config"]["data.train"] == ["https://host/x.tar"]
    assert begun["config"]["optim.lr"] == 5e-4
    logs = [call["values"] for call in of(first, "wandb.log")]
    image = {"val/retrieval": "image of 8 x 4", "step": 1}
    assert logs == [{"train/loss": 3.0, "step": 1}, {"train/loss": 2.0, "step": 2}, image]
    assert [call["values"] | {"step": call["step"]} for call in of(first, "mlflow.metrics")] == logs[:2]
    assert of(first, "wandb.finish")[0]["exit_code"] == 1
    assert of(first, "mlflow.set_terminated")[0]["status"] == "KILLED"
    assert [call["values"] | {"step": call["step"]} for call in of(first, "trackio.log")] == logs
    (named,) = of(first, "trackio.init")
    assert named["name"].startswith("one-")
    assert (named["project"], named["config"], named["resume"]) == ("clipdist", begun["config"], "allow")
    assert "secret" not in str(first)
    second = logged(1.0, start_step=1)
    assert of(second, "wandb.init")[0]["id"] == begun["id"]
    assert of(second, "mlflow.update_run")[0]["run_id"] == "made-by-mlflow"
    assert of(second, "mlflow.create_run") == []
    assert of(first, "mlflow.params")[0]["values"]["optim.lr"] == "0.0005"
    assert of(second, "mlflow.params") == []
    assert of(second, "wandb.log")[0]["values"]["step"] == 2
    assert of(second, "wandb.finish")[0]["exit_code"] == 0
    assert of(second, "mlflow.set_terminated")[0]["status"] == "FINISHED"
    assert of(second, "trackio.init")[0]["name"] == named["name"]
    assert len(of(second, "trackio.finish")) == 1


def test_a_logger_that_fails_ends_no_run(logged, tmp_path, capsys):
    calls = logged(3.0, -1, 2.0)
    assert [call["values"]["train/loss"] for call in of(calls, "wandb.log")] == [3.0]
    assert len(of(calls, "mlflow.metrics")) == 3
    said = capsys.readouterr().err
    assert said == "note: run.logger=wandb: the server is away; training goes on without it until the next start\n"
    assert steps(tmp_path / "one") == [1, 1, 2, 2, 3, 3]
    with pytest.raises(
        UserError, match=r"run\.logger=wandb: cannot begin: No API key configured\. Use `wandb login`; with"
    ):
        logged(1.0, name="no key")
    (tmp_path / "no key" / "loggers.json").write_text('{"wandb": "abc"}')  # it began once: the network is away now
    assert of(logged(1.0, name="no key"), "mlflow.metrics")
