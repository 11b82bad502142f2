"""Processes of a benchmark: workers that hold an object and answer calls, and commands run on several ranks."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from clipdist.errors import Fault, UserError
from tools.bench.harness import ROOT
from tools.bench.peak_memory import ProportionalSetSize, process_tree

GRACE_S = 10  # for the other ranks to fail too where one has, and for a process to end by itself


class BenchProcesses:
    """One process per rank; each makes an object at the first call and calls its methods as it is asked to.

    Args:
        make: makes the object from `job`, in the process; it may have a close().
        world: number of processes. Several get the environment that torchrun gives.
        tracebacks: print the traceback of a failure on stderr.
        title: what a Fault shall begin with.
    """

    def __init__(
        self,
        context: ForkServerContext | SpawnContext,
        make: Callable[[Any], Any],
        job: Any,
        *,
        world: int = 1,
        tracebacks: bool = True,
        title: str = "",
    ) -> None:
        self.title = title
        self.pipes: list[Connection] = []
        self.processes = []
        for environment in rank_environments(world) if world > 1 else [{}]:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, make, job, environment, tracebacks))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __enter__(self) -> BenchProcesses:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.end(GRACE_S if kind is None else 0)

    def started(self) -> BenchProcesses:
        """Wait until every process has made its object. Raise as ask_all does."""
        self.ask_all("")
        return self

    def ask_all(self, method: str, *args: Any, limit_s: float | None = None) -> list[Any]:
        """Call one method on all ranks. Return their results, by rank.

        Raises:
            UserError: a process found its input bad.
            Fault: a process failed or ended, or the time limit has passed. All processes are ended then.
        """
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # noticed below
                pipe.send((method, args))
        deadline = time.monotonic() + limit_s if limit_s else float("inf")
        answers: dict[int, Any] = {}
        failure: UserError | None = None
        while len(answers) < len(self.pipes):
            waited_for = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waited_for, max(0.0, min(GRACE_S, deadline - time.monotonic())))
            if failure and not ready:
                break  # the others wait in a collective for the one that failed
            if time.monotonic() > deadline:
                failure = Fault(f"no answer within {limit_s:g} s")
                break
            for rank, pipe in enumerate(self.pipes):
                if pipe in ready:
                    kind, answers[rank] = self._receive(rank)
                    if kind != "done":
                        failure = failure or (UserError if kind == "user" else Fault)(answers[rank])
        if failure:
            self.end(grace_s=0)
            raise type(failure)(f"{self.title}: {failure}") if self.title else failure
        return [answers[rank] for rank in range(len(self.pipes))]

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method of the only process, as ask_all."""
        return self.ask_all(method, *args)[0]

    @contextlib.contextmanager
    def alone(self, others: Iterable[BenchProcesses]) -> Iterator[None]:
        """Suspend the other processes and theirs, which would go on preparing batches for seconds."""
        pids = [process.pid for other in others if other is not self for process in other.processes]
        suspended = [process for pid in pids if pid for process in process_tree(pid)]
        for process in suspended:
            process.suspend()
        try:
            yield
        finally:
            for process in suspended:
                process.resume()

    def _receive(self, rank: int) -> tuple[str, Any]:
        try:
            return self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(GRACE_S)
            code = self.processes[rank].exitcode
            return "fault", f"a process ended, exit code {code}{' (out of memory?)' * (code == -signal.SIGKILL)}"

    def end(self, grace_s: float) -> None:
        for pipe in self.pipes:
            pipe.close()  # a process that waits for a call ends by itself
        for process in self.processes:
            process.join(grace_s)
            process.kill()
            process.join()


def serve(
    pipe: Connection, make: Callable[[Any], Any], job: Any, environment: dict[str, str], tracebacks: bool
) -> None:
    """Answer calls until the other end is closed: ("done", result), ("user", line) or ("fault", line)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    os.environ |= environment
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the report's
    held: Any = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            method, args = pipe.recv()
            try:
                held = held or make(job)
                answer = "done", getattr(held, method)(*args) if method else None
            except UserError as error:
                answer = "user", str(error)
            except Exception as error:
                if tracebacks:
                    traceback.print_exc()
                answer = "fault", " ".join(f"{type(error).__name__}: {error}".split())[:300]
            pipe.send(answer)
    if hasattr(held, "close"):
        held.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environments(world: int) -> Iterator[dict[str, str]]:
    """Yield the variables that torchrun sets, for each rank of one host."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for rank in range(world):
        yield {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def repository_environment() -> dict[str, str]:
    """Return this process' environment, in which Python finds the packages of this repository first."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def threads_per_rank(ranks: int) -> int:
    """Return OMP_NUM_THREADS where it is set, else the cores that this process may use, divided among the ranks."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, len(os.sched_getaffinity(0)) // ranks)


def run_ranks(
    command: list[str], ranks: int, environment: dict[str, str], log: Path, watch: ProportionalSetSize | None = None
) -> None:
    """Run a command on all ranks; what they print goes to `log`.

    Raises:
        Fault: a rank failed; the others are ended. The last lines of the log are printed on stderr.
    """
    processes: list[subprocess.Popen] = []
    with open(log, "w", encoding="utf-8") as out:
        try:
            for of_rank in rank_environments(ranks):
                processes.append(subprocess.Popen(command, env=environment | of_rank, stdout=out, stderr=out))
            if watch:
                watch.pids = [process.pid for process in processes]
            codes: list[int | None] = [None]
            while None in codes and not any(codes):
                time.sleep(0.05)
                codes = [process.poll() for process in processes]
        finally:
            _end(processes)
    if any(process.returncode for process in processes):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        print("".join(lines[-20:]), file=sys.stderr, end="")
        raise Fault(f"a process of {log.stem} failed: {shlex.join(command)}")


def _end(processes: list[subprocess.Popen]) -> None:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):  # clipdist saves at the first, leaves at the second
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
