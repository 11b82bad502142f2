"""Notes for the batch script of a job: how a rank ended, and whether to requeue the job.

The batch script (launch/after.sh) acts on them once srun has returned. A rank does not call scontrol itself: Slurm
would kill the other ranks while they still leave, and inside a container there is no scontrol.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# What a batch script's --signal names, to be sent ahead of a time limit or a preemption: ours, and many others.
WARNINGS = ("SIGUSR2", "SIGUSR1")


def requeue(reason: str) -> bool:
    """Request that the job be requeued. Call it on rank 0, after a stop's checkpoint and before any rank leaves.

    Args:
        reason: name of the signal that asked for the stop.

    Returns:
        Whether the job will be requeued: only after a warning signal. SIGTERM and Ctrl-C come from a user, or from a
        preemption without a warning, which the batch script distinguishes. False outside of a batch job.
    """
    files = job_files()
    if reason not in WARNINGS or files is None or "SLURM_JOB_ID" not in os.environ:
        return False
    try:
        files.with_name(f"{files.name}.again").write_text(f"{reason}\n")
    except OSError:
        return False
    return True


def note_start(run_dir: Path) -> None:
    """Note the run folder and its newest checkpoint, on rank 0 before training; after.sh looks for a newer one.

    The note's two lines are the run folder and the manifest, absolute; the second is empty without a checkpoint.
    """
    files = job_files()
    if files is None:
        return
    manifests = sorted((run_dir.resolve() / "checkpoints").glob("step-*/manifest.json"))
    with contextlib.suppress(OSError):
        files.with_name(f"{files.name}.start").write_text(
            f"{run_dir.resolve()}\n{manifests[-1] if manifests else ''}\n"
        )


def restarts() -> int:
    """Return how often this job was started before: by Slurm, or by submit.py with --cluster local."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("CLIPDIST_RESTARTS") or 0)


def note_exit(code: int) -> None:
    """Note the exit code of the first rank that ended by itself with 2 or 75.

    srun kills the ranks that outlive the first one to fail, and then returns the largest code, that of the kill.
    """
    files = job_files()
    if code not in (2, 75) or files is None:
        return
    with contextlib.suppress(OSError), open(files.with_name(f"{files.name}.code"), "x") as file:
        file.write(f"{code}\n")


def job_files() -> Path | None:
    """Return the path prefix of a job's notes, as its batch script set it; None without such a script."""
    prefix = os.environ.get("CLIPDIST_JOB_FILES")
    return Path(prefix) if prefix else None
