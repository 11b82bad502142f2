"""Write a dual encoder with SigLIP's towers as a SiglipModel folder of transformers; see siglip.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from clipdist.errors import UserError
from clipdist.models import export, siglip
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.spec import ModelSpec


def is_siglip(spec: ModelSpec) -> bool:
    """Whether the image tower is pooled as SigLIP's, which CLIPModel cannot be."""
    return spec.model["vision_cfg"].get("timm_pool") == "map"


def export_siglip(
    model: DualEncoder, out: Path, *, half: bool = False, repository: str = "", card: export.Card | None = None
) -> export.Exported:
    """Write a SiglipModel folder: config.json, model.safetensors, the tokenizer's files and preprocessor_config.json.

    A model without the sigmoid loss' bias gets a bias of 0.

    Args:
        model, out, half, repository, card: as export_hugging_face.

    Raises:
        UserError: towers that are not SigLIP's, or as export_hugging_face.
        RuntimeError: as export_hugging_face.
    """
    from transformers import AutoTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    spec = model.spec
    tensors = siglip.to_theirs(export.tensors_of(model, half))
    tensors.setdefault("logit_bias", torch.zeros(1))
    cfg = SiglipConfig(**siglip.config_of(model), architectures=["SiglipModel"], dtype="float16" if half else "float32")
    with torch.device("meta"):
        wanted = SiglipModel(cfg).state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        if name not in tensors or name not in wanted or tensors[name].shape != wanted[name].shape:
            raise UserError(f"{spec.name}: its towers are not SigLIP's ({name} differs); {siglip.INSTEAD}")
    if spec.image_resize_mode != "squash" or spec.image_resize_size not in (0, spec.image_size):
        raise UserError(f"{spec.name}: SiglipImageProcessor squashes images and crops none; {siglip.INSTEAD}")
    fp32 = ', dtype="float32"' if half else ""
    text = f"""from transformers import AutoProcessor, SiglipModel
model = SiglipModel.from_pretrained("PLACE"{fp32})
processor = AutoProcessor.from_pretrained("PLACE")
# processor(text=[...], images=..., padding="max_length", max_length={spec.context_length}), texts in lower case"""
    with export.new_folder(out) as folder:
        cfg.save_pretrained(folder)
        export.save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
        tokenizer = AutoTokenizer.from_pretrained(spec.tokenizer["name"])
        tokenizer.model_max_length = spec.context_length
        tokenizer.save_pretrained(folder)
        SiglipImageProcessor(
            size={"height": spec.image_size, "width": spec.image_size},
            resample=2 if spec.image_interpolation == "bilinear" else 3,
            image_mean=list(spec.image_mean),
            image_std=list(spec.image_std),
        ).save_pretrained(folder)
        export.write_card(folder, card, text, repository or out.name)
        theirs: Any = SiglipModel(SiglipConfig.from_pretrained(folder)).eval()
        theirs.load_state_dict(load_file(folder / "model.safetensors"))

        def encode(image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = theirs(input_ids=tokens, pixel_values=export.normalised(spec, image))
            return found.image_embeds, found.text_embeds

        error = export.compare(model, encode, str(out), math.inf if half else export.TOLERANCE)
        read = AutoTokenizer.from_pretrained(folder)
        options = {"padding": "max_length", "max_length": spec.context_length, "truncation": True}
        export.check_tokenizer(
            spec, out, lambda sentences: read([sentence.lower() for sentence in sentences], **options)["input_ids"]
        )
    return export.Exported((out,), export.lines_of(text, str(out)), error)
