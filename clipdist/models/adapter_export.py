"""Export the adapters of a run with LoRA without their base: in peft's form, or as a folder that clipdist loads.

peft puts adapters on a model of transformers: on a CLIPModel, whose layers have counterparts in open_clip's plain
towers once q, k and v are layers of their own, or on the Transformer of a Hugging Face text tower.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clipdist import config
from clipdist.errors import UserError
from clipdist.models import export, hugging_face
from clipdist.models.clip_model import inexpressible
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.interpolate import require_new_run, save_checkpoint
from clipdist.models.load import adapted_model, load_model

_INSTEAD = "take --format adapter, which clipdist loads"
_TRANSFORMER = "text.transformer."


class _Counterpart(NamedTuple):
    """The model of transformers that adapters go on.

    Attributes:
        base: its folder or name.
        lines: of Python that load it as `base`.
        load: its from_pretrained.
        rename: our names of tensors -> its names; without those that are no part of it.
        encode: the counterpart with adapters -> what `export.compare` takes.
    """

    base: str
    lines: tuple[str, ...]
    load: Callable[..., Any]
    rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    encode: Callable[[Any], export.Encoder]


def export_adapter(folder: Path, out: Path, weights: str = "") -> export.Exported:
    """Write a folder as a run's, with one checkpoint: what trained, and the name and SHA-256 of the base.

    load_model and all tools take it as they take the run: the base is built again, and one that differs is refused.

    Args:
        folder: a checkpoint.
        weights: where the base's are by now, if not where they were.

    Raises:
        UserError: a checkpoint without adapters, a base that cannot be built, or a folder that cannot be written.
        RuntimeError: features, normalised, differ from the model's by more than 1e-5.
    """
    require_new_run(out)
    model, saved, manifest = adapted_model(folder, weights)
    of_base = config.Config(model=saved.model, objectives=saved.objectives, train=config.Train(seed=saved.train.seed))
    buffers = {name for name, _ in model.named_buffers() if f"buffer/{name}" in manifest.tensors}
    trained = {name for name in model.state_dict() if f"param/{name}" in manifest.tensors}
    tensors = {name: value for name, value in model.state_dict().items() if name in buffers | trained}
    save_checkpoint(out, tensors, of_base, {name: manifest.state[name] for name in ("model", "base")}, buffers)
    loaded = load_model(str(out), weights).model
    error = export.compare(model.eval(), lambda image, ids: export.encode_both(loaded, image, ids), str(out))
    where = f', weights="{weights}"' if weights else ""
    lines = ("import clipdist", f'model, preprocess, tokenizer = clipdist.load("{out}"{where})')
    return export.Exported((out,), lines, error, parameters=sum(tensors[name].numel() for name in trained))


def export_peft(folder: Path, out: Path, weights: str = "") -> export.Exported:
    """Write adapter_config.json and adapter_model.safetensors, which peft puts on a model of transformers.

    Args:
        folder, weights: see export_adapter.
        out: a new folder.

    Raises:
        UserError: as export_adapter; towers, or a base, that transformers has no model of; a tower that trained whole.
        RuntimeError: features, normalised, differ from the model's by more than 1e-5.
    """
    import peft

    model, saved, _ = adapted_model(folder, weights)
    model.eval()
    assert saved.model.lora
    theirs = (_of_text_tower if model.spec.hf_text else _of_clip)(model, weights or saved.model.weights, saved.model)
    own = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    adapters = theirs.rename({name.replace(".default.", "."): own[name] for name in own if ".lora_" in name})
    if not adapters:
        raise UserError(f"{folder}: no adapters on {theirs.base}; {_INSTEAD}")
    settings = peft.LoraConfig(
        r=saved.model.lora.rank,
        lora_alpha=saved.model.lora.alpha,  # type: ignore[arg-type]
        target_modules=sorted({name.partition(".lora_")[0] for name in adapters}),
        base_model_name_or_path=theirs.base,
        inference_mode=True,
    )
    lines = (*theirs.lines, "from peft import PeftModel", f'model = PeftModel.from_pretrained(base, "{out}")')
    with export.new_folder(out) as temporary:
        settings.save_pretrained(str(temporary))
        tensors = {f"base_model.model.{name}": value.contiguous() for name, value in adapters.items()}
        export.save_tensors(tensors, temporary / "adapter_model.safetensors", {"format": "pt"})
        loaded = peft.PeftModel.from_pretrained(theirs.load(theirs.base, dtype="float32"), str(temporary)).eval()
        error = export.compare(model, theirs.encode(loaded), str(out))
    left = "" if not model.spec.hf_text else "the image tower, the projection and the scalars"
    left = "logit_bias" if model.logit_bias is not None and not left else left
    return export.Exported(
        (out,), lines, error, left_out=left, parameters=sum(value.numel() for value in adapters.values())
    )


def _of_clip(model: DualEncoder, weights: str, cfg: config.Model) -> _Counterpart:
    """Return the CLIPModel of the folder that the base's weights are."""
    from transformers import CLIPModel

    spec = model.spec
    if reason := inexpressible(spec):
        raise UserError(f"{spec.name}: has {reason}, for which peft would need a model of transformers; {_INSTEAD}")
    whole = [name for name, value in model.named_parameters() if value.requires_grad and ".lora_" not in name]
    if whole := [name for name in whole if name not in model.scalars]:
        raise UserError(
            f"{spec.name}: more than adapters trained ({whole[0]}), which peft's file does not hold; {_INSTEAD}"
        )
    if not hugging_face.is_hugging_face(Path(weights)):
        how = f"python tools/export.py {cfg.name} --weights {weights} --out BASE --format hugging_face"
        how = f"write it by {how}, and add --weights BASE" if weights else f"this one was drawn; {_INSTEAD}"
        raise UserError(f"--format peft: needs the base of the adapters as a Hugging Face folder: {how}")
    side = hugging_face.read_config(Path(weights))["vision_config"]["image_size"]
    if side != spec.image_size:
        raise UserError(f"{weights}: was trained at {spec.image_size} pixels, the folder's are {side}; {_INSTEAD}")

    def encode(theirs: Any) -> export.Encoder:
        def features(image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = theirs(input_ids=tokens, pixel_values=export.normalised(spec, image))
            return found.image_embeds, found.text_embeds

        return features

    assert model.logit_scale is not None
    lines = (
        "from transformers import CLIPModel",
        f'base = CLIPModel.from_pretrained("{weights}", dtype="float32")',
        f"base.logit_scale.data.fill_({model.logit_scale.item():.6f})  # it trained, too",
    )
    return _Counterpart(weights, lines, CLIPModel.from_pretrained, hugging_face.to_theirs, encode)


def _of_text_tower(model: DualEncoder, weights: str, cfg: config.Model) -> _Counterpart:
    """Return the Transformer of a Hugging Face text tower; its features are compared behind our pooling."""
    from transformers import AutoModel

    name = model.spec.hf_text
    tower: Any = model.text
    if weights or not model.spec.model["text_cfg"].get("hf_model_pretrained", True):
        raise UserError(f"{cfg.name}: the base of its text adapters is not {name} as it is published; {_INSTEAD}")
    if getattr(tower.config, "is_encoder_decoder", False):
        raise UserError(f"{cfg.name}: its text tower is the encoder of {name} alone; {_INSTEAD}")

    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {own.removeprefix(_TRANSFORMER): tensors[own] for own in tensors if own.startswith(_TRANSFORMER)}

    def encode(theirs: Any) -> export.Encoder:
        def features(image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mask = (tokens != tower.config.pad_token_id).long()
            found = theirs(input_ids=tokens, attention_mask=mask)
            return model.encode_image(image), tower.proj(tower.pooler(found, mask))

        return features

    lines = ("from transformers import AutoModel", f'base = AutoModel.from_pretrained("{name}", dtype="float32")')
    return _Counterpart(name, lines, AutoModel.from_pretrained, rename, encode)
