"""Run a rank without training under a watchdog, for test_watch.py. Its address and behaviour are given as JSON.

Rank 0 prints its port, every rank "ready". What it does:
    train       goes from step to step until a line comes on stdin, then ends well
    hang        the same until a line comes, then stays in phase data for ever
    words       the same, then raises the exception that the line names
    stuck       the same, then stays in native code without ever letting the interpreter go on
    slow        the same, then asks for a stop and does not end
    again       the same, then ends well and says "closed"; stdin has the port of the next watch, under which it trains
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

import clipdist.fault_tolerance.watchdog
from clipdist.errors import Fault, UserError, run_main
from clipdist.fault_tolerance.heartbeat import open_listener
from clipdist.fault_tolerance.watchdog import Watchdog

ERRORS = {"UserError": UserError, "Fault": Fault, "RuntimeError": RuntimeError}


def main() -> None:
    do = json.loads(sys.argv[1])
    if do["act"] == "stuck":
        clipdist.fault_tolerance.watchdog.BACKSTOP_S = 1.0
    os.environ["RANK"] = str(do["rank"])
    told: list[str] = []
    threading.Thread(target=lambda: told.extend(iter(sys.stdin.readline, "")), daemon=True).start()
    with watch(do, do["port"]) as first:
        first.linger = lambda seconds: (Path(do["dir"]) / f"lingered-{do['rank']}").touch()
        train(first, told)
        if do["act"] == "hang":
            with first.phase("data"):
                time.sleep(1000)
        elif do["act"] == "words":
            kind, _, text = told[0].strip().partition(" ")
            with first.phase("validation"):
                raise ERRORS[kind](text)
        elif do["act"] == "stuck":
            ctypes.PyDLL(None).sleep(1000)
        elif do["act"] == "slow":
            first.stopping(0.5)
            time.sleep(1000)
    if do["act"] == "again":
        told.clear()
        print("closed", flush=True)
        while not told:
            time.sleep(0.01)
        with watch(do, int(told.pop(0))) as second:
            train(second, told)


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def watch(do: dict, port: int) -> Watchdog:
    listener = None
    if do["rank"] == 0:
        listener = open_listener() if not port else socket.create_server(("", port))
        print(listener.getsockname()[1], flush=True)
    opened = Watchdog(
        do["rank"],
        do["world"],
        Path(do["dir"]),
        do["hang_s"],
        port=port,
        token=do["token"],
        listener=listener,
        node=f"node{do['rank'] // 2}",
        silence_s=do["silence_s"],
    )
    opened.record = lambda step, why: append(Path(do["dir"]) / "record", f"{do['rank']} {step} {why}\n")
    opened.progress(120)
    print("ready", flush=True)
    return opened


def train(watchdog: Watchdog, told: list[str]) -> None:
    while not told:
        watchdog.progress(120)
        with watchdog.phase("step"):
            time.sleep(0.02)


if __name__ == "__main__":
    run_main(main)
