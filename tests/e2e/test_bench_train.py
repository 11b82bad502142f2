"""tools/bench/train.py: what it answers, and that clipdist and open_clip_train train alike. No time is asserted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from clipdist.errors import UserError
from tools.bench.peak_memory import ProportionalSetSize
from tools.bench.peers.trainer import import_peer

pytest.importorskip("open_clip_train")


def test_rates_are_told_and_the_losses_agree(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    few = "--ranks 1 --rounds 1 --steps 2 --warmup 1 --workers 1 --loss-steps 8 --no-memory --json"
    out = tmp_path / "bench.md"
    line = f"train --config configs/tiny.yaml {few}"
    ended = bench(line, "--out", out)
    answer = ended.record
    assert answer["ours"] > 0
    assert answer["open_clip"] > 0
    assert answer["ratio"] == pytest.approx(answer["ours"] / answer["open_clip"])
    assert answer["loss_max_diff"] < 1e-4
    assert answer["ours_peak_bytes"] is answer["open_clip_peak_bytes"] is None
    assert out.read_text().strip() in ended.stdout
    assert not list(tmp_path.glob("bench-*"))  # the runs' folders are gone
    for word in ("| open_clip 1 workers |", "commit:", "hardware:", "torch ", "they agree to 0.0001"):
        assert word in ended.text


def test_memory_counts_what_a_process_and_its_children_hold():
    code = (
        "import os, time; held = bytearray(80 << 20); held[::4096] = b'x' * len(held[::4096]); os.fork(); time.sleep(9)"
    )
    with ProportionalSetSize() as watch:
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
        (["--ranks", "3"], "cannot be divided among 3 ranks"),
        (["optim.lr"], "optim.lr"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("train", "--config", "configs/tiny.yaml", *words)


def test_a_missing_open_clip_train_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip_train", None)
    with pytest.raises(UserError, match="open_clip_train is not installed"):
        import_peer()
