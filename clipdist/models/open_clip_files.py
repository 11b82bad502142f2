"""Read what open_clip's package says of its models without importing it: the import takes seconds and loads torch."""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from clipdist.errors import UserError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # per channel, on the scale 0..1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def model_config(name: str) -> dict[str, Any] | None:
    """Return the description of one of open_clip's models; None where it has none of this name."""
    if name not in model_names():
        return None
    return json.loads((_package() / "model_configs" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def model_names() -> list[str]:
    return sorted(path.stem for path in (_package() / "model_configs").glob("*.json"))


@cache
def config_fields(class_name: str) -> frozenset[str]:
    """Return the field names of a dataclass in open_clip/model.py: CLIPVisionCfg or CLIPTextCfg.

    Raises:
        LookupError: this version of open_clip has no such class.
    """
    for node in ast.parse((_package() / "model.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            fields = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
            return frozenset(target.id for target in fields if isinstance(target, ast.Name))
    raise LookupError(f"open_clip.model has no class {class_name}")


def check_channels(what: str, values: Any) -> None:
    """Raise UserError, which names `what`, unless these are three numbers."""
    numbers = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
    if not numbers or len(values) != 3:
        raise UserError(f"{what} takes three numbers, one per channel")


def _package() -> Path:
    found = importlib.util.find_spec("open_clip")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
