"""Prepare a training process: command line, signals, file limit, garbage collection, and the lock on its run folder."""

from __future__ import annotations

import gc
import os
import resource
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

from clipdist.errors import UserError
from clipdist.fault_tolerance.signals import StopFlag
from clipdist.storage import lock

REQUEUED_LOCK_WAIT_S = 150.0  # of a requeued job: file systems release the lock of a lost node after some time
LOCK_WAIT_S = 1.0  # launch/status.py holds the lock briefly


def command_line(words: list[str]) -> str:
    """Return the command that resumes this run, with its launcher, as it was typed where that is known."""
    by_deepspeed = any(word.startswith("--local_rank") for word in words)
    words = [word for word in words if not word.startswith("--local_rank")]
    environ = os.environ
    if "CLIPDIST_JOB_FILES" in environ:
        template = "deepspeed" if by_deepspeed else "train"
        launcher = ["sbatch", "--nodes", environ.get("SLURM_JOB_NUM_NODES", "1"), f"slurm/{template}.sbatch"]
        return shlex.join([*launcher, *words])
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = _typed_launcher("torchrun") or _torchrun()
    elif by_deepspeed:
        launcher = _typed_launcher("deepspeed") or _deepspeed()
    else:
        launcher = ["python"]
    command = shlex.join([*launcher, "clipdist/train.py", *words])
    return command + "  # and on the other nodes as before" * (environ.get("GROUP_WORLD_SIZE", "1") != "1")


def _typed_launcher(name: str) -> list[str]:
    """Return the launcher and its options from the command line of the process above; empty if it is not visible."""
    with suppress(psutil.Error, ValueError):
        for process in psutil.Process().parents()[:2]:  # `deepspeed` starts deepspeed.launcher.launch, that the ranks
            line = process.cmdline()
            for start, word in enumerate(line):
                if Path(word).name == name or (name, word) == ("torchrun", "torch.distributed.run"):
                    return [name, *line[start + 1 : line.index(sys.argv[0])]]
    return []


def _torchrun() -> list[str]:
    """Return a torchrun command of this node from the variables that torchrun sets."""
    environ = os.environ
    nodes, here = environ.get("GROUP_WORLD_SIZE", "1"), environ["LOCAL_WORLD_SIZE"]
    if nodes == "1":
        return ["torchrun", "--nproc-per-node", here]
    meeting = ["--master-addr", environ["MASTER_ADDR"], "--master-port", environ["MASTER_PORT"]]
    return ["torchrun", "--nnodes", nodes, "--node-rank", environ["GROUP_RANK"], *meeting, "--nproc-per-node", here]


def _deepspeed() -> list[str]:
    """Return a deepspeed command from the variables that its launcher sets on every node."""
    nodes, here = os.environ.get("CROSS_SIZE", "1"), os.environ.get("LOCAL_SIZE", "1")
    several = ["--hostfile", "HOSTFILE", "--num_nodes", nodes] if nodes != "1" else []
    return ["deepspeed", *several, "--num_accelerators", here]


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
    if os.environ.get("RANK", "0") == "0":  # to the others a launcher sends it after an error, which is to stay last
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
