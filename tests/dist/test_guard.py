"""A step that is left out was never taken: ZeRO 0 to 3, whole batch and micro-batches, fp32 and bf16, two ranks."""

from __future__ import annotations

from dist.launch import run_ranks


def test_steps_left_out_leave_no_trace():
    run_ranks("guarded.py", 2)
