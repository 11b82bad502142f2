"""What the plan says of a ZeRO stage's weights and optimiser is what DeepSpeed's own tensors hold."""

from __future__ import annotations

import json

import pytest
from dist.launch import run_ranks

from clipdist.config import load_config
from clipdist.estimate import make_estimate
from clipdist.estimate.memory import optimizer_bytes, weight_bytes


def test_weights_and_optimiser_are_as_deepspeed_holds_them() -> None:
    found = json.loads(run_ranks("zero_state.py", 2).splitlines()[-1])
    assert [row[0] for row in found] == [0, 0, 1, 2, 3, 3, 1, 3]
    for stage, precision, optimizer, state, weights in found:
        words = [f"engine.zero_stage={stage}", f"train.precision={precision}", "train.global_batch=8", "device=cpu"]
        words.append(f"optim.name={optimizer}")
        plan = make_estimate(load_config(None, ["model.name=configs/models/tiny_vit.json", *words]), world=2)
        small = plan.sizes.small * plan.layout.itemsize if stage == 3 else 0
        where = f"stage {stage}, {precision}, {optimizer}"
        assert optimizer_bytes(plan.sizes, plan.layout) == pytest.approx(state, rel=0.01), where
        predicted = weight_bytes(plan.sizes, plan.layout) - plan.sizes.buffer_bytes - small
        assert predicted == pytest.approx(weights, rel=0.01), where
