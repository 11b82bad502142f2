"""A dual encoder in; a .safetensors file that open_clip loads out, with a model JSON beside it where open_clip has no
model of that description."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clipdist.data.tokens import truncated_merges
from clipdist.errors import UserError
from clipdist.model.dual_encoder import DualEncoder
from clipdist.model.spec import BPE_VOCABULARY, ModelSpec


@dataclass(frozen=True)
class Export:
    """What was written, and how open_clip takes it.

    Attributes:
        name: for open_clip.create_model_and_transforms.
        config: the model JSON to register with open_clip.add_model_config first; None for a model of open_clip's own.
        merges: the byte-pair merges of a vocabulary smaller than CLIP's, for open_clip.SimpleTokenizer; else None.
        max_difference: largest difference of normalised features between the model and what open_clip loads.
    """

    file: Path
    name: str
    config: Path | None
    merges: Path | None
    spec: ModelSpec
    max_difference: float

    def lines(self) -> list[str]:
        """The Python lines that load it."""
        pixels = ""
        if self.spec.image_mean != open_clip.OPENAI_DATASET_MEAN or self.spec.image_std != open_clip.OPENAI_DATASET_STD:
            pixels = f", image_mean={self.spec.image_mean}, image_std={self.spec.image_std}"
        register = [f'open_clip.add_model_config("{self.config}")'] if self.config else []
        tokenizer = f'open_clip.get_tokenizer("{self.name}")'
        if self.merges:
            tokenizer = f'open_clip.SimpleTokenizer("{self.merges}", context_length={self.spec.context_length})'
        arguments = f'"{self.name}", pretrained="{self.file}"{pixels}'
        return [
            "import open_clip",
            *register,
            f"model, _, preprocess = open_clip.create_model_and_transforms({arguments})",
            f"tokenizer = {tokenizer}",
        ]


def export_model(model: DualEncoder, out: Path, facts: dict[str, str | int | None] | None = None) -> Export:
    """Writes the file and what goes with it, then loads it with open_clip and compares.

    Args:
        model: fp32, on the CPU, in evaluation mode.
        out: FILE.safetensors; FILE.json and FILE.bpe.txt.gz are written beside it where needed.
        facts: further entries of the file's metadata, such as the step.

    Raises:
        UserError: a CBOW text tower (open_clip has none), another suffix, or a folder that cannot be written.
        RuntimeError: open_clip's features differ from the model's by more than 1e-5.
    """
    spec = model.spec
    if spec.cbow:
        raise UserError(f"{spec.name}: open_clip has no CBOW text tower, so there is nothing to export this model to")
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    biased = model.logit_bias is not None
    name = _name_in_open_clip(spec, biased)
    config = None if name else out.with_suffix(".json")
    merges = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _write_weights(model, out, facts or {})
        if config:
            config.write_text(json.dumps(_open_clip_description(spec, biased), indent=4) + "\n", encoding="utf-8")
        if spec.tokenizer["kind"] == "bpe" and spec.tokenizer["vocab_size"] < BPE_VOCABULARY:
            merges = out.with_suffix(".bpe.txt.gz")
            merges.write_bytes(truncated_merges(spec.tokenizer["vocab_size"]))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    if config:
        open_clip.add_model_config(config)
    name = name or out.stem
    return Export(out, name, config, merges, spec, _difference(model, name, out))


def _name_in_open_clip(spec: ModelSpec, biased: bool) -> str | None:
    """The name under which open_clip builds exactly this model: the same, or the one of its QuickGELU variant."""
    for name in (spec.name, f"{spec.name}-quickgelu"):
        known = open_clip.get_model_config(name)
        if known is None:
            continue
        if (known.pop("init_logit_bias", None) is not None) != biased:
            continue
        if bool(known.pop("quick_gelu", False)) == spec.quick_gelu and known == spec.model:
            return name
    return None


def _open_clip_description(spec: ModelSpec, biased: bool) -> dict:
    bias = {"init_logit_bias": -10.0} if biased else {}  # its presence makes open_clip build the parameter
    return {**spec.model, "quick_gelu": spec.quick_gelu, **bias}


def _write_weights(model: DualEncoder, out: Path, facts: dict[str, str | int | None]) -> None:
    """open_clip's names and shapes: no prefix on the text tower of its CLIP class, a 0-D log scale."""
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if model.spec.clip_class:
            name = name.removeprefix("text.")
        tensors[name] = value.detach().cpu().clone()
    for name in ("logit_scale", "logit_bias"):
        if name in tensors:
            tensors[name] = tensors[name].reshape([])
    metadata = {"format": "pt", "clipdist": json.dumps({**model.spec.to_dict(), **facts})}
    temporary = out.with_name(out.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, out)


@torch.no_grad()
def _difference(model: DualEncoder, name: str, out: Path) -> float:
    """Largest difference of the normalised features of two random pictures and texts."""
    spec = model.spec
    theirs = open_clip.create_model(name, pretrained=str(out)).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (2, 3, spec.image_size, spec.image_size), generator=generator, dtype=torch.uint8)
    vocabulary = spec.tokenizer.get("vocab_size") or theirs.vocab_size
    tokens = torch.randint(2, vocabulary - 2, (2, spec.context_length), generator=generator)
    tokens[:, -1] = vocabulary - 1  # the end mark, where CLIP's text tower is read
    mine = model(image, tokens)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.image_mean, spec.image_std))
    other = (theirs.encode_image((image / 255 - mean) / std), theirs.encode_text(tokens))
    pairs = [(mine[0], other[0]), (mine[1], other[1])]
    worst = max(float((F.normalize(a) - F.normalize(b)).abs().max()) for a, b in pairs)
    if not worst <= 1e-5:
        raise RuntimeError(f"{out}: open_clip's features differ from the model's by {worst:.1e}")
    return worst
