"""Starts W real processes on the CPU (gloo) and waits for them: how every test of this folder gets its ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(script: str, world: int, *args: str, timeout_s: float = 300, expect: int = 0) -> str:
    """Runs tests/dist/SCRIPT with the given arguments as ranks 0 .. world-1.

    Fails with the output of every rank whose exit code is not `expect`. Returns what rank 0 printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, str(HERE / script), *args]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s)[0])
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}:\n{text[-4000:]}" for rank, text in enumerate(outputs) if processes[rank].returncode != expect]
    assert not failed, "\n".join(failed)
    return outputs[0]
