"""Load a model and its tokenizer from a run, a checkpoint, a Hugging Face folder or a model's name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from clipdist import config
from clipdist.checkpoint.format import MANIFEST, checkpoint_of, read_manifest
from clipdist.checkpoint.reader import load_full_weights
from clipdist.data.tokens import Tokenizer, make_tokenizer
from clipdist.errors import UserError
from clipdist.models.dual_encoder import DualEncoder, assemble, build_model
from clipdist.models.hugging_face import is_hugging_face, read_config
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.models.weights import weights_checksum


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
    """

    model: DualEncoder
    tokenizer: Tokenizer
    label: str
    run_dir: Path | None
    step: int | None
    manifest_sha256: str = ""
    kept: config.Data | None = None

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
) -> LoadedModel:
    """Load a model, fp32, in evaluation mode.

    Args:
        source: a run folder or its checkpoints/ (the newest checkpoint, or the one of `step`), a checkpoint folder,
            the folder of a Hugging Face CLIPModel or SiglipModel, an open_clip name, or a model JSON.
        weights: for a name or JSON: an open_clip tag, or a file.
        trust_weights: run a TorchScript file that is not OpenAI's.
        allow_random: take a name or JSON without weights as it is drawn.

    Raises:
        UserError: a run without a checkpoint, weights beside a run's own, none where some are needed, an unknown name.
    """
    folder = Path(source)
    if folder.is_dir() and weights:
        kind = "a Hugging Face folder" if is_hugging_face(folder) else "a run"
        raise UserError(f"{source}: {kind} has weights of its own; leave {weights} out, or name a model instead")
    if folder.is_dir() and not is_hugging_face(folder):
        return _load_checkpoint(checkpoint_of(folder, step), device)
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
            resolve_spec(cfg)  # a misspelt name is the first thing to hear about
        except UserError as error:
            raise UserError(f"{source}: no run or checkpoint folder; taken as a model: {error}") from None
        if not (weights or allow_random):
            raise UserError(f"{source}: a model without weights; name an open_clip tag (such as openai) or a file")
    biased = folder.is_dir() and read_config(folder)["model_type"] == "siglip"
    model = build_model(cfg, config.Clip(loss="sigmoid") if biased else None)
    return LoadedModel(model.to(device).eval(), make_tokenizer(model.spec), label, run_dir=None, step=None)


def _load_checkpoint(folder: Path, device: str | torch.device) -> LoadedModel:
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    manifest = read_manifest(folder)
    spec = ModelSpec.from_dict(manifest.state["model"])
    weights = load_full_weights(folder)
    clip = config.Clip(loss="sigmoid" if "logit_bias" in weights else "infonce")
    with NothingDrawn():  # all weights come from the checkpoint
        model = assemble(spec, clip, tower_weights=False)
    strangers = model.state_dict().keys() ^ weights.keys()
    if strangers:
        raise UserError(f"{folder}: does not hold the model that it describes: {sorted(strangers)[0]}")
    model.load_state_dict(weights, assign=True)  # mapped from the file: what is not used is not read
    data = manifest.config.get("data", {})
    kept = config.Data(**data) if data.get("cache_features") else None
    if kept:
        model.lock_towers(config.Model(**manifest.config["model"]))
    inside = folder.resolve().parent  # run/checkpoints, unless the folder was copied elsewhere by itself
    run_dir = inside.parent if inside.name == "checkpoints" else None
    label = f"{run_dir.name if run_dir else folder.name}, step {manifest.step}"
    return LoadedModel(model.to(device).eval(), make_tokenizer(spec), label, run_dir, manifest.step, digest, kept)


class NothingDrawn(TorchFunctionMode):
    """Leaves initial weights undrawn, which takes seconds for a large model."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))
