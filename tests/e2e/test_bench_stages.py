"""tools/bench/stages.py: its answer, and bad input."""

from __future__ import annotations

import pytest

TINY = ["model.name=configs/models/tiny_vit.json", "train.global_batch=4"]


def test_stages_are_timed(bench, tmp_path):
    stages = "train.stages=[{share: 0.5, patch_dropout: 0.5}, {share: 0.2, image_size: 16}, {share: 0.3}]"
    ended = bench("stages --rounds 2 --json", "--out", tmp_path / "stages.md", *TINY, stages)
    assert len(ended.record["ratio"]) == 2  # the last stage is what they are compared with
    assert all(ratio > 0 for ratio in ended.record["ratio"].values())
    assert "images of 32 pixels, at most 16 tokens, 50 % of the patches dropped" in ended.text
    assert (tmp_path / "stages.md").read_text().strip() in ended.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "train.stages: name the stages"),
        (["train.stages=[{share: 1, image_size: 20}]"], "must be a multiple of the model's patches of 8"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("stages", *TINY, *words)
