"""Starts W real processes on the CPU (gloo) and waits for them: how every test of this folder gets its ranks."""

from __future__ import annotations

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# A process with threads cannot be forked safely.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@functools.cache
def warm() -> subprocess.Popen[str]:
    """One warm.py for all tests of this process: the imports of a rank take ten seconds, its fork one."""
    env = os.environ | ALONE | {"PYTHONPATH": str(HERE.parents[1])}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "warm.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    )
    atexit.register(process.kill)
    return process


def run_ranks(script: str, world: int, *args: str, timeout_s: float = 300, expect: int = 0) -> str:
    """Runs tests/dist/SCRIPT with the given arguments as ranks 0 .. world-1.

    Fails with the output of every rank whose exit code is not `expect`. Returns what rank 0 printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        request = {"script": str(HERE / script), "args": [str(word) for word in args], "world": world, "port": port}
        server = warm()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps({**request, "folder": folder, "timeout_s": timeout_s}) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())["codes"]
        outputs = [(Path(folder) / f"{rank}.txt").read_text(errors="replace") for rank in range(world)]
    failed = [
        f"rank {rank}: {codes[rank]}\n{text[-4000:]}" for rank, text in enumerate(outputs) if codes[rank] != expect
    ]
    assert not failed, "\n".join(failed)
    return outputs[0]
