"""The temperature never exceeds ln 100: on the fp32 master weights and on those that the module reads."""

from __future__ import annotations

from dist.launch import run_ranks


def test_bound_holds_on_the_master_weights_of_every_stage():
    run_ranks("bound.py", 2)
