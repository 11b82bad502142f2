"""Load a model and its tokenizer from a run, a checkpoint, a Hugging Face folder or a model's name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from clipdist import config
from clipdist.checkpoint.format import EMA, MANIFEST, Manifest, checkpoint_of, read_manifest
from clipdist.checkpoint.reader import load_full_weights
from clipdist.data.bad_sample import BadSample
from clipdist.data.decode import eval_image, eval_pixels
from clipdist.data.tokens import Tokenizer, make_tokenizer
from clipdist.data.transform import EvalTransform
from clipdist.errors import UserError
from clipdist.models.build import assemble, build_model
from clipdist.models.caption_decoder import CAPTION, DECODER, open_clip_decoder
from clipdist.models.dual_encoder import HEADS, DualEncoder
from clipdist.models.hugging_face import is_hugging_face, read_config
from clipdist.models.image_tokens import tokens_shape
from clipdist.models.lora import Base, merge_adapters
from clipdist.models.open_clip_files import model_config
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.models.state_dicts import without_heads
from clipdist.models.weights import weights_checksum

_OWN_WEIGHTS = "has weights of its own; leave {} out, or name a model instead"


@dataclass(frozen=True)
class Preprocess:
    """The evaluation transform of a model: an image as its image tower takes it."""

    transform: EvalTransform

    def __call__(self, image: str | Path | bytes | np.ndarray | Image.Image) -> torch.Tensor:
        """Return uint8 of shape transform.shape of a file, its bytes, pixels uint8 [h, w, 3], or Pillow's image.

        Raises:
            UserError: the file cannot be read, or is not an image.
        """
        name = str(image) if isinstance(image, (str, Path)) else "image"
        try:
            if isinstance(image, (str, Path)):
                image = Path(image).read_bytes()
            if isinstance(image, bytes):
                return eval_image(image, self.transform)
            pixels = np.array(image.convert("RGB") if isinstance(image, Image.Image) else image)
            return eval_pixels(pixels, self.transform)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None
        except BadSample as error:
            raise UserError(f"{name}: {error.reason}") from None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode.

    Attributes:
        label: what a table calls it, such as "demo, step 1200" or "RN50 (openai)".
        run_dir, step: where it was trained; None for a model that is not from a run.
        manifest_sha256: of a checkpoint's manifest, which holds the checksums of all its parts; empty for a model that
            is not from a checkpoint.
        kept: the data section of a run that keeps the features of locked towers; None: it does not. The towers are
            then locked.
        widths: of features that were trained too (objectives.clip.widths).
    """

    model: DualEncoder
    tokenizer: Tokenizer
    label: str
    run_dir: Path | None
    step: int | None
    manifest_sha256: str = ""
    kept: config.Data | None = None
    widths: tuple[int, ...] = ()

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess(self.model.spec.transform)

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits that change whenever the features might: a key for what is computed once and kept.

        Without a checkpoint they cover the weights and all of the description but its name: QuickGELU is no weight.
        """
        if self.manifest_sha256:
            return self.manifest_sha256[:16]
        described = {**self.model.spec.to_dict(), "name": ""}
        text = weights_checksum(self.model) + json.dumps(described, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_model(
    source: str,
    weights: str = "",
    trust_weights: bool = False,
    device: str | torch.device = "cpu",
    allow_random: bool = False,
    step: int | None = None,
    ema: bool = False,
    needs_text: str = "",
) -> LoadedModel:
    """Load a model, fp32, in evaluation mode.

    Args:
        source: a run folder or its checkpoints/ (the newest checkpoint, or the one of `step`), a checkpoint folder,
            the folder of a Hugging Face CLIPModel or SiglipModel, an open_clip name, or a model JSON.
        weights: for a name or JSON: an open_clip tag, or a file; for a run with LoRA: where its base is by now.
        trust_weights: run a TorchScript file that is not OpenAI's.
        allow_random: take a name or JSON without weights as it is drawn.
        ema: of a run with train.ema, the moving average of the weights; it counts as a model without a run folder,
            where the figures of the weights themselves are.
        needs_text: what a text tower is needed for; "": for nothing.

    Raises:
        UserError: a run without a checkpoint, weights beside a run's own, none where some are needed, an unknown name,
            no text tower where there must be one.
    """
    folder = Path(source)
    if folder.is_dir() and not is_hugging_face(folder):
        return _load_checkpoint(checkpoint_of(folder, step), device, weights, ema, (source, needs_text))
    if ema:
        raise UserError(f"{source}: no run or checkpoint folder, and --ema takes the moving average that a run kept")
    if folder.is_dir() and weights:
        raise UserError(f"{source}: a Hugging Face folder {_OWN_WEIGHTS.format(weights)}")
    if step is not None:
        raise UserError(f"{source}: only a run folder has steps to choose from")
    if folder.is_dir():
        cfg = config.Model(name=str(folder), weights=str(folder))
        label = f"{folder.resolve().name} (Hugging Face)"
    elif "/" in source and not source.endswith(".json"):
        raise UserError(f"{source}: no such run or checkpoint folder")
    else:
        cfg = config.Model(name=source, weights=weights, trust_weights=trust_weights)
        label = f"{folder.stem if source.endswith('.json') else source} ({weights or 'no weights'})"
        try:
            spec = resolve_spec(cfg, with_text=None)  # a misspelt name is the first thing to hear about
        except UserError as error:
            raise UserError(f"{source}: no run or checkpoint folder; taken as a model: {error}") from None
        if needs_text:
            spec.require_text(source, needs_text)
        if not (weights or allow_random):
            raise UserError(f"{source}: a model without weights; name an open_clip tag (such as openai) or a file")
    biased = folder.is_dir() and read_config(folder)["model_type"] == "siglip"
    model = build_model(cfg, config.Clip(loss="sigmoid") if biased else None, with_text=None)
    return LoadedModel(model.to(device).eval(), make_tokenizer(model.spec), label, run_dir=None, step=None)


def load_named(source: str, trust_weights: bool = False, ema: bool = False, needs_text: str = "") -> LoadedModel:
    """Load a model that one word names, on the CPU: a folder as load_model takes it, or NAME:WEIGHTS.

    Raises:
        UserError: as load_model.
    """
    name, weights = _name_and_weights(source)
    return load_model(name, weights=weights, trust_weights=trust_weights, ema=ema, needs_text=needs_text)


def describe_named(source: str) -> ModelSpec:
    """Return the description of the model that load_named would load; reads no weights.

    Raises:
        UserError: there is none of that name.
    """
    name, weights = _name_and_weights(source)
    folder = Path(name)
    if folder.is_dir() and not is_hugging_face(folder):
        return ModelSpec.from_dict(read_manifest(checkpoint_of(folder)).state["model"])
    if "/" in name and not name.endswith(".json") and not folder.is_dir():
        raise UserError(f"{name}: no such run or checkpoint folder")
    if not (weights or folder.is_dir()):
        raise UserError(f"{name}: a model without weights; write NAME:WEIGHTS, with an open_clip tag or a file")
    return resolve_spec(config.Model(name=name, weights=weights or name), with_text=None)


def _name_and_weights(source: str) -> tuple[str, str]:
    """Split NAME:WEIGHTS; a folder has no weights beside it."""
    name, _, weights = (source, "", "") if Path(source).is_dir() else source.partition(":")
    return name, weights


def starting_point(source: str, trust_weights: bool = False) -> tuple[config.Model, Literal["infonce", "sigmoid"]]:
    """Return the name and weights with which training starts from a model, and the loss that this was trained with.

    Args:
        source: a run or checkpoint, the folder of a Hugging Face CLIPModel or SiglipModel, or NAME:WEIGHTS: an
            open_clip name or model JSON with a tag or a file.

    Raises:
        UserError: a run without a checkpoint, or with adapters alone; no weights; an unknown name, tag or file; a
            model without a text tower.
    """
    folder = Path(source)
    if folder.is_dir() and is_hugging_face(folder):
        cfg = config.Model(name=source, weights=source)
        sigmoid = read_config(folder)["model_type"] == "siglip"
    elif folder.is_dir():
        checkpoint = checkpoint_of(folder)
        manifest = read_manifest(checkpoint)
        ModelSpec.from_dict(manifest.state["model"]).require_text(source, "training on pairs")
        if "base" in manifest.state:
            raise UserError(
                f"{source}: has adapters alone; merge them into a file, python tools/export.py {source} --out"
                " FILE.safetensors, and start from NAME:FILE.safetensors"
            )
        cfg = config.Model(name=manifest.config["model"]["name"], weights=source)
        sigmoid = "param/logit_bias" in manifest.tensors  # the configuration of averaged weights says no loss
    else:
        name, weights = _name_and_weights(source)
        if not weights:
            known = "no such run, checkpoint or Hugging Face folder" if "/" in source else "a model without weights"
            raise UserError(f"{source}: {known}; write NAME:WEIGHTS, such as ViT-B-32:openai, or name a folder")
        cfg = config.Model(name=name, weights=weights, trust_weights=trust_weights)
        sigmoid = "init_logit_bias" in (model_config(name) or {})
    resolve_spec(cfg)
    return cfg, "sigmoid" if sigmoid else "infonce"


def _load_checkpoint(
    folder: Path,
    device: str | torch.device,
    base: str = "",
    ema: bool = False,
    needs_text: tuple[str, str] = ("", ""),
) -> LoadedModel:
    """Load a checkpoint; see load_model.

    Args:
        needs_text: what was asked for, and what needs a text tower.
    """
    digest = hashlib.sha256((folder / MANIFEST).read_bytes() + EMA.encode() * ema).hexdigest()
    manifest = read_manifest(folder)
    spec = ModelSpec.from_dict(manifest.state["model"])
    if needs_text[1]:
        spec.require_text(*needs_text)
    if base and "base" not in manifest.state:
        raise UserError(f"{folder}: a run {_OWN_WEIGHTS.format(base)}")
    weights = _merged_weights(folder, base, ema) if "base" in manifest.state else load_full_weights(folder, ema=ema)
    described = {name: tensor for name, tensor in weights.items() if spec.decoder and name.startswith(DECODER)}
    weights = without_heads(weights) | described
    clip = config.Clip(loss="sigmoid" if "logit_bias" in weights else "infonce")
    with NothingDrawn():  # all weights come from the checkpoint
        model = assemble(spec, clip, tower_weights=False)
        if described:
            add_open_clip_decoder(model)
    strangers = model.state_dict().keys() ^ weights.keys()
    if strangers:
        raise UserError(f"{folder}: does not hold the model that it describes: {sorted(strangers)[0]}")
    model.load_state_dict(weights, assign=True)  # mapped from the file: what is not used is not read
    data = manifest.config.get("data", {})
    kept = config.Data(**data) if data.get("cache_features") else None
    if kept:
        model.lock_towers(config.Model(**{**manifest.config["model"], "lora": None}))
    objective = manifest.config.get("objectives", {}).get("clip") or {}
    widths = tuple(objective.get("widths", ()))
    inside = folder.resolve().parent  # run/checkpoints, unless the folder was copied elsewhere by itself
    run_dir = inside.parent if inside.name == "checkpoints" else None
    label = f"{run_dir.name if run_dir else folder.name}, step {manifest.step}{', moving average' if ema else ''}"
    model, where = model.to(device).eval(), None if ema else run_dir
    return LoadedModel(model, make_tokenizer(spec), label, where, manifest.step, digest, kept, widths)


def add_open_clip_decoder(model: DualEncoder) -> None:
    """Put the decoder that the description has, multimodal_cfg, behind the towers."""
    width = tokens_shape(model.visual, model.spec.image_size)[1]
    decoder = open_clip_decoder(model.spec, width, make_tokenizer(model.spec).marks())
    model.add_heads({CAPTION: decoder}, projects=True)


def _merged_weights(folder: Path, base: str, ema: bool) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint that has adapters alone, merged into those of its base."""
    model, _, _ = adapted_model(folder, base, ema)
    merge_adapters(model)
    return model.state_dict()


