"""Keep features in one .safetensors file: what is computed once and asked often.

Lists of strings are tensors too (JSON in UTF-8 bytes), since a safetensors file's head must stay below 100 MB, which a
million captions exceed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipdist.data.tensor_file import load_tensors, save_tensors
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings

FORMAT = "clipdist embeddings 1"
T = TypeVar("T")


def read_kept(path: Path, read: Callable[[Path], T]) -> T | None:
    """Return what `read` makes of a file; None where there is none, or, with a line on stderr, one of no use."""
    if not path.exists():
        return None
    try:
        return read(path)
    except UserError as error:
        print(f"{error}: made again", file=sys.stderr)
        return None


def write_kept(write: Callable[[], None]) -> None:
    """Call `write`; where the file cannot be written, a line on stderr says so and the search goes on."""
    try:
        write()
    except UserError as error:
        print(f"not kept for the next search: {error}", file=sys.stderr)


def save_embeddings(path: Path, embeddings: Embeddings, facts: dict[str, str]) -> None:
    """Keep embeddings.

    Args:
        facts: what a reader must know to use the features: of which model, which shards ...

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {name: getattr(embeddings, name) for name in ("image", "text", "text_image", "sample_ids")}
    tensors |= {name: _bytes_of(getattr(embeddings, name)) for name in ("captions", "keys")}
    save_tensors(path, FORMAT, tensors, {"bad": embeddings.bad, "sources": embeddings.caption_sources, "facts": facts})


def load_embeddings(path: Path) -> tuple[Embeddings, dict[str, str]]:
    """Return what save_embeddings wrote, and its facts.

    Raises:
        UserError: as load_tensors; parts that disagree.
    """
    tensors, head = load_tensors(path, FORMAT)
    try:
        parts: dict[str, Any] = {name: json.loads(tensors.pop(name).numpy().tobytes()) for name in ("captions", "keys")}
        embeddings = Embeddings(**(tensors | parts), bad=head["bad"], caption_sources=head.get("sources", {}))
        facts = head["facts"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a damaged file of embeddings ({error}); save them again") from None
    n, m, rows = len(embeddings.image), len(embeddings.text), embeddings.text_image
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
    return embeddings, facts


def _bytes_of(strings: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(list(strings), ensure_ascii=False).encode()), dtype=torch.uint8)
