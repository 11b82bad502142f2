"""Whole runs meet accidents: what accidents.py finds, scenario by scenario."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("accidents.py")
LIMIT_S = 900
SCENARIOS = (
    "rollback",
    "rollbacks_spent",
    "data_away_for_long",
    "data_away_for_a_moment",
    "stopped_while_data_is_missing",
    "one_rank_is_warned",
    "stopped_at_the_start",
    "damaged_checkpoint",
    "full_disk",
    "full_disk_at_the_end",
    "saves_by_the_clock",
    "what_is_kept",
    "hang",
    "hang_in_data",
    "flipped_bit_in_memory",
    "other_configuration",
    "killed_beside_a_writer",
    "asked_again_and_again",
    "resume_rule",
)


@pytest.fixture(scope="module")
def found(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each scenario found; the script's processes end with it."""
    folder = tmp_path_factory.mktemp("accidents")
    words = [sys.executable, str(SCRIPT), str(shards), str(folder), *SCENARIOS]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    errors = folder / "errors.txt"
    with errors.open("w") as file:
        ended = subprocess.run(
            words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=file, text=True, timeout=LIMIT_S
        )
    told = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"name"')]
    assert ended.returncode == 0, f"after {[one['name'] for one in told]}: {errors.read_text()[-3000:]}"
    return {one["name"]: one for one in told}


@pytest.mark.parametrize("name", SCENARIOS)
def test_accident(found: dict[str, dict[str, Any]], name: str) -> None:
    assert found[name]["ok"], found[name]["detail"]
