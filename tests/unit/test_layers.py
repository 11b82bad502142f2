"""The structure of the code: which package may import which, and who touches DeepSpeed."""

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


def test_only_the_engine_imports_deepspeed():
    found = {
        path
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if path.startswith("clipdist/") and "deepspeed" in _imported(node)
    }
    assert ZERO in found
    assert {Path(path).parent.name for path in found} == {"engine"}, found


def test_nothing_imports_a_tool():
    found = [path for path, tree in trees().items() for node in ast.walk(tree) if "tools" in _imported(node)]
    assert not found, found


def _imported(node: ast.AST) -> set[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


# A package imports from lower layers alone, except within the layers of SHARED.
# tools/ is in layer 9 too: no module imports it.
LAYERS = (
    {"errors", "config", "storage"},
    {"distributed"},
    {"data", "losses", "checkpoint"},
    {"datasets", "models"},
    {"objectives"},
    {"engine"},
    {"fault_tolerance", "estimate"},
    {"evals", "monitor"},
    {"report", "run_plan", "resume", "journal", "process", "trainer", "train"},
    {"launch"},
)
SHARED = (0, 8, 9)  # layers whose packages may import one another; import cycles are forbidden there too


def package_of(module: str) -> str:
    """clipdist.data.loader -> data."""
    top, *rest = module.split(".")
    return rest[0] if top == "clipdist" and rest else top


def imports() -> dict[str, set[str]]:
    """Module -> the modules of clipdist/ and launch/ that it imports, anywhere in it."""
    named = {
        path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree for path, tree in trees().items()
    }
    found: dict[str, set[str]] = {}
    for module, tree in named.items():
        found[module] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & named.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in named:
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & named.keys()
                found[module] |= inside or {node.module}
    return found


def test_packages_import_from_lower_layers():
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if "clipdist" not in (here := package_of(module), there := package_of(other))  # clipdist/__init__.py
        and here != there
        and (layer[there] > layer[here] or (layer[there] == layer[here] and layer[here] not in SHARED))
    ]
    assert not upward, "\n".join(upward)


def test_there_are_no_import_cycles():
    found = imports()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(found[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in found:
        visit(module, ())
