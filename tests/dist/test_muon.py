"""Muon's step (optim.name=muon) is that of whole matrices on one process in float64, however ZeRO shards them."""

from __future__ import annotations

import json

import pytest
from dist.launch import run_ranks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_is_that_of_whole_matrices(world: int) -> None:
    found = json.loads(run_ranks("muon.py", world).splitlines()[-1])
    assert len(found) == (9 if world == 2 else 4)
    for cell, errors in found.items():
        name, worst = max(errors.items(), key=lambda item: item[1])
        parts = {part: error for part, error in errors.items() if "matrices" in part or "rest" in part}
        print(world, cell, {part: f"{error:.1e}" for part, error in parts.items()}, f"{name} {worst:.1e}")
        assert {"visual matrices", "visual rest", "text matrices", "text rest"} < parts.keys(), cell
        assert all(error < 1e-5 for error in parts.values()), cell
        assert worst < 3e-5, (cell, name)  # of directions without a gradient fp32's rounding grows 485-fold
