"""tools/bench/native_aspect.py: its answer on a tiny tower, and bad input."""

from __future__ import annotations

import pytest


def test_all_ways_are_timed(bench, tmp_path):
    words = ["model.name=tests/dist/naflex.json", "--out", tmp_path / "native.md"]
    ended = bench("native_aspect --aspects 1:1,2:1 --images 4 --rounds 1 --json", *words)
    assert len(ended.record["ratio"]) == 3
    assert all(ratio > 0 for ratio in ended.record["ratio"].values())
    # A square is shown on 4 x 4 patches, an image of 2:1 on 3 x 5 (the budget is 16).
    assert "| packed | 16 | 16 |" in ended.text
    assert "| padded to a square, as large | 25 | 19 |" in ended.text
    assert (tmp_path / "native.md").read_text().strip() in ended.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--aspects", "4x3"], "--aspects 4x3: must be aspect ratios"),
        (["model.name=configs/models/tiny_vit.json"], "its images are squares; set model.patch_budget"),
        (["--images", "0"], "--images 0: must be at least 1"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("native_aspect", *words)
