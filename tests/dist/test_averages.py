"""The moving average of the weights (train.ema) is that of one process in float64, for any ZeRO stage and precision."""

from __future__ import annotations

import json

import pytest
from dist.launch import run_ranks


@pytest.mark.parametrize("world", [1, 2])
def test_the_average_is_that_of_whole_weights_and_is_what_the_model_computes_with(world: int) -> None:
    found = json.loads(run_ranks("averages.py", world).splitlines()[-1])
    assert len(found) == (4 if world == 1 else 11)
    for cell, errors in found.items():
        print(world, cell, errors)
        half = "bf16" in cell
        assert errors["average"] < 1e-6, cell
        assert errors["features"] < (2e-2 if half else 1e-5), cell
        assert errors["hidden"] < (2e-2 if half else 1e-5), cell
        assert errors["moved"] > 5 * errors["features"], cell  # the weights themselves give other features
