"""The watchdog over all ranks: end all of them, with the reason, if one dies, fails or makes no progress.

It is one thread per rank, beside training and without training's communication. All ranks are connected to rank 0,
which tells all others when to end and why.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from clipdist.errors import EXIT_BAD_INPUT, EXIT_FAULT, RANK_0_FIRST_S, Fault, UserError
from clipdist.fault_tolerance.heartbeat import Message, RankConnections, open_listener
from clipdist.fault_tolerance.signals import asked_to_stop
from clipdist.fault_tolerance.stacks import stacks, stacks_file, write_stacks
from clipdist.fault_tolerance.verdict import Cause, RankState, Verdict, death, decide, hang, silence

if TYPE_CHECKING:
    from clipdist.distributed.consensus import Consensus
    from clipdist.distributed.rank import DistEnv

TICK_S = 0.2  # longest wait for messages
BEAT_S = 5.0  # between two heartbeats
SILENCE_S = 35.0  # without a heartbeat: a rank that is stopped, or whose interpreter is stuck
GATHER_S = 1.0  # after the first sign of an end, for the other signs: which one came first is told by all of them
SPEAK_S = 5.0  # for the message and stacks, on an output or a disk that may hang
LINGER_S = 20.0  # for a checkpoint that is being written
OWN_END_S = 30.0  # that a rank has to end by itself once its error is the reason
VERDICT_S = 15.0  # that a rank with an error waits for the verdict
LEAVE_S = 3.0
BACKSTOP_S = 60.0  # after hang_s, if not even the watchdog gets to run
ERROR_LENGTH = 2000


def open_watchdog(dist_env: DistEnv, consensus: Consensus, run_dir: Path, hang_s: float) -> Watchdog:
    """Connect this rank's watchdog to the others', after rank 0's port and a secret were shared. Collective.

    Raises:
        Fault: this rank cannot reach rank 0.
    """
    listener = open_listener() if dist_env.rank == 0 else None
    port = consensus.broadcast(str(listener.getsockname()[1] if listener else ""))
    return Watchdog(
        dist_env.rank,
        dist_env.world_size,
        run_dir,
        hang_s,
        host=os.environ["MASTER_ADDR"],
        port=int(port),
        token=int(consensus.shared_token(), 16),
        listener=listener,
    )


class Watchdog:
    """One rank's watchdog; a context manager around training. It may be closed and followed by another.

    Create one on every rank at about the same time, after rank 0's port and the token were shared.

    Attributes:
        linger: called before a forced end with the most seconds that it may take, for what must not be cut off.
        record: called once with the step and the reason for the end; on rank 0, or on rank 1 where rank 0 was lost.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        run_dir: Path,
        hang_s: float,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: int = 0,
        listener: socket.socket | None = None,
        node: str = "",
        silence_s: float = SILENCE_S,
    ) -> None:
        """
        Args:
            run_dir: gets stacks/rank-00000.txt ... when the run hangs.
            hang_s: seconds without progress that end the run; 0: never, and a rank that is stopped may stay so.
            host: where rank 0 runs, as the others reach it.
            port: of rank 0's listener.
            token: random, the same on all ranks; other programs that find the port do not know it.
            listener: on rank 0, from `open_listener`.
            node: this machine's name; its host name where empty.
            silence_s: time without a heartbeat after which a rank counts as dead.

        Raises:
            Fault: rank 0 cannot be reached.
        """
        self.linger: Callable[[float], None] | None = None
        self.record: Callable[[int, str], None] | None = None
        self._rank, self._run_dir, self._hang_s = rank, run_dir, hang_s
        self._silence_s = silence_s if hang_s else 0.0
        self._beat_s = min(BEAT_S, silence_s / 4, hang_s / 4 or BEAT_S)
        self._clock = Clock()
        now = self._clock.now()
        me = RankState(rank, now, node or socket.gethostname(), os.getpid(), since=now)
        self._me, self._phases = me, ["start"]
        others = range(1, world) if rank == 0 else [0]
        self._states = {rank: me} | {other: RankState(other, now, since=now) for other in others}
        self._causes: list[Cause] = []
        self._decide_at: float | None = None
        self._verdict: Verdict | None = None
        self._own_error = ""
        self._stop_by: tuple[float, float] | None = None  # deadline, and the seconds that it gave
        self._end_by: tuple[float, int] | None = None  # this rank ends by itself, at the latest then
        self._beaten = 0.0
        self._oom_kills = _oom_kills()
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._released, self._closing = threading.Event(), False
        self._ranks = RankConnections(world, token, listener)
        if rank:
            try:
                for answer in self._ranks.join(host, port, {"rank": rank, "pid": me.pid, "node": me.node}):
                    self._take(0, answer)
            except OSError as error:
                self._ranks.close()
                raise Fault(
                    f"rank {rank} on {me.node} cannot reach rank 0 at {host}:{port} ({error}); all nodes must reach"
                    " each other over TCP on all ports"
                ) from None
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # a crash in native code leaves its stacks
        self._arm_backstop()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # For the main thread

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what this rank does inside the with block; may be nested. Entering and leaving count as progress."""
        self._phases.append(name)
        self._enter(name)
        try:
            yield
        except BaseException:
            self._phases.pop()  # the name stays until the next phase, for the error report
            raise
        self._phases.pop()
        self._enter(self._phases[-1])

    def progress(self, step: int | None = None) -> None:
        """Restart the time of `hang_s`; `step` is the position from now on."""
        if step is not None:
            self._me.step = step
        self._me.since = self._clock.now()

    def report_error(self, text: str, code: int = EXIT_FAULT) -> None:
        """Tell all ranks the error that this rank ends with. Return when this rank may print it and end with `code`;
        do not return if another rank is the cause."""
        if self._thread.is_alive():
            self._order("words", (" ".join(text.split())[:ERROR_LENGTH], code))
            while not self._released.wait(VERDICT_S) and self._verdict is not None:
                pass  # the watchdog is about to end the process

    def stopping(self, limit_s: float) -> None:
        """End this process with its stacks and exit code 1 unless it ends within `limit_s`. The first call counts."""
        self._order("stopping", limit_s)

    def close(self) -> None:
        """End the watchdog: from now on no rank's end counts as a loss. A second call does nothing."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._order("close", None)
            self._thread.join(LEAVE_S + SPEAK_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Report an error to all ranks; close otherwise."""
        if error is None:
            self.close()
        elif isinstance(error, UserError):
            self.report_error(str(error), EXIT_FAULT if isinstance(error, Fault) else EXIT_BAD_INPUT)
        else:
            self.report_error(f"{type(error).__name__}: {error}")

    def _enter(self, name: str) -> None:
        self._me.phase, self._me.since = name, self._clock.now()

    def _order(self, what: str, value: Any) -> None:
        self._orders.put((what, value))
        self._ranks.wake()

    # The thread

    def _run(self) -> None:
        while not self._closing:
            events = self._ranks.poll(TICK_S)
            self._clock.tick()
            for rank, message in events:
                self._take(rank, message)
            while not self._orders.empty():
                self._obey(*self._orders.get())
            if self._verdict is None:
                self._beat()
                self._look()
            self._keep_deadlines()
        self._leave()

    def _take(self, rank: int, message: Message) -> None:
        state = self._states[rank]
        state.heard = self._clock.now()
        match message["kind"]:
            case "hello":
                state.node, state.pid = str(message["node"]), int(message["pid"])
                self._ranks.answer(rank, self._beat_message())
            case "beat":
                state.node, state.pid = message["node"], message["pid"]
                state.step, state.phase = message["step"], message["phase"]
                state.since = state.heard - message["seconds"]
            case "bye":
                state.left = True
                self._ranks.hang_up(rank)
                self._released.set()  # no verdict will come from there
            case "words":
                self._blame(Cause(rank, message["text"], message["code"], message["text"]))
            case "hang":
                self._hang()
            case "verdict":
                self._accept(Verdict(**message["verdict"]))
            case "lost" if not state.left and all(cause.rank != rank for cause in self._causes):
                self._blame(death(state, message["unreachable"]))

    def _obey(self, what: str, value: Any) -> None:
        match what:
            case "words" if not self._own_error:
                self._own_error, code = value
                self._ranks.tell(self._beat_message())  # where it came up
                if self._rank == 0:
                    self._blame(Cause(0, self._own_error, code, self._own_error))
                else:
                    self._ranks.tell({"kind": "words", "text": self._own_error, "code": code})
                    if self._states[0].left and not self._causes:  # it ended well; where it was lost, that is the cause
                        self._released.set()
            case "stopping" if self._stop_by is None:
                self._stop_by = time.monotonic() + value, value
            case "close":
                self._closing = True

    def _beat(self) -> None:
        now = time.monotonic()
        if now < self._beaten + self._beat_s:
            return
        self._beaten = now
        self._ranks.tell(self._beat_message(), unless_behind=True)
        self._arm_backstop()

    def _arm_backstop(self) -> None:
        """Have a thread of C end this process unless armed again: it works even while the interpreter is stuck."""
        if self._hang_s:
            faulthandler.dump_traceback_later(self._hang_s + BACKSTOP_S, exit=True, file=2)

    def _beat_message(self) -> Message:
        me = self._me
        seconds = self._clock.now() - me.since
        told: Message = {"kind": "beat", "node": me.node, "pid": me.pid, "step": me.step, "phase": me.phase}
        return told | {"seconds": round(seconds, 1)}

    def _look(self) -> None:
        """Look for ranks without heartbeats or progress, and decide when it is time."""
        now = self._clock.now()
        for state in self._states.values():
            if state is self._me or state.left:
                continue
            if self._silence_s and now - state.heard > self._silence_s:
                self._blame(silence(state, now - state.heard))
        if self._hang_s and now - self._me.since > self._hang_s and not self._causes:
            if self._rank == 0 or self._states[0].left:
                self._hang()
            else:
                self._ranks.tell({"kind": "hang"}, unless_behind=True)
        if self._decide_at is not None and now > self._decide_at:
            self._end(decide(self._causes, self._states))

    def _blame(self, cause: Cause) -> None:
        if not cause.words:
            self._states[cause.rank].left = True
        self._causes.append(cause)
        if self._decide_at is None:
            # Rank 0 waits for other causes. A rank that has lost rank 0 gets no more messages.
            self._decide_at = self._clock.now() + (0 if self._rank else GATHER_S)

    def _hang(self) -> None:
        if self._verdict is None and not self._causes:
            there = [state for state in self._states.values() if not state.left]
            where = str(stacks_file(self._run_dir, 0).parent)
            self._end(hang(there, self._clock.now(), self._hang_s, where))

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if self._end_by is not None and now > self._end_by[0]:
            os._exit(self._end_by[1])
        if self._stop_by is not None and now > self._stop_by[0]:
            text = f"was asked to stop and has not ended {self._stop_by[1]:.0f} s later, {self._me.place}"
            if self._rank:
                self._ranks.tell({"kind": "words", "text": text, "code": EXIT_FAULT})
            self._end(Verdict(f"{self._me.name} {text}", stacks=True, rank=self._rank))

    def _leave(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._ranks.tell({"kind": "bye"})
        # Connections that rank 0 closes while the others still send could lose this message.
        deadline = time.monotonic() + LEAVE_S
        while self._rank == 0 and self._ranks.connected and time.monotonic() < deadline:
            for rank, message in self._ranks.poll(TICK_S):
                if message["kind"] in ("bye", "words"):
                    self._ranks.hang_up(rank)
        self._ranks.close()
        self._released.set()

    # The end

    def _accept(self, verdict: Verdict) -> None:
        """Take the verdict of rank 0."""
        if self._verdict is None:
            self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        """End this rank as decided; on rank 0 tell all others. Return only if this rank is to end by itself."""
        self._verdict = verdict
        faulthandler.cancel_dump_traceback_later()
        own = bool(self._own_error) and (verdict.rank == self._rank or verdict.words == self._own_error)
        if not own and not (verdict.words and self._launcher_ends_this()):
            _within(SPEAK_S, self._speak, verdict)
        if self._rank == 0:
            self._ranks.tell({"kind": "verdict", "verdict": asdict(verdict)})
        if self.record is not None and self._rank == int(self._states[0].left):
            _within(SPEAK_S, self.record, self._me.step or 0, verdict.line)
        if own:
            self._end_by = time.monotonic() + OWN_END_S, verdict.code
            self._released.set()
            return
        if verdict.stacks:
            _within(SPEAK_S, self._show_stacks, verdict)
        if self.linger is not None:
            _within(LINGER_S, self.linger, LINGER_S)
        self._ranks.poll(TICK_S)  # lets pending messages leave this machine
        os._exit(verdict.code)

    def _launcher_ends_this(self) -> bool:
        """Wait for rank 0 and the rank with the error to print it. Return whether a launcher ends this rank meanwhile,
        which then need not print it."""
        deadline = time.monotonic() + (RANK_0_FIRST_S if self._rank else 0)
        while time.monotonic() < deadline:
            if asked_to_stop():
                return True
            time.sleep(TICK_S)
        return False

    def _speak(self, verdict: Verdict) -> None:
        line = f"error{f' (rank {self._rank})' if self._rank else ''}: {verdict.line}"
        if self._me.node in verdict.nodes and _oom_kills() > self._oom_kills:
            line += f"; the kernel of {self._me.node} has killed a process for want of memory meanwhile"
        os.write(2, f"{line}\n".encode())
        sys.stdout.flush()

    def _show_stacks(self, verdict: Verdict) -> None:
        me = self._me
        seconds = self._clock.now() - me.since
        head = f"{me.name} (pid {me.pid}) {me.place} for {seconds:.0f} s: {verdict.line}\n"
        text = stacks()
        os.write(2, f"stacks of {me.name}, {me.place} for {seconds:.0f} s:\n{text}".encode())
        with suppress(OSError):
            write_stacks(self._run_dir, self._rank, head + text)


class Clock:
    """Count the seconds that this process ran, without those while it was stopped (Slurm can suspend a job).

    The backstop counts these as well: a job suspended for longer than hang_s + BACKSTOP_S ends on resuming.
    """

    GAP_S = 2.0  # a longer time between two ticks does not count

    def __init__(self) -> None:
        self._lost, self._ticked = 0.0, time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._lost

    def tick(self) -> None:
        """Note that the process runs. Call it several times a second."""
        now = time.monotonic()
        if now - self._ticked > self.GAP_S:
            self._lost += now - self._ticked
        self._ticked = now


def _within(seconds: float, act: Callable[..., None], *arguments: Any) -> None:
    """Run an action that may hang or fail, for at most so many seconds."""

    def attempt() -> None:
        with suppress(Exception):
            act(*arguments)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _oom_kills() -> int:
    """Return how many processes of this machine the kernel has killed for lack of memory; 0 if it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
