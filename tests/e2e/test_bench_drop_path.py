"""tools/bench/drop_path.py: its answer on a tiny tower, and a tower that it cannot measure."""

from __future__ import annotations


def test_all_rates_are_timed(bench):
    ended = bench("drop_path --images 2 --rounds 1 --json", "model.name=configs/models/tiny_vit.json")
    assert list(ended.record["ratio"]) == ["0.0", "0.1", "0.2", "0.4"]
    assert ended.record["ratio"]["0.0"] == 1
    assert "| 0.4 |" in ended.text


def test_a_tower_without_known_blocks_is_told(refused):
    told = refused("drop_path", "model.name=configs/models/tiny_rn.json")
    assert "ModifiedResNet has no blocks of a known ViT" in told
