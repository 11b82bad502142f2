"""Write a checkpoint: every rank its part, then rank 0 the manifest that joins the parts.

The ranks meet through the file system. A save that fails leaves complete checkpoints as they are, and what it wrote is
removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipdist.checkpoint.format import (
    CHUNK_BYTES,
    MANIFEST,
    Manifest,
    Piece,
    checkpoint_dir,
    encode_manifest,
    read_manifest,
)
from clipdist.checkpoint.retention import RetentionPolicy, prune, remove_leftovers
from clipdist.errors import UserError
from clipdist.storage import sync, write_text

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
OTHERS_S = 60.0  # rank 0 waits for the others so long at least, beyond retry_s
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


class SaveFailed(Exception):
    """A checkpoint was not written; the text says why."""


class PartMissing(Exception):
    """A rank's part of a checkpoint did not come in time, or that rank gave up."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Write the checkpoints of one run, one at a time.

    Attributes:
        retry_s: how long to retry what the storage refuses.
        hurry: while it is set nothing is retried.
    """

    run_dir: Path
    keep: RetentionPolicy
    rank: int
    retry_s: float
    hurry: threading.Event = field(default_factory=threading.Event)

    def write(self, pieces: list[Piece], manifest: Manifest, attempt: str) -> None:
        """Write this rank's part; on rank 0 also wait for the others', complete the checkpoint and prune older ones.

        Args:
            pieces: on the CPU.
            attempt: see `write_part`.

        Raises:
            SaveFailed: on rank 0 if any rank failed; on another rank if its own part was not written.
        """
        folder = checkpoint_dir(self.run_dir, manifest.step)
        began = time.monotonic()
        try:
            self._retry(lambda: write_part(folder, self.rank, pieces, attempt), folder)
            if self.rank == 0:
                wait_s = self.retry_s + max(OTHERS_S, 10 * (time.monotonic() - began))
                self._retry(lambda: write_manifest(folder, manifest, attempt, wait_s), folder)
        except (OSError, PartMissing, ValueError) as error:
            reason = str(error)
            abandon_part(folder, self.rank, attempt, reason)
            if self.rank == 0:
                _discard(folder)
            raise SaveFailed(reason) from error
        if self.rank == 0:
            with suppress(OSError):  # the checkpoint is good; what should have gone goes with the next one
                prune(self.run_dir, self.keep, folder)

    def _retry(self, work: Callable[[], object], folder: Path) -> None:
        pause_s, deadline = FIRST_PAUSE_S, time.monotonic() + self.retry_s
        while True:
            try:
                # Where a mount is gone, its empty folder may still take files: they would fill another disk.
                if not self.run_dir.is_dir():
                    raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(self.run_dir))
                work()
                return
            except OSError as error:
                if error.errno in DISK_FULL and remove_leftovers(self.run_dir, folder):
                    continue
                if time.monotonic() + pause_s > deadline or self.hurry.wait(pause_s):
                    raise
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def write_part(folder: Path, rank: int, pieces: Iterable[Piece], attempt: str) -> None:
    """Write a rank's pieces, which are on the CPU, and a note that describes them.

    Args:
        folder: as checkpoint_dir names it; made if it is missing.
        attempt: token of this save among all of the run, so that no stale note is taken; fit for a file's name.

    Raises:
        OSError: the storage refuses. The call may be repeated.
    """
    for path in (folder.parent, folder):
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync(path.parent)
    pieces = list(pieces)
    file = _part_file(folder, rank, attempt)
    size, digest = _write_safetensors(file, pieces)
    note = {
        "attempt": attempt,
        "file": file.name,
        "bytes": size,
        "sha256": digest,
        "pieces": {
            piece.name: [list(piece.shape), str(piece.data.dtype).removeprefix("torch."), piece.start, len(piece.data)]
            for piece in pieces
        },
    }
    write_text(_note_path(folder, rank), json.dumps(note), durable=True)  # syncs the data file's entry, too


def abandon_part(folder: Path, rank: int, attempt: str, reason: str) -> None:
    """Remove what a rank wrote in a save that failed, and leave a note, so that rank 0 need not wait for it."""
    with suppress(OSError):
        _part_file(folder, rank, attempt).unlink()  # first: on a full disk it makes room for the note
    with suppress(OSError):
        write_text(_note_path(folder, rank), json.dumps({"attempt": attempt, "failed": reason}), durable=True)


def write_manifest(folder: Path, manifest: Manifest, attempt: str, timeout_s: float = 600) -> Path:
    """Wait for all parts of this attempt, rename the manifest into place and remove what it does not name.

    Raises:
        PartMissing: a rank's part did not come, or it gave up.
        ValueError: the parts leave a hole in a tensor.
        OSError: the storage refuses. The call may be repeated.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for note in _wait_for_notes(folder, manifest.world, attempt, time.monotonic() + timeout_s):
        files[note["file"]] = {"bytes": note["bytes"], "sha256": note["sha256"]}
        for name, (shape, dtype, start, numel) in note["pieces"].items():
            entry = tensors.setdefault(name, {"shape": shape, "dtype": dtype, "pieces": []})
            entry["pieces"].append([note["file"], start, numel])
    for name, entry in tensors.items():
        if sum(numel for _, _, numel in entry["pieces"]) != math.prod(entry["shape"]):
            raise ValueError(f"{folder}: the ranks' pieces do not make up {name} of shape {entry['shape']}")
    path = folder / MANIFEST
    write_text(path, encode_manifest(manifest, tensors, files), durable=True)
    _remove_unnamed(folder, files)
    return path


def _discard(folder: Path) -> None:
    """Remove what a failed save left; a checkpoint that was complete before stays as it was."""
    if (folder / MANIFEST).exists():
        with suppress(OSError, UserError):
            _remove_unnamed(folder, read_manifest(folder).files)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unnamed(folder: Path, files: Container[str]) -> None:
    """Remove all but the manifest and its files: notes, parts of an earlier save or of one that failed."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if path.name != MANIFEST and path.name not in files:
                path.unlink()


def _part_file(folder: Path, rank: int, attempt: str) -> Path:
    """Return the file of a rank's part; in a complete checkpoint a new name, since that one must stay good.

    While this attempt has parts to write no manifest of it can exist: an existing one is an earlier attempt's.
    """
    again = f"-{attempt}" if (folder / MANIFEST).exists() else ""
    return folder / f"rank-{rank:05d}{again}.safetensors"


def _write_safetensors(path: Path, pieces: list[Piece]) -> tuple[int, str]:
    """Write and sync a file of the safetensors format, without a copy of the data. Return its bytes and SHA-256."""
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
        for data in (memoryview(head), *(piece.data.view(torch.uint8).numpy().data for piece in pieces)):
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + end, digest.hexdigest()


def _note_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _wait_for_notes(folder: Path, world: int, attempt: str, deadline: float) -> list[dict[str, Any]]:
    """Return all ranks' notes of this attempt, by rank.

    One listing serves all ranks that are waited for. It is needed: NFS remembers for a while that a file was missing,
    unless its folder is listed.
    """
    notes: dict[int, dict[str, Any]] = {}
    while True:
        with suppress(OSError):  # the folder does not exist yet, or the storage is unavailable
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
    """Return {rank: its note}; empty if it is another attempt's, or cannot be read now."""
    with suppress(OSError, ValueError, KeyError):
        note = json.loads(_note_path(folder, rank).read_text())
        if note["attempt"] == attempt:
            if "failed" in note:
                raise PartMissing(f"rank {rank}: {note['failed']}")
            return {rank: note}
    return {}
