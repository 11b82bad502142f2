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
import re
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from clipdist.errors import Fault, UserError
from clipdist.storage import Retry, reason

T = TypeVar("T")
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # the manifest's own; one that was written before there were any has none
CHUNK_BYTES = 4 << 20
POLL_S = 0.01
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
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


class _Missing(Exception):
    """A file that is not there, while the storage is."""


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


def step_of(folder: Path) -> int | None:
    """The step that a folder's name says; None where it is no name of a checkpoint: a copy, a note, what users add."""
    named = _STEP_NAME.fullmatch(folder.name)
    return int(named[1]) if named else None


def step_folders(run_dir: str | Path, prefix: str = "") -> list[Path]:
    """Folders of a run's checkpoints, complete or not, oldest first; or those with a prefix before such a name.

    Raises:
        OSError: the storage refuses. A folder that is missing holds none.
    """
    try:
        names = os.listdir(Path(run_dir) / "checkpoints")
    except _NO_SUCH_FILE:
        return []
    steps = {name: step_of(Path(name.removeprefix(prefix))) for name in names if name.startswith(prefix)}
    found = sorted((step, name) for name, step in steps.items() if step is not None)
    return [Path(run_dir) / "checkpoints" / name for _, name in found]


def complete_folders(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first.

    Raises:
        OSError: the storage refuses: whether there are any is not known.
    """
    return [folder for folder in step_folders(run_dir) if _is_complete(folder)]


def _is_complete(folder: Path) -> bool:
    try:
        os.stat(folder / MANIFEST)  # not Path.exists, which in some versions takes any refusal for absence
    except _NO_SUCH_FILE:
        return False
    return True


def list_checkpoints(run_dir: str | Path, retry_s: float = 0.0) -> list[Path]:
    """complete_folders, with patience.

    Raises:
        Fault: the storage refuses, for longer than retry_s.
    """
    return _outlast(Path(run_dir) / "checkpoints", partial(complete_folders, run_dir), retry_s)


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    folders = list_checkpoints(run_dir)
    return folders[-1] if folders else None


def read_manifest(folder: str | Path, retry_s: float = 0.0) -> Manifest:
    """Reads manifest.json.

    Args:
        retry_s: what the storage refuses is tried again for so long.

    Raises:
        UserError: missing, damaged, or of another format version.
        Fault: the storage refuses.
    """
    path = Path(folder) / MANIFEST
    try:
        record = json.loads(_outlast(path, partial(_present, path, path.read_bytes), retry_s))
        if record.get("version") != FORMAT_VERSION:
            raise UserError(f"{path}: format version {record.get('version')}, this program reads {FORMAT_VERSION}")
        stated = record.pop(CHECKSUM, None)
        if stated is not None and stated != _checksum(record):
            raise UserError(f"{path}: damaged, its checksum does not fit what it says; take an older checkpoint")
        return Manifest(**record)
    except _Missing:
        raise UserError(f"{folder}: not a checkpoint (no {MANIFEST})") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); take an older checkpoint") from None


def _present(path: Path, read: Callable[[], T], sure: bool = False) -> T:
    """What `read` gives of a file.

    Args:
        sure: the file's folder was there a moment ago: where it is not, the storage is away.

    Raises:
        _Missing: there is no such file.
        OSError: the storage refuses, which says nothing against the file.
    """
    try:
        return read()
    except _NO_SUCH_FILE:
        with suppress(*(() if sure else _NO_SUCH_FILE)):
            os.listdir(path.parent)
        raise _Missing from None


def _outlast(path: Path, read: Callable[[], T], retry_s: float) -> T:
    """What `read` gives, as soon as it raises no OSError.

    Raises:
        Fault: it did so for longer than retry_s.
    """
    try:
        return read()
    except OSError as error:
        if not retry_s:
            raise Fault(f"{path}: cannot be read ({reason(str(path), error)})") from None
        return Retry(retry_s).until_success(str(path), error, read)


def _checksum(record: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says; of the values, not of how they are laid out in the file."""
    return _digest(_encode(record))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
    return digest.hexdigest()


def _encode(value: Any, depth: int = 2) -> Iterator[str]:
    """What json.dumps(value, sort_keys=True) gives, in parts.

    A call of the encoder holds the interpreter's lock, and with it the training loop: for seconds, if it were one call
    for all pieces of a thousand ranks.
    """
    if not depth or not isinstance(value, dict):
        yield json.dumps(value, sort_keys=True)
        return
    for number, key in enumerate(sorted(value)):
        yield f"{', ' if number else '{'}{json.dumps(key)}: "
        yield from _encode(value[key], depth - 1)
    yield "}" if value else "{}"


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
    for note in _wait_for_notes(folder, manifest.world, attempt, deadline):
        files[note["file"]] = {"bytes": note["bytes"], "sha256": note["sha256"]}
        for name, (shape, dtype, start, numel) in note["pieces"].items():
            entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([note["file"], start, numel])
    for name, entry in tensors.items():
        if sum(numel for _, _, numel in entry["pieces"]) != math.prod(entry["shape"]):
            raise ValueError(f"{folder}: the ranks' pieces do not make up {name} of shape {entry['shape']}")
    small = json.loads(json.dumps(asdict(manifest)))  # as it will be read: a tuple is a list there
    text = "".join(_encode(small | {"tensors": tensors, "files": files}))
    path = folder / MANIFEST
    _write_synced(path, f'{text[:-1]}, "{CHECKSUM}": "{_digest([text])}"}}')
    _remove_strangers(folder, files)
    return path


def remove_strangers(folder: Path) -> None:
    """Removes what a checkpoint's manifest does not name: notes, parts of an earlier save or of one that failed."""
    with suppress(OSError, UserError):
        _remove_strangers(folder, read_manifest(folder).files)


def _remove_strangers(folder: Path, files: Container[str]) -> None:
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name != MANIFEST and path.name not in files:
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
    """Reads slices of the tensors of one checkpoint folder.

    Args:
        retry_s: what the storage refuses is tried again for so long, file by file.

    Raises:
        UserError: no checkpoint, or its manifest is damaged.
        Fault: the storage refuses. This holds for every method that reads.
    """

    def __init__(self, folder: str | Path, retry_s: float = 0.0) -> None:
        self.folder = Path(folder)
        self.retry_s = retry_s
        self.manifest = read_manifest(self.folder, retry_s)
        self._open: dict[str, safe_open] = {}  # opening a file reads its whole table of tensors

    def close(self) -> None:
        """Gives the files back, so that a checkpoint that is removed frees its room. Another read opens them again.

        What read_full returned keeps its file mapped as long as it lives.
        """
        self._open.clear()

    def check_sizes(self) -> None:
        """A quick look: every file is there, and as long as it was.

        Raises:
            UserError: names the file, and what is wrong with it.
        """
        for name, about in self.manifest.files.items():
            path = self.folder / name
            size = self._outlast(path, partial(os.stat, path)).st_size
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
            if self._outlast(path, partial(_sha256, path)) != about["sha256"]:
                raise _damaged(path, "its content does not fit its SHA-256")

    def _outlast(self, path: Path, read: Callable[[], T]) -> T:
        try:
            return _outlast(path, partial(_present, path, read, sure=True), self.retry_s)
        except _Missing:
            raise _damaged(path, "missing") from None

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
        path = self.folder / name
        try:
            if name not in self._open:
                self._open[name] = self._outlast(path, partial(_map, path))
            yield self._open[name]
        except SafetensorError as error:
            raise UserError(f"{path}: cannot be read ({error})") from None


def _map(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:  # torch's word for what the system refuses
        raise OSError(str(error)) from None


def load_full_weights(folder: str | Path, retry_s: float = 0.0) -> dict[str, torch.Tensor]:
    """The dual encoder's parameters (fp32) and buffers, whole, by their names in the module.

    Where they lie in one piece they are mapped from the files, which take up room as long as the tensors live.
    """
    reader = CheckpointReader(folder, retry_s)
    weights = {}
    for prefix in ("param/", "buffer/"):
        for name in reader.names(prefix):
            weights[name.removeprefix(prefix)] = reader.read_full(name)
    return weights


def _damaged(path: Path, damage: str) -> UserError:
    return UserError(f"{path}: {damage}; resume from another checkpoint (train.resume=FOLDER)")


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _wait_for_notes(folder: Path, world: int, attempt: str, deadline: float) -> list[dict[str, Any]]:
    """All ranks' notes of this attempt, by rank.

    One listing serves all ranks that are waited for. It is needed: NFS remembers for a while that a file was missing,
    unless its folder is listed.
    """
    notes: dict[int, dict[str, Any]] = {}
    while True:
        with suppress(OSError):  # the folder is not there yet, or the storage is away
            listed = set(os.listdir(folder))
            for rank in range(world):
                if rank not in notes and _note_path(folder, rank).name in listed:
                    notes |= _note_of(folder, rank, attempt)
        if len(notes) == world:
            return [notes[rank] for rank in range(world)]
        if time.monotonic() > deadline:
            missing = next(rank for rank in range(world) if rank not in notes)
            raise PartMissing(f"{_note_path(folder, missing)}: this rank's part of the checkpoint did not come")
        time.sleep(POLL_S)


def _note_of(folder: Path, rank: int, attempt: str) -> dict[int, dict[str, Any]]:
    """{rank: its note}; empty where that is of another attempt, or cannot be read now."""
    with suppress(OSError, ValueError, KeyError):
        record = json.loads(_note_path(folder, rank).read_text())
        if record["attempt"] == attempt:
            if "failed" in record:
                raise PartMissing(f"rank {rank}: {record['failed']}")
            return {rank: record}
    return {}


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
