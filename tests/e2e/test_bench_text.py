"""tools/bench/text.py: its answer on drawn shards, and bad input."""

from __future__ import annotations

import pytest
from pairs import write_pairs


def test_both_ways_are_timed(bench, tmp_path):
    shards = write_pairs(tmp_path / "train", 70)
    words = ["model.name=configs/models/tiny_vit.json", f"data.train={shards}", "train.global_batch=64"]
    ended = bench("text --rounds 2 --json", "--out", tmp_path / "text.md", *words)
    assert set(ended.record["ratio"]) == {"text tower", "training step"}
    assert all(ratio > 0 for ratio in ended.record["ratio"].values())
    assert 2 < ended.record["mean_tokens"] < 12
    assert "tokens instead of 64 x 16" in ended.text
    assert (tmp_path / "text.md").read_text().strip() in ended.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.train="], "data.train: name shards with captions"),
        (["data.train=nowhere"], "nowhere"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["train.global_bach=2"], "train.global_bach"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("text", *words)
