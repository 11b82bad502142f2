"""Run a command line with an intentional accident. Return the exit codes and results of the run.

The ranks are forked from a process that has imported everything, so that a start costs a second or two instead of ten.
They run clipdist.train.main as the launchers' processes do.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdist.checkpoint.format import newest_checkpoint
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.errors import exit_code

RUNNING = 1000  # stands for the exit code of a process that has none yet
LOOK_S = 0.02
OTHERS_END_S = 60  # from a rank's death to the end of the others, at most

# What a run imports, part of it late.
IMPORTED = (
    "deepspeed",
    "omegaconf._impl",
    "torch.utils.tensorboard",
    "clipdist.train",
    "clipdist.trainer",
    "clipdist.fault_tolerance.consistency",
)


class Failed(Exception):
    """An attempt that went otherwise than it must; with the end of its log."""


@dataclass
class Attempt:
    """One start of a run.

    Attributes:
        codes: exit codes by rank; negative numbers are signals.
        others_s: seconds from the first rank's end to the last one's.
        log: what all ranks printed.
    """

    codes: list[int] = field(default_factory=list)
    others_s: float = 0.0
    log: str = ""


@dataclass(frozen=True)
class Point:
    """Where a rank kills itself: before, or after, its `call`-th call of a function."""

    name: str
    owner: str  # module, or module:class
    function: str
    rank: int
    call: int = 2
    after: bool = False

    def lay(self, rank: int) -> None:
        """In the process of a rank, before training: see `attempt`."""
        if rank != self.rank:
            return
        module, _, name = self.owner.partition(":")
        owner = getattr(importlib.import_module(module), name) if name else importlib.import_module(module)
        real, calls = getattr(owner, self.function), 0

        def deadly(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call and not self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **settings)
            if calls == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, self.function, deadly)


def warm_up() -> None:
    """Imports all that a run imports and runs nothing of it: threads would not survive a fork.

    OMP_NUM_THREADS and OPENBLAS_NUM_THREADS must be 1, and DS_ACCELERATOR cpu, from this process' start.

    Raises:
        RuntimeError: there are threads nevertheless.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    with suppress(AttributeError):
        importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018  looks for compilers, once
    if threading.active_count() > 1:
        raise RuntimeError(f"threads after the imports: {threading.enumerate()}")


def attempt(
    words: list[str],
    world: int,
    log: Path,
    *,
    prepare: Callable[[int], None] | None = None,
    during: Callable[[list[int], float], None] | None = None,
    limit_s: float = 300,
) -> Attempt:
    """Starts W processes and waits for all of them.

    Args:
        words: clipdist/train.py's command line.
        log: their output is appended to it.
        prepare: called in each process with its rank, before training.
        during: called in this process with the ranks' process ids and the seconds since the start, again and again
            until the first rank ends.

    Raises:
        Failed: a rank still runs `limit_s` after the start, or OTHERS_END_S after the first rank's end.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = log.stat().st_size if log.exists() else 0
    pids = [_fork(words, rank, world, port, log, prepare) for rank in range(world)]
    try:
        ended = _wait(pids, during, limit_s)
    except TimeoutError as error:
        raise Failed(f"{error}\n{_tail(log, said)}") from None
    finally:
        for pid in pids:
            _end(pid)
    ended.log = log.read_bytes()[said:].decode(errors="replace")
    return ended


def expect(ended: Attempt, codes: list[int], what: str) -> Attempt:
    """The attempt itself.

    Raises:
        Failed: its exit codes are others.
    """
    if ended.codes != codes:
        tail = "\n".join(ended.log.splitlines()[-25:])
        raise Failed(f"{what}: exit codes {ended.codes}, not {codes}\n{tail}")
    return ended


# What a run left behind


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def history(run: Path) -> dict[int, tuple[str, float]]:
    """{step: (hash of the global batch's sample ids, loss)} of a run with train.log_every=1.

    Raises:
        Failed: a step is told twice.
    """
    told = [(r["step"], (r["batch_hash"], r["loss"])) for r in records(run) if r["type"] == "train"]
    if len(dict(told)) != len(told):
        raise Failed(f"{run}: metrics.jsonl tells a step twice")
    return dict(told)


def differences(run: Path, other: Path) -> str:
    """Where two finished runs differ in the order of their samples, a loss, or a bit of their last checkpoints; empty
    where they do not."""
    import torch

    ours, theirs = history(run), history(other)
    steps = [step for step in sorted(ours.keys() | theirs.keys()) if ours.get(step) != theirs.get(step)]
    if steps:
        return f"{run.name}: samples or loss of step {steps[0]} differ ({len(steps)} of {len(theirs)} steps do)"
    mine, yours = (CheckpointReader(newest_checkpoint(folder) or folder) for folder in (run, other))
    if mine.manifest.step != yours.manifest.step or set(mine.names()) != set(yours.names()):
        return f"{run.name}: the last checkpoints are of other steps, or hold other tensors"
    for name in mine.names():
        if not torch.equal(mine.read_full(name), yours.read_full(name)):
            return f"{run.name}: {name} differs"
    return ""


# Processes


def _fork(words: list[str], rank: int, world: int, port: int, log: Path, prepare: Callable[[int], None] | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if prepare:
            prepare(rank)
        code = _train(words)
    except BaseException:  # the traceback that Python prints comes after `finally`, which ends the process
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _train(words: list[str]) -> int:
    from clipdist.train import main

    return exit_code(lambda: main(words))


def _wait(pids: list[int], during: Callable[[list[int], float], None] | None, limit_s: float) -> Attempt:
    ended = Attempt(codes=[RUNNING] * len(pids))
    began, first_end = time.monotonic(), 0.0
    while RUNNING in ended.codes:
        now = time.monotonic()
        if during and not first_end:
            during(pids, now - began)
        for rank, pid in enumerate(pids):
            if ended.codes[rank] == RUNNING:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended.codes[rank] = os.waitstatus_to_exitcode(status)
                    first_end = first_end or time.monotonic()
        if now > began + limit_s or (first_end and now > first_end + OTHERS_END_S):
            raise TimeoutError(f"ranks still run after {now - began:.0f} s; exit codes so far {ended.codes}")
        time.sleep(LOOK_S)
    ended.others_s = time.monotonic() - first_end
    return ended


def _end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def _tail(log: Path, said: int) -> str:
    return "\n".join(log.read_bytes()[said:].decode(errors="replace").splitlines()[-25:])
