"""Load a DualEncoder's weights from an open_clip tag, a file or a Hugging Face folder.

Nothing is ever unpickled freely. OpenAI's .pt files are TorchScript archives, which are programs: they are only run
when their SHA-256 is one that OpenAI publishes, or when the user says that the file is trusted.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipdist.checkpoint.format import checkpoint_of
from clipdist.checkpoint.reader import load_full_weights
from clipdist.errors import UserError, brief
from clipdist.models.caption_decoder import OPEN_CLIPS
from clipdist.models.clip_model import check_same_architecture
from clipdist.models.hugging_face import is_hugging_face, to_ours, weight_files
from clipdist.models.open_clip_files import LOCAL_TIMM, models_of
from clipdist.models.spec import ModelSpec
from clipdist.models.state_dicts import plain_names, read_torch_file, without_heads
from clipdist.models.towers import find_projection
from clipdist.models.weight_facts import OPENAI_FACTS, is_torchscript, trained_spec

# Of descriptions: positions are interpolated; the towers' own weights do not matter where all weights follow.
_NOT_COMPARED = (
    "image_size",
    "image_seq_len",
    "timm_model_pretrained",
    "hf_model_pretrained",
    "tokenizer_kwargs",
    "hf_tokenizer_name",
)


def load_weights(model: nn.Module, weights: str, trust: bool = False) -> None:
    """Load both towers and the log scale, in place; of a model without a text tower, the image tower.

    Args:
        model: a DualEncoder of the same architecture; only a ViT's image size may differ (positions are interpolated).
        weights: an open_clip tag of the model's name, or a file: .safetensors, a torch state dict or a training
            checkpoint that holds one, or a TorchScript archive in OpenAI's form; or the folder of a Hugging Face
            CLIPModel or SiglipModel, or of a run or checkpoint.
        trust: run a TorchScript archive although its SHA-256 is not one of OpenAI's.

    Raises:
        UserError: no such file or tag, a download that fails, an untrusted archive, or tensors that do not fit.
    """
    spec = model.spec
    assert isinstance(spec, ModelSpec)
    path = Path(weights)
    if (path.is_dir() or path.is_file()) and (trained := trained_spec(path)):
        _check_same_model(path, trained, spec)
    if path.is_dir() and not is_hugging_face(path):
        found = without_heads(load_full_weights(checkpoint_of(path)))
    elif path.is_dir():
        check_same_architecture(path, spec)
        found = to_ours({name: value for file in weight_files(path) for name, value in read_state_dict(file).items()})
    else:
        path = path if path.is_file() else _download(spec.name, weights)
        found = read_state_dict(path, trust)
        if any(name.startswith("vision_model.") for name in found):
            raise UserError(
                f"model.weights={path}: a file of a Hugging Face model; name its folder, whose config.json says what"
                " the tensors do not"
            )
    tensors = _to_dual_encoder(found, model)
    # An objective's decoder is put behind the towers later: see clipdist.objectives.make.
    decoder = {name.removeprefix(OPEN_CLIPS): tensors.pop(name) for name in [*tensors] if name.startswith(OPEN_CLIPS)}
    model.decoder_weights = decoder  # type: ignore[assignment]
    _check_fit(model, spec.name, tensors, path)
    model.load_state_dict(tensors)


def _check_same_model(path: Path, trained: dict[str, Any], spec: ModelSpec) -> None:
    """Compare a model that clipdist trained with the one that takes its weights. Image sizes may differ.

    Raises:
        UserError: another architecture, another tokenizer, or no text tower where there must be one.
    """
    if spec.has_text and trained["tokenizer"]["kind"] == "none":
        raise UserError(f"model.weights={path}: has no text tower, and {spec.name} needs the weights of one")
    for section in ("vision_cfg", "text_cfg") if spec.has_text else ("vision_cfg",):
        theirs, ours = trained["model"][section], spec.model[section]
        for key in sorted(theirs.keys() | ours.keys()):
            if key not in _NOT_COMPARED and not _same(theirs.get(key), ours.get(key)):
                raise UserError(
                    f"model.weights={path}: does not fit {spec.name}: {section}.{key} is {theirs.get(key)} there, the"
                    f" model has {ours.get(key)}; take model.name={trained['name']}, which it was trained as"
                )
    for key in ("kind", "name", "mode", "options", "vocab_size") if spec.has_text else ():
        theirs, ours = trained["tokenizer"].get(key), spec.tokenizer.get(key)
        if not _same(theirs, ours):
            raise UserError(
                f"model.weights={path}: was trained with another tokenizer than {spec.name} has ({key} {theirs} instead"
                f" of {ours}); take model.name={trained['name']}, which it was trained as"
            )


def _same(theirs: Any, ours: Any) -> bool:
    """Whether two values of a description are equal, or both folders, which may have moved."""
    folders = [str(value).removeprefix(LOCAL_TIMM).startswith("/") for value in (theirs, ours)]
    return theirs == ours or all(folders)


def read_state_dict(path: Path, trust: bool = False) -> dict[str, torch.Tensor]:
    """Read a weights file as it is, on the CPU.

    Raises:
        UserError: the file cannot be read safely, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return _without_facts(_read_safetensors(path))
    if is_torchscript(path):
        return _without_facts(_read_torchscript(path, trust))
    return _without_facts(read_torch_file(path))


