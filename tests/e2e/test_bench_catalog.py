"""The catalog's benchmark as users call it: what it says, that its check of the order counts, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/bench/catalog.py"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, timeout=300)


def test_its_numbers() -> None:
    done = bench("--shards", "900", "--samples-per-shard", "1800", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["shards"] == 900
    assert 900 * 1620 <= result["samples"] <= 900 * 1980
    assert [row["window"] for row in result["orders"]] == [0, 20_000]
    steps = result["samples"] // 32_768
    assert [row["checked_ids"] for row in result["orders"]] == [steps * 32_768] * 2  # small: the whole epoch
    assert f"900 shards, {result['samples']} samples" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--shards", "0"], "--shards 0: must be at least 1"),
        (["--shards", "3", "--samples-per-shard", "5"], "fewer than a global batch"),
    ],
)
def test_bad_input_is_told(args: list[str], said: str) -> None:
    done = bench(*args)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
