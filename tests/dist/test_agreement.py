"""Ranks that have something else than the others are found and named."""

from __future__ import annotations

from dist.launch import run_ranks


def test_the_rank_that_differs_is_named_and_no_other_ever():
    run_ranks("agreement.py", 3, "fp32")