def adapted_model(folder: Path, base: str = "", ema: bool = False) -> tuple[DualEncoder, config.Config, Manifest]:
    """Return the model of a checkpoint that has adapters alone, with them on its base, which is built again.

    Args:
        base: the weights of the base, if not where they were.

    Returns:
        The model, the configuration it was trained by, and the checkpoint's manifest.

    Raises:
        UserError: a checkpoint of a whole model, a base that cannot be built, or another base by now.
    """
    manifest = read_manifest(folder)
    if "base" not in manifest.state:
        raise UserError(f"{folder}: holds a whole model, no adapters (model.lora)")
    saved = config.saved_config(manifest.config)
    if saved is None:
        raise UserError(f"{folder}: of another version, which built its base from other settings; merge it with that")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(saved.train.seed)  # as training did, for parts of the base that are drawn
        try:
            named = replace(saved.model, weights=base or saved.model.weights)
            spec = ModelSpec.from_dict(manifest.state["model"])
            has, reads = spec.has_text, spec.reads_text
            model = build_model(named, saved.objectives.clip, with_text=has, with_tokens=reads)
        except UserError as error:
            told = "holds adapters alone, and their base cannot be built (--weights says where its weights are)"
            raise UserError(f"{folder}: {told}: {error}") from None
    load_trained(model, folder, manifest, ema=ema)
    return model, saved, manifest


