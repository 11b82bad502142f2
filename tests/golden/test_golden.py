"""A change of code reproduces the recorded losses: exactly where the machine matches the record, else to 1e-4."""

from __future__ import annotations

import json

import pytest
from golden.record import GOLDEN, STEPS, WORLDS, fingerprint, golden_losses


@pytest.mark.parametrize("world", WORLDS)
def test_losses_are_the_recorded_ones(world, tmp_path, record_property):
    golden = json.loads(GOLDEN.read_text())
    expected = golden["losses"][str(world)]
    losses = golden_losses(world, tmp_path)
    assert len(losses) == STEPS
    here = fingerprint()
    different = {name for name in here if here[name] != golden["fingerprint"][name]}
    rule = f"to 1e-4 ({', '.join(sorted(different))} differ from the record)" if different else "exactly"
    record_property("rule", rule)
    print(f"W={world}: compared {rule}")
    if different:
        assert losses == pytest.approx(expected, rel=1e-4)
    else:
        assert losses == expected
