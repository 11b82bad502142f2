"""A run is the weighted sum of its objectives, whole and in micro-batches; the example of docs/objectives.md is one."""

from __future__ import annotations

from dist.launch import run_ranks


def test_a_run_is_the_weighted_sum_of_its_objectives():
    run_ranks("objectives.py", 2)
