"""Run a process for test_signals.py with the given behaviour, and print the state of its stop flag line by line.

flag       sets up the flag and prints it whenever it changes; a line on stdin ends it well
blocked    the same, but the main thread stays in one call of C, where no Python handler runs
restored   sets up the flag, gives the signals back, and waits
rank       depends on its launcher, if it has one, then as flag
start ...  starts the rest of the words as a child, and waits for it
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

from clipdist.fault_tolerance.signals import StopFlag, asked_to_stop, die_with_launcher


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once and whole, from any thread


def main(what: str, *rest: str) -> int:
    if what == "start":
        return subprocess.call([sys.executable, __file__, *rest])
    if what == "rank":
        say("depends" if die_with_launcher() else "alone")
    signal.signal(signal.SIGUSR2, lambda number, frame: say("submitit"))
    stop = StopFlag()
    stop.on_stop = lambda reason: say(f"told {reason}")
    if what == "restored":
        stop.restore()
    say(f"ready {os.getpid()}")
    if what == "blocked":
        signal.alarm(120)  # not for ever where the tests have died
        mutex = ctypes.create_string_buffer(64)  # zeros: one that nobody holds
        for _ in range(2):  # to lock it twice takes for ever, and unlike a sleep goes on after a signal
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ended: list[str] = []
    threading.Thread(target=lambda: ended.append(sys.stdin.readline()), daemon=True).start()
    shown = False
    while not ended:
        if stop.set and not shown:
            shown = True
            say(f"set {stop.reason} {asked_to_stop()}")
        time.sleep(0.01)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
