"""Read slices of the tensors of a checkpoint folder, for any number of ranks and any ZeRO stage."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from clipdist.checkpoint.format import CHUNK_BYTES, EMA, Missing, read_manifest, retried
from clipdist.errors import UserError

T = TypeVar("T")


class CheckpointReader:
    """Read slices of the tensors of one checkpoint folder.

    Args:
        retry_s: how long to retry what the storage refuses, file by file.

    Raises:
        UserError: no checkpoint, or its manifest is damaged; from every method that reads: a file is missing or
            damaged. The message names the file.
        Fault: the storage refuses, from every method that reads.
    """

    def __init__(self, folder: str | Path, retry_s: float = 0.0) -> None:
        self.folder = Path(folder)
        self.retry_s = retry_s
        self.manifest = read_manifest(self.folder, retry_s)
        self._open: dict[str, safe_open] = {}  # opening a file reads its whole table of tensors

    def close(self) -> None:
        """Close the files, so that a checkpoint that is removed frees its space. Another read opens them again.

        What read_full returned keeps its file mapped as long as it lives.
        """
        self._open.clear()

    def check_sizes(self) -> None:
        """Check that every file exists and has its size."""
        for name, about in self.manifest.files.items():
            path = self.folder / name
            size = self._retried(path, partial(os.stat, path)).st_size
            if size != about["bytes"]:
                raise _damaged(path, f"{size} bytes instead of {about['bytes']}")

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Check the sizes of all files, and the SHA-256 sums of files rank, rank + world, ...

        Each of `world` ranks reads its share; the checkpoint is good if no rank raises.
        """
        self.check_sizes()
        for name, about in list(self.manifest.files.items())[rank::world]:
            path = self.folder / name
            if self._retried(path, partial(_sha256, path)) != about["sha256"]:
                raise _damaged(path, "its content does not fit its SHA-256")

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.manifest.tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest.tensors[name]["shape"])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Return elements start .. start+numel of a flat tensor, 1-D, in the stored dtype; without numel to its end."""
        entry = self.manifest.tensors[name]
        numel = math.prod(entry["shape"]) - start if numel is None else numel
        out = torch.empty(numel, dtype=getattr(torch, entry["dtype"]))
        self.read_into(out, name, start)
        return out

    def read_into(self, out: torch.Tensor, name: str, start: int = 0) -> None:
        """Fill a 1-D tensor, on any device, with elements start .. start+len(out) of a flattened tensor."""
        stop = start + len(out)
        for file, piece_start, piece_numel in self.manifest.tensors[name]["pieces"]:
            first, last = max(start, piece_start), min(stop, piece_start + piece_numel)
            if first < last:
                with self._file(file) as handle:
                    part = handle.get_slice(name)[first - piece_start : last - piece_start]
                    out[first - start : last - start].copy_(part)

    def read_full(self, name: str) -> torch.Tensor:
        """Return the whole tensor; mapped from the file, if it is stored there in one piece."""
        pieces = self.manifest.tensors[name]["pieces"]
        if len(pieces) > 1:
            return self.read(name).reshape(self.shape(name))
        with self._file(pieces[0][0]) as handle:
            return handle.get_tensor(name).reshape(self.shape(name))

    @contextmanager
    def _file(self, name: str) -> Iterator[safe_open]:
        path = self.folder / name
        try:
            if name not in self._open:
                self._open[name] = self._retried(path, partial(_map, path))
            yield self._open[name]
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None

    def _retried(self, path: Path, read: Callable[[], T]) -> T:
        try:
            return retried(path, read, self.retry_s, folder_known=True)
        except Missing:
            raise _damaged(path, "missing") from None


def load_full_weights(folder: str | Path, retry_s: float = 0.0, ema: bool = False) -> dict[str, torch.Tensor]:
    """Return the dual encoder's parameters (fp32) and buffers, whole, by their names in the module.

    Args:
        ema: take the moving average of those that have one.

    Raises:
        UserError: there is no average, and `ema` asks for it; or see CheckpointReader.

    Those stored in one piece are mapped from the files, whose disk space stays taken as long as the tensors live.
    """
    reader = CheckpointReader(folder, retry_s)
    if ema and not reader.names(EMA):
        raise UserError(f"{folder}: holds no moving average of the weights (--ema): it was saved without train.ema")
    weights = {}
    for prefix in ("param/", "buffer/", *([EMA] if ema else [])):
        for name in reader.names(prefix):
            weights[name.removeprefix(prefix)] = reader.read_full(name)
    return weights


def _map(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # raised by torch where the system refuses
        raise OSError(str(error)) from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(path: Path, damage: str) -> UserError:
    return UserError(f"{path}: {damage}; resume from another checkpoint (train.resume=FOLDER)")
