"""tools/bench/memory.py: its answer, and that a step in micro-batches takes a fraction of a whole batch's memory."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipdist.errors import UserError

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/bench/memory.py"
MICRO, BATCH = 16, 256


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_memory_does_not_grow_with_the_global_batch(tmp_path):
    out = tmp_path / "memory.md"
    sizes = ["--micro-batch", str(MICRO), "--times", "1", str(BATCH // MICRO), "--precision", "fp32"]
    ended = run(*sizes, "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {(r["global_batch"], r["micro_batch"]): r for r in json.loads(ended.stdout.splitlines()[-1])["rows"]}
    assert set(rows) == {(MICRO, MICRO), (BATCH, MICRO), (BATCH, 0)}
    peak = {cell: row["peak_bytes"] for cell, row in rows.items()}
    assert peak[BATCH, MICRO] < peak[BATCH, 0] / 2
    assert peak[BATCH, MICRO] < 4 * peak[MICRO, MICRO]
    assert peak[BATCH, 0] > 4 * peak[MICRO, MICRO]  # it is the activations that are measured
    assert rows[BATCH, MICRO]["feature_bytes"] == 2 * BATCH * 32 * 8  # of 32 features: a float and its gradient each
    assert all(row["time_s"] > 0 and row["precision"] == "fp32" for row in rows.values())
    text = out.read_text()
    assert text.strip() in ended.stdout
    for told in ("commit:", "hardware:", f"| fp32 | {BATCH} |"):
        assert told in text


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_memory", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--times", "0", "4"], "must be at least 1"),
        (["train.micro_batch=4"], "this program sets it itself"),
        (["model.name=nothing"], "nothing"),
        (["optim.lear=1"], r"optim\.lear"),
        (["--precision", "fp16"], "not on a CPU"),
    ],
)
def test_bad_input_is_told_before_anything_starts(tool, monkeypatch, words, says):
    monkeypatch.setattr(sys, "argv", ["bench_memory.py", "device=cpu", *words])
    with pytest.raises(UserError, match=says):
        tool.main()


def test_bad_input_is_one_line():
    ended = run("--micro-batch", "0")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr == "error: --micro-batch 0 --times 1 4 16 64: must be at least 1\n"


def test_a_whole_batch_that_would_not_fit_is_left_out(tool):
    row = tool.Row("fp32", 8, 8, 1 << 24, 0, 1.0)
    assert tool.fits("cpu", row, 8)
    assert not tool.fits("cpu", row, 8 << 20)
    assert not tool.fits("cpu", tool.Row("fp32", 8, 0, None, 0, None), 8)
