"""What a training process is besides training: its command line, signals, file limits, garbage collection, and the lock
on its run folder."""

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

LOCK_S = 150.0  # that a requeued job waits for the run folder: file systems hold the lock of a lost node for so long
BRIEFLY_S = 1.0  # launch/status.py looks at the lock


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
def without_collection() -> Iterator[None]:
    """Suspend garbage collection: nothing of what imports make is garbage, and the search is a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def end_of_imports() -> None:
    """Collect again, but never look through what was imported: in training, one rank's pause is a pause of all."""
    gc.freeze()
    gc.enable()


@contextmanager
def listening_to_signals() -> Iterator[StopFlag]:
    """Until training begins a signal ends the process at once; afterwards `on_stop` of the flag is the caller's."""
    stop = StopFlag()
    stop.on_stop = leave_before_training
    try:
        yield stop
    finally:
        stop.restore()


def leave_before_training(reason: str) -> None:
    """End this process as the signal alone would: the ranks may wait for one another for long, and nothing is lost."""
    print(f"{reason} before training began", file=sys.stderr, flush=True)
    os._exit(128 + signal.Signals[reason])


def allow_many_files() -> None:
    """Raise the soft limit of open files: connections between ranks, and shards."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def lock_run_folder(folder: Path, wait_s: float = BRIEFLY_S) -> IO[str]:
    """Keep other runs out of the folder while the returned file stays open.

    Raises:
        UserError: another run writes to it, and still does after `wait_s`.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115  held for the run
    try:
        lock(file, wait_s=wait_s)
    except BlockingIOError:
        raise UserError(f"run folder {folder}: another run is writing to it; choose another run.name") from None
    except OSError:
        pass  # a file system without locks
    return file
