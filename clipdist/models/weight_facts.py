"""What is known of weights before they are read: QuickGELU, and how images are resized and normalised.

Weights say it in a tag's entry, a file beside them, the head of a file, a folder's configuration; nothing is unpickled.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from clipdist import config
from clipdist.data.transform import INTERPOLATIONS, RESIZE_MODES
from clipdist.errors import UserError
from clipdist.models.open_clip_files import (
    LOCAL_TIMM,
    OPENAI_MEAN,
    OPENAI_STD,
    check_channels,
    model_config,
    read_json,
)

# What is known of pixels besides the image's size, with OpenAI's values: see EvalTransform. A model JSON has image_*.
PIXEL_FACTS: dict[str, Any] = {
    "mean": OPENAI_MEAN,
    "std": OPENAI_STD,
    "resize_mode": "shortest",
    "interpolation": "bicubic",
    "fill_color": 0,
    "resize_size": 0,
    "floor_crop": False,
}

# Numbers that stand among the tensors of OpenAI's files, and of nobody else's.
OPENAI_FACTS = {"input_resolution", "context_length", "vocab_size"}


def weights_facts(cfg: config.Model) -> dict[str, Any]:
    """Return what is known of weights before they are read: "quick_gelu" and PIXEL_FACTS, as far as they say."""
    if not cfg.weights:
        return {}
    path = Path(cfg.weights)
    if path.suffix == ".pt2":
        raise UserError(
            f"model.weights={path}: a torch.export program computes one tower's features and cannot be trained from;"
            " export the run with --format open_clip or hugging_face instead"
        )
    if path.is_file():
        openai = path.suffix != ".safetensors" and (is_torchscript(path) or _is_openai_state_dict(path))
        if openai:
            return {"quick_gelu": True}
        return _described_beside(path) or _trained_spec_facts(path) or _facts_of_all_tags(cfg.name)
    if path.is_dir():
        from clipdist.checkpoint.format import MANIFEST, list_checkpoints, run_folder
        from clipdist.models import hugging_face

        if hugging_face.is_hugging_face(path):
            return hugging_face.weights_facts(path)
        if not (path / MANIFEST).is_file() and not list_checkpoints(run_folder(path)):
            open_clips = (path / "open_clip_config.json").is_file()
            raise UserError(
                f"model.weights={path}: a folder without config.json (Hugging Face's) and without checkpoints (a run's)"
                + f"; take model.name={path}/open_clip_config.json and its weights file" * open_clips
            )
        return _trained_spec_facts(path)
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") or "/" in cfg.weights:
        raise UserError(f"model.weights={cfg.weights}: no such file")
    import open_clip

    facts = open_clip.get_pretrained_cfg(cfg.name, cfg.weights)
    if not facts:
        tags = open_clip.list_pretrained_tags_by_model(cfg.name)
        hint = f"its tags are {', '.join(tags)}" if tags else "it has no tags, name a file"
        raise UserError(f"model.weights={cfg.weights}: neither a file nor a tag of {cfg.name}; {hint}")
    return facts


def trained_spec(path: Path) -> dict[str, Any] | None:
    """Return the description, as ModelSpec.to_dict gives it, in a run, a checkpoint or a file of tools/export.py."""
    if path.is_dir():
        from clipdist.checkpoint.format import checkpoint_of, read_manifest
        from clipdist.models.hugging_face import is_hugging_face

        return None if is_hugging_face(path) else read_manifest(checkpoint_of(path)).state["model"]
    head, _ = _safetensors_head(path)
    return json.loads(head["clipdist"]) if "clipdist" in head else None


def _trained_spec_facts(path: Path) -> dict[str, Any]:
    """Return what a run's or an exported model's description says of its weights; of other files, what names tell."""
    spec = trained_spec(path)
    if spec:
        pixels = {key: spec[f"image_{key}"] for key in PIXEL_FACTS if f"image_{key}" in spec}
        return {**pixels, "quick_gelu": spec["quick_gelu"], "image_size": spec["image_size"]}
    names = {name.rpartition(".")[2] for name in _safetensors_head(path)[1]}
    return {"quick_gelu": True} if names >= OPENAI_FACTS else {}


def _safetensors_head(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the metadata of a .safetensors file and the names in it; of another file, nothing."""
    if path.suffix != ".safetensors":
        return {}, []
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="np") as file:
            return file.metadata() or {}, list(file.keys())
    except safetensors.SafetensorError as error:
        raise UserError(f"model.weights={path}: not a safetensors file: {error}") from None


