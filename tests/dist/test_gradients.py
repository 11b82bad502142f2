"""Loss and gradients are those of one process on the whole batch: W in {1, 2, 4} x ZeRO {0, 1, 2, 3}."""

from __future__ import annotations

import json

import pytest
from dist.launch import run_ranks

VIT = "configs/models/tiny_vit.json"
RESNET = "configs/models/tiny_rn.json"  # BatchNorm: normalises over a rank's own rows
DROPOUT = "tests/dist/vit_patch_dropout.json"
CASES = [*(f"{VIT}:{stage}:fp32" for stage in range(4)), f"{RESNET}:2:fp32", f"{DROPOUT}:3:fp32"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_exact(world, tmp_path):
    run_ranks("gradients.py", world, str(tmp_path / "rows.json"), *CASES)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == len(CASES) * 4
    for row in rows:
        print("{model} W={world} stage={stage} {part}: ratio {norm_ratio:.6f}, error {error:.1e}".format(**row))
        assert row["reference"] > 0.1  # there is something to be exact about
        assert row["error"] <= 1e-5, row
