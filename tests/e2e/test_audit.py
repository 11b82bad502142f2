"""tools/audit_gradients.py: the proof of exactness as users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from clipdist.config import Config
from clipdist.evals.audit import LossAndGradients, compare
from clipdist.models.dual_encoder import PARTS
from tools.audit_gradients import report

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOOL = ["tools/audit_gradients.py", "--config", "configs/tiny.yaml"]


def run(*words: str, launcher: tuple[str, ...] = (str(BIN / "python"),)) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *TOOL, *words], cwd=ROOT, env=env, capture_output=True, text=True)


def test_the_tool_passes_and_shows_what_peers_get_wrong(shards):
    words = ["--ranks", "2", "--steps", "1", "--peers", "--json", f"data.train={shards / 'train'}"]
    ended = run(*words, "train.micro_batch=4", "engine.zero_stage=2")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["pass"]
    assert (result["world"], result["micro_batch"], result["zero_stage"]) == (2, 4, 2)
    assert str(shards) in result["data"]
    rows = {(row["impl"], row["part"]): row for row in result["rows"]}
    for part in ("image", "text", "temperature", "loss", "evaluation"):
        assert rows["clipdist", part]["error"] < 1e-5
    # Each rank's gradient is that of its own rows alone; DDP divides it by W.
    assert rows["open_clip default flags", "image"]["norm_ratio"] == pytest.approx(1 / 2, rel=1e-4)
    assert rows["open_clip default flags", "temperature"]["norm_ratio"] == pytest.approx(1, rel=1e-4)
    assert not rows["open_clip --local-loss", "text"]["passed"]
    assert rows["open_clip --local-loss --gather-with-grad", "text"]["passed"]
    accumulated = rows["open_clip --local-loss --gather-with-grad --accum-freq 4", "temperature"]
    assert accumulated["norm_ratio"] == pytest.approx(4, rel=1e-4)


def test_a_launchers_ranks_are_taken_as_they_are():
    torchrun = (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2")
    ended = run("--steps", "1", "--json", "objectives.clip.loss=sigmoid", launcher=torchrun)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["world"] == 2
    assert {row["part"] for row in result["rows"]} == {"image", "text", "temperature", "bias", "loss", "evaluation"}
    assert result["data"].startswith("drawn random pictures")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ranks", "3"], "train.global_batch=16"),
        (["--ranks", "2", "train.micro_batch=3"], "train.micro_batch=3"),
        (["--ranks", "2", "train.precision=fp16"], "train.precision=fp16"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, named):
    ended = run(*words)
    assert ended.returncode == 2
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_part_that_fails_is_exit_1_but_a_peers_is_not(capsys):
    right = LossAndGradients(2.0, {"visual.w": torch.ones(8), "text.w": torch.ones(8), "logit_scale": torch.ones(1)})
    half = LossAndGradients(2.0, right.gradients | {"text.w": torch.full([8], 0.5)})
    stub = SimpleNamespace(
        cfg=Config(), spec=SimpleNamespace(name="m"), dist_env=SimpleNamespace(world_size=2), micro=1, precision="fp32"
    )
    stub.notes = lambda: ["this"]

    def part_of(name):
        return PARTS[name.partition(".")[0]]

    fine, wrong = (compare(measured, right, "fp32", step=1, part_of=part_of) for measured in (right, half))
    peer = compare(half, right, "fp32", step=1, part_of=part_of, impl="open_clip")
    assert report(Namespace(json=False), stub, [*fine, *peer], "drawn") == 0
    assert report(Namespace(json=True), stub, wrong, "drawn") == 1
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["part"] for row in result["rows"] if not row["passed"]] == ["text"]
    assert not result["pass"]
