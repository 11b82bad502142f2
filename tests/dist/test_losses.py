"""Splitting a batch over ranks changes neither value nor gradients; bad input ends every rank with the same words."""

from __future__ import annotations

import pytest
from dist.launch import run_ranks


@pytest.mark.parametrize("world", [2, 4])
def test_losses_on_several_ranks(world):
    run_ranks("losses.py", world, str(world))
