"""In: a configuration and what each rank shall execute. Out: training on this machine, its log shown, its exit code."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from submitit import DebugExecutor, Job, LocalExecutor
from submitit.core.utils import pickle_load

from clipdist.config import Config
from clipdist.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, UserError

FOLLOW_S = 0.2  # between two looks at the log
GRACE_S = 30.0  # from the first rank's failure to the kill of the others, who wait up to 20 s for a checkpoint
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit ends local jobs after five minutes unless told a time


def run_here(config: Config, folder: Path, command: list[str]) -> int:
    """Trains with one process per GPU (or CPU rank), and shows the first one's log. Starts again after a fault.

    Returns:
        0; 1 where a rank failed and the restarts are used up; 75 after Ctrl-C, SIGTERM or SIGHUP and a checkpoint.

    Raises:
        UserError: the ranks ended with one.
    """
    with stop_signals() as stop:
        return run_until_done(config, folder, command, stop)


def run_until_done(config: Config, folder: Path, command: list[str], stop: Stop) -> int:
    most = config.launch.max_restarts
    for restart in range(most + 1):
        os.environ["CLIPDIST_RESTARTS"] = str(restart)
        job = start(config, folder, command)
        print(f"{job.num_tasks} processes on this machine, log {job.paths.stdout}", flush=True)
        wait_for(job, command, stop)
        codes = [exit_code(job, rank) for rank in range(job.num_tasks)]
        code = verdict(codes)
        if stop.first is not None and code == EXIT_FAULT and set(codes) <= {0, -signal.SIGTERM}:
            return EXIT_INTERRUPTED  # before training had begun: nothing is lost
        if code == 0:
            print(f"done: {config.run.dir}")
        if code == EXIT_BAD_INPUT:
            raise UserError(refusal(job, codes.index(EXIT_BAD_INPUT)))
        if code != EXIT_FAULT:
            return code
        for rank, ended in enumerate(codes):
            if ended != 0:
                print(f"rank {rank} failed: exit code {ended}; see {job.task(rank).paths.stderr}", file=sys.stderr)
        if stop.first is not None:
            return code
        if restart < most:
            print(f"starting again, restart {restart + 1} of {most}", file=sys.stderr, flush=True)
    return EXIT_FAULT


def start(config: Config, folder: Path, command: list[str]) -> Job[int]:
    gpus = 0 if config.device == "cpu" else config.launch.gpus
    executor = LocalExecutor(folder)
    executor.update_parameters(
        tasks_per_node=config.launch.gpus, gpus_per_node=gpus, timeout_min=NO_LIMIT_MIN, setup=config.launch.setup
    )
    # The ranks look after Ctrl-C themselves: they inherit "ignored" and set a handler when training starts.
    # A terminal's SIGHUP would end submitit's processes in between.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        return executor.submit(subprocess.call, command)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Signals that ask this process to end: the first one, and whether Ctrl-C came once more after it."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.at_once = False

    def note(self, number: int, frame: object) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
        elif number == signal.SIGINT:  # batch systems repeat the others
            self.at_once = True


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Takes SIGINT, SIGTERM and SIGHUP over; the last one not where nohup ignores it."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in STOPPING}
    taken = [number for number in STOPPING if number != signal.SIGHUP or before[number] != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, stop.note)
    try:
        yield stop
    finally:
        for number in taken:
            signal.signal(number, before[number])


def wait_for(job: Job[int], command: list[str], stop: Stop) -> None:
    """Shows the first rank's log until all ranks ended. Passes a stop on, and ends what outlives a failed rank."""
    log, told, deadline = Log(job.paths.stdout), set[int](), math.inf
    while not job.done():
        time.sleep(FOLLOW_S)
        if stop.first is not None:
            if not told:
                say("interrupted: writing a checkpoint; Ctrl-C again ends at once")
            # The terminal may have sent it to them already; to a rank, SIGHUP says no more than SIGTERM.
            number = signal.SIGINT if stop.first == signal.SIGINT else signal.SIGTERM
            told |= signal_ranks(job, command, number, told)
        if stop.at_once or time.monotonic() > deadline:
            signal_ranks(job, command, signal.SIGKILL)
        log.show()
        # A rank that lost another ends by itself, but first lets a checkpoint be written to its end.
        if deadline == math.inf and any(exit_code(job, rank) not in (0, None) for rank in range(job.num_tasks)):
            deadline = time.monotonic() + GRACE_S
    log.show()


def say(text: str) -> None:
    with suppress(OSError):  # the terminal is gone: that is what SIGHUP says
        print(f"\n{text}", flush=True)


def signal_ranks(job: Job[int], command: list[str], number: int, but: Collection[int] = ()) -> set[int]:
    """To the ranks themselves, the children of submitit's tasks. Returns the process ids that got it.

    SIGKILL also ends a task that has not started its rank yet.
    """
    sent = set()
    with suppress(psutil.NoSuchProcess):  # all have ended in the meantime
        for process in psutil.Process(int(job.job_id)).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                is_rank = process.cmdline() == command and process.parent().cmdline() != command
                wanted = is_rank or (number == signal.SIGKILL and not process.children())
                if wanted and process.pid not in but:
                    process.send_signal(number)
                    sent.add(process.pid)
    return sent


def exit_code(job: Job[int], rank: int) -> int | None:
    """Of a rank, negative where a signal ended it; None while it runs, and where submitit's task itself was killed."""
    result = job.task(rank).paths.result_pickle  # job.result() would wait for the other ranks
    if not result.exists():
        return None
    outcome, value = pickle_load(result)
    return value if outcome == "success" else EXIT_FAULT


def verdict(codes: list[int | None]) -> int:
    """The exit code of all ranks together. After the first that ends by itself the others are killed."""
    for code in (EXIT_BAD_INPUT, EXIT_INTERRUPTED):
        if code in codes:
            return code
    return EXIT_FAULT if any(codes) or None in codes else 0


def refusal(job: Job[int], rank: int) -> str:
    """What a rank said before it ended with bad input."""
    lines = job.task(rank).paths.stderr.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error")]
    return said[-1].partition(": ")[2] if said else f"bad input, see {job.task(rank).paths.stderr}"


class Log:
    """A file that grows, printed as it does."""

    def __init__(self, path: Path) -> None:
        self._path, self._shown = path, 0

    def show(self) -> None:
        """Prints what was written since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()


def debug_here(config: Config, folder: Path, resume_command: str) -> int:
    """Trains in this very process, so that breakpoint() works; an exception opens pdb where it was raised.

    Raises:
        UserError: bad input, which needs no debugger.
    """
    outcome = DebugExecutor(folder).submit(_train_or_refuse, config, resume_command).result()
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _train_or_refuse(config: Config, resume_command: str) -> int | UserError:
    from launch.rank import train_rank

    try:
        return train_rank(config, resume_command)
    except UserError as error:
        return error
