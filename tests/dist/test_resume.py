"""A run that is interrupted and goes on ends as the undisturbed one: bit for bit in fp32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dist.launch import run_ranks

from clipdist.checkpoint.format import newest_checkpoint
from clipdist.checkpoint.reader import CheckpointReader

STEPS = 8  # two epochs of 70 // 16 = 4 steps
RESNET = "configs/models/tiny_rn.json"  # running statistics must survive, too


def words(shards: Path, root: Path, name: str, **settings: object) -> list[str]:
    given = {
        "run.root": root,
        "run.name": name,
        "data.train": shards / "train",
        "data.val": "",
        "model.name": RESNET,
        "engine.zero_stage": 2,
        "train.steps": STEPS,
        "train.save_every": 3,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return ["--config", "configs/tiny.yaml", *(f"{key}={value}" for key, value in given.items())]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [(record["step"], record["loss"]) for record in records if record["type"] == "train"]
    assert len({step for step, _ in train}) == len(train)  # no step is told twice
    return dict(train)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(newest_checkpoint(run))
    assert reader.manifest.step == STEPS
    return {name: reader.read_full(name) for name in reader.names()}


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    assert {name.partition("/")[0] for name in ours} == {"param", "exp_avg", "exp_avg_sq", "buffer"}
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks("training.py", 2, "none", "0", *words(shards, root, "whole"))
    return root / "whole"


def test_after_a_signal(shards, undisturbed, tmp_path):
    out = run_ranks("training.py", 2, "sigterm", "4", *words(shards, tmp_path, "run"), expect=75)
    assert "go on with" in out
    assert newest_checkpoint(tmp_path / "run").name == "step-00000004"
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run"))
    assert_same(tmp_path / "run", undisturbed)


def test_after_a_kill(shards, undisturbed, tmp_path):
    run_ranks("training.py", 2, "kill", "5", *words(shards, tmp_path, "run"), expect=9)
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    out = run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run"))
    assert "step-00000003" in out
    assert_same(tmp_path / "run", undisturbed)


def test_another_number_of_ranks_and_another_stage_go_on(shards, tmp_path):
    """Without BatchNorm the curve is that of the undisturbed run up to rounding."""
    model = "configs/models/tiny_vit.json"
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "whole", model__name=model))
    run_ranks("training.py", 2, "kill", "4", *words(shards, tmp_path, "run", model__name=model), expect=9)
    settings = words(shards, tmp_path, "run", model__name=model, engine__zero_stage=0)
    run_ranks("training.py", 1, "kill", "7", *settings, expect=9)
    settings = words(shards, tmp_path, "run", model__name=model, engine__zero_stage=3)
    out = run_ranks("training.py", 4, "none", "0", *settings)
    assert "step-00000006" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    restarts = [record["world"] for record in map(json.loads, lines) if record.get("event") == "restart"]
    assert restarts == [1, 4]
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-5)
