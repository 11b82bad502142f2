"""Read what open_clip's package says of its models without importing it: the import takes seconds and loads torch."""

from __future__ import annotations

import ast
import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from clipdist.errors import UserError

LOCAL_TIMM = "local-dir:"  # timm's prefix of a folder with an image tower
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


def models_of(sizes: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the names of the models with a ViT or ResNet of open_clip's own that have tensors of these sizes.

    Args:
        sizes: by our names, "visual.*" and "text.*".
    """
    return [name for name in model_names() if _has_sizes(model_config(name) or {}, sizes)]


def _has_sizes(described: dict[str, Any], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether tensors have the sizes that one of open_clip's descriptions of its own towers means."""
    vision, text = described.get("vision_cfg", {}), described.get("text_cfg", {})
    if vision.get("timm_model_name") or text.get("hf_model_name") or "multimodal_cfg" in described:
        return False
    layers, width, pixels = vision.get("layers", 12), vision.get("width", 768), vision.get("image_size", 224)
    wanted: dict[str, tuple[int, ...]] = {
        "text.token_embedding.weight": (text.get("vocab_size", 49408), text.get("width", 512)),
        "text.positional_embedding": (text.get("context_length", 77), text.get("width", 512)),
        "text.text_projection": (text.get("width", 512), described["embed_dim"]),
    }
    counts = {"text.transformer.resblocks.": text.get("layers", 12)}
    if isinstance(layers, int):
        patch = vision.get("patch_size", 16)
        side = pixels[0] if isinstance(pixels, list) else pixels
        wanted["visual.conv1.weight"] = (width, 3, patch, patch)
        wanted["visual.positional_embedding"] = ((side // patch) ** 2 + 1, width)
        counts["visual.transformer.resblocks."] = layers
    else:
        wanted["visual.conv1.weight"] = (width // 2, 3, 3, 3)
        counts |= {f"visual.layer{stage}.": blocks for stage, blocks in enumerate(layers, start=1)}
    return all(sizes.get(name) == size for name, size in wanted.items()) and all(
        len({name.removeprefix(prefix).split(".")[0] for name in sizes if name.startswith(prefix)}) == count
        for prefix, count in counts.items()
    )


def mlp_ratio(width: int, hidden: int) -> float:
    """Return the mlp_ratio of which open_clip and timm make a layer of `hidden` units: they round the product down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


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
