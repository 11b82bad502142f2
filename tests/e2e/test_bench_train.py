"""tools/bench/train.py: memory, FLOPs and bad input; test_bench_gpu.py runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from clipdist.config import load_config
from clipdist.errors import UserError
from tools.bench import train
from tools.bench.harness import ROOT
from tools.bench.mfu import flops_per_pair, peak_flops, utilisation
from tools.bench.peak_memory import ProportionalSetSize
from tools.bench.peers.trainer import import_peer

pytest.importorskip("open_clip_train")


def test_flops_are_those_that_others_count():
    """ViT-B/32: 14.78 GFLOP a forward pass by open_clip's table. Pixels need no gradient: 2 * 49 * 768 * 3072 less."""
    config = load_config(ROOT / "configs/tiny.yaml", ["model.name=ViT-B-32", "data.train=none", "data.val=[]"])
    assert flops_per_pair(config) == pytest.approx(3 * 14.78e9 - 2 * 49 * 768 * 3072, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_not_known(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)
    share = utilisation(1000, 1e11, peak_flops(name))
    assert share is None if tflops is None else share == pytest.approx(100 / tflops)


def test_on_a_gpu_memory_and_mfu_are_those_of_the_timed_runs(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    config = load_config(ROOT / "configs/tiny.yaml", ["data.train=none", "data.val=[]"])
    runs = {"clipdist": [train.TimedRun(2e6, 5 << 30), train.TimedRun(4e6, 6 << 30)]}
    runs["open_clip 1 workers"] = [train.TimedRun(1e6, 7 << 30)] * 2
    results = train.TrainingResults({side: [run.rate for run in of_side] for side, of_side in runs.items()})
    job = SimpleNamespace(config=config, precision="bf16", ranks=2)
    train.add_gpu_figures(job, runs, results)
    assert results.peak_bytes == {"clipdist": 6 << 30, "open_clip": 7 << 30}
    told = train.summary(results)
    assert told["ours_mfu"] == pytest.approx(3e6 * flops_per_pair(config) / 624e12)
    assert told["open_clip_mfu"] == pytest.approx(told["ours_mfu"] / 3)
    cells = [[cell.strip() for cell in line.split("|")] for line in train.rate_table(results, told)]
    assert cells[2][4:6] == [f"{100 * told['ours_mfu']:.1f} %", "6442 MB"]


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
