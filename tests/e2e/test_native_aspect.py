"""A model whose images keep their aspect ratio: training on one rank and two, features kept, tools, bad input."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import records
from dist.launch import train
from pairs import write_pairs
from PIL import Image

from tools import eval_retrieval, search_images, universal_perturbation

MODEL = "model.name=tests/dist/naflex.json"
SHAPES = ((32, 32), (32, 96), (96, 32), (40, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of noise in four shapes, and a run of 4 steps on two ranks."""
    random = np.random.default_rng(0)
    images = {}
    for number in range(64):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (*SHAPES[number % 4], 3), dtype=np.uint8)).save(file, "PNG")
        images[number] = file.getvalue()
    folder = tmp_path_factory.mktemp("native")
    write_pairs(folder / "train", 64, bad=images)
    write_pairs(folder / "val", 20, bad=dict(list(images.items())[:20]))
    ended = train(2, *words(folder, "two"), "data.flip=0.5", "train.micro_batch=4")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "images in evaluation: own aspect ratio, at most 16 patches of 8 x 8, bicubic; mean" in ended.stdout
    return folder


def words(folder: Path, name: str) -> list[str]:
    data = [f"data.train={folder / 'train'}", f"data.val={folder / 'val'}"]
    return [MODEL, *data, f"run.root={folder}", f"run.name={name}", "train.steps=4"]


def test_one_rank_trains_the_same_run(folder):
    ended = train(1, *words(folder, "one"), "data.flip=0.5")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    curves = [[record["loss"] for record in records(folder / name, "train")] for name in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_tools_take_the_run(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_retrieval.py", str(folder / "two"), str(folder / "val"), "--json"])
    eval_retrieval.main()
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    (validation,) = [record for record in records(folder / "two", "val") if record["step"] == 4]
    assert {key: measured[key] for key in ("t2i_r1", "i2t_r10")} == pytest.approx(
        {key: validation[key] for key in ("t2i_r1", "i2t_r10")}
    )
    monkeypatch.setattr(sys, "argv", ["search_images.py", str(folder / "two"), str(folder / "val"), "--query", "red"])
    search_images.main()
    assert "000000" in capsys.readouterr().out


def test_a_locked_tower_keeps_its_features(folder):
    locked = ["model.lock_image=true", "data.crop_scale_min=1.0", "data.cache=" + str(folder / "cache")]
    curves = []
    for name, more in (("locked", []), ("kept", ["data.cache_features=true"])):
        ended = train(1, *words(folder, name), *locked, *more)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        curves.append([record["loss"] for record in records(folder / name, "train")])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)  # a whole crop is what evaluation sees


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.patch_budget=2", "model.patch_budget=2: must be a number of patches in 4 .. 65535"),
        ("train.stages=[{share: 1, tokens: 8}]", "train.stages: not with model.name=tests/dist/naflex.json"),
        ("engine.compile=true", "engine.compile=true: not for tests/dist/naflex.json"),
        ("model.name=configs/models/tiny_vit.json", "takes square images alone"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(folder, word, said):
    more = ["model.patch_budget=64"] if word.startswith("model.name") else []
    ended = train(1, *words(folder, "bad"), word, *more)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_a_perturbation_of_one_size_is_refused(folder, monkeypatch):
    classes = folder / "labelled" / "test"
    for name in ("red", "blue"):
        (classes / name).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            Image.new("RGB", (20, 40), name).save(classes / name / f"{number}.png")
    words = ["universal_perturbation.py", str(folder / "two"), "--data", str(folder / "labelled")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Exception, match="a perturbation is of one size"):
        universal_perturbation.main()