def _described_beside(path: Path) -> dict[str, Any]:
    """Return what open_clip_config.json says of the pixels, in open_clip's hub form; {} where there is none."""
    described = path.with_name("open_clip_config.json")
    if path.stem not in ("open_clip_model", "open_clip_pytorch_model") or not described.is_file():
        return {}
    content = read_json(described)
    pixels = content.get("preprocess_cfg", {})
    return {key: pixels[key] for key in PIXEL_FACTS if key in pixels} | {
        "quick_gelu": content.get("model_cfg", {}).get("quick_gelu", False)
    }


def _facts_of_all_tags(name: str) -> dict[str, Any]:
    """Return what all published weights of an open_clip name have in common of PIXEL_FACTS.

    A file says nothing of the pixels; SigLIP's, for instance, are all resized and normalised alike.
    """
    if model_config(name) is None:
        return {}
    import open_clip

    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    return {
        key: tags[0][key]
        for key in PIXEL_FACTS
        if tags and key in tags[0] and all(facts.get(key) == tags[0][key] for facts in tags)
    }


def _timm_facts(vision: dict[str, Any]) -> dict[str, Any]:
    """Return PIXEL_FACTS of the pre-trained weights that timm loads into an image tower; {} where it loads none.

    timm's crop_pct is left out: it enlarges the picture for ImageNet's test, and its border would not be seen.
    """
    name = vision.get("timm_model_name")
    if not name or not vision.get("timm_model_pretrained", True):
        return {}
    if name.startswith(LOCAL_TIMM):
        described = Path(name.removeprefix(LOCAL_TIMM)) / "config.json"
        found = read_json(described) if described.is_file() else {}
        said = found.get("pretrained_cfg", found)
    else:
        import timm

        known = timm.get_pretrained_cfg(name, allow_unregistered=True) if ":" not in name else None
        said = known.to_dict() if known else {}
    facts = {key: said[key] for key in ("mean", "std") if said.get(key)}
    if said.get("interpolation") in INTERPOLATIONS:
        facts["interpolation"] = said["interpolation"]
    modes = {"center": "shortest", "squash": "squash", "border": "longest"}
    return facts | ({"resize_mode": modes[said["crop_mode"]]} if said.get("crop_mode") in modes else {})


def pixel_facts(cfg: config.Model, description: dict[str, Any], weights: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the fields image_* of ModelSpec: what the description says, else the weights, else OpenAI's.

    Raises:
        UserError: a value that cannot be one.
    """
    tower = {} if cfg.weights else _timm_facts(description["vision_cfg"])
    found: dict[str, Any] = {}
    for key, default in PIXEL_FACTS.items():
        said = (description.get(f"image_{key}"), weights.get(key), tower.get(key), default)
        found[f"image_{key}"] = next(value for value in said if value is not None)
    where = f"model.name={cfg.name}: "
    if found["image_interpolation"] == "random":  # open_clip evaluates these by bicubic interpolation
        found["image_interpolation"] = "bicubic"
    if isinstance(found["image_fill_color"], int):
        found["image_fill_color"] = (found["image_fill_color"],) * 3
    for key in ("image_mean", "image_std", "image_fill_color"):
        check_channels(f"{where}{key}", found[key])
        found[key] = tuple(found[key])
    for key, choices in (("image_resize_mode", RESIZE_MODES), ("image_interpolation", INTERPOLATIONS)):
        if found[key] not in choices:
            raise UserError(f"{where}{key}={found[key]}: must be one of {', '.join(choices)}")
    resized, theirs = found["image_resize_size"], weights.get("image_size")
    if not isinstance(resized, int) or resized < 0:
        raise UserError(f"{where}image_resize_size={resized}: must be a number of pixels")
    if resized and theirs and "image_resize_size" not in description:
        found["image_resize_size"] = round(resized * size / theirs)
    return found


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, the form of OpenAI's .pt files (reads the table of contents only)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _is_openai_state_dict(path: Path) -> bool:
    """Whether a torch file holds OpenAI's tensors, saved again by somebody: it then needs QuickGELU as they do."""
    from clipdist.models.state_dicts import read_torch_file

    try:
        return read_torch_file(path, device="meta").keys() >= OPENAI_FACTS  # names only: no tensor is read
    except Exception:  # torch raises many kinds for what is no such file; reading the weights will tell what is wrong
        return False
