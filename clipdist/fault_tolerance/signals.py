"""What asks a process to end: signals and the death of its launcher in, a flag that the loop looks at out."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# USR2 is what submitit asks Slurm for, USR1 what many batch scripts do; both come ahead of a time limit. HUP comes
# when a terminal closes.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_KEY_S = 1.0  # a terminal and a launcher both pass on one Ctrl-C; after this time it is another one
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
REAPERS = ("systemd", "init", "tini", "docker-init", "dumb-init", "catatonit", "conmon", "s6-svscan")

_active: StopFlag | None = None  # handlers belong to the whole process, so there is one flag at a time


class StopFlag:
    """Set by the first signal that asks for an end. `set` and `reason` ("SIGTERM", ...) never change back.

    A second Ctrl-C, more than a second after the first, ends the process at once. Every other repetition is ignored:
    Slurm and the launchers send several signals while the run writes its last checkpoint.

    It replaces all handlers that were there before (submitit's would pickle and requeue the job by themselves).
    A process that was forked from this one does not set the flag.
    """

    def __init__(self) -> None:
        """Takes the signals over. Only the main thread may do so (ValueError elsewhere)."""
        global _active
        self.set = False
        self.reason = ""
        self.on_stop: Callable[[str], None] | None = None  # called once, from a thread of its own, with the reason
        self._told = False
        # Python runs a handler only between two steps of the main thread's interpreter. A main thread that waits in a
        # collective for a dead rank never gets there; the byte that C writes here reaches the thread all the same.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.getsignal(number) for number in STOPPING}
        for number in self._taken():
            signal.signal(number, self._on_signal)
        _active = self

    def restore(self) -> None:
        """Gives the signals back to the handlers of before."""
        global _active
        for number in self._taken():
            signal.signal(number, self._before[number])
        signal.set_wakeup_fd(self._wakeup_before)
        _active = None
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _taken(self) -> list[signal.Signals]:
        """nohup ignores SIGHUP, and is obeyed. None: a handler that was not set from Python, nothing to put back."""
        nohup = self._before[signal.SIGHUP] == signal.SIG_IGN
        taken = [number for number in STOPPING if self._before[number] is not None]
        return [number for number in taken if not (number == signal.SIGHUP and nohup)]

    def _on_signal(self, number: int, frame: Any) -> None:
        self._note(number)

    def _note(self, number: int) -> None:
        if not self.set:
            self.reason = signal.Signals(number).name
            self.set = True

    def _listen(self) -> None:
        first_interrupt = None
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number not in STOPPING:
                    continue
                self._note(number)
                now = time.monotonic()
                if number == signal.SIGINT:
                    if first_interrupt is not None and now - first_interrupt > SAME_KEY_S:
                        os.write(2, b"interrupted again: ended at once\n")
                        os._exit(128 + signal.SIGINT)
                    first_interrupt = first_interrupt or now
                if self.on_stop is not None and not self._told:
                    self._told = True
                    self.on_stop(self.reason)

    def _leave_child(self) -> None:
        """In a forked child: what comes from a terminal or a batch system is its parent's to handle."""
        signal.set_wakeup_fd(-1)
        for number in self._taken():
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def asked_to_stop() -> bool:
    """Whether a signal has set this process' flag."""
    return _active is not None and _active.set


def _after_fork_in_child() -> None:
    global _active
    if _active is not None:
        _active._leave_child()
        _active = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def die_with_launcher(words: list[str] | None = None) -> bool:
    """Has SIGTERM sent to this process when the launcher that started it dies. Call it early, from the main thread.

    torchrun's agent or the launcher of deepspeed may be killed without a chance to end its ranks, which would train
    on, unseen, on GPUs that somebody else takes for free. A process that no launcher started is left alone, so that
    `nohup python clipdist/train.py` outlives its shell. Nothing happens outside Linux.

    Args:
        words: the command line's, by default this process' own; the launcher of deepspeed adds --local_rank to them.

    Returns:
        Whether this process now depends on a launcher.
    """
    by_deepspeed = any(word.startswith("--local_rank") for word in (sys.argv if words is None else words))
    if not sys.platform.startswith("linux") or not (by_deepspeed or "TORCHELASTIC_RUN_ID" in os.environ):
        return False
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher or _is_reaper(launcher):  # it died before the call, or even before this process ran
        os.kill(os.getpid(), signal.SIGTERM)
    # `deepspeed` itself is one generation above: it starts deepspeed.launcher.launch, which outlives it.
    runner = _parent(launcher)
    if by_deepspeed and "deepspeed" in _command(runner):
        threading.Thread(target=_follow, args=(runner,), name="launcher", daemon=True).start()
    return True


def _follow(pid: int) -> None:
    """Waits for the end of another process, then asks this one to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        pass
    except (OSError, AttributeError):  # a kernel before 5.3, or a sandbox that forbids it
        return
    else:
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        end.poll()
        os.close(descriptor)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_reaper(pid: int) -> bool:
    """Whether a process is one that takes in orphans; a launcher, which is a Python program, may be pid 1 itself."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return True  # gone
    return (pid == 1 or name in REAPERS) and "python" not in _command(pid)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    """The parent's pid; 0 where it is not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
