"""Train on this machine: one process per rank, the first one's log shown, started again after a fault."""

from __future__ import annotations

import math
import os
import pdb
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from clipdist.config import Config
from clipdist.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, UserError
from launch.rank import launcher_variables, train_rank

FOLLOW_S = 0.2  # between two looks at the log
GRACE_S = 30.0  # from the first rank's failure to the kill of the others, who wait up to 20 s for a checkpoint
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class RankProcess:
    """A rank on this machine, and the files that hold what it prints."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    @property
    def code(self) -> int | None:
        """Exit code, negative where a signal ended the rank; None while it runs."""
        return self.process.poll()


class StopRequest:
    """Signals that ask this process to end: the first one, and whether Ctrl-C came once more after it."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.at_once = False

    def note(self, number: int, frame: object) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
        elif number == signal.SIGINT:  # batch systems repeat the others
            self.at_once = True


def run_here(config: Config, folder: Path, command: list[str]) -> int:
    """Train with one process per GPU (or CPU rank), and start again after a fault.

    Args:
        folder: of the logs.
        command: what every rank executes.

    Returns:
        0; 1 where a rank failed and the restarts are used up; 75 after Ctrl-C, SIGTERM or SIGHUP and a checkpoint.

    Raises:
        UserError: the ranks ended with one.
    """
    most = config.launch.max_restarts
    with stop_signals() as stop:
        for restart in range(most + 1):
            ranks = start(config, folder, command, restart)
            print(f"{len(ranks)} processes on this machine, log {ranks[0].stdout}", flush=True)
            wait_for(ranks, stop)
            codes = [rank.code for rank in ranks]
            if stop.first is not None and set(codes) <= {0, -signal.SIGTERM, 128 + signal.SIGTERM} and any(codes):
                return EXIT_INTERRUPTED  # before training began: nothing is lost
            if EXIT_BAD_INPUT in codes:
                raise UserError(refusal(ranks[codes.index(EXIT_BAD_INPUT)]))
            if EXIT_INTERRUPTED in codes:  # the others of these ranks were killed
                return EXIT_INTERRUPTED
            if not any(codes):
                print(f"done: {config.run.dir}")
                return 0
            for number, rank in enumerate(ranks):
                if rank.code != 0:
                    print(f"rank {number} failed: exit code {rank.code}; see {rank.stderr}", file=sys.stderr)
            if stop.first is not None:
                break
            if restart < most:
                print(f"starting again, restart {restart + 1} of {most}", file=sys.stderr, flush=True)
    return EXIT_FAULT


def start(config: Config, folder: Path, command: list[str], restart: int) -> list[RankProcess]:
    """Start the ranks. With launch.setup a shell runs its lines first and then becomes the rank."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.launch.setup:
        command = ["/bin/sh", "-c", " && ".join([*config.launch.setup, f"exec {shlex.join(command)}"])]
    environment = {**os.environ, "CLIPDIST_RESTARTS": str(restart)}
    environment.pop("SUBMITIT_EXECUTOR", None)  # of a job that this one runs in
    if config.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    job, world = str(os.getpid()), config.launch.gpus
    # The terminal sends Ctrl-C and SIGHUP to the ranks, too. They are told by SIGTERM; until training sets handlers
    # they inherit "ignored".
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    ranks = []
    try:
        for rank in range(world):
            files = [folder / f"{job}-{restart}_{rank}_log.{end}" for end in ("out", "err")]
            variables = launcher_variables(rank, world, rank, world, "127.0.0.1", job, restart)
            with open(files[0], "ab") as stdout, open(files[1], "ab") as stderr:
                process = subprocess.Popen(command, env=environment | variables, stdout=stdout, stderr=stderr)
            ranks.append(RankProcess(process, *files))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return ranks


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGHUP; the last one not where nohup ignores it."""
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in STOPPING}
    taken = [number for number in STOPPING if number != signal.SIGHUP or before[number] != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number in taken:
            signal.signal(number, before[number])


def wait_for(ranks: list[RankProcess], stop: StopRequest) -> None:
    """Show the first rank's log until all ranks ended. Forward a stop, and kill the ranks that outlive a failed one."""
    told, deadline = False, math.inf
    with ranks[0].stdout.open(encoding="utf-8", errors="replace", newline="") as log:
        while any(rank.code is None for rank in ranks):
            time.sleep(FOLLOW_S)
            if stop.first is not None and not told:
                told = True
                with suppress(OSError):  # the terminal is gone, as SIGHUP says
                    print("\ninterrupted: writing a checkpoint; Ctrl-C again ends at once", flush=True)
                for rank in ranks:
                    rank.process.terminate()
            if stop.at_once or time.monotonic() > deadline:
                for rank in ranks:
                    rank.process.kill()
            show_new(log)
            # A rank that lost another ends by itself, but first lets a checkpoint be written to its end.
            if deadline == math.inf and any(rank.code for rank in ranks):
                deadline = time.monotonic() + GRACE_S
        show_new(log)


def refusal(rank: RankProcess) -> str:
    """Return what a rank said before it ended with bad input."""
    lines = rank.stderr.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error")]
    return said[-1].partition(": ")[2] if said else f"bad input, see {rank.stderr}"


def show_new(log: TextIO) -> None:
    """Print what was written to a log since it was last read."""
    sys.stdout.write(log.read())
    sys.stdout.flush()


def debug_here(config: Config, resume_command: str) -> int:
    """Train in this very process, so that breakpoint() works; an exception opens pdb where it was raised.

    Raises:
        UserError: bad input, which needs no debugger.
    """
    try:
        return train_rank(config, resume_command)
    except UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        pdb.post_mortem(error.__traceback__)
        raise
