"""The search's benchmark as users call it: its numbers come from features that were kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools/bench/search.py"


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *args], capture_output=True, text=True, timeout=300)


def test_its_numbers() -> None:
    done = bench(
        "--pictures", "50", "--model", "configs/models/tiny_vit.json", "--rounds", "1", "--device", "cpu", "--json"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["pictures"] == 50
    assert 0 < record["search_s"] < record["after_imports_s"]
    assert "50 pictures" in done.stdout


def test_bad_input_is_told() -> None:
    done = bench("--pictures", "0")
    assert done.returncode == 2
    assert "--pictures 0: must be at least 1" in done.stderr
