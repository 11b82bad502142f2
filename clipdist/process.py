"""Prepare a training process: command line, signals, file limit, garbage collection, and the lock on its run folder."""

from __future__ import annotations

import gc
import os
import resource
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from clipdist.errors import UserError
from clipdist.fault_tolerance.signals import StopFlag
from clipdist.storage import lock

REQUEUED_LOCK_WAIT_S = 150.0  # of a requeued job: file systems release the lock of a lost node after some time
LOCK_WAIT_S = 1.0  # launch/status.py holds the lock briefly


def command_line(words: list[str]) -> str:
    """Return the command that resumes this run, with the launcher that started it."""
    by_deepspeed = any(word.startswith("--local_rank") for word in words)
    words = [word for word in words if not word.startswith("--local_rank")]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    elif by_deepspeed:
        launcher = ["deepspeed", "--num_accelerators", os.environ["WORLD_SIZE"]]
    else:
        launcher = ["python"]
    return shlex.join([*launcher, "clipdist/train.py", *words])


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection, which would take a tenth of the time of imports and find nothing."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_imported_objects() -> None:
    """Enable garbage collection except for imported objects: a pause of one rank stops all ranks."""
    gc.freeze()
    gc.enable()


@contextmanager
def listening_to_signals() -> Iterator[StopFlag]:
    """Install signal handlers. A signal ends the process at once until the caller sets `on_stop` of the flag."""
    stop = StopFlag()
    stop.on_stop = exit_before_training
    try:
        yield stop
    finally:
        stop.restore()


def exit_before_training(reason: str) -> None:
    """Exit as the signal itself would: before training there is nothing to save, and ranks may wait for one another."""
    print(f"{reason} before training began", file=sys.stderr, flush=True)
    os._exit(128 + signal.Signals[reason])


def allow_many_files() -> None:
    """Raise the soft limit of open files to the hard limit, for connections between ranks and for shards."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def lock_run_folder(folder: Path, wait_s: float = LOCK_WAIT_S) -> IO[str]:
    """Lock the run folder while the returned file stays open.

    Raises:
        UserError: another run still holds the lock after `wait_s`.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115  held for the run
    try:
        lock(file, wait_s=wait_s)
    except BlockingIOError:
        raise UserError(f"run folder {folder}: another run is writing to it; choose another run.name") from None
    except OSError:
        pass  # a file system without locks
    return file
