"""The checkpoint's format: fragments of flat fp32 tensors in, a folder out; the folder in, any slice of any tensor out.

    checkpoints/step-00001200/
        rank-00000.safetensors ...   what each rank held: pieces of parameters, moments, buffers, random states
        manifest.json                written last: a folder without it is not a checkpoint

The manifest maps a tensor to its shape and [(file, start, numel)], start counting elements of the flattened tensor; so
any number of ranks, of any ZeRO stage, reads what it needs. Files carry SHA-256 sums, and the manifest one of its own.
No pickle, no deepspeed.

Why a kill at any instant harms nothing: data, notes and folders are synced before the manifest, which is renamed into
place; and a step that is saved again goes to files of other names, until a new manifest names those.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from clipdist.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # the manifest's own; one that was written before there were any has none
CHUNK_BYTES = 4 << 20
POLL_S = 0.01
_DTYPES = {  # the names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class PartMissing(Exception):
    """A rank's part of a checkpoint did not come in time, or that rank gave up."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of a flattened tensor. `data` is 1-D and contiguous; `shape` is the whole tensor's."""

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
        stated = record.pop(CHECKSUM, None)
        if stated is not None and stated != _checksum(record):
            raise UserError(f"{path}: damaged, its checksum does not fit what it says; take an older checkpoint")
        return Manifest(**record)
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint (no {MANIFEST})") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); take an older checkpoint") from None


def _checksum(record: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says; of the values, not of how they are laid out in the file."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# Writing: every rank writes its part, then rank 0 joins the parts into the manifest.


def write_part(folder: Path, rank: int, pieces: Iterable[Piece], attempt: str) -> None:
    """Writes rank's pieces, on the CPU, and a note of what they are.

    Args:
        folder: as checkpoint_dir names it; made where it is missing.
        attempt: marks this save among all of the run, so that no stale note is taken; fit for a file's name.

    Raises:
        OSError: the storage refuses. The call may be repeated.
    """
    _make_folder(folder)
    pieces = list(pieces)
    file = _part_file(folder, rank, attempt)
    size, digest = _write_safetensors(file, pieces)
    record = {
        "attempt": attempt,
        "file": file.name,
        "bytes": size,
        "sha256": digest,
        "pieces": {
            piece.name: [list(piece.shape), str(piece.data.dtype).removeprefix("torch."), piece.start, len(piece.data)]
            for piece in pieces
        },
    }
    _write_synced(_note_path(folder, rank), json.dumps(record))  # syncs the folder: the entry of the data file, too


def abandon_part(folder: Path, rank: int, attempt: str, reason: str) -> None:
    """Removes what rank wrote in a save that failed, and leaves a note, so that rank 0 need not wait for it."""
    with suppress(OSError):
        _part_file(folder, rank, attempt).unlink()  # first: on a full disk it makes room for the note
    with suppress(OSError):
        _write_synced(_note_path(folder, rank), json.dumps({"attempt": attempt, "failed": reason}))


def write_manifest(folder: Path, manifest: Manifest, attempt: str, timeout_s: float = 600) -> Path:
    """Waits for all parts of this attempt, renames the manifest into place and removes what it does not name.

    Raises:
        PartMissing: a rank's part did not come, or it gave up.
        ValueError: the parts leave a hole in a tensor.
        OSError: the storage refuses. The call may be repeated.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    deadline = time.monotonic() + timeout_s
    for rank in range(manifest.world):
        note = _wait_for_note(folder, rank, attempt, deadline)
        files[note["file"]] = {"bytes": note["bytes"], "sha256": note["sha256"]}
        for name, (shape, dtype, start, numel) in note["pieces"].items():
            entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([note["file"], start, numel])
    for name, entry in tensors.items():
        if sum(numel for _, _, numel in entry["pieces"]) != math.prod(entry["shape"]):
            raise ValueError(f"{folder}: the ranks' pieces do not make up {name} of shape {entry['shape']}")
    record = asdict(manifest) | {"tensors": tensors, "files": files}
    record = json.loads(json.dumps(record))  # as it will be read: a tuple is a list there
    path = folder / MANIFEST
    _write_synced(path, json.dumps(record | {CHECKSUM: _checksum(record)}))
    remove_strangers(folder)
    return path


