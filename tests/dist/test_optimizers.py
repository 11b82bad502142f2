"""Steps of every optimiser are those of whole tensors on one process in float64, however ZeRO shards them."""

from __future__ import annotations

import json

import pytest
from dist.launch import run_ranks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_are_those_of_whole_tensors(world: int, tmp_path) -> None:
    found = json.loads(run_ranks("optimizers.py", world, tmp_path).splitlines()[-1])
    assert len(found) >= {1: 4 + 3, 2: 9 + 18, 4: 4 + 3}[world]
    for cell, errors in found.items():
        if not errors:
            continue
        name, worst = max(errors.items(), key=lambda item: item[1])
        parts = {part: error for part, error in errors.items() if " " in part or part.startswith("exp_avg")}
        print(world, cell, {part: f"{error:.1e}" for part, error in parts.items()}, f"{name} {worst:.1e}")
        if "visual matrices" in parts:  # muon.py
            assert {
                "visual matrices",
                "visual rest",
                "text matrices",
                "text rest",
                "logit_scale rest",
            } == parts.keys(), cell
        assert all(error < 1e-5 for error in parts.values()), cell
        assert worst < 3e-5, (cell, name)  # Muon's of directions without a gradient: fp32's rounding grows 485-fold
