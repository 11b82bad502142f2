"""One tar shard in, the place of every member of every sample out; remembered in 00000.tar.idx.npz beside the shard.

A sample is the run of neighbouring members that share a key: the member's path up to the first dot of its file name
(webdataset's rule), the rest being its kind. With the index a member is one positioned read, in any order.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clipdist.errors import UserError

INDEX_VERSION = 1
_BLOCK_BYTES = 512
_COLUMN = "column."  # prefix of the numeric columns among the arrays of the file


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the n samples of a shard lie, m kinds of member each.

    Attributes:
        tar: the shard.
        keys: unicode [n], unique.
        kinds: m file extensions without the leading dot, in order of first appearance: ("jpg", "txt", "json").
        offset: int64 [n, m], byte in the tar at which the member's data begin; -1: the sample has no such member.
        size: int64 [n, m], bytes of the member's data; 0 where absent.
        columns: numeric arrays [n] that filters use (width, height, ...); empty after a bare scan.
    """

    tar: Path
    keys: np.ndarray
    kinds: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


def index_path(tar: str | Path) -> Path:
    """00000.tar -> 00000.tar.idx.npz, in the same folder."""
    tar = Path(tar)
    return tar.with_name(tar.name + ".idx.npz")


def split_member_name(name: str) -> tuple[str, str] | None:
    """ "a/b.seg.png" -> ("a/b", "seg.png"), the kind in lower case; None for hidden files and names without a dot."""
    folder, slash, base = name.rpartition("/")
    stem, dot, kind = base.partition(".")
    return (folder + slash + stem, kind.lower()) if stem and dot and kind else None


def scan_shard(tar: str | Path) -> ShardIndex:
    """Reads the headers of a shard, no data; `columns` stays empty.

    Members that are no plain file (folders, links, sparse files, ...) are passed over.

    Raises:
        UserError: no such file, not an uncompressed tar, cut off, a key that occurs twice.
    """
    tar = Path(tar)
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            last = None
            for member in archive:
                named = split_member_name(member.name) if _is_plain_file(member) else None
                if named is None:
                    continue
                key, kind = named
                if (key in samples and key != last) or kind in samples.get(key, {}):
                    raise UserError(f"{tar}: the key {key!r} occurs twice ({member.name}); keys of a shard are unique")
                samples.setdefault(key, {})[kind] = (member.offset_data, member.size)
                last = key
            end = archive.offset
        _require_end_mark(tar, end)
    except FileNotFoundError:
        raise UserError(f"{tar}: no such shard") from None
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar}: not a tar file, or cut off ({error}); write or copy it again") from None
    except OSError as error:
        raise UserError(f"{tar}: cannot be read ({error.strerror or error})") from None
    return index_from_members(tar, samples)


def index_from_members(tar: Path, samples: Mapping[str, Mapping[str, tuple[int, int]]]) -> ShardIndex:
    """The index of {key: {kind: (data offset, size)}}, samples and kinds in their order of appearance."""
    kinds = list(dict.fromkeys(kind for members in samples.values() for kind in members))
    place = np.full((len(samples), len(kinds), 2), (-1, 0), dtype=np.int64)
    for row, members in enumerate(samples.values()):
        for kind, where in members.items():
            place[row, kinds.index(kind)] = where
    keys = np.array(list(samples), dtype=np.str_)
    offset, size = np.ascontiguousarray(place[..., 0]), np.ascontiguousarray(place[..., 1])
    return ShardIndex(tar, keys, tuple(kinds), offset, size)


def write_index(index: ShardIndex) -> None:
    """Writes the index beside its shard, atomically, stamped with the shard's present size and mtime.

    Raises:
        OSError: the folder cannot be written.
    """
    arrays = {
        "version": np.int64(INDEX_VERSION),
        "tar_stat": _tar_stat(index.tar),
        "kinds": np.array(index.kinds, dtype=np.str_),
        "keys": index.keys,
        "offset": index.offset,
        "size": index.size,
        **{_COLUMN + name: values for name, values in index.columns.items()},
    }
    path = index_path(index.tar)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several ranks may write at once
    try:
        with open(partial, "xb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_index(tar: str | Path) -> ShardIndex:
    """The index of a shard: the one beside it where that is fresh, else a scan, remembered if the folder allows it.

    Fresh means: this version, and the tar has the size and mtime it had then. A copy changes the mtime; where the scan
    then finds every member in its place, the old index' columns are kept.

    Raises:
        UserError: as scan_shard.
    """
    tar = Path(tar)
    if not tar.is_file():
        raise UserError(f"{tar}: no such shard")
    stored, fresh = _read_index(tar)
    if stored is not None and fresh:
        return stored
    index = scan_shard(tar)
    if stored is not None and _same_members(stored, index):
        index = replace(index, columns=stored.columns)
    with contextlib.suppress(OSError):  # a read-only folder: the next start scans again
        write_index(index)
    return index


def _read_index(tar: Path) -> tuple[ShardIndex | None, bool]:
    """The index file beside a shard and whether it is fresh; None where there is none that can be read."""
    try:
        with np.load(index_path(tar), allow_pickle=False) as file:
            if int(file["version"]) != INDEX_VERSION:
                return None, False
            columns = {name.removeprefix(_COLUMN): file[name] for name in file.files if name.startswith(_COLUMN)}
            kinds = tuple(str(kind) for kind in file["kinds"])
            index = ShardIndex(tar, file["keys"], kinds, file["offset"], file["size"], columns)
            fresh = bool(np.array_equal(file["tar_stat"], _tar_stat(tar)))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None, False  # absent or damaged: the shard itself is the truth
    shape = (len(index.keys), len(kinds))
    whole = index.keys.ndim == 1 and index.offset.shape == shape and index.size.shape == shape
    return (index, fresh) if whole and all(len(c) == shape[0] for c in columns.values()) else (None, False)


def _same_members(a: ShardIndex, b: ShardIndex) -> bool:
    arrays = ((a.keys, b.keys), (a.offset, b.offset), (a.size, b.size))
    return a.kinds == b.kinds and all(np.array_equal(x, y) for x, y in arrays)


def _tar_stat(tar: Path) -> np.ndarray:
    stat = tar.stat()
    return np.array([stat.st_size, stat.st_mtime_ns], dtype=np.int64)


def _is_plain_file(member: tarfile.TarInfo) -> bool:
    # A sparse file counts as regular for tarfile, but its bytes do not lie in one piece.
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _require_end_mark(tar: Path, end: int) -> None:
    """tarfile takes garbage and a cut between two members for the end; a whole tar ends in a block of zeros."""
    with open(tar, "rb") as file:
        file.seek(end)
        if file.read(_BLOCK_BYTES) != bytes(_BLOCK_BYTES):
            raise tarfile.ReadError(f"no end mark at byte {end}")
