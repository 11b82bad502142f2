"""Average the weights of models of one architecture, and write the result as a run folder with one checkpoint.

WiSE-FT (Wortsman et al., arXiv:2109.01903, section 3): (1 - alpha) theta_0 + alpha theta_1. A uniform soup of n models
(Wortsman et al., arXiv:2203.05482, section 2): the mean of their weights.

All tensors of floating point are averaged in the same way: parameters; the log scale (so that temperatures have their
geometric mean) and the bias of the sigmoid loss; BatchNorm's running statistics, which are not measured again. Other
buffers, such as counts of batches, are the first model's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipdist import config
from clipdist.checkpoint.format import Manifest, Piece, checkpoint_dir
from clipdist.checkpoint.writer import write_manifest, write_part
from clipdist.errors import UserError, writing
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.spec import LOCAL_TIMM, ModelSpec

State = dict[str, Tensor]


def require_same_architecture(models: Mapping[str, DualEncoder]) -> None:
    """Raise UserError, which names the first difference, unless all models have one description and the same tensors.

    Args:
        models: by the names that the error shall have, the first of which the others are compared with.
    """
    (first, model), *others = models.items()
    own, own_shapes = _description(model.spec), _shapes(model)
    for name, other in others:
        where = f"{first} and {name}: different architectures, whose weights cannot be averaged"
        described, shapes = _description(other.spec), _shapes(other)
        for key in sorted(own.keys() | described.keys()):
            if own.get(key) != described.get(key):
                raise UserError(f"{where}: {key} is {own.get(key)} and {described.get(key)}")
        for key in sorted(own_shapes.keys() | shapes.keys()):
            if own_shapes.get(key) != shapes.get(key):
                raise UserError(f"{where}: {key} is {own_shapes.get(key, 'missing')} and {shapes.get(key, 'missing')}")


def average(states: Sequence[State], weights: Sequence[float]) -> State:
    """Return the weighted sum of state dicts with the same names and shapes; a model of weight 0 does not enter.

    Args:
        weights: of each; their sum is 1.
    """
    used = [(state, weight) for state, weight in zip(states, weights) if weight]
    averaged = {}
    for name, first in states[0].items():
        if first.is_floating_point():
            averaged[name] = sum((weight * state[name] for state, weight in used), torch.zeros_like(first))
        else:
            averaged[name] = first
    return averaged


def require_new_run(out: Path) -> None:
    """Raise UserError where `out` is anything but a folder that does not exist or is empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists already; name a new folder, or remove it")


def save_run(out: Path, model: DualEncoder, made_of: dict[str, Any]) -> Path:
    """Write a run folder with one checkpoint, of step 0, which load_model and the tools take. Return the checkpoint.

    Args:
        model: on the CPU.
        made_of: plain values for the manifest's state: what the weights were averaged of.

    Raises:
        UserError: it cannot be written.
    """
    settings = config.load_config()
    named = replace(settings, model=replace(settings.model, name=model.spec.name))
    state = {"model": model.spec.to_dict(), "made_of": made_of}
    return save_checkpoint(out, model.state_dict(), named, state, {name for name, _ in model.named_buffers()})


def save_checkpoint(
    out: Path, tensors: State, settings: config.Config, state: dict[str, Any], buffers: Collection[str] = ()
) -> Path:
    """Write a run folder with one checkpoint, of step 0, without what a run would need to go on. Return the checkpoint.

    Args:
        tensors: by name; on the CPU or not.
        state: plain values for the manifest.
        buffers: names of those tensors that are no parameters.

    Raises:
        UserError: it cannot be written.
    """
    folder = checkpoint_dir(out, 0)
    pieces = [
        Piece(
            f"{'buffer' if name in buffers else 'param'}/{name}",
            tuple(value.shape),
            0,
            value.detach().cpu().contiguous().reshape(-1),
        )
        for name, value in tensors.items()
    ]
    settings_tree = config.to_dict(settings)
    manifest = Manifest(step=0, optimizer_step=0, samples=0, world=1, config=settings_tree, order={}, state=state)
    with writing(f"--out {out}", "; name another folder"):
        write_part(folder, 0, pieces, "weights")
        write_manifest(folder, manifest, "weights")
    return folder


def _description(spec: ModelSpec) -> dict[str, Any]:
    """Return what decides a model's features besides its tensors, flat; not its name, nor folders of its towers."""
    flat: dict[str, Any] = {}
    for key, value in spec.to_dict().items():
        flat |= _flattened(key, value)
    unread = {key for key, value in flat.items() if key == "name" or key.endswith("_pretrained") or _is_folder(value)}
    return {key: value for key, value in flat.items() if key not in unread}


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and Path(value.removeprefix(LOCAL_TIMM)).is_absolute()


def _flattened(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: list(value) if isinstance(value, tuple) else value}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flattened(f"{key}.{name}", entry)
    return flat


def _shapes(model: DualEncoder) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}
