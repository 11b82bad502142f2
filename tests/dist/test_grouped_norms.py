"""BatchNorm over groups of the global batch is torch's own on each group, for every number of ranks."""

from __future__ import annotations

import pytest
from dist.launch import run_ranks


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_kind_of_layer_normalises_over_its_groups(world):
    assert run_ranks("grouped_norms.py", world).split()[-1] == "38"
