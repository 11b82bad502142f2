"""Layer-wise learning rates (optim.layer_decay) by what a step does to the weights, at every ZeRO stage."""

from __future__ import annotations

import json
import re

import pytest
from dist.launch import run_ranks

FACTORS = {  # of a tower of two blocks, with a decay of 0.5
    r"visual\.(conv1|class_embedding|positional_embedding|ln_pre)|text\.(token_embedding|positional_embedding)": 0.125,
    r".*resblocks\.0\.": 0.25,
    r".*resblocks\.1\.": 0.5,
    r"visual\.(ln_post|proj)|text\.(ln_final|text_projection)|logit_scale": 1.0,
}


def test_a_layer_moves_by_its_own_rate() -> None:
    found = json.loads(run_ranks("layer_rates.py", 2).splitlines()[-1])
    assert len(found) == 7
    for cell, changes in found.items():
        for name, change in changes.items():
            (factor,) = [factor for pattern, factor in FACTORS.items() if re.match(pattern, name)]
            assert change == pytest.approx(factor, rel=1e-3), (cell, name)
