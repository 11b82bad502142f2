"""Turn signals, and the death of the launcher, into a flag that the training loop reads."""

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
from contextlib import suppress
from typing import Any

import psutil

# USR2 is what submitit asks Slurm for, USR1 what many batch scripts do; both come ahead of a time limit. HUP comes
# when a terminal closes.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_KEY_S = 1.0  # a terminal and a launcher both pass on one Ctrl-C; after this time it is another one
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
REAPERS = ("systemd", "init", "tini", "docker-init", "dumb-init", "catatonit", "conmon", "s6-svscan")

_active: StopFlag | None = None  # handlers belong to the whole process, so there is one flag at a time


class StopFlag:
    """Flag that the first stop signal sets. `set` and `reason` ("SIGTERM", ...) never change back.

    A second Ctrl-C, more than a second after the first, ends the process at once. Other repeated signals are ignored:
    Slurm and the launchers send several while the run writes its last checkpoint.

    It replaces all earlier handlers (submitit's would pickle and requeue the job by themselves).
    A process that was forked from this one does not set the flag.
    """

    def __init__(self) -> None:
        """Install the handlers. Only the main thread may do so (ValueError elsewhere)."""
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
        """Restore the earlier handlers."""
        global _active
        for number in self._taken():
            signal.signal(number, self._before[number])
        signal.set_wakeup_fd(self._wakeup_before)
        _active = None
        self._writer.close()  # ends the thread
        self._thread.join()
        self._reader.close()

    def _taken(self) -> list[signal.Signals]:
        """Return the signals to handle: not SIGHUP under nohup, none whose handler was set outside Python (None)."""
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
        """In a forked child, ignore what terminals and batch systems send: its parent handles that."""
        signal.set_wakeup_fd(-1)
        for number in self._taken():
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


def asked_to_stop() -> bool:
    """Return whether a signal has set this process' flag."""
    return _active is not None and _active.set


def _after_fork_in_child() -> None:
    global _active
    if _active is not None:
        _active._leave_child()
        _active = None


os.register_at_fork(after_in_child=_after_fork_in_child)


def die_with_launcher(words: list[str] | None = None) -> bool:
    """Have SIGTERM sent to this process when the launcher that started it dies. Call it early, from the main thread.

    torchrun's agent, the launcher of deepspeed or submit.py --cluster local may be killed without a chance to end its
    ranks, which would keep training on GPUs that seem to be free. A process that no launcher started is left alone, so
    that `nohup python clipdist/train.py` outlives its shell. Nothing happens outside Linux.

    Args:
        words: of the command line, by default this process'; the launcher of deepspeed adds --local_rank to them.

    Returns:
        Whether this process now depends on a launcher.
    """
    by_deepspeed = any(word.startswith("--local_rank") for word in (sys.argv if words is None else words))
    launched = by_deepspeed or "TORCHELASTIC_RUN_ID" in os.environ or "CLIPDIST_RESTARTS" in os.environ
    if not sys.platform.startswith("linux") or not launched:
        return False
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher or _is_reaper(launcher):  # it died before the call, or even before this process ran
        os.kill(os.getpid(), signal.SIGTERM)
    # `deepspeed` itself is one generation above: it starts deepspeed.launcher.launch, which outlives it.
    if by_deepspeed:
        with suppress(psutil.Error):
            runner = psutil.Process(launcher).parent()
            if runner is not None and "deepspeed" in " ".join(runner.cmdline()):
                threading.Thread(target=_follow, args=(runner.pid,), name="launcher", daemon=True).start()
    return True


def _follow(pid: int) -> None:
    """Wait for the end of another process, then send SIGTERM to this one."""
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
    """Return whether a process adopts orphans; a launcher, which is a Python program, may be pid 1 itself."""
    try:
        process = psutil.Process(pid)
        return (pid == 1 or process.name() in REAPERS) and "python" not in " ".join(process.cmdline())
    except psutil.Error:
        return True  # gone
