"""--cluster local with a stand-in for the trainer: exit codes, restarts, Ctrl-C, and the code that runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from stand_in import make_repository, write_trainer

LIMIT_S = 120


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With little patience for ranks that outlive a failed one: the stand-ins never end by themselves."""
    folder = make_repository(tmp_path / "repository")
    set_grace(folder, "30.0", "0.5")
    return folder


def set_grace(repository: Path, old: str, new: str) -> None:
    file = repository / "launch/local_job.py"
    before = file.read_text()
    assert f"GRACE_S = {old}" in before
    file.write_text(before.replace(f"GRACE_S = {old}", f"GRACE_S = {new}"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder, in which a file named end says how the trainer shall end."""
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def launch(repository: Path, shards: Path, run: Path) -> Iterator:
    """Starts launch/submit.py with two ranks here; ends what a test left running."""
    started: list[subprocess.Popen] = []

    def start(*more: str) -> subprocess.Popen:
        words = ["--config", "configs/tiny.yaml", "--cluster", "local", "--gpus", "2", f"run.root={run.parent}"]
        process = subprocess.Popen(
            [sys.executable, "launch/submit.py", *words, f"data.train={shards}/train", *more],
            cwd=repository,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [process.pid, *(int(file.read_text()) for file in run.parent.glob("*/pid-*"))]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate()


def wait_for_ranks(run: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not all((run / f"pid-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_all_start_again_once_the_other_ranks_have_written_their_checkpoint(launch, run, repository):
    set_grace(repository, "0.5", "30.0")
    (run / "end").write_text("1:die once")
    process = launch()
    wait_for_ranks(run)
    lost, other = (int((run / f"pid-{rank}").read_text()) for rank in (1, 0))
    deadline = time.monotonic() + LIMIT_S
    while psutil.pid_exists(lost):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    assert psutil.pid_exists(other)
    (run / "end").write_text("done")
    said, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    assert "rank 1 failed: exit code -9; see " in errors
    assert "rank 0 failed" not in errors
    assert "starting again, restart 1 of 3" in errors
    assert "begin one restarts 1" in said


def test_the_restarts_are_limited(launch, run):
    (run / "end").write_text("1:die")
    process = launch("--max-restarts", "1")
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert errors.count("rank 1 failed: exit code -9") == 2
    assert errors.count("rank 0 failed: exit code -9") == 2  # it would wait for ever
    assert errors.count("starting again") == 1


def test_bad_input_of_one_rank_ends_all_without_a_restart(launch, run):
    (run / "end").write_text("1:refuse")
    process = launch()
    said, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (2, "error: no such thing\n")
    assert "done:" not in said


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (signal.SIGINT, ()),
        (signal.SIGTERM, ("--setup", "export A=${HOME}/a")),  # a shell starts the ranks
        (signal.SIGHUP, ()),
    ],
)
def test_a_stop_ends_all_ranks_with_a_checkpoint(launch, run, number, more):
    process = launch(*more)
    wait_for_ranks(run)
    time.sleep(0.5)  # the flag is set up right before the ranks note their process ids; this is for the launcher
    process.send_signal(number)
    said, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (75, "")
    assert "writing a checkpoint" in said
    assert "stopped by SIGTERM" in said
    assert not any(psutil.pid_exists(int((run / f"pid-{rank}").read_text())) for rank in (0, 1))


def test_ranks_save_and_end_when_submit_itself_is_killed(launch, run):
    process = launch("--setup", "export A=${HOME}/a")
    wait_for_ranks(run)
    process.kill()
    deadline = time.monotonic() + LIMIT_S
    logs = list(run.glob("submitit/*_log.out"))
    assert len(logs) == 2
    while not all("stopped by SIGTERM" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stop_before_training_is_no_fault(launch, run):
    """Python has not begun to run in the ranks: a shell still runs the setup lines."""
    process = launch("--setup", f"touch {run}/setup; exec sleep 600")
    deadline = time.monotonic() + LIMIT_S
    while not (run / "setup").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (75, "")


def test_the_job_runs_the_code_of_its_submission(launch, run, repository):
    """The first start is killed, the code is changed meanwhile, and the restart still runs what was submitted."""
    process = launch()
    wait_for_ranks(run)
    write_trainer(repository, "two")
    (repository / "configs/tiny.yaml").write_text("device: nonsense\n")
    (run / "end").write_text("done")
    os.kill(int((run / "pid-0").read_text()), signal.SIGKILL)
    said, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    assert "begin one restarts 1" in said
    assert "begin two" not in said
    (line,) = (run / "jobs.jsonl").read_text().splitlines()
    snapshot = Path(json.loads(line)["snapshot"])
    assert snapshot.parent == run / "code"
    assert "'one'" in (snapshot / "clipdist/train.py").read_text()


def test_a_sweep_runs_one_after_another(launch, run):
    for lr in ("1e-3", "2e-3"):
        folder = run.parent / f"tiny-lr{lr}"
        folder.mkdir()
        (folder / "end").write_text("done")
    process = launch("--sweep", "optim.lr=1e-3,2e-3", "data.seed=5")
    said, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, errors
    begun = [line for line in said.splitlines() if line.startswith("begin")]
    assert begun == ["begin one restarts 0 lr 0.001", "begin one restarts 0 lr 0.002"]


@pytest.mark.parametrize(
    ("end", "environment", "code"),
    [("done", {"RANK": "0"}, 0), ("refuse", {"RANK": "0"}, 2), ("done", {}, 1)],  # the stand-in fails without RANK
)
def test_debugging_is_one_process_and_an_exception_opens_pdb(repository, shards, run, end, environment, code):
    (run / "end").write_text(end)
    words = [
        "--config",
        "configs/tiny.yaml",
        "--cluster",
        "debug",
        f"run.root={run.parent}",
        f"data.train={shards}/train",
    ]
    ended = subprocess.run(
        [sys.executable, "launch/submit.py", *words],
        cwd=repository,
        env={name: value for name, value in os.environ.items() if name != "RANK"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ended.returncode == code, ended.stderr
    assert ("(Pdb)" in ended.stdout) == (code == 1)
    assert ("KeyError: 'RANK'" in ended.stderr) == (code == 1)
    assert (ended.stderr == "error: no such thing\n") == (code == 2)
