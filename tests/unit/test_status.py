"""launch/status.py: the state of runs from what lies in their folders, and from Slurm where it answers."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipdist.checkpoint.format import MANIFEST, checkpoint_dir
from clipdist.errors import UserError
from launch import status

ROOT = Path(__file__).resolve().parents[2]
OLD = time.time() - 10_000


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def write_run(folder: Path, steps: int = 3, events: tuple = (), log: str = "", began: float = OLD) -> Path:
    """A run of 10 steps in all that has logged so many, one a second, and then the events."""
    folder.mkdir(parents=True)
    rows = [
        {"type": "train", "step": n, "time": began + n, "loss": 1.0, "samples_per_s": 16.0} for n in range(1, steps + 1)
    ]
    rows += [{"type": "event", "step": steps, "time": began + steps, **event} for event in events]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("data:\n  steps: 99\ntrain:\n  epochs: 1\n  steps: 10\n  samples: 0\n")
    write_log(folder, log)
    return folder


def write_log(folder: Path, text: str) -> None:
    log = folder / "submitit/7_0_log.out"
    log.parent.mkdir(exist_ok=True)
    log.write_text(text)
    (folder / "jobs.jsonl").write_text(json.dumps({"job": "7", "log": str(log), "snapshot": "code/abc"}) + "\n")


def answer(folder: Path, monkeypatch, text: str) -> None:
    """A squeue that says so."""
    (folder / "squeue").write_text(f"#!/bin/sh\necho '{text}'\n")
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")


def test_a_run_that_is_written_to_is_running(tmp_path):
    run = write_run(tmp_path / "run", steps=4, began=time.time() - 4)
    found = status.status(run)
    assert (found.state, found.step, found.steps, found.samples_per_s) == ("running", 4, 10, 16.0)
    assert found.eta_s == pytest.approx(6)
    assert (found.job, found.snapshot, found.logs) == ("7", "code/abc", [str(run / "submitit/7_0_log.out")])


def test_a_held_lock_says_that_it_runs(tmp_path):
    run = write_run(tmp_path / "run")
    assert status.status(run).state == "unknown"
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert status.status(run).state == "running"


def test_a_direct_start_that_was_killed_a_moment_ago_does_not_run_any_more(tmp_path):
    run = write_run(tmp_path / "run", began=time.time() - 4)
    (run / ".lock").touch()
    (run / "environment.json").write_text('{"host": "another"}')
    assert status.status(run).state == "running"  # whether locks reach across machines is not known
    (run / "environment.json").write_text(json.dumps({"host": platform.node()}))
    found = status.status(run)
    assert (found.state, found.error) == ("failed", status.NO_WORDS)
    with open(run / "jobs.jsonl") as jobs:  # of launch/submit.py, which starts the ranks again
        fcntl.flock(jobs, fcntl.LOCK_EX)
        assert status.status(run).state == "running"


def test_steps_are_known_from_checkpoints_where_none_was_logged(tmp_path):
    run = write_run(tmp_path / "run", steps=0, events=({"event": "interrupted", "step": 2},))
    assert status.status(run).step == 2
    checkpoint_dir(run, 4).mkdir(parents=True)
    (checkpoint_dir(run, 4) / MANIFEST).touch()
    assert "interrupted  step 4/10" in status.describe(status.status(run))[0]


@pytest.mark.parametrize(
    ("steps", "events", "log", "state"),
    [
        (10, (), "", "finished"),
        (3, (), "finished 3 steps; see runs\n", "finished"),
        (3, ({"event": "interrupted"},), "", "interrupted"),
        (3, ({"event": "fault", "error": "no memory"},), "", "failed"),
        (10, ({"event": "fault", "error": "no memory"},), "", "failed"),
        (3, ({"event": "fault", "error": "no memory"}, {"event": "restart"}), "", "unknown"),
        (3, (), "[rank0]: Traceback (most recent call last):\n[rank0]:   File x\n[rank0]: ValueError: bad\n", "failed"),
        (3, (), "Traceback (most recent call last):\n  File x\nValueError: bad\n", "failed"),
        (3, (), "error: rank 1 on node2 ended without a word\n", "failed"),
        (3, (), "error: old\nfault (exit code 1): job 7 starts again, restart 1 of 3\nstep 3/10\n", "unknown"),
    ],
)
def test_how_a_run_ended_is_read_from_its_folder(tmp_path, steps, events, log, state):
    found = status.status(write_run(tmp_path / "run", steps, events, log))
    assert found.state == state
    if state == "failed":
        assert found.error in ("no memory", "ValueError: bad", "error: rank 1 on node2 ended without a word")


@pytest.mark.parametrize(
    ("said", "state"),
    [("PENDING Resources", "queued"), ("RUNNING None", "running"), ("CANCELLED None", "interrupted")],
)
def test_slurm_knows_what_is_queued_and_running(tmp_path, monkeypatch, said, state):
    run = write_run(tmp_path / "run")
    answer(tmp_path, monkeypatch, said)
    found = status.status(run)
    assert (found.state, found.slurm) == (state, said.removesuffix(" None"))


def test_a_job_that_left_with_a_checkpoint_has_not_failed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    answer(tmp_path, monkeypatch, "FAILED NonZeroExitCode")
    assert status.status(run).state == "failed"
    (run / "submitit/7.code").write_text("75\n")
    assert status.status(run).state == "interrupted"


def test_a_job_that_is_not_queued_again_any_more_has_failed(tmp_path):
    """Its ranks left with a checkpoint, but the batch script's last word is that it made no progress."""
    said = "fault (no new checkpoint): job 7 was warned of its end 4 times in a row\n"
    found = status.status(write_run(tmp_path / "run", events=({"event": "interrupted"},), log=said))
    assert (found.state, found.error) == ("failed", said.strip())


def test_events_and_faults_are_counted_and_the_last_error_is_told(tmp_path):
    events = ({"event": "restart"}, {"event": "rollback"}, {"event": "skip"}, {"event": "skip"})
    run = write_run(tmp_path / "run", events=events, log="error: first\nstep 3/10\nerror: last words\n")
    (run / "submitit/7.faults").write_text("then exit code 1\n")
    found = status.status(run)
    assert (found.restarts, found.faults, found.rollbacks, found.skips) == (1, 1, 1, 2)
    assert found.error == "error: last words"


def test_a_half_written_last_line_and_an_empty_folder_do_no_harm(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"type": "train", "step": 4, "ti')
    assert status.status(run).step == 3
    (tmp_path / "empty").mkdir()
    found = status.status(tmp_path / "empty")
    assert (found.state, found.step, found.logs) == ("unknown", None, [])


def test_several_runs_by_pattern_as_one_json_object_without_torch(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / name)
    (tmp_path / "runs/no run").mkdir()
    program = "import sys, launch.status as s; s.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", program, str(tmp_path / "runs/*"), "--json", "--follow"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    last = json.loads(ended.stdout.splitlines()[-1])
    assert [Path(run["run"]).name for run in last["runs"]] == ["a", "b"]
    (tmp_path / "runs/a/checkpoints").mkdir()
    assert status.find_runs([str(tmp_path / "runs/a/checkpoints")]) == [tmp_path / "runs/a"]
    with pytest.raises(UserError, match="no run folder"):
        status.find_runs([str(tmp_path / "nothing*")])
