"""tools/bench/text_towers.py on a few pairs: word vectors, a trained tower, its retrieval; bad input."""

from __future__ import annotations

from pathlib import Path


def test_a_tower_is_trained_and_measured(bench, shards: Path, tmp_path: Path) -> None:
    few = "text_towers --towers lstm+vectors --samples 32 --json"
    words = [shards, "--work", tmp_path / "work", "--out", tmp_path / "towers.md", "train.global_batch=16"]
    (row,) = bench(few, *words).record["rows"]
    assert row["text_parameters"] > 256 * 16384
    assert min(row["cpu_s"], row["wall_s"], row["peak_bytes"]) > 0
    assert all(0 <= row[name] <= 100 for name in ("t2i_r1", "i2t_r10"))
    text = (tmp_path / "towers.md").read_text()
    assert "| LSTM, word vectors |" in text
    assert "- command: " in text


def test_bad_input_is_told(refused, shards: Path, tmp_path: Path) -> None:
    assert "nowhere/train" in refused("text_towers", tmp_path / "nowhere", "--work", tmp_path / "work")
    assert "optim.rl" in refused("text_towers", shards, "--work", tmp_path / "work", "optim.rl=1")
    assert "--samples 0: must be at least 1" in refused("text_towers", shards, "--samples", 0)
