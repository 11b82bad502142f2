"""The checkpoint's format: names, the manifest, and which folders are checkpoints. No torch.

    checkpoints/step-00001200/
        rank-00000.safetensors ...   fragments of flat fp32 tensors: parameters, moments, buffers
        manifest.json                written last: a folder without it is not a checkpoint

The manifest maps a tensor to its shape and [(file, start, numel)], start counting elements of the flattened tensor; so
any number of ranks, of any ZeRO stage, reads what it needs. Files carry SHA-256 sums, and the manifest one of its own.
No pickle, no deepspeed.

A kill at any instant harms no checkpoint: data, notes and folders are synced before the manifest, which is renamed into
place; and a step that is saved again goes to files of other names, until a new manifest names those.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clipdist.errors import Fault, UserError
from clipdist.storage import Retry, reason

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CHECKSUM = "checksum"  # the manifest's own; manifests of earlier releases have none
STATE = "state/"  # of the objectives' own tensors, such as a queue
EMA = "ema/"  # what the names of averages begin with, as those of weights with "param/" or "buffer/"
CHUNK_BYTES = 4 << 20  # written, read and hashed at one time
_STEP_NAME = re.compile(r"step-([0-9]{8,})")
_NO_SUCH_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Missing(Exception):
    """A file does not exist, and the storage is available."""


@dataclass(frozen=True)
class Piece:
    """A run of elements of a flattened tensor. `data` is 1-D and contiguous; `shape` is the whole tensor's."""

    name: str
    shape: tuple[int, ...]
    start: int
    data: torch.Tensor


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

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


def run_folder(folder: Path) -> Path:
    """Return the run folder that a path names: itself, or RUN of RUN/checkpoints."""
    inside = folder.resolve()
    return inside.parent if inside.name == "checkpoints" and not (inside / "checkpoints").is_dir() else folder


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for any other name, such as a copy that a user made."""
    named = _STEP_NAME.fullmatch(folder.name)
    return int(named[1]) if named else None


def step_folders(run_dir: str | Path, prefix: str = "") -> list[Path]:
    """List the checkpoint folders of a run, complete or not, oldest first.

    Args:
        prefix: list those whose names have this prefix before the usual name instead.

    Raises:
        OSError: the storage refuses. A run folder that does not exist has none.
    """
    try:
        names = os.listdir(Path(run_dir) / "checkpoints")
    except _NO_SUCH_FILE:
        return []
    steps = {name: step_of(Path(name.removeprefix(prefix))) for name in names if name.startswith(prefix)}
    found = sorted((step, name) for name, step in steps.items() if step is not None)
    return [Path(run_dir) / "checkpoints" / name for _, name in found]


def complete_folders(run_dir: str | Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first.

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


def checkpoint_of(folder: Path, step: int | None = None) -> Path:
    """Return the checkpoint that a folder (a run, its checkpoints/, a checkpoint) and a step name; None: the newest.

    Raises:
        UserError: there is none, or none of that step.
    """
    found = [folder] if (folder / MANIFEST).is_file() else list_checkpoints(run_folder(folder))
    if not found and any(folder.glob("*.tar")):
        raise UserError(f"{folder}: holds shards, not a run or model")
    if not found:
        raise UserError(f"{folder}: no complete checkpoint in it; is this a run folder, and has it saved yet?")
    if step is None:
        return found[-1]
    steps = {read_manifest(checkpoint).step: checkpoint for checkpoint in found}
    if step not in steps:
        raise UserError(f"{folder}: no checkpoint of step {step}; it has {', '.join(map(str, sorted(steps)))}")
    return steps[step]


def list_checkpoints(run_dir: str | Path, retry_s: float = 0.0) -> list[Path]:
    """List the complete checkpoints of a run, oldest first; retry for `retry_s` seconds.

    Raises:
        Fault: the storage refuses.
    """
    return retried(Path(run_dir) / "checkpoints", partial(complete_folders, run_dir), retry_s)


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    folders = list_checkpoints(run_dir)
    return folders[-1] if folders else None


def read_manifest(folder: str | Path, retry_s: float = 0.0) -> Manifest:
    """Read manifest.json; retry for `retry_s` seconds.

    Raises:
        UserError: missing, damaged, or of another format version.
        Fault: the storage refuses.
    """
    path = Path(folder) / MANIFEST
    try:
        record = json.loads(retried(path, path.read_bytes, retry_s))
        if record.get("version") != FORMAT_VERSION:
            raise UserError(f"{path}: format version {record.get('version')}, this program reads {FORMAT_VERSION}")
        stated = record.pop(CHECKSUM, None)
        if stated is not None and stated != _checksum(_encode(record)):
            raise UserError(f"{path}: damaged, its checksum does not fit what it says; take an older checkpoint")
        return Manifest(**record)
    except Missing:
        newest = newest_checkpoint(run_folder(Path(folder)))
        hint = f"; the newest of this run is {newest}" if newest else ""
        raise UserError(f"{folder}: not a checkpoint (no {MANIFEST}){hint}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read as a manifest ({error}); take an older checkpoint") from None


def encode_manifest(manifest: Manifest, tensors: dict[str, Any], files: dict[str, Any]) -> str:
    """Return the text of manifest.json with these `tensors` and `files`, and with its checksum."""
    record = json.loads(json.dumps(asdict(manifest))) | {"tensors": tensors, "files": files}  # tuples become lists
    text = "".join(_encode(record))
    return f'{text[:-1]}, "{CHECKSUM}": "{_checksum([text])}"}}'


def retried(path: Path, read: Callable[[], T], retry_s: float, *, folder_known: bool = False) -> T:
    """Call `read`, which reads `path`, until it raises no OSError. Return its value.

    Args:
        retry_s: how long to retry; 0: not at all.
        folder_known: the file's folder existed a moment ago: if it does not now, the storage is unavailable.

    Raises:
        Missing: there is no such file.
        Fault: the storage refused for longer than `retry_s`.
    """

    def attempt() -> T:
        try:
            return read()
        except _NO_SUCH_FILE:
            with suppress(*(() if folder_known else _NO_SUCH_FILE)):
                os.listdir(path.parent)
            raise Missing from None

    try:
        return attempt()
    except OSError as error:
        if not retry_s:
            raise Fault(f"{path}: cannot be read ({reason(str(path), error)})") from None
        return Retry(retry_s).until_success(str(path), error, attempt)


def _checksum(text: Iterable[str]) -> str:
    """Return the SHA-256 of a manifest's values, not of how they are laid out in the file."""
    digest = hashlib.sha256()
    for part in text:
        digest.update(part.encode())
    return digest.hexdigest()


def _encode(value: Any, depth: int = 2) -> Iterator[str]:
    """Yield json.dumps(value, sort_keys=True) in parts.

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
