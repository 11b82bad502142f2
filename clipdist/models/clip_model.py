"""Describe a ModelSpec as Hugging Face's CLIPModel, where that can express it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clipdist.errors import UserError
from clipdist.models.hugging_face import (
    ARGMAX_EOS,
    DEFAULT_EPS,
    FIELDS,
    clip_encoding,
    end_mark,
    read_config,
    read_description,
)
from clipdist.models.spec import ModelSpec

# Fields of open_clip's sections that CLIPModel's configuration can say, and those without effect in such a tower.
_SAID = {
    "vision_cfg": {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "pool_type"},
}
_WITHOUT_EFFECT = {
    "vision_cfg": {"output_tokens", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"},
    "text_cfg": {"output_tokens", "pad_id", "eos_id", "hf_tokenizer_name"},
}

# Of a folder's configuration: positions are interpolated; the projections' width is the top level's, and a shape; the
# marks are the tokenizer's.
_NOT_COMPARED_SIGLIP = ("image_size", "hf_tokenizer_name", "tokenizer_kwargs")
_NOT_COMPARED = ("image_size", "projection_dim", "bos_token_id", "eos_token_id")


def check_same_architecture(folder: Path, spec: ModelSpec) -> None:
    """Compare what the tensors' shapes do not show as well, such as the number of heads. Image sizes may differ.

    Raises:
        UserError: the folder holds another model than `spec` describes.
    """
    theirs = read_config(folder)
    if theirs["model_type"] == "siglip":
        _check_same_siglip(folder, spec)
        return
    if reason := inexpressible(spec) if spec.has_text else _inexpressible_image_tower(spec):
        raise UserError(f"model.weights={folder}: holds Hugging Face's CLIPModel, but {spec.name} has {reason}")
    ours = config_of(spec)
    for section in ("vision_config", "text_config") if spec.has_text else ("vision_config",):
        for key, value in ours[section].items():
            if key not in _NOT_COMPARED and theirs[section][key] != value:
                found = theirs[section][key]
                raise UserError(
                    f"model.weights={folder}: does not fit {spec.name}: {section}.{key} is {found}, the model has"
                    f" {value}; model.name={folder} takes the folder's own description"
                )


def _check_same_siglip(folder: Path, spec: ModelSpec) -> None:
    import open_clip

    theirs = read_description(folder)
    for section in ("vision_cfg", "text_cfg") if spec.has_text else ("vision_cfg",):
        kind = open_clip.CLIPVisionCfg if section == "vision_cfg" else open_clip.CLIPTextCfg
        described = [
            {**dataclasses.asdict(kind()), "timm_model_args": None, **model[section]} for model in (theirs, spec.model)
        ]
        for key, found in described[0].items():
            if key not in _NOT_COMPARED_SIGLIP and described[1][key] != found:
                raise UserError(
                    f"model.weights={folder}: does not fit {spec.name}: {section}.{key} is {found} there, the model has"
                    f" {described[1][key]}; model.name={folder} takes the folder's own description"
                )


def inexpressible(spec: ModelSpec) -> str:
    """Return what of a model CLIPModel has no place for, as the object of "has"; empty where it can hold all of it."""
    text = spec.model["text_cfg"]
    if not spec.has_text:
        return "no text tower"
    if spec.own_text:
        return f"{'an LSTM' if spec.own_text == 'lstm' else 'a CBOW'} text tower"
    if spec.hf_text:
        return f"the Hugging Face text tower {spec.hf_text}"
    if reason := _inexpressible_image_tower(spec):
        return reason
    if spec.tokenizer["options"] or spec.tokenizer.get("mode"):
        return "a tokenizer with options of its own"
    if reason := _inexpressible_section(spec, "text_cfg"):
        return reason
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        return f"text_cfg.pool_type={text['pool_type']!r}"
    return ""


def _inexpressible_image_tower(spec: ModelSpec) -> str:
    vision = spec.model["vision_cfg"]
    if vision.get("timm_model_name"):
        return f"timm's image tower {vision['timm_model_name']}"
    if not isinstance(vision.get("layers", 12), int):
        return "a ResNet image tower"
    return _inexpressible_section(spec, "vision_cfg")


def _inexpressible_section(spec: ModelSpec, section: str) -> str:
    import open_clip

    kind = open_clip.CLIPVisionCfg if section == "vision_cfg" else open_clip.CLIPTextCfg
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for key, value in spec.model[section].items():
        unused = key in _SAID[section] | _WITHOUT_EFFECT[section] or key.startswith(("timm_", "hf_"))
        if not unused and value != defaults[key]:
            return f"{section}.{key}={value!r}"
    norm = spec.model[section].get("norm_kwargs") or {}
    return f"{section}.norm_kwargs={norm!r}" if set(norm) - {"eps"} else ""


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Return CLIPConfig's arguments for a model that `inexpressible` has nothing against."""
    import open_clip

    vision = open_clip.CLIPVisionCfg(**spec.model["vision_cfg"])
    text = open_clip.CLIPTextCfg(**(spec.model["text_cfg"] if spec.has_text else {}))
    described: dict[str, Any] = {"projection_dim": spec.embed_dim}
    for part, ours in (("vision", vision), ("text", text)):
        described[f"{part}_config"] = {theirs: getattr(ours, own) for theirs, own in FIELDS[part].items()} | {
            "hidden_act": "quick_gelu" if spec.quick_gelu else "gelu",
            "projection_dim": spec.embed_dim,
            "intermediate_size": int(ours.width * ours.mlp_ratio),
            "layer_norm_eps": (ours.norm_kwargs or {}).get("eps", DEFAULT_EPS),
        }
    heads = vision.width // vision.head_width
    described["vision_config"] |= {"image_size": spec.image_size, "num_attention_heads": heads}
    end = end_mark(text.vocab_size) if spec.tokenizer["kind"] == "bpe" else ARGMAX_EOS
    marks = {
        "bos_token_id": end_mark(text.vocab_size) - 1,
        "eos_token_id": text.eos_id if text.pool_type == "eos" else end,
    }
    described["text_config"] |= marks
    return described


def clip_tokenizer(spec: ModelSpec) -> Any:
    """Return transformers' tokenizer with the ids of the model's own."""
    from transformers import AutoTokenizer, CLIPTokenizer

    if spec.tokenizer["kind"] == "hf":
        return AutoTokenizer.from_pretrained(spec.tokenizer["name"])
    vocabulary, merges = clip_encoding(spec.tokenizer["vocab_size"])
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=spec.context_length)  # type: ignore[arg-type]
