"""tools/bench/train.py: what it answers, and that clipdist and open_clip_train train alike. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("open_clip_train")
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/bench/train.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("bench_train", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rates_are_told_and_the_losses_agree(tool, shards, tmp_path, monkeypatch, capfd):
    few = ["--ranks", "1", "--rounds", "1", "--steps", "2", "--warmup", "1", "--workers", "1", "--loss-steps", "8"]
    out = tmp_path / "bench.md"
    words = ["--config", "configs/tiny.yaml", str(shards / "train"), *few, "--no-memory", "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words, "--out", str(out), "--json"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tool.main() == 0
    told = capfd.readouterr().out
    answer = json.loads(told.splitlines()[-1])
    assert answer["ours"] > 0
    assert answer["open_clip"] > 0
    assert answer["ratio"] == pytest.approx(answer["ours"] / answer["open_clip"])
    assert answer["loss_max_diff"] < 1e-4
    assert answer["ours_peak_bytes"] is answer["open_clip_peak_bytes"] is None
    text = out.read_text()
    assert text.strip() in told
    for word in ("| open_clip 1 workers |", "commit:", "hardware:", "torch ", "they agree to 0.0001"):
        assert word in text
    assert [path.name for path in tmp_path.iterdir()] == ["bench.md"]  # the runs' folders are gone


def test_memory_counts_what_a_process_and_its_children_hold(tool):
    code = (
        "import os, time; held = bytearray(80 << 20); held[::4096] = b'x' * len(held[::4096]); os.fork(); time.sleep(9)"
    )
    with tool.ProportionalSetSize() as watch:
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        watch.pids = [child.pid]
        deadline = time.monotonic() + 8
        while watch.peak_bytes < 80 << 20 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGKILL)  # its own child, too
        child.wait()
    assert 80 << 20 <= watch.peak_bytes < 140 << 20  # the fork's pages are its parent's: not counted twice


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "no shards match nowhere"),
        (["--ranks", "3"], "cannot be divided among 3 ranks"),
        (["optim.lr"], "no shards match optim.lr"),
    ],
)
def test_bad_input_is_told_in_one_line(tool, monkeypatch, capsys, words, says):
    from clipdist.errors import UserError

    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--config", "configs/tiny.yaml", *words])
    with pytest.raises(UserError, match=says):
        tool.main()


def test_shards_that_leave_a_loader_without_a_batch_are_refused(tool, shards, monkeypatch):
    from clipdist.errors import UserError

    words = [str(shards / "train"), "--config", "configs/tiny.yaml", "--ranks", "1", "train.global_batch=64"]
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words])
    with pytest.raises(UserError, match="fewer than a rank's batch of 64"):
        tool.main()


def test_a_missing_open_clip_train_is_told(monkeypatch):
    from clipdist.errors import UserError
    from tools.bench.peers.trainer import import_peer

    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    with pytest.raises(UserError, match="open_clip_train is not installed"):
        import_peer()
