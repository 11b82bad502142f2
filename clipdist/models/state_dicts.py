"""Find the state dict of a whole model in a torch file, and give its tensors their plain names."""

from __future__ import annotations

import argparse
import pathlib
import pickle
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdist.errors import UserError, brief

# Entries of training checkpoints that hold the model: open_clip and Lightning, most others, and DeepSpeed.
ENTRIES = ("state_dict", "model", "model_state_dict", "module")
PREFIXES = ("module.", "model.")  # of DistributedDataParallel, and of a Lightning module's attribute
COMPILED = "_orig_mod."  # of torch.compile, also inside of names

# What training scripts save beside tensors, and cannot run code when it is loaded: settings and numpy's numbers.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS = [
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")),
    _NUMPY_SCALAR,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),  # as numpy 1 wrote it
]


def read_torch_file(path: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read the state dict of a model from a torch file without running what is in it; names without known prefixes.

    Args:
        device: "meta" reads the names, shapes and dtypes alone.

    Raises:
        UserError: the file cannot be read safely, or holds no state dict.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = _unsafe(path, error)
        raise UserError(f"model.weights={path}: not a state dict that can be read safely: {reason}") from error
    if _is_state_dict(content):
        return plain_names(content)
    found = [key for key, value in content.items() if _is_state_dict(value)] if isinstance(content, dict) else []
    taken = next((key for key in ENTRIES if key in found), None)
    if taken is None:
        raise UserError(f"model.weights={path}: holds no state dict (names and tensors), but {_holds(content)}")
    if len(found) > 1 and device != "meta":
        print(f"model.weights={path}: takes {taken!r} of its state dicts {', '.join(map(repr, found))}")
    return plain_names(content[taken])


def plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors without the prefixes that wrappers of a model give to all of its names."""
    tensors = {name.replace(COMPILED, ""): value for name, value in tensors.items()}
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def without_heads(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint without the objectives' heads, which are for training alone."""
    return {name: value for name, value in tensors.items() if not name.startswith("heads.")}


def _is_state_dict(content: Any) -> bool:
    named = isinstance(content, dict) and content and all(isinstance(name, str) for name in content)
    return bool(named) and all(torch.is_tensor(value) for value in content.values())


def _unsafe(path: Path, error: Exception) -> str:
    """Return why a file was not read: the classes in it that might run code, where torch finds them."""
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip, or not a file of torch
        return brief(error)
    if not unsafe:
        return brief(error)
    return f"it holds objects of {', '.join(sorted(unsafe)[:3])}, which might run code; save model.state_dict() alone"


def _holds(content: Any) -> str:
    if not isinstance(content, dict):
        return f"an object of {type(content).__name__}"
    kinds = [f"{key!r} ({type(value).__name__})" for key, value in content.items()]
    return f"{', '.join(kinds[:6])}{' ...' if len(kinds) > 6 else ''}" or "nothing"
