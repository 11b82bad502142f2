"""The day on a GPU, rehearsed on the CPU: the tables that its parts leave, and what a part does to the next ones.

Its parts are the benchmarks of training and of the data engine as users call them, so that their answers are looked at
here. No time is asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import psutil
import pytest

from clipdist.config import load_config
from tools.bench import gpu
from tools.bench.gpu import Part

ROOT = Path(__file__).parents[2]
pytest.importorskip("open_clip_train")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, shards):
    """The answers by part, the folder of the tables, and what stayed in the temporary folder."""
    out, scratch = tmp_path_factory.mktemp("gpu"), tmp_path_factory.mktemp("scratch")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    words = ["--rehearse", "--out", str(out), "--json", "--flickr8k", str(shards)]
    command = ["sh", str(ROOT / "tools/bench/gpu.sh"), *words]
    ended = subprocess.run(
        command, cwd=out, env=env | {"TMPDIR": str(scratch)}, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]), out, list(scratch.iterdir())


def test_every_part_leaves_a_table_and_a_line_in_the_summary(rehearsal):
    answers, out, left = rehearsal
    assert list(answers) == ["tests", "losses", "train", "data", "flickr8k"]
    assert all(answer["line"].startswith("done") for answer in answers.values())
    summary = next(out.glob("summary_cpu_*.md")).read_text()
    for part in answers:
        table = next(path for path in out.glob(f"{part}_cpu_*"))
        assert table.name in summary
        text = (table / "table.md" if part == "losses" else table).read_text()
        for word in ("command:", "commit:"):
            assert word in text
    assert "hardware:" in summary
    assert not left


def test_the_losses_and_flickr8k_are_measured(rehearsal):
    answers, _, _ = rehearsal
    assert all(row["grad_error"] < 2e-6 for row in answers["losses"]["rows"])
    trained = answers["flickr8k"]
    assert trained["finished"]
    assert trained["validated_step"] == trained["steps"] == 70 // 16
    assert 0 <= trained["t2i_r1"] <= trained["t2i_r10"] <= 100
    assert trained["samples_per_s"] > 0


def test_training_rates_are_told_and_the_losses_agree(rehearsal):
    answers, out, _ = rehearsal
    answer = answers["train"]
    assert answer["ours"] > 0
    assert answer["open_clip"] > 0
    assert answer["ratio"] == pytest.approx(answer["ours"] / answer["open_clip"])
    assert answer["loss_max_diff"] < 1e-4
    assert answer["ours_peak_bytes"] is answer["open_clip_peak_bytes"] is None
    assert answer["ours_mfu"] is None
    text = next(out.glob("train_cpu_*.md")).read_text()
    for word in ("| open_clip 1 workers |", "commit:", "hardware:", "torch ", "they agree to 0.0001"):
        assert word in text


def test_rates_of_all_sides_of_the_data_engine_are_told(rehearsal):
    answers, out, _ = rehearsal
    answer = answers["data"]
    assert answer["ratio"] == pytest.approx(answer["ours"] / answer["open_clip"])
    assert answer["of_ceiling"] == pytest.approx(answer["ours"] / answer["ceiling"])
    assert min(answer["ours"], answer["open_clip"], answer["ceiling"]) > 0
    assert 0 < answer["wait_share"] < 1
    assert answer["step_s"] > 0
    assert sum(answer["shares"].values()) == pytest.approx(1)
    for stages in answer["stage_us"].values():
        assert set(stages) == {"read", "decode", "resize", "tokens", "other"}
        assert min(stages["read"], stages["decode"], stages["tokens"]) > 0
    assert answer["first_batch_s"] > 0
    assert answer["start_s"] > 0
    assert answer["resume_ratio"] > 0
    assert answer["open_clip_workers"] in (1, 2)
    text = next(out.glob("data_cpu_*.md")).read_text()
    for word in ("| clipdist ", "open_clip_train, ", "| decode ", "commit:", "hardware:", "load ", "128 pictures"):
        assert word in text


def test_the_commands_for_a_gpu_are_accepted(monkeypatch, tmp_path, shards):
    """By the benchmarks' own command lines and the recipes; those of losses and training look for no device before."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--flickr8k", str(shards)])
    parts = gpu.gpu_parts(gpu.parse_args())
    assert [part.name for part in parts if part.missing] == []
    for file, *words in (command for part in parts[1:] for command in part.commands):
        tool = import_module(f"tools.bench.{Path(file).stem}")
        monkeypatch.setattr(sys, "argv", [file, *(word.replace("MINUTES", "1.5") for word in words)])
        args = tool.parse_args()
        if hasattr(args, "overrides"):
            assert load_config(args.config, args.overrides).device == "cuda"


def test_a_part_that_fails_or_takes_too_long_is_a_line(tmp_path, monkeypatch):
    """And nothing that it started lives on."""
    monkeypatch.setattr(gpu, "LEAST_S", 0.1)
    (tmp_path / "logs").mkdir()
    started = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    cut = gpu.run_part(Part("slow", 1, [["-c", started]]), 2.0, tmp_path, "cpu")
    assert cut.line == "cut after 2 s"
    pid = int((tmp_path / "logs/slow_cpu.log").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    refused = "import sys; print('error: no such thing', file=sys.stderr); sys.exit(2)"
    failed = gpu.run_part(Part("bad", 1, [["-c", refused], ["-c", "1/0"]]), 60, tmp_path, "cpu")
    assert failed.line == "FAILED (exit code 2): error: no such thing"
    assert failed.table is None
    faulty = 'import sys; print(\'{"notes": ["W=1 infonce, clipdist kernel: out of memory"]}\'); sys.exit(1)'
    failed = gpu.run_part(Part("losses", 1, [["-c", faulty]]), 60, tmp_path, "cpu")
    assert failed.line == "FAILED: W=1 infonce, clipdist kernel: out of memory"
    assert gpu.run_part(Part("late", 1, []), 0.0, tmp_path, "cpu").line == "not run: no time is left"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["0"], "MINUTES 0: must lie in 0.1 .. 1440"),
        (["--flickr8k", "nowhere"], "--flickr8k nowhere: does not exist"),
        (["--rehearse", "--parts", "los"], "--parts los: choose among tests losses train data flickr8k"),
        ([], "torch sees no CUDA device"),
    ],
)
def test_bad_input_is_told(refused, monkeypatch, words, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert says in refused("gpu", *words)