def weights_checksum(module: nn.Module) -> str:
    """Return the SHA-256 over the names and bytes of all parameters and buffers, 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def openai_hashes() -> set[str]:
    """Return the SHA-256 of the files that OpenAI publishes: they stand in the addresses that open_clip knows."""
    import open_clip

    addresses = [open_clip.get_pretrained_url(name, "openai") for name in open_clip.list_openai_models()]
    return {address.split("/")[-2] for address in addresses if "openaipublic" in address}


def _download(name: str, tag: str) -> Path:
    import open_clip

    facts = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        raise UserError(f"model.weights={tag}: neither a file nor a tag of {name}")
    try:
        return Path(open_clip.download_pretrained(facts))
    except Exception as error:  # the hub and urllib raise many kinds for "no network"
        source = facts.get("hf_hub") or facts.get("url")
        raise UserError(
            f"model.weights={tag}: cannot be fetched from {source}: {brief(error)}; fetch it on a machine with a"
            " network and name the file, or set HF_HUB_OFFLINE=1 and HF_HOME to a filled cache"
        ) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return plain_names(load_file(path))
    except safetensors.SafetensorError as error:
        raise UserError(f"model.weights={path}: not a safetensors file: {error}") from error


def _read_torchscript(path: Path, trust: bool) -> dict[str, torch.Tensor]:
    if not trust:
        digest = _sha256(path)
        if digest not in openai_hashes():
            raise UserError(
                f"model.weights={path}: a TorchScript archive (a program) whose SHA-256 {digest[:12]}... is not one of"
                " OpenAI's; model.trust_weights=true runs it nevertheless, if you trust its origin"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out, but these files stay as they are
        try:
            tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
        except RuntimeError as error:
            raise UserError(f"model.weights={path}: a damaged TorchScript archive: {brief(error)}") from error
    return tensors


def _without_facts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name not in OPENAI_FACTS}


def _to_dual_encoder(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Convert open_clip's and OpenAI's names, dtypes and shapes to ours: visual.*, text.*, logit_scale [1], fp32."""
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed

    tensors = convert_to_custom_text_state_dict(dict(tensors))
    if model.text is None:  # the image tower without its projection is wanted, and at least something of it is there
        own = model.state_dict()
        if not any(name.startswith("visual.") for name in tensors):  # an image tower's own state dict
            prefix = "visual.trunk." if hasattr(model.visual, "trunk") else "visual."
            tensors = {prefix + name: value for name, value in tensors.items()}
        found = find_projection(model.visual)
        same = set(getattr(found.owner, found.name).parameters()) if found else set()
        held = {name: own[name] for name, parameter in model.named_parameters() if parameter in same}  # an identity
        tensors = {name: value for name, value in tensors.items() if name in own.keys() - held.keys()} or tensors
        tensors |= held
    bias = model.logit_bias
    if isinstance(bias, torch.Tensor):  # weights trained with InfoNCE have none: it starts as configured
        tensors["logit_bias"] = tensors.get("logit_bias", bias.detach()).reshape(1)
    else:
        tensors.pop("logit_bias", None)  # a constant bias cancels in both softmaxes of InfoNCE
    tensors.pop("text.transformer.embeddings.position_ids", None)  # written by transformers before 4.31
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    if "logit_scale" in tensors:
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    resize_pos_embed(tensors, model)
    _resize_timm_positions(tensors, model)
    return tensors


def _resize_timm_positions(tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Interpolate the positions of a timm ViT without a class token, SigLIP's, to the model's grid, in place.

    Bicubic, as transformers does with interpolate_pos_encoding=True. With a class token their number is no square, and
    the weights are refused by their shapes.
    """
    name = "visual.trunk.pos_embed"
    if name not in tensors or name not in (own := model.state_dict()):
        return
    old, new = (math.isqrt(value.shape[1]) for value in (tensors[name], own[name]))
    if old == new or old**2 != tensors[name].shape[1] or new**2 != own[name].shape[1]:
        return
    grid = tensors[name].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    tensors[name] = grid.flatten(2).transpose(1, 2).contiguous()


def _check_fit(model: nn.Module, name: str, tensors: dict[str, torch.Tensor], path: Path) -> None:
    where = f"model.weights={path}: does not fit {name}"
    own = model.state_dict()
    reason = ""
    strangers = sorted(tensors.keys() - own.keys())
    if not own.keys() & tensors.keys() - {"logit_scale"}:
        reason = f"not one tensor is of this model; the file holds {', '.join(list(tensors)[:3])} ..."
    for name, value in own.items() if not reason else ():
        if name not in tensors:
            reason = f"{name} is missing ({len(own.keys() - tensors.keys())} are)"
        elif value.shape != tensors[name].shape:
            reason = f"{name} is {list(tensors[name].shape)}, the model wants {list(value.shape)}"
        if reason:
            break
    if strangers and not reason:
        reason = f"{strangers[0]} is not of this model ({len(strangers)} such)"
    if reason:
        names = models_of({name: tuple(value.shape) for name, value in tensors.items()})
        raise UserError(f"{where}: {reason}{f'; take model.name={_either(names)}' if names else ''}")


def _either(names: list[str]) -> str:
    shown = names[:4]
    return f"{', '.join(shown[:-1])} or {shown[-1]}" if len(shown) > 1 else shown[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
