"""What the plan says of a ZeRO stage's weights and optimiser is what DeepSpeed's own tensors hold; of objectives on
views also what teachers and state hold, and what two ranks send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dist.launch import run_ranks

from clipdist.config import load_config
from clipdist.estimate import Estimate, make_estimate
from clipdist.estimate.memory import STATE, TEACHER, optimizer_bytes, weight_bytes


@pytest.fixture(scope="module")
def held() -> list[list[list[Any]]]:
    return json.loads(run_ranks("zero_state.py", 2).splitlines()[-1])


def planned(words: list[str]) -> Estimate:
    common = ["model.name=configs/models/tiny_vit.json", "train.global_batch=8", "device=cpu"]
    return make_estimate(load_config(None, [*common, *words]), world=2)


def test_what_objectives_on_views_hold_and_send(held: list[list[list[Any]]]) -> None:
    for stage, section, average, copied, state, sent in held[1]:
        plan = planned([f"engine.zero_stage={stage}", "train.precision=fp32", f"objectives={section}"])
        memory = plan.stages[stage]
        where = f"stage {stage}, {section}"
        assert memory.parts[TEACHER] == copied, where
        assert memory.parts[STATE] in (state, 3 * state), where
        averaged = 4 * plan.sizes.trained // (plan.world if stage else 1)
        assert average == pytest.approx(averaged if copied else 0, rel=0.01), where
        print(f"{where}: planned {sum(plan.wire.values()):.0f} bytes, sent {sent}")
        assert sum(plan.wire.values()) == pytest.approx(sent, rel=0.02), where


def test_weights_and_optimiser_are_as_deepspeed_holds_them(held: list[list[list[Any]]]) -> None:
    found = held[0]
    assert [row[0] for row in found] == [0, 0, 1, 2, 3, 3, 1, 3]
    for stage, precision, optimizer, state, weights in found:
        words = [f"engine.zero_stage={stage}", f"train.precision={precision}", f"optim.name={optimizer}"]
        plan = planned(words)
        small = plan.sizes.small * plan.layout.itemsize if stage == 3 else 0
        where = f"stage {stage}, {precision}, {optimizer}"
        assert optimizer_bytes(plan.sizes, plan.layout) == pytest.approx(state, rel=0.01), where
        predicted = weight_bytes(plan.sizes, plan.layout) - plan.sizes.buffer_bytes - small
        assert predicted == pytest.approx(weights, rel=0.01), where
