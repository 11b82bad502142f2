"""The watch over all ranks: what each one does and for how long in; an end of all, with the reason, where one is lost.

One thread per rank, which runs beside training and shares no communication with it. All ranks hold a connection to
rank 0; a rank that dies, says why it ends, or makes no progress is told to all, and all end.
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
from clipdist.fault_tolerance.heartbeat import Message, Wire, open_listener
from clipdist.fault_tolerance.signals import asked_to_stop
from clipdist.fault_tolerance.stacks import stacks, stacks_file, write_stacks
from clipdist.fault_tolerance.verdict import Cause, RankState, Verdict, death, decide, hang, silence

if TYPE_CHECKING:
    from clipdist.distributed.consensus import Consensus
    from clipdist.distributed.rank import DistEnv

TICK_S = 0.2  # between two looks at the clock
BEAT_S = 5.0  # between two heartbeats
SILENCE_S = 35.0  # without a heartbeat: a rank that is stopped, or whose interpreter is stuck
GATHER_S = 1.0  # after the first sign of an end, for the other signs: which one came first is told by all of them
SPEAK_S = 5.0  # for a line and stacks, on an output or a disk that may hang
LINGER_S = 20.0  # for a checkpoint that is being written
OWN_END_S = 30.0  # that a rank has to end by itself once its error is the reason
VERDICT_S = 15.0  # that last words wait for the verdict
GOOD_BYE_S = 3.0
BACKSTOP_S = 60.0  # after hang_s, when not even the watch gets to run
WORDS_LENGTH = 2000


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
    """Create one on every rank at about the same time, after rank 0's port and the token were shared; use it as a
    context manager around training. It may be closed and followed by another.

    Attributes:
        linger: called with the seconds at most before a forced end, for what must not be cut off.
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
            listener: on rank 0, from `peers.open_listener`.
            node: this machine's name; its host name where empty.
            silence_s: after which a rank that sends no heartbeats counts as dead.

        Raises:
            Fault: rank 0 cannot be reached.
        """
        self.linger: Callable[[float], None] | None = None
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
        self._own_words = ""
        self._stop_by: tuple[float, float] | None = None  # deadline, and the seconds that it gave
        self._end_by: tuple[float, int] | None = None  # this rank ends by itself, at the latest then
        self._beaten = 0.0
        self._oom_kills = _oom_kills()
        self._orders: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._released, self._closing = threading.Event(), False
        self._wire = Wire(world, token, listener)
        if rank:
            try:
                for answer in self._wire.join(host, port, {"rank": rank, "pid": me.pid, "node": me.node}):
                    self._take(0, answer)
            except OSError as error:
                self._wire.close()
                raise Fault(
                    f"rank {rank} on {me.node} cannot reach rank 0 at {host}:{port} ({error}); all nodes must reach"
                    " each other over TCP on all ports"
                ) from None
        if not faulthandler.is_enabled():
            faulthandler.enable(2)  # a crash in native code leaves its stacks
        self._arm_backstop()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    # What training tells, from the main thread

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what this rank does inside; may be nested. Entering and leaving count as progress."""
        self._phases.append(name)
        self._enter(name)
        try:
            yield
        except BaseException:
            self._phases.pop()  # the name stays until the next phase: last words tell where the error came up
            raise
        self._phases.pop()
        self._enter(self._phases[-1])

    def progress(self, step: int | None = None) -> None:
        """Resets the clock of `hang_s`; `step` is the position from now on."""
        if step is not None:
            self._me.step = step
        self._me.since = self._clock.now()

    def last_words(self, text: str, code: int = EXIT_FAULT) -> None:
        """This rank ends with an error: tells all ranks why. Returns when this rank may tell it itself and end with
        `code`; does not return where another rank is the reason."""
        if self._thread.is_alive():
            self._order("words", (" ".join(text.split())[:WORDS_LENGTH], code))
            while not self._released.wait(VERDICT_S) and self._verdict is not None:
                pass  # the watch is about to end the process

    def stopping(self, limit_s: float) -> None:
        """A stop was asked for: a process that has not ended after `limit_s` ends with its stacks and exit code 1.
        The first call counts."""
        self._order("stopping", limit_s)

    def close(self) -> None:
        """A good end: from now on nobody's leaving counts as a loss. Again: nothing happens."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._order("close", None)
            self._thread.join(GOOD_BYE_S + SPEAK_S)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """A good end closes; an error's last words are told first."""
        if error is None:
            self.close()
        elif isinstance(error, UserError):
            self.last_words(str(error), EXIT_FAULT if isinstance(error, Fault) else EXIT_BAD_INPUT)
        else:
            self.last_words(f"{type(error).__name__}: {error}")

    def _enter(self, name: str) -> None:
        self._me.phase, self._me.since = name, self._clock.now()

    def _order(self, what: str, value: Any) -> None:
        self._orders.put((what, value))
        self._wire.wake()

    # The thread

    def _run(self) -> None:
        while not self._closing:
            events = self._wire.poll(TICK_S)
            self._clock.tick()
            for rank, message in events:
                self._take(rank, message)
            while not self._orders.empty():
                self._obey(*self._orders.get())
            if self._verdict is None:
                self._beat()
                self._look()
            self._keep_deadlines()
        self._say_good_bye()

    def _take(self, rank: int, message: Message) -> None:
        state = self._states[rank]
        state.heard = self._clock.now()
        match message["kind"]:
            case "hello":
                state.node, state.pid = str(message["node"]), int(message["pid"])
                self._wire.answer(rank, self._beat_message())
            case "beat":
                state.node, state.pid = message["node"], message["pid"]
                state.step, state.phase = message["step"], message["phase"]
                state.since = state.heard - message["seconds"]
            case "bye":
                state.left = True
                self._wire.hang_up(rank)
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
            case "words" if not self._own_words:
                self._own_words, code = value
                self._wire.tell(self._beat_message())  # where it came up
                if self._rank == 0:
                    self._blame(Cause(0, self._own_words, code, self._own_words))
                else:
                    self._wire.tell({"kind": "words", "text": self._own_words, "code": code})
                    if self._states[0].left:
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
        self._wire.tell(self._beat_message(), unless_behind=True)
        self._arm_backstop()

    def _arm_backstop(self) -> None:
        """A thread of C ends this process unless it is armed again: an interpreter that is stuck does not stop it."""
        if self._hang_s:
            faulthandler.dump_traceback_later(self._hang_s + BACKSTOP_S, exit=True, file=2)

    def _beat_message(self) -> Message:
        me = self._me
        seconds = self._clock.now() - me.since
        told: Message = {"kind": "beat", "node": me.node, "pid": me.pid, "step": me.step, "phase": me.phase}
        return told | {"seconds": round(seconds, 1)}

    def _look(self) -> None:
        """Judges silence and hangs, and decides when it is time."""
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
                self._wire.tell({"kind": "hang"}, unless_behind=True)
        if self._decide_at is not None and now > self._decide_at:
            self._end(decide(self._causes, self._states))

    def _blame(self, cause: Cause) -> None:
        if not cause.words:
            self._states[cause.rank].left = True
        self._causes.append(cause)
        if self._decide_at is None:
            # Rank 0 waits for other signs. A rank that has lost rank 0 hears of nothing more.
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
                self._wire.tell({"kind": "words", "text": text, "code": EXIT_FAULT})
            self._end(Verdict(f"{self._me.name} {text}", stacks=True, rank=self._rank))

    def _say_good_bye(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._wire.tell({"kind": "bye"})
        # Connections that rank 0 cuts while the others still send could swallow the good-bye.
        deadline = time.monotonic() + GOOD_BYE_S
        while self._rank == 0 and self._wire.connected and time.monotonic() < deadline:
            for rank, message in self._wire.poll(TICK_S):
                if message["kind"] in ("bye", "words"):
                    self._wire.hang_up(rank)
        self._wire.close()
        self._released.set()

    # The end

    def _accept(self, verdict: Verdict) -> None:
        """A verdict that rank 0 told."""
        if self._verdict is None:
            self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        """Ends this rank as decided; on rank 0 tells all others. Returns only where this rank ends by itself."""
        self._verdict = verdict
        faulthandler.cancel_dump_traceback_later()
        own = bool(self._own_words) and (verdict.rank == self._rank or verdict.words == self._own_words)
        if not own and not (verdict.words and self._launcher_ends_this()):
            _within(SPEAK_S, self._speak, verdict)
        if self._rank == 0:
            self._wire.tell({"kind": "verdict", "verdict": asdict(verdict)})
        if own:
            self._end_by = time.monotonic() + OWN_END_S, verdict.code
            self._released.set()
            return
        if verdict.stacks:
            _within(SPEAK_S, self._show_stacks, verdict)
        if self.linger is not None:
            _within(LINGER_S, self.linger, LINGER_S)
        self._wire.poll(TICK_S)  # what was told leaves this machine
        os._exit(verdict.code)

    def _launcher_ends_this(self) -> bool:
        """Whether others have said it all: rank 0 has told the error by now, and so has the rank that met it. Where a
        launcher ends the others in the meantime, they stay silent."""
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
    """Seconds that this process ran: while it is stopped (Slurm can suspend a job) no time goes by.

    The back-stop counts them all the same: a job suspended for longer than hang_s + BACKSTOP_S ends on resuming.
    """

    GAP_S = 2.0  # a longer time between two ticks does not count

    def __init__(self) -> None:
        self._lost, self._ticked = 0.0, time.monotonic()

    def now(self) -> float:
        return time.monotonic() - self._lost

    def tick(self) -> None:
        """To be called several times a second."""
        now = time.monotonic()
        if now - self._ticked > self.GAP_S:
            self._lost += now - self._ticked
        self._ticked = now


def _within(seconds: float, act: Callable[..., None], *arguments: Any) -> None:
    """Gives an action that may hang, or fail, so much time and no more."""

    def attempt() -> None:
        with suppress(Exception):
            act(*arguments)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _oom_kills() -> int:
    """Processes of this machine that the kernel has killed for want of memory so far; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
