"""Keep the indices of many shards in one file, NAME.index.zip, of which a start reads a few numbers a shard.

A plain zip: head.npz holds per shard its name, sample count, size, time and digest; 0.npz, 1.npz, ... are the indices
themselves, each read when a sample of its shard is first wanted. So a hundred thousand shards open in seconds.
"""

from __future__ import annotations

import io
import os
import posixpath
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from clipdist.data.fetch import is_remote
from clipdist.data.index import (
    MOST_INDEX_BYTES,
    MOST_PLACES,
    ShardIndex,
    index_from_bytes,
    index_to_bytes,
)
from clipdist.errors import Unreadable, UserError
from clipdist.storage import replacing

SUFFIX = ".index.zip"
_VERSION = 1
_HEAD = "head.npz"


class Consolidated:
    """An opened consolidated index of S shards.

    Args:
        path: the file, or its bytes as one.
        name: the address that it was fetched from; shards' names are relative to it.
    Attributes:
        tars: S paths or addresses.
        counts: int64 [S], samples of each shard.
        digests: uint8 [S, 16], see ShardIndex.digest.
        rule: the filters that made it, in words; "" for none.
        checked: of the shards that were found to be those that were indexed, the time of change that they have, ns.

    Raises:
        UserError: no such file, or not one that write_parts made.
    """

    def __init__(self, path: str | Path | BinaryIO, name: str = "") -> None:
        self.name, self._path = name or str(path), path
        self._zip: zipfile.ZipFile | None = None
        try:
            with np.load(io.BytesIO(self._unpack(_HEAD)), allow_pickle=False) as head:
                version = int(head["version"])
                names, self.counts, self.digests = head["names"], head["counts"], head["digests"]
                self.rule = str(head["rule"])
            _check_head(names, self.counts, self.digests)
        except FileNotFoundError:
            raise UserError(f"{self.name}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror or error})") from None
        except Exception:  # NumPy, zipfile and what they unpack with raise many kinds on damaged bytes
            raise UserError(
                f"{self.name}: not an index of shards, or cut off; make it with tools/index_shards.py"
            ) from None
        if version != _VERSION:
            raise UserError(f"{self.name}: version {version} of the index, this is {_VERSION}; index the shards again")
        self.checked: dict[int, int] = {}
        base = posixpath.dirname(self.name)
        self.tars = [_join(base, name) for name in names.tolist()]

    def __len__(self) -> int:
        return len(self.tars)

    def load(self, number: int) -> ShardIndex:
        """Read the index of one shard. Thread-safe.

        Raises:
            UserError: it is damaged; Unreadable: the storage is unavailable.
        """
        try:
            index = index_from_bytes(self._unpack(f"{number}.npz"), self.tars[number])
        except OSError as error:
            self._zip = None  # a descriptor from before an outage may never be good again
            raise Unreadable(f"{self.name}: cannot be read ({error.strerror or error})") from None
        except Exception:  # as above
            index = None
        if index is None or len(index) != self.counts[number] or index.digest() != self.digests[number].tobytes():
            raise UserError(f"{self.name}: the part for {self.tars[number]} is damaged; make the index again")
        return index

    def _unpack(self, name: str) -> bytes:
        opened = self._zip
        if opened is None:
            opened = self._zip = zipfile.ZipFile(self._path)
        entry = opened.getinfo(name)
        if entry.file_size > MOST_INDEX_BYTES:
            raise zipfile.BadZipFile(f"{name}: {entry.file_size} bytes")
        return opened.read(entry)


def _check_head(names: np.ndarray, counts: np.ndarray, digests: np.ndarray) -> None:
    """Raise ValueError where these are not the arrays that write_parts makes."""
    types = (names.dtype.kind, names.ndim, counts.dtype, digests.dtype) == ("U", 1, np.int64, np.uint8)
    if not types or counts.shape != names.shape or digests.shape != (*names.shape, 16):
        raise ValueError("arrays of other types or shapes")
    if not ((counts >= 0) & (counts <= MOST_PLACES)).all():
        raise ValueError("impossible counts")
    "\n".join(names.tolist()).encode("utf-8", "surrogateescape")


class Part(NamedTuple):
    """One shard of a consolidated index: `data` is what index_to_bytes made, made where it suits."""

    tar: str
    samples: int
    digest: bytes
    data: bytes


def make_part(index: ShardIndex) -> Part:
    return Part(index.tar, len(index), index.digest(), index_to_bytes(index))


def write_parts(path: str | Path, parts: Iterable[Part], rule: str = "") -> None:
    """Write NAME.index.zip, atomically. Shards in or below its folder are named relative to it, others in full.

    Args:
        parts: in the order of the catalog; taken one by one, so that few are in memory.
        rule: the filters that they went through, in words.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    names, counts, digests = [], [], []
    with replacing(path, shared=True) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
        for number, part in enumerate(parts):
            file.writestr(f"{number}.npz", part.data)
            names.append(_relative(path.parent, part.tar))
            counts.append(part.samples)
            digests.append(np.frombuffer(part.digest, dtype=np.uint8))
        head = {
            "version": np.int64(_VERSION),
            "names": np.array(names, dtype=np.str_),
            "counts": np.array(counts, dtype=np.int64),
            "digests": np.array(digests, dtype=np.uint8).reshape(-1, 16),
            "rule": np.str_(rule),
        }
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **head)
        file.writestr(_HEAD, buffer.getvalue())


def _relative(folder: Path, tar: str) -> str:
    if is_remote(tar):
        return tar
    full, base = os.path.abspath(tar), os.path.abspath(folder)
    return os.path.relpath(full, base) if full.startswith(base.rstrip("/") + "/") else full


def _join(base: str, name: str) -> str:
    return name if is_remote(name) or name.startswith("/") or not base else f"{base}/{name}"
