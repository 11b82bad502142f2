"""Export the image tower alone as a state dict: a timm tower's for timm, another's for open_clip."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from clipdist.errors import UserError, writing
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import (
    TOLERANCE,
    Exported,
    compare_pairs,
    normalised,
    sample_inputs,
    save_tensors,
    tensors_of,
)
from clipdist.models.towers import find_projection, native_size, remove_projection
from clipdist.storage import replacing

NO_TEXT = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1}  # open_clip's class takes no model without one


def export_image_tower(model: DualEncoder, out: Path, half: bool = False) -> Exported:
    """Write a file, load it again by the library that the tower is of, and compare.

    Of a timm tower it holds timm's model, whose features are those before the projection. Of a tower of open_clip it
    holds all of it, with the projection where the model has one.

    Args:
        model: fp32, on the CPU, in evaluation mode.
        out: FILE.safetensors.
        half: write the weights in fp16.

    Raises:
        UserError: another suffix, a tower that timm does not build by itself, or a file that cannot be written.
        RuntimeError: features of the loaded tower differ from the model's by more than 1e-5; with `half`, are not
            finite.
    """
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out {out}: must be a file that ends in .safetensors")
    of_timm = hasattr(model.visual, "trunk")
    lines, tower = _timm_tower(model) if of_timm else _open_clip_tower(model)
    prefix = "visual.trunk." if of_timm else "visual."
    tensors = {
        name.removeprefix(prefix): value for name, value in tensors_of(model, half).items() if name.startswith(prefix)
    }
    with writing(f"--out {out}", "; name another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            save_tensors(tensors, temporary, {"format": "pt", "image_tower": json.dumps(model.spec.to_dict())})
    tower.load_state_dict(load_file(out))
    image, _ = sample_inputs(model)
    with torch.no_grad():
        wanted = model.encode_hidden(image) if of_timm else model.encode_image(image)
        found = tower.eval()(normalised(model.spec, image))
    error = compare_pairs([(wanted, found)], str(out), math.inf if half else TOLERANCE)
    pixels = f"# takes (pixels / 255 - {model.spec.image_mean}) / {model.spec.image_std}"
    loading = (f'tower.load_state_dict(load_file("{out}"))  {pixels}', "tower.eval()")
    count = sum(value.numel() for value in tower.parameters())
    return Exported((out,), ("from safetensors.torch import load_file", *lines, *loading), error, parameters=count)


def _timm_tower(model: DualEncoder) -> tuple[list[str], nn.Module]:
    """Return the lines that build timm's model of a tower, and what they build."""
    vision = model.spec.model["vision_cfg"]
    name, pool, side = vision["timm_model_name"], vision.get("timm_pool", "avg"), model.spec.image_size
    if pool in ("abs_attn", "rot_attn"):
        raise UserError(
            f"{model.spec.name}: timm_pool={pool} is open_clip's own, behind timm's model; take --format torch_export"
        )
    own_head = not vision.get("timm_proj", "linear")  # timm's classifier is the projection
    arguments: dict[str, Any] = {"num_classes": model.spec.embed_dim if own_head else 0}
    arguments |= {"global_pool": pool} if pool else {}
    arguments |= vision.get("timm_model_args") or {}
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    lines = ["import timm", f'tower = timm.create_model("{name}", {words})']
    tower = timm.create_model(name, **arguments)
    if native_size(model.visual) not in (0, side) and hasattr(tower, "set_input_size"):
        lines.append(f"tower.set_input_size(({side}, {side}))")
        tower.set_input_size((side, side))  # type: ignore[operator]
    return lines, tower


def _open_clip_tower(model: DualEncoder) -> tuple[list[str], nn.Module]:
    """Return the lines that build open_clip's tower, and what they build."""
    spec = model.spec
    described = {"embed_dim": spec.embed_dim, "vision_cfg": spec.model["vision_cfg"], "text_cfg": NO_TEXT}
    described |= {"quick_gelu": spec.quick_gelu}
    words = ", ".join(f"{key}={value!r}" for key, value in described.items())
    lines = ["import open_clip", f"tower = open_clip.CLIP({words}).visual"]
    tower = open_clip.CLIP(**described).visual
    if not spec.has_text and (found := find_projection(tower)):
        stand_in = "None"
        if isinstance(found.stand_in, nn.Linear):
            width = found.stand_in.in_features
            lines.insert(0, "import torch")
            stand_in = f"torch.nn.Linear({width}, {width})"
        owner = "tower" if found.owner is tower else "tower.attnpool"
        lines.append(f"{owner}.{found.name} = {stand_in}  # there is no projection")
        remove_projection(tower)
    return lines, tower
