"""launch/after.sh and clipdist/fault_tolerance/slurm.py: which endings of a job lead to another start."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from clipdist.fault_tolerance.slurm import note_exit, note_start, requeue, restarts

ROOT = Path(__file__).resolve().parents[2]
RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None"
PREEMPTED = RUNNING.replace("PreemptTime=None", "PreemptTime=2026-01-01T01:00:00")
CANCELLED = RUNNING.replace("RUNNING", "CANCELLED")


@pytest.fixture
def after(tmp_path):
    """after.sh under a stand-in for scontrol: (exit code, the job that was queued again or "")."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/bash\n[ "$1" = show ] && cat {tmp_path}/state || echo "$2" >{tmp_path}/queued\n')
    program.chmod(0o755)

    def run(code: int, state: str = RUNNING, most: int = 1, **env: str) -> tuple[int, str]:
        (tmp_path / "state").write_text(f"{state} \n")
        queued = tmp_path / "queued"
        queued.unlink(missing_ok=True)
        given = {"PATH": f"{tmp_path}{os.pathsep}{os.defpath}", "SLURM_JOB_ID": "7"} | env
        words = ["bash", str(ROOT / "launch/after.sh"), str(code), str(tmp_path / "job"), str(most)]
        ended = subprocess.run(words, env=given, capture_output=True, text=True)
        (tmp_path / "errors").write_text(ended.stderr)
        return ended.returncode, queued.read_text().strip() if queued.exists() else ""

    run.errors = (tmp_path / "errors").read_text
    return run


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The environment of a rank in a batch job."""
    monkeypatch.setenv("CLIPDIST_JOB_FILES", str(tmp_path / "job"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def test_a_warned_job_is_queued_again_and_no_restart_is_used_up(after, job):
    assert requeue("SIGUSR2")
    for _ in range(3):
        assert after(75) == (75, "7")
    assert after(1) == (1, "7")  # still the first fault


def save(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def test_warnings_without_a_new_checkpoint_end_the_job(after, job, tmp_path):
    """A start that takes longer than the job's time would come again for ever."""
    run = tmp_path / "a run"
    save(run, 20)
    requeue("SIGUSR2")
    for step in (40, 60):  # with progress the count begins anew
        for _ in range(2):
            note_start(run)
            assert after(75, most=2) == (75, "7")
        note_start(run)
        save(run, step)
        assert after(75, most=2) == (75, "7")
    for _ in range(2):
        note_start(run)
        assert after(75, most=2) == (75, "7")
    assert after(75, most=2) == (1, "")
    assert "was warned of its end 3 times in a row before it had one" in after.errors()
    assert "launch.time_min" in after.errors()
    assert (tmp_path / "job.code").read_text() == "1\n"  # for launch/status.py
    assert not (tmp_path / "job.faults").exists()


def test_a_half_written_checkpoint_is_no_progress(after, job, tmp_path):
    requeue("SIGUSR2")
    note_start(tmp_path / "run")
    (tmp_path / "run/checkpoints/step-00000020").mkdir(parents=True)
    assert after(75, most=0) == (1, "")


def test_preemptions_do_not_count_however_early(after, job, tmp_path):
    requeue("SIGUSR2")
    note_start(tmp_path)
    assert [after(75, PREEMPTED, most=0) for _ in range(2)] == [(75, "7")] * 2
    assert after(140, PREEMPTED, most=0) == (75, "7")


def test_a_stop_that_the_user_asked_for_is_obeyed(after, job):
    assert not requeue("SIGTERM")
    assert not requeue("SIGINT")
    assert after(75) == (75, "")
    assert after(143, CANCELLED) == (143, "")


def test_a_preemption_without_a_warning_is_told_from_a_cancellation(after):
    assert after(75, PREEMPTED) == (75, "7")


def test_faults_restart_up_to_the_limit(after, tmp_path):
    assert [after(137, most=2) for _ in range(3)] == [(137, "7"), (137, "7"), (137, "")]
    assert len((tmp_path / "job.faults").read_text().splitlines()) == 2
    assert after(1, most=0) == (1, "")


@pytest.mark.parametrize("code", [0, 2])
def test_the_end_and_bad_input_are_final(after, code):
    assert after(code, PREEMPTED) == (code, "")


def test_the_first_rank_to_end_says_the_exit_code(after, job):
    """srun kills the others and returns the largest code."""
    note_exit(2)
    note_exit(75)
    assert after(143) == (2, "")


def test_a_warning_before_training_queues_again(after, tmp_path):
    assert after(140) == (75, "7")
    assert not (tmp_path / "job.faults").exists()
    assert after(138) == (1, "")  # twice in a row, and one restart is granted


def test_of_an_array_one_element_is_queued_again(after):
    assert after(1, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3") == (1, "7_3")


def test_outside_of_a_batch_job_nothing_is_noted(monkeypatch):
    monkeypatch.delenv("CLIPDIST_JOB_FILES", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not requeue("SIGUSR2")
    note_exit(2)


def test_restarts_are_those_of_slurm_or_of_the_local_launcher(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.delenv("CLIPDIST_RESTARTS", raising=False)
    assert restarts() == 0
    monkeypatch.setenv("CLIPDIST_RESTARTS", "2")
    assert restarts() == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert restarts() == 4
