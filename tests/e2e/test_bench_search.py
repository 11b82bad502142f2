"""The search's benchmark as users call it: its numbers come from features that were kept."""

from __future__ import annotations


def test_its_numbers(bench):
    ended = bench("search --pictures 50 --model configs/models/tiny_vit.json --rounds 1 --device cpu --json")
    assert ended.record["pictures"] == 50
    assert 0 < ended.record["search_s"] < ended.record["after_imports_s"]
    assert "50 pictures" in ended.stdout


def test_bad_input_is_told(refused):
    assert "--pictures 0: must be at least 1" in refused("search", "--pictures", 0)
