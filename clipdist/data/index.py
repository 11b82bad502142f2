"""Find the members of every sample of a tar shard, and keep their places in 00000.tar.idx.npz beside it.

A sample is the run of neighbouring members that share a key: the member's path up to the first dot of its file name
(webdataset's rule), the rest being its kind. With the index a member is one positioned read, in any order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from clipdist.data.not_shards import describe_content
from clipdist.errors import Unreadable, UserError
from clipdist.storage import replacing

INDEX_VERSION = 1
MOST_KINDS = 256  # offsets are a table of samples x kinds: a tar with more kinds is no shard
MOST_PLACES = 1 << 25  # samples x kinds: a gigabyte of tables, a thousand times what a shard has
MOST_NAME = 1024  # characters of a member's name
MOST_LETTERS = 1 << 28  # of all keys, which take the space of the longest each: a gigabyte
MOST_INDEX_BYTES = 1 << 30  # of all arrays of an index file, unpacked: a few kilobytes unpack to gigabytes
_MOST_HEADER_BYTES = 1 << 16  # that one header may occupy: long names and extended attributes fit, bombs do not
_MOST_DIGITS = 256  # in a row: tarfile's search takes the square of their number, and no file's name has more
_BLOCK_BYTES = 512
_PADDING_BYTES = 1 << 20  # read at a time of what follows the end mark
_COLUMN = "column."  # prefix of the numeric columns among the arrays of the file
IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
AT_ONCE_BYTES = 8 << 20  # a member of more is read by itself
_HEADERS_BYTES = 16 << 10  # between the members of a sample that are read at once


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the n samples of a shard lie, m kinds of member each.

    Attributes:
        tar: the shard's path or address.
        keys: unicode [n], unique.
        kinds: m file extensions without the leading dot, in order of first appearance: ("jpg", "txt", "json").
        offset: int64 [n, m], byte in the tar at which the member's data begin; -1: the sample has no such member.
        size: int64 [n, m], bytes of the member's data; 0 where absent.
        tar_bytes, tar_mtime_ns: the shard's size and time of change when it was indexed; time 0: not known.
        crc: uint32 [n, m], CRC-32 of the members' data, 0 where absent; None after a bare scan, which reads no data.
        columns: numeric arrays [n] that filters use (width, height, ...); empty after a bare scan.
    """

    tar: str
    keys: np.ndarray
    kinds: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray
    tar_bytes: int
    tar_mtime_ns: int = 0
    crc: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> bytes:
        """Return 16 bytes that name this sequence of samples: keys, kinds and member sizes, not folder and time."""
        by_name = sorted(range(len(self.kinds)), key=lambda i: self.kinds[i])
        names = "\n".join([*(self.kinds[i] for i in by_name), "", *self.keys.tolist(), ""])
        digest = hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16)
        digest.update(np.ascontiguousarray(self.size[:, by_name], dtype="<i8").tobytes())
        return digest.digest()

    @functools.cached_property
    def column_of(self) -> dict[str, int]:
        return {kind: column for column, kind in enumerate(self.kinds)}

    def spans(self, is_read: Callable[[str], bool]) -> np.ndarray:
        """Return the part of the tar that holds all of a sample that is read, int64 [n, 2]: first byte and length.

        Length 0: its members are not neighbours, or large, and are to be read one by one.

        Args:
            is_read: of a kind of members, whether it is read.
        """
        columns = tuple(column for kind, column in self.column_of.items() if is_read(kind))
        if columns not in self._spans:
            self._spans[columns] = self._find_spans(columns)
        return self._spans[columns]

    @functools.cached_property
    def _spans(self) -> dict[tuple[int, ...], np.ndarray]:
        return {}

    def _find_spans(self, columns: tuple[int, ...]) -> np.ndarray:
        offset, size = self.offset[:, columns], self.size[:, columns]
        read = (offset >= 0) & (size <= AT_ONCE_BYTES)
        begin = np.where(read, offset, np.iinfo(np.int64).max).min(axis=1, initial=np.iinfo(np.int64).max)
        length = np.where(read, offset + size, 0).max(axis=1, initial=0) - begin
        at_once = (length > 0) & (length <= np.where(read, size, 0).sum(axis=1) + _HEADERS_BYTES)
        return np.stack([np.where(at_once, begin, 0), np.where(at_once, length, 0)], axis=1)

    def select(self, rows: np.ndarray) -> ShardIndex:
        """Return the index of some rows only (bool [n] or positions)."""
        return replace(
            self,
            keys=self.keys[rows],
            offset=self.offset[rows],
            size=self.size[rows],
            crc=None if self.crc is None else self.crc[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
        )

    def bytes_in_memory(self) -> int:
        arrays = [self.keys, self.offset, self.size, *self.columns.values()]
        arrays += [] if self.crc is None else [self.crc]
        return sum(array.nbytes for array in arrays) + 16 * len(self)  # and spans


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
    """Read the headers of a shard, no data; `columns` stays empty.

    Members that are no plain file (folders, links, sparse files, ...) are ignored.

    Raises:
        UserError: no such file, not an uncompressed tar, cut off, a key that occurs twice, members that do not
            stand together.
    """
    index, damage = scan_whole_samples(tar)
    if damage:
        raise UserError(damage)
    return index


def scan_whole_samples(tar: str | Path) -> tuple[ShardIndex, str]:
    """As scan_shard, but of a damaged shard return the whole samples, and what is wrong.

    Returns:
        The index, and "" or the damage in one line. Samples whose members are not neighbours, or occur twice, are left
        out, and so is the last one before a cut: it may lack members.

    Raises:
        UserError: no such file, cannot be read.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    torn: dict[str, str] = {}  # key -> the kind that it has twice; "": its members are not neighbours
    before = damage = ""
    if os.path.exists(tar) and not os.path.isfile(tar):  # reading a pipe might never end
        raise UserError(f"{tar}: not a file")
    try:
        stat = os.stat(tar)
        for key, kind, place in _members(tar, stat.st_size):
            own = samples.setdefault(key, {})
            if kind in own or (own and key != before):
                torn.setdefault(key, kind if kind in own else "")
            own[kind] = place
            before = key
    except FileNotFoundError:
        raise Unreadable(f"{tar}: no such shard") from None
    except OSError as error:
        raise Unreadable(f"{tar}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # tarfile raises many kinds on hostile headers
        other = describe_content(tar)
        damage = f"{tar}: {other or f'not a tar file, or cut off ({error}); write or copy it again'}"
        samples.pop(before, None)
    if torn:
        samples = {key: own for key, own in samples.items() if key not in torn}
        damage = damage or f"{tar}: {_describe_torn(torn)}"
    index = index_from_members(tar, samples)
    return replace(index, tar_bytes=stat.st_size, tar_mtime_ns=stat.st_mtime_ns), damage


def _describe_torn(torn: dict[str, str]) -> str:
    key, kind = next(iter(torn.items()))
    if kind:
        return f"the key {key!r} occurs twice (again with {kind!r}); keys of a shard are unique"
    return (
        f"the members of {len(torn)} samples ({key!r} is the first) do not stand together, as those of a shard must;"
        " write it sorted by name: tar --sort=name -cf NEW.tar FOLDER"
    )


class _HeaderFile(io.FileIO):
    """A tar to read headers from. tarfile takes a header's own size on trust, and would read it into memory whole."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = super().read(size) or b""
        if size > _BLOCK_BYTES and max(map(len, re.findall(rb"\d+", data)), default=0) > _MOST_DIGITS:
            raise tarfile.ReadError("a header of digits only")
        return data


def _members(tar: str | Path, tar_bytes: int) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(key, kind, (data offset, size)) of every plain file, in the order of the tar."""
    with _HeaderFile(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        position = -1
        for member in archive:
            # A negative size leads tarfile back to where it was: for ever.
            inside = 0 <= member.size <= tar_bytes - member.offset_data or not _is_plain_file(member)
            if archive.offset <= position or not inside or len(member.name) > MOST_NAME:
                raise tarfile.ReadError(f"no sound member at byte {member.offset}")
            position = archive.offset
            named = split_member_name(member.name) if _is_plain_file(member) else None
            if named is not None and "\0" not in member.name:  # arrays of names cannot hold it
                yield *named, (member.offset_data, member.size)
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
        end = archive.offset
    _require_end_mark(tar, end)


def index_from_members(
    tar: str | Path,
    samples: Mapping[str, Mapping[str, tuple[int, int]]],
    crc: Mapping[str, Mapping[str, int]] | None = None,
) -> ShardIndex:
    """Make the index of {key: {kind: (data offset, size)}}, samples and kinds in their order of appearance.

    Args:
        crc: {key: {kind: CRC-32}}, where the data are at hand.

    Raises:
        UserError: more than MOST_KINDS kinds of member, MOST_PLACES places or MOST_LETTERS letters of keys.
    """
    names = dict.fromkeys(kind for own in samples.values() for kind in own)
    kinds = {kind: column for column, kind in enumerate(names)}
    if len(kinds) > MOST_KINDS:
        raise UserError(
            f"{tar}: {len(kinds)} kinds of members, as {next(iter(kinds))}, at most {MOST_KINDS} can be told apart:"
            " a sample's key ends at the first dot of a file's name; write names without further dots"
        )
    if len(samples) * len(kinds) > MOST_PLACES:
        raise UserError(f"{tar}: {len(samples)} samples of {len(kinds)} kinds: too large for a shard; cut it up")
    if len(samples) * max(map(len, samples), default=0) > MOST_LETTERS:
        raise UserError(f"{tar}: {len(samples)} samples with very long names: too large for a shard; shorten the names")
    place = np.full((len(samples), len(kinds), 2), (-1, 0), dtype=np.int64)
    sums = np.zeros((len(samples), len(kinds)), dtype=np.uint32)
    for row, (key, own) in enumerate(samples.items()):
        for kind, where in own.items():
            place[row, kinds[kind]] = where
            if crc is not None:
                sums[row, kinds[kind]] = crc[key][kind]
    keys = np.array(list(samples), dtype=np.str_)
    offset, size = np.ascontiguousarray(place[..., 0]), np.ascontiguousarray(place[..., 1])
    return ShardIndex(str(tar), keys, tuple(kinds), offset, size, 0, crc=None if crc is None else sums)


def stamped(index: ShardIndex) -> ShardIndex:
    """Return the index with the present size and time of its (local) shard."""
    stat = os.stat(index.tar)
    return replace(index, tar_bytes=stat.st_size, tar_mtime_ns=stat.st_mtime_ns)


def index_to_bytes(index: ShardIndex) -> bytes:
    """Return an .npz of plain arrays."""
    arrays = {
        "version": np.int64(INDEX_VERSION),
        "tar_stat": np.array([index.tar_bytes, index.tar_mtime_ns], dtype=np.int64),
        "kinds": np.array(index.kinds, dtype=np.str_),
        "keys": index.keys,
        "offset": index.offset,
        "size": index.size,
        **({} if index.crc is None else {"crc": index.crc}),
        **{_COLUMN + name: values for name, values in index.columns.items()},
    }
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def index_from_bytes(data: bytes, tar: str | Path) -> ShardIndex | None:
    """Read what index_to_bytes wrote; None where it is damaged, of another version, or points outside the shard."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            unpacked_bytes = sum(entry.file_size for entry in file.zip.infolist())
            if unpacked_bytes > MOST_INDEX_BYTES or int(file["version"]) != INDEX_VERSION:
                return None
            columns = {name.removeprefix(_COLUMN): file[name] for name in file.files if name.startswith(_COLUMN)}
            kinds = tuple(file["kinds"].tolist())
            tar_bytes, tar_mtime_ns = (int(value) for value in file["tar_stat"])
            crc = file["crc"] if "crc" in file.files else None
            offset, size = file["offset"], file["size"]
            index = ShardIndex(str(tar), file["keys"], kinds, offset, size, tar_bytes, tar_mtime_ns, crc, columns)
        return index if _is_sound(index) else None
    except Exception:  # NumPy, zipfile and what they unpack with raise many kinds on damaged bytes
        return None


def _is_sound(index: ShardIndex) -> bool:
    """Check types, shapes and ranges. Raises TypeError or UnicodeError where names are no text."""
    shape = (len(index.keys), len(index.kinds)) if index.keys.ndim == 1 else None
    tables = [(index.offset, np.int64), (index.size, np.int64)]
    if index.crc is not None:
        tables.append((index.crc, np.uint32))
    if index.keys.dtype.kind != "U" or any(table.shape != shape or table.dtype != kind for table, kind in tables):
        return False
    "\n".join([*index.kinds, *index.keys.tolist()]).encode("utf-8", "surrogateescape")
    inside = (index.offset >= -1) & (index.size >= 0) & (index.size <= index.tar_bytes - index.offset.clip(0))
    there = (index.offset >= 0) | (index.size == 0)
    return bool((inside & there).all()) and all(
        column.shape == index.keys.shape and column.dtype.kind in "biuf" for column in index.columns.values()
    )


def write_index(index: ShardIndex) -> None:
    """Write the index beside its shard, atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    path = index_path(index.tar)
    with replacing(path, shared=True) as partial:  # several ranks may write at once
        partial.write_bytes(index_to_bytes(index))


def load_index(tar: str | Path) -> ShardIndex:
    """Read the index beside a local shard if it is fresh; else scan the shard, and write the index if possible.

    Fresh means: this version, and the tar has the size and mtime it had then. A copy changes the mtime; where the scan
    then finds every member in its place, the old index' columns and checksums are kept.

    Raises:
        UserError: as scan_shard.
    """
    if not os.path.isfile(tar):
        raise Unreadable(f"{tar}: no such shard")
    stored = stored_index(tar)
    if stored is not None and is_fresh(stored):
        return stored
    index = keep_facts(scan_shard(tar), stored)
    with contextlib.suppress(OSError):  # a read-only folder: the next start scans again
        write_index(index)
    return index


def stored_index(tar: str | Path) -> ShardIndex | None:
    """Read the index beside a shard, fresh or not; None where there is none, or a damaged one."""
    try:
        return index_from_bytes(index_path(tar).read_bytes(), tar)
    except OSError:
        return None


def is_fresh(index: ShardIndex) -> bool:
    """Return whether the (local) shard has the size and time that it had when it was indexed."""
    stat = os.stat(index.tar)
    return (stat.st_size, stat.st_mtime_ns) == (index.tar_bytes, index.tar_mtime_ns)


def keep_facts(scanned: ShardIndex, stored: ShardIndex | None) -> ShardIndex:
    """Return a scan with the columns and checksums of an older index, if every member is where it was."""
    if stored is None or not _same_members(stored, scanned):
        return scanned
    return replace(scanned, columns=stored.columns, crc=stored.crc)


def check_fresh(index: ShardIndex) -> None:
    """Check that a local shard is still the one that was indexed, elsewhere than beside it and some time ago.

    A copy has another time: then the headers are read, and every member must be in its place.

    Raises:
        UserError: the shard has changed, or is gone.
    """
    if not os.path.isfile(index.tar):
        raise Unreadable(f"{index.tar}: no such shard")
    if is_fresh(index):
        return
    if os.path.getsize(index.tar) == index.tar_bytes:
        now = scan_shard(index.tar)
        rows = {key: row for row, key in enumerate(now.keys.tolist())}
        found = np.array([rows.get(key, -1) for key in index.keys.tolist()], dtype=np.int64)
        if (found >= 0).all() and _same_members(index, now.select(found)):
            return
    raise UserError(f"{index.tar}: has changed since it was indexed; index it again with tools/index_shards.py")


def _same_members(a: ShardIndex, b: ShardIndex) -> bool:
    arrays = ((a.keys, b.keys), (a.offset, b.offset), (a.size, b.size))
    return a.kinds == b.kinds and all(np.array_equal(x, y) for x, y in arrays)


def _is_plain_file(member: tarfile.TarInfo) -> bool:
    # A sparse file counts as regular for tarfile, but its bytes do not lie in one piece.
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _require_end_mark(tar: str | Path, end: int) -> None:
    """tarfile takes garbage and a cut between two members for the end; a whole tar ends in a block of zeros.

    It also takes a header that is lost in zeros (pages that were never written) for the end: nothing may follow that.
    """
    with open(tar, "rb") as file:
        file.seek(end)
        block = file.read(_BLOCK_BYTES)
        if block != bytes(_BLOCK_BYTES):
            raise tarfile.ReadError(f"no end mark at byte {end}")
        while block:
            if block.count(0) != len(block):
                raise tarfile.ReadError(f"more data behind the end mark at byte {end}")
            block = file.read(_PADDING_BYTES)