def load_trained(model: DualEncoder, folder: Path, manifest: Manifest, retry_s: float = 0.0, ema: bool = False) -> None:
    """Load a checkpoint into the model that it was saved from: all weights, or with LoRA those that train.

    Args:
        ema: load the moving average of the weights.

    Raises:
        UserError: they are those of another model, or of adapters on another base.
    """
    saved = manifest.state.get("base")
    base = Base(**saved) if saved else None
    if base and model.base is None:
        raise UserError(f"{folder}: holds adapters on {base}, and model.lora is not set; set it as that run did")
    if model.base and base is None:
        raise UserError(
            f"{folder}: a checkpoint of a whole model, and model.lora is set; to put adapters on it, export it by"
            " tools/export.py and name that file as model.weights of a new run"
        )
    if base and model.base and base.sha256 != model.base.sha256:
        raise UserError(f"{folder}: holds adapters on {base}, but the base is another now: {model.base}")
    weights = load_full_weights(folder, retry_s, ema)
    if not any(name.startswith("heads.") for name in model.state_dict()):
        weights = without_heads(weights)
    locked = {name for name, parameter in model.named_parameters() if base and not parameter.requires_grad}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder}: a checkpoint of another model ({str(error).splitlines()[-1].strip()})") from None
    # Objectives that the checkpoint lacks start anew, if train.resume_objectives allows it; others are left.
    strangers = [name for name in (*missing, *unexpected) if name not in locked and not name.startswith(HEADS)]
    if strangers:
        raise UserError(f"{folder}: a checkpoint of another model ({strangers[0]} does not fit)")


class NothingDrawn(TorchFunctionMode):
    """Leaves initial weights undrawn, which takes seconds for a large model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))
