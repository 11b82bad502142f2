"""Build a dual encoder from its description: its towers by open_clip, timm, transformers or this project."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from clipdist import config
from clipdist.errors import UserError, brief
from clipdist.models.cbow import CBOW
from clipdist.models.drop_path import allow_drop_path
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.lora import base_of
from clipdist.models.lstm import LSTM
from clipdist.models.open_clip_files import LOCAL_TIMM
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.models.towers import MeanPooler, keep_statistics_fp32, remove_projection, resize
from clipdist.models.weights import load_weights
from clipdist.models.word_vectors import load_word_vectors

OWN_TOWERS = {"cbow": CBOW, "lstm": LSTM}


def build_model(
    cfg: config.Model,
    clip: config.Clip | None = None,
    *,
    restored: ModelSpec | None = None,
    with_text: bool | None = True,
    with_tokens: bool | None = None,
) -> DualEncoder:
    """Build the configured model, load its weights and word vectors, and lock its towers.

    Random weights are drawn from torch's global generator.

    Args:
        clip: initial values of the scalars; None: the defaults.
        restored: the description of the model in a checkpoint, whose weights the caller loads: no weights are read
            here, and the model JSON and weights file may be gone. (Not with LoRA, whose checkpoints lack the base.)
        with_text, with_tokens: see resolve_spec; where a model is restored, its description alone counts.

    Raises:
        UserError: the description is inconsistent, weights cannot be read, or towers cannot be locked as configured.
    """
    spec = restored or resolve_spec(cfg, with_text, with_tokens)
    model = assemble(spec, clip, tower_weights=not cfg.weights and not restored)
    if not restored:
        model.check_sizes()
    if cfg.word_vectors and not restored:
        from clipdist.data.tokens import BPETokenizer

        assert isinstance(model.text, (CBOW, LSTM))
        words = BPETokenizer(model.text.vocab_size, spec.context_length)
        load_word_vectors(model.text.token_embedding, cfg.word_vectors, words)
    if cfg.weights and not restored:
        load_weights(model, cfg.weights, trust=cfg.trust_weights)
    if cfg.lora:
        model.base = base_of(model, cfg)
    if cfg.drop_path:
        allow_drop_path(model.visual, cfg.drop_path)
        model.drop_path = cfg.drop_path
    model.lock_towers(cfg)
    return model


def built_for(cfg: config.Config, restored: ModelSpec | None = None) -> DualEncoder:
    """Build the model of a run, with the text tower and the tokenizer that its objectives need; see build_model."""
    wanted = cfg.objectives
    return build_model(
        cfg.model, wanted.clip, restored=restored, with_text=wanted.text_tower, with_tokens=wanted.read_text
    )


def assemble(spec: ModelSpec, clip: config.Clip | None = None, tower_weights: bool = True) -> DualEncoder:
    """Build the model of a resolved description.

    Args:
        clip: see build_model.
        tower_weights: False: do not load timm's and Hugging Face's pre-trained weights even if the description asks
            for them, because weights of the whole model follow.

    Raises:
        UserError: the towers cannot be built, or their pre-trained weights cannot be loaded.
    """
    import open_clip

    if spec.hf_text:
        from transformers.utils import logging

        logging.set_verbosity_error()  # its report of layers that a tower does not use, and its bar
        logging.disable_progress_bar()
    described = {**spec.model, "vision_cfg": dict(spec.model["vision_cfg"]), "text_cfg": dict(spec.model["text_cfg"])}
    for key in ("custom_text", "multimodal_cfg"):
        described.pop(key, None)
    for section in ("vision_cfg", "text_cfg"):
        described[section]["output_tokens"] = False  # a decoder of captions asks for them
    described["vision_cfg"].pop("image_seq_len", None)  # open_clip 3 does not know it
    if not tower_weights:
        described["vision_cfg"]["timm_model_pretrained"] = False
        described["text_cfg"]["hf_model_pretrained"] = False
    if spec.own_text or not spec.has_text:
        described["text_cfg"] = {"layers": 1, "width": 8, "heads": 1, "vocab_size": 1}  # replaced, or left out, below
    try:
        with _timm_arguments(described["vision_cfg"]):
            towers = open_clip.CustomTextCLIP(**described, quick_gelu=spec.quick_gelu)
        resize(towers.visual, spec.image_size)
    except Exception as error:  # timm, transformers and the hub raise errors of many types for bad descriptions
        raise UserError(_cannot_build(described, spec, error)) from error
    if clip and max([0, *clip.widths]) > spec.embed_dim:
        raise UserError(f"objectives.clip.widths={clip.widths}: {spec.name} has embed_dim={spec.embed_dim} features")
    keep_statistics_fp32(towers.visual)
    if not spec.has_text:
        remove_projection(towers.visual)
    if isinstance(getattr(towers.text, "pooler", None), open_clip.hf_model.MeanPooler):
        towers.text.pooler = MeanPooler()
    text: nn.Module | None = towers.text if spec.has_text else None
    if kind := spec.own_text:
        text = OWN_TOWERS[kind](**spec.model["text_cfg"][kind], embed_dim=spec.embed_dim)
    return DualEncoder(spec, towers.visual, text, clip or config.Clip())


@contextmanager
def _timm_arguments(vision: dict[str, Any]) -> Iterator[None]:
    """Let timm's model have the arguments in "timm_model_args", which open_clip would not pass on.

    timm takes them from a folder's config.json.
    """
    args = vision.pop("timm_model_args", None)
    if not args:
        yield
        return
    import timm

    name, side = vision["timm_model_name"], vision.get("image_size", 224)
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    fixed = known is not None and known.fixed_input_size  # a ViT then takes img_size; a ResNet does not
    described = {
        "architecture": name,
        "pretrained_cfg": {"input_size": [3, side, side], "fixed_input_size": fixed},
        "model_args": args,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(described), encoding="utf-8")
        vision["timm_model_name"] = f"{LOCAL_TIMM}{folder}"
        yield


def _cannot_build(described: dict[str, Any], spec: ModelSpec, error: Exception) -> str:
    """Return the message for an error of a tower's constructor, with what was wanted from the hub if that failed."""
    vision, text = described["vision_cfg"], described["text_cfg"]
    wanted = []
    if vision.get("timm_model_name") and vision.get("timm_model_pretrained"):
        wanted.append(f"timm's ImageNet weights of {vision['timm_model_name']}")
    if spec.hf_text:
        what = "configuration and weights" if text.get("hf_model_pretrained", True) else "configuration"
        wanted.append(f"{what} of {spec.hf_text}")
    if not (wanted and _from_the_hub(error)):
        return f"model.name={spec.name}: the towers cannot be built: {brief(error)}"
    return (
        f"model.name={spec.name}: needs {' and '.join(wanted)} from a local folder or the Hugging Face hub (offline:"
        f" HF_HUB_OFFLINE=1 and HF_HOME at a filled cache): {brief(error)}"
    )


def _from_the_hub(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is one of files or of the network."""
    hub = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in hub:
            return True
        error = error.__cause__ or error.__context__
    return False
