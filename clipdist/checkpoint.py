"""The checkpoint's format: fragments of flat fp32 tensors in, a folder out; the folder in, any slice of any tensor out.

    checkpoints/step-00001200/
        rank-00000.safetensors ...   what each rank held: pieces of parameters, moments, buffers, random states
        manifest.json                written last: a folder without it is not a checkpoint

The manifest maps a tensor to its shape and [(file, start, numel)], start counting elements of the flattened tensor; so
any number of ranks, of any ZeRO stage, reads what it needs. Files carry SHA-256 sums. No pickle, no deepspeed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clipdist.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Piece:
    """A run of elements of a flattened tensor. `data` is 1-D, on the CPU; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `tensors`: name -> {"shape", "dtype", "pieces": [[file, start, numel], ...]}.
    """

    step: int  # optimiser steps that were tried: the data position of the next one
    optimizer_step: int  # steps that changed the weights (fp16 skips some)
    samples: int
    world: int
    config: dict[str, Any]
    order: dict[str, Any]
    state: dict[str, Any]  # small plain values: loss scaler, finished, ...
    skipped: list[list[int]] = field(default_factory=list)  # ranges of data steps that were left out
    tensors: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # name -> {"bytes", "sha256"}
    version: int = FORMAT_VERSION


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = Path(run_dir).glob(f"checkpoints/step-*/{MANIFEST}")
    return sorted((path.parent for path in found), key=lambda folder: folder.name)


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    folders = list_checkpoints(run_dir)
    return folders[-1] if folders else None


def read_manifest(folder: str | Path) -> Manifest:
    """Reads manifest.json.

    Raises:
        UserError: missing, damaged, or of another format version.
    """
    path = Path(folder) / MANIFEST
    try:
        record = json.loads(path.read_text())
        if record.get("version") != FORMAT_VERSION:
            raise UserError(f"{path}: format version {record.get('version')}, this program reads {FORMAT_VERSION}")
        return Manifest(**record)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint (no {MANIFEST})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); take an older checkpoint") from None


# Writing: every rank writes its part, then rank 0 joins the parts into the manifest.


def write_part(folder: Path, rank: int, pieces: Iterable[Piece], attempt: str) -> None:
    """Writes rank's pieces and a note of what they are. `attempt` marks the run, so that no stale note is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank-{rank:05d}.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    note: dict[str, Any] = {}
    for piece in pieces:
        tensors[piece.name] = piece.data
        note[piece.name] = [list(piece.shape), str(piece.data.dtype).removeprefix("torch."), piece.start]
    save_file(tensors, file)
    record = {
        "attempt": attempt,
        "bytes": file.stat().st_size,
        "sha256": _sha256(file),
        "pieces": {name: [*about, tensors[name].numel()] for name, about in note.items()},
    }
    _sync(file)
    _write_synced(_note_path(folder, rank), json.dumps(record))


def write_manifest(folder: Path, manifest: Manifest, attempt: str, timeout_s: float = 600) -> Path:
    """Waits for all parts of this attempt, checks their sizes, and renames the manifest into place.

    Raises:
        TimeoutError: a rank's part did not come.
        ValueError: the parts leave a hole in a tensor.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    deadline = time.monotonic() + timeout_s
    for rank in range(manifest.world):
        note = _wait_for_note(_note_path(folder, rank), attempt, deadline)
        file = f"rank-{rank:05d}.safetensors"
        files[file] = {"bytes": note["bytes"], "sha256": note["sha256"]}
        for name, (shape, dtype, start, numel) in note["pieces"].items():
            entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([file, start, numel])
    for name, entry in tensors.items():
        if sum(numel for _, _, numel in entry["pieces"]) != math.prod(entry["shape"]):
            raise ValueError(f"{folder}: the ranks' pieces do not make up {name} of shape {entry['shape']}")
    record = asdict(manifest) | {"tensors": tensors, "files": files}
    path = folder / MANIFEST
    _write_synced(path, json.dumps(record))
    for rank in range(manifest.world):
        _note_path(folder, rank).unlink(missing_ok=True)
    return path


def prune(run_dir: Path, keep: int) -> None:
    """Leaves the newest `keep` checkpoints; removes older ones and what interrupted writers left beside them.

    A run never writes a checkpoint that is older than one in its folder (clipdist.plan sees to it).
    """
    complete = list_checkpoints(run_dir)
    if not complete:
        return
    keepers = {folder.name for folder in complete[-keep:]}
    for folder in sorted(run_dir.glob("checkpoints/step-*")):
        if folder.name < complete[-1].name and folder.name not in keepers:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-removed folder must not look complete
            shutil.rmtree(folder, ignore_errors=True)


# Reading


class CheckpointReader:
    """Reads slices of the tensors of one checkpoint folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._open: dict[str, safe_open] = {}  # opening a file reads its whole table of tensors

    def verify(self) -> None:
        """Compares sizes and SHA-256 sums of all files.

        Raises:
            UserError: a file is missing or damaged.
        """
        for name, about in self.manifest.files.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != about["bytes"] or _sha256(path) != about["sha256"]:
                raise UserError(f"{path}: missing or damaged; resume from another checkpoint (train.resume=FOLDER)")

    def names(self, prefix: str = "") -> list[str]:
        return [name for name in self.manifest.tensors if name.startswith(prefix)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest.tensors[name]["shape"])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
        """Elements start .. start+numel of a flattened tensor, as they were stored (1-D).

        Raises:
            UserError: a file is missing or damaged.
        """
        entry = self.manifest.tensors[name]
        total = math.prod(entry["shape"])
        stop = total if numel is None else start + numel
        out = torch.empty(stop - start, dtype=getattr(torch, entry["dtype"]))
        for file, piece_start, piece_numel in entry["pieces"]:
            first, last = max(start, piece_start), min(stop, piece_start + piece_numel)
            if first < last:
                with self._file(file) as handle:
                    out[first - start : last - start] = handle.get_slice(name)[first - piece_start : last - piece_start]
        return out

    def read_full(self, name: str) -> torch.Tensor:
        """The whole tensor; mapped from the file, where it lies there in one piece."""
        pieces = self.manifest.tensors[name]["pieces"]
        if len(pieces) > 1:
            return self.read(name).reshape(self.shape(name))
        with self._file(pieces[0][0]) as handle:
            return handle.get_tensor(name).reshape(self.shape(name))

    @contextmanager
    def _file(self, name: str) -> Iterator[safe_open]:
        try:
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt")
            yield self._open[name]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / name}: cannot be read ({error})") from None


def load_full_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The dual encoder's parameters (fp32) and buffers, whole, by their names in the module."""
    reader = CheckpointReader(folder)
    weights = {}
    for prefix in ("param/", "buffer/"):
        for name in reader.names(prefix):
            weights[name.removeprefix(prefix)] = reader.read_full(name)
    return weights


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _wait_for_note(path: Path, attempt: str, deadline: float) -> dict[str, Any]:
    while True:
        try:
            record = json.loads(path.read_text())
            if record["attempt"] == attempt:
                return record
        except (OSError, ValueError, KeyError):
            pass  # not there yet
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path}: this rank's part of the checkpoint did not come")
        time.sleep(0.01)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
