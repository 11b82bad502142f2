"""Fork ranks from a process that has imported everything. Reads one JSON request per line, prints one answer per line.

Request: {"script", "args", "world", "port", "folder", "timeout_s"}. Answer: {"codes": exit codes by rank}. Rank r
prints to folder/r.out and folder/r.err.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from rehearsal import warm_up


def fork(rank: int, request: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(request["folder"]) / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(request["port"])}
        os.environ |= {"WORLD_SIZE": str(request["world"]), "LOCAL_WORLD_SIZE": str(request["world"])}
        sys.argv = [request["script"], *request["args"]]
        sys.path.insert(0, str(Path(request["script"]).parent))
        try:
            runpy.run_path(request["script"], run_name="__main__")
            code = 0
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int], timeout_s: float) -> list[int | None]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return [codes.get(pid) for pid in pids]


if __name__ == "__main__":
    warm_up()
    for line in sys.stdin:
        request = json.loads(line)
        pids = [fork(rank, request) for rank in range(request["world"])]
        print(json.dumps({"codes": wait(pids, request["timeout_s"])}), flush=True)
