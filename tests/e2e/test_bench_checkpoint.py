"""tools/bench/checkpoint.py: what it answers. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/bench/checkpoint.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(TOOL), *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_saving_and_starting_are_measured(tmp_path):
    out = tmp_path / "bench.md"
    few = ["--models", "configs/models/tiny_rn.json", "--batch", "4", "--saves", "2", "--steps", "2"]
    ended = run(*few, "--work", str(tmp_path), "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (result,) = json.loads(ended.stdout.splitlines()[-1])["models"]
    saves = result["saves"]
    assert len(saves["plain_s"]) == 4
    assert len(saves["in_loop_s"]) == len(saves["gone_s"]) == 2
    assert len(saves["beside_s"]) >= 2
    assert result["checkpoint_bytes"] > 3 * 4 * result["parameters"]  # weights and two moments
    assert result["fresh"]["verify"] == result["fresh"]["restore"] == 0
    assert all(seconds > 0 for seconds in result["resumed"].values())
    assert "| tiny_rn, " in out.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["bench.md"]  # the checkpoints are gone


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    ended = run("--work", str(tmp_path / "none"), "--models", "configs/models/tiny_rn.json")
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: --work")
