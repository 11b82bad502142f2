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
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
# A process with threads cannot be forked safely.
ALONE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@functools.cache
def warm() -> subprocess.Popen[str]:
    """One warm.py for all tests of this process: the imports of a rank take ten seconds, its fork one."""
    paths = [*map(str, HERE.parents[:2]), os.environ.get("PYTHONPATH")]
    env = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "warm.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
    )
    atexit.register(process.kill)
    return process


def run_ranks(script: str, world: int, *args: object, timeout_s: float = 300, expect: int = 0) -> str:
    """Runs tests/dist/SCRIPT with the given arguments as ranks 0 .. world-1.

    Fails with the output of every rank whose exit code is not `expect`. Returns what rank 0 printed.
    """
    codes, outs, errs = _ask(script, world, args, timeout_s)
    failed = [
        f"rank {rank}: {code}\n{outs[rank][-2000:]}\n{errs[rank][-4000:]}"
        for rank, code in enumerate(codes)
        if code != expect
    ]
    assert not failed, "\n".join(failed)
    return outs[0]


def train(world: int, *words: object) -> subprocess.CompletedProcess[str]:
    """clipdist/train.py on configs/tiny.yaml and W ranks, as launchers start it, in a tenth of the time."""
    codes, outs, errs = _ask("training.py", world, ("none", 0, "--config", "configs/tiny.yaml", *words), 300)
    return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), "".join(outs), "".join(errs))


def _ask(script: str, world: int, args: Sequence[object], timeout_s: float) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, outputs and errors, by rank."""
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
        outs, errs = (
            [(Path(folder) / f"{rank}.{kind}").read_text(errors="replace") for rank in range(world)]
            for kind in ("out", "err")
        )
    return codes, outs, errs
