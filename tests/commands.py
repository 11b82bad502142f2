"""The training command as users type it, by every launcher, on the smallest recipe; and what its run folder says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "python": [str(BIN / "python"), "clipdist/train.py"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "clipdist/train.py"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "0", "clipdist/train.py"],
}


def run(launcher: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [word if word != "0" else free_port() for word in LAUNCHERS[launcher]]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--config", "configs/tiny.yaml", *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def records(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["type"] == kind]
