"""Keep tensors in one .safetensors file, without pickle; its head holds the format and small values as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdist.errors import UserError
from clipdist.storage import replacing


def save_tensors(path: Path, form: str, tensors: Mapping[str, Tensor], head: Mapping[str, Any]) -> None:
    """Write one file atomically, in place of an older one; its folder is made where it is missing.

    Args:
        form: name and version of the content, which the reader asks for.
        head: small JSON values.

    Raises:
        UserError: the file cannot be written.
    """
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True, shared=True) as partial:
            texts = {name: json.dumps(value) for name, value in head.items()}
            save_file(written, str(partial), {"format": form, **texts})
    except (OSError, SafetensorError) as error:
        what = form.split()[1]
        raise UserError(f"{path}: the {what} cannot be written ({error}); is there room on the disk?") from None


def load_tensors(path: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, mapped from the file, and the head that save_tensors wrote.

    Raises:
        UserError: no such file, a damaged one, or one of another format.
    """
    what = form.split()[1]
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file of {what}")
    try:
        with safe_open(str(path), framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of {what}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); save the {what} again") from None
    found = head.pop("format", "no format")
    if found != form:
        raise UserError(f"{path}: not a file of {what} ({found}); expected {form!r}")
    try:
        return tensors, {name: json.loads(value) for name, value in head.items()}
    except ValueError as error:
        raise UserError(f"{path}: a damaged file of {what} ({error}); save them again") from None
