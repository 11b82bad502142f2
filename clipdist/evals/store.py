"""Embeddings in, one .safetensors file out, and back: features that are computed once and asked often, without pickle.

The strings travel as tensors too (JSON in UTF-8 bytes), since a safetensors file's head must stay below 100 MB, which a
million captions pass; the head holds what is small: the format, the samples that were left out, and the facts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings
from clipdist.storage import replacing

FORMAT = "clipdist embeddings 1"


def save_embeddings(path: Path, embeddings: Embeddings, facts: dict[str, str]) -> None:
    """Writes one file, which is there whole or not at all; a file of that name is replaced.

    Args:
        path: its folder is made where it is missing.
        facts: what a reader must know to use the features: of which model, which shards ...

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {
        "image": embeddings.image,
        "text": embeddings.text,
        "text_image": embeddings.text_image,
        "sample_ids": embeddings.sample_ids,
        "captions": _bytes_of(embeddings.captions),
        "keys": _bytes_of(embeddings.keys),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    head = {"format": FORMAT, "bad": json.dumps(embeddings.bad), "facts": json.dumps(facts)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True, shared=True) as partial:
            save_file(tensors, str(partial), head)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the embeddings cannot be written ({error}); is there room on the disk?") from None


def load_embeddings(path: Path) -> tuple[Embeddings, dict[str, str]]:
    """What save_embeddings wrote, and its facts.

    Raises:
        UserError: no such file, or not one of save_embeddings, or a damaged one.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; name a file of embeddings")
    try:
        with safe_open(str(path), framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of embeddings") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole .safetensors file ({error}); save the embeddings again") from None
    if head.get("format") != FORMAT:
        raise UserError(f"{path}: not a file of embeddings ({head.get('format', 'no format')}); expected {FORMAT!r}")
    try:
        embeddings = Embeddings(
            image=tensors["image"],
            text=tensors["text"],
            text_image=tensors["text_image"],
            captions=_strings_of(tensors["captions"]),
            keys=_strings_of(tensors["keys"]),
            sample_ids=tensors["sample_ids"],
            bad=json.loads(head["bad"]),
        )
        facts = json.loads(head["facts"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: a damaged file of embeddings ({error}); save them again") from None
    _require_consistent(path, embeddings)
    return embeddings, facts


def _require_consistent(path: Path, embeddings: Embeddings) -> None:
    n, m = len(embeddings.image), len(embeddings.text)
    rows = embeddings.text_image
    agree = (
        embeddings.image.ndim == embeddings.text.ndim == 2
        and embeddings.image.is_floating_point()
        and embeddings.text.is_floating_point()
        and rows.dtype == embeddings.sample_ids.dtype == torch.int64
        and len(embeddings.keys) == len(embeddings.sample_ids) == n
        and len(embeddings.captions) == len(rows) == m
        and (not m or (embeddings.image.shape[1] == embeddings.text.shape[1] and 0 <= rows.min() <= rows.max() < n))
    )
    if not agree:
        raise UserError(f"{path}: a damaged file of embeddings (its parts disagree in size); save them again")


def _bytes_of(strings: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(strings), ensure_ascii=False).encode()), dtype=torch.uint8)


def _strings_of(data: Tensor) -> list[str]:
    return json.loads(data.numpy().tobytes())
