"""The catalog's benchmark as users call it: what it says, that its check of the order counts, and bad input."""

from __future__ import annotations

import pytest


def test_its_numbers(bench):
    ended = bench("catalog --shards 900 --samples-per-shard 1800 --json")
    result = ended.record
    assert result["shards"] == 900
    assert 900 * 1620 <= result["samples"] <= 900 * 1980
    assert [row["window"] for row in result["orders"]] == [0, 20_000]
    steps = result["samples"] // 32_768
    assert [row["checked_ids"] for row in result["orders"]] == [steps * 32_768] * 2  # small: the whole epoch
    assert f"900 shards, {result['samples']} samples" in ended.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--shards", "0"], "--shards 0: must be at least 1"),
        (["--shards", "3", "--samples-per-shard", "5"], "fewer than a global batch"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("catalog", *words)