def remove_strangers(folder: Path) -> None:
    """Removes what a checkpoint's manifest does not name: notes, parts of an earlier save or of one that failed."""
    with suppress(OSError, UserError):
        named = {MANIFEST, *read_manifest(folder).files}
        for path in list(folder.iterdir()):
            if path.name not in named:
                path.unlink()


def _make_folder(folder: Path) -> None:
    for path in (folder.parent, folder):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync(path.parent)


def _part_file(folder: Path, rank: int, attempt: str) -> Path:
    """Where rank's part goes. In a complete checkpoint to a name of its own: that one is good until the new one is.

    While this attempt has parts to write no manifest of it can exist: one that lies there is an earlier attempt's.
    """
    again = f"-{attempt}" if (folder / MANIFEST).exists() else ""
    return folder / f"rank-{rank:05d}{again}.safetensors"


def _write_safetensors(path: Path, pieces: list[Piece]) -> tuple[int, str]:
    """Writes and syncs a file of the safetensors format, with no copy of the data. Returns its bytes and SHA-256."""
    pieces = sorted(pieces, key=lambda piece: -piece.data.itemsize)  # so that each begins at a multiple of its size
    header: dict[str, Any] = {}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.data.numel() * piece.data.itemsize
        header[piece.name] = {
            "dtype": _DTYPES[piece.data.dtype],
            "shape": [piece.data.numel()],
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for data in (memoryview(head), *(_bytes_of(piece.data) for piece in pieces)):
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + end, digest.hexdigest()


def _bytes_of(data: torch.Tensor) -> memoryview:
    return data.view(torch.uint8).numpy().data


# Reading


class CheckpointReader:
    """Reads slices of the tensors of one checkpoint folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._open: dict[str, safe_open] = {}  # opening a file reads its whole table of tensors

    def check_sizes(self) -> None:
        """A quick look: every file is there, and as long as it was.

        Raises:
            UserError: names the file, and what is wrong with it.
        """
        for name, about in self.manifest.files.items():
            path = self.folder / name
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _damaged(path, f"missing or not readable ({error.strerror})") from None
            if size != about["bytes"]:
                raise _damaged(path, f"{size} bytes instead of {about['bytes']}")

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Compares the sizes of all files, and the SHA-256 sums of files rank, rank + world, ...

        Each of `world` ranks so reads its part, and a checkpoint is good where none of them raises.

        Raises:
            UserError: names the file, and what is wrong with it.
        """
        self.check_sizes()
        for name, about in list(self.manifest.files.items())[rank::world]:
            path = self.folder / name
            try:
                same = _sha256(path) == about["sha256"]
            except OSError as error:
                raise _damaged(path, f"cannot be read ({error.strerror})") from None
            if not same:
                raise _damaged(path, "its content does not fit its SHA-256")

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
        numel = math.prod(entry["shape"]) - start if numel is None else numel
        out = torch.empty(numel, dtype=getattr(torch, entry["dtype"]))
        self.read_into(out, name, start)
        return out

    def read_into(self, out: torch.Tensor, name: str, start: int = 0) -> None:
        """Fills a 1-D tensor, of any device, with the elements start .. start+len(out) of a flattened tensor.

        Raises:
            UserError: a file is missing or damaged.
        """
        stop = start + len(out)
        for file, piece_start, piece_numel in self.manifest.tensors[name]["pieces"]:
            first, last = max(start, piece_start), min(stop, piece_start + piece_numel)
            if first < last:
                with self._file(file) as handle:
                    part = handle.get_slice(name)[first - piece_start : last - piece_start]
                    out[first - start : last - start].copy_(part)

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


def _damaged(path: Path, damage: str) -> UserError:
    return UserError(f"{path}: {damage}; resume from another checkpoint (train.resume=FOLDER)")


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _wait_for_note(folder: Path, rank: int, attempt: str, deadline: float) -> dict[str, Any]:
    path = _note_path(folder, rank)
    while True:
        with suppress(OSError, ValueError, KeyError):  # not there yet, or the storage is away
            os.listdir(folder)  # NFS remembers for a while that a file was missing, unless its folder is listed
            record = json.loads(path.read_text())
            if record["attempt"] == attempt:
                if "failed" in record:
                    raise PartMissing(f"rank {rank}: {record['failed']}")
                return record
        if time.monotonic() > deadline:
            raise PartMissing(f"{path}: this rank's part of the checkpoint did not come")
        time.sleep(POLL_S)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Has the storage keep a file's content, or a folder's entries, before anything that comes after."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
