"""In: a configuration and what each rank shall execute. Out: training on this machine, its log shown, its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from submitit import DebugExecutor, Job, LocalExecutor
from submitit.core.utils import pickle_load

from clipdist.config import Config
from clipdist.errors import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_INTERRUPTED, UserError

FOLLOW_S = 0.2  # between two looks at the log
GRACE_S = 2.0  # from the first rank's failure to the end of the others
NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit ends local jobs after five minutes unless told a time


def run_here(config: Config, folder: Path, command: list[str]) -> int:
    """Trains with one process per GPU (or CPU rank), and shows the first one's log. Starts again after a fault.

    Returns:
        0; 1 where a rank failed and the restarts are used up; 75 after Ctrl-C and a checkpoint.

    Raises:
        UserError: the ranks ended with one.
    """
    most = config.launch.max_restarts
    for restart in range(most + 1):
        os.environ["CLIPDIST_RESTARTS"] = str(restart)
        job = start(config, folder, command)
        print(f"{job.num_tasks} processes on this machine, log {job.paths.stdout}", flush=True)
        stopped = watch(job)
        codes = [exit_code(job, rank) for rank in range(job.num_tasks)]
        code = verdict(codes)
        if code == 0:
            print(f"done: {config.run.dir}")
        if code == EXIT_BAD_INPUT:
            raise UserError(refusal(job, codes.index(EXIT_BAD_INPUT)))
        if code != EXIT_FAULT:
            return code
        for rank, ended in enumerate(codes):
            print(f"rank {rank} failed: exit code {ended}; see {job.task(rank).paths.stderr}", file=sys.stderr)
        if stopped:
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
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(subprocess.call, command)
    finally:
        signal.signal(signal.SIGINT, before)


def watch(job: Job[int]) -> bool:
    """Until all ranks ended. Returns whether Ctrl-C ended them."""
    log = Log(job.paths.stdout)
    try:
        wait_for(job, log)
    except KeyboardInterrupt:
        leave_with_checkpoint(job, log)
        return True
    return False


def wait_for(job: Job[int], log: Log) -> None:
    """Shows the first rank's log until all ranks ended; ends the others where one failed."""
    while not job.done():
        time.sleep(FOLLOW_S)
        log.show()
        if any(exit_code(job, rank) not in (0, None) for rank in range(job.num_tasks)):
            time.sleep(GRACE_S)  # mostly all fail alike, and each may say why
            signal_ranks(job, signal.SIGKILL)  # the others would wait for the lost rank in a collective
    log.show()


def leave_with_checkpoint(job: Job[int], log: Log) -> None:
    """After Ctrl-C: the ranks finish their step and save; a second Ctrl-C ends them at once."""
    print("\ninterrupted: writing a checkpoint; Ctrl-C again ends at once", flush=True)
    try:
        signal_ranks(job, signal.SIGINT)  # a terminal has sent it to them already, `kill -INT` has not
        wait_for(job, log)
    except KeyboardInterrupt:
        signal_ranks(job, signal.SIGKILL)
        wait_for(job, log)


def signal_ranks(job: Job[int], number: int) -> None:
    """To the ranks themselves: the children of submitit's tasks, which are children of its controller."""
    try:
        for task in psutil.Process(int(job.job_id)).children():
            for rank in task.children() or ([task] if number == signal.SIGKILL else []):
                rank.send_signal(number)
    except psutil.NoSuchProcess:  # it ended in the meantime
        pass


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
