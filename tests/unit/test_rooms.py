"""The structure of the code: which room may import which, and who touches DeepSpeed."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ZERO = "clipdist/engine/zero.py"
# Attributes that only DeepSpeed's objects have: its engine, its optimisers, and the parameters that it has taken over.
DEEPSPEEDS = {
    "_deepspeed",
    "_hp_mapping",
    "allreduce_gradients",
    "ds_id",
    "ds_numel",
    "ds_persist",
    "ds_shape",
    "ds_status",
    "ds_tensor",
    "fp16_enabled",
    "fp32_partitioned_groups_flat",
    "grad_position",
    "set_gradient_accumulation_boundary",
    "was_step_applied",
    "zero_optimization_stage",
}


def trees() -> dict[str, ast.Module]:
    """Every Python file of clipdist/ and launch/, by its path."""
    paths = sorted([*ROOT.glob("clipdist/**/*.py"), *ROOT.glob("launch/**/*.py")])
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


def test_only_one_file_touches_deepspeeds_objects():
    touched = [
        f"{path}:{node.lineno} .{node.attr}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if path != ZERO and isinstance(node, ast.Attribute) and node.attr in DEEPSPEEDS
    ]
    assert not touched, touched


def test_the_engines_room_alone_imports_deepspeed():
    found = {
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if path.startswith("clipdist/") and "deepspeed" in _imported(node)
    }
    assert ZERO in found
    assert {Path(path).parent.name for path in found} == {"engine"}, found


def _imported(node: ast.AST) -> set[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
