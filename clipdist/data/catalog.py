"""Number the samples of shards that are named by folders, patterns, lists, addresses or consolidated indices."""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import io
import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from clipdist import config
from clipdist.data import consolidated
from clipdist.data.consolidated import Consolidated
from clipdist.data.fetch import Fetcher, beside, is_remote, safe_name, without_query
from clipdist.data.index import ShardIndex, check_fresh, index_from_bytes, load_index
from clipdist.data.members import DEFAULT_MEMBERS, Members
from clipdist.data.not_shards import describe_file, describe_folder, describe_list
from clipdist.errors import Fault, UserError

_HOW_TO_MAKE = "make them with e.g. `python tools/shard_flickr8k.py SOURCE --out DIR`"
_OPEN_THREADS = 8  # opening an index is mostly waiting for the file system
_REMOTE_THREADS = 32
MOST_BOOK_BYTES = 1 << 30  # of a consolidated index that is fetched; copy a larger one to a disk
INDEX_MEMORY_BYTES = 256 << 20  # of member tables that stay in memory; the others are read again when wanted


def fetcher_of(cfg: config.Data) -> Fetcher:
    """Return the fetcher of addresses that the configuration asks for."""
    return Fetcher(retry_s=cfg.retry_s)


@dataclass(frozen=True)
class Shard:
    """One shard of a catalog: its path or address, how many samples it has, what names them, and how to index it."""

    tar: str
    count: int
    digest: bytes
    load: Callable[[], ShardIndex]


class Catalog:
    """All samples of several shards, numbered 0 .. N-1 in the order of the shards.

    Attributes:
        shards: the S shards.
        starts: int64 [S+1], number of the first sample of every shard, and N at the end.
        sources: for every source that was named, its range of shards (first, end).
        members: which members of its samples are image and captions.
        contents: what look_at found in some samples, in words.
    """

    def __init__(
        self, shards: Sequence[Shard], sources: Sequence[tuple[int, int]] = (), members: Members = DEFAULT_MEMBERS
    ) -> None:
        self.shards, self.members, self.contents = list(shards), members, ""
        self.sources = list(sources) or [(0, len(self.shards))]
        self.starts = np.concatenate([[0], np.cumsum([shard.count for shard in self.shards])]).astype(np.int64)
        self._tables: OrderedDict[int, ShardIndex] = OrderedDict()
        self._table_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        sources: Sequence[str],
        what: str = "data.train",
        fetcher: Fetcher | None = None,
        members: Members = DEFAULT_MEMBERS,
    ) -> Catalog:
        """Open shards.

        Args:
            sources: in this order; each a folder (all its *.tar, sorted), a tar, a glob, a brace pattern of these or of
                addresses (https://, s3://, ...), a .txt file with one source a line, or a consolidated .index.zip. One
                that matches nothing is an error, as is a shard named twice.
            what: the setting that an error message shall name.
            fetcher: for addresses.
            members: which members of its samples are image and captions.

        Raises:
            UserError: no shards match, a shard is named twice, one is damaged, or an address has no index.
        """
        fetcher = fetcher or Fetcher()
        named = name_shards(sources, what, fetcher)
        loose = [part for parts in named for part in parts if isinstance(part, str)]
        threads = _REMOTE_THREADS if any(map(is_remote, loose)) else _OPEN_THREADS
        with ThreadPoolExecutor(threads) as pool:
            opened = dict(zip(loose, pool.map(functools.partial(_open_loose, fetcher=fetcher), loose)))
        shards: list[Shard] = []
        ranges = []
        for parts in named:
            first = len(shards)
            for part in parts:
                shards += _shards_of(part) if isinstance(part, Consolidated) else [opened[part][0]]
            ranges.append((first, len(shards)))
        catalog = cls(shards, ranges, members)
        for number, shard in enumerate(catalog.shards):  # those read just now need not be read again
            if shard.tar in opened:
                catalog._keep(number, opened[shard.tar][1])
        return catalog

    def __len__(self) -> int:
        return int(self.starts[-1])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Return the shard's number and the row in it.

        Raises:
            IndexError: not in 0 .. N-1.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of {len(self)}")
        shard = int(self.starts.searchsorted(sample_id, side="right")) - 1
        return shard, int(sample_id - self.starts[shard])

    def table(self, shard: int) -> ShardIndex:
        """Return the index of a shard. Thread-safe; the most recently used ones stay in memory.

        Raises:
            UserError: the index is damaged, or the shard is not the one that was indexed.
            Unreadable: the storage is unavailable.
        """
        with self._lock:
            table = self._tables.get(shard)
            if table is not None:
                self._tables.move_to_end(shard)
                return table
        table = self.shards[shard].load()
        self._keep(shard, table)
        return table

    def fingerprint(self) -> str:
        """Return hex digits that name this sequence of samples: shard names, counts, keys and member sizes.

        Folders and times do not enter, so that a copy on another machine continues the same order.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            name = posixpath.basename(without_query(shard.tar))
            digest.update(f"{name}\n{shard.count}\n".encode("utf-8", "surrogateescape") + shard.digest)
        return digest.hexdigest()

    def is_remote(self) -> bool:
        return any(is_remote(shard.tar) for shard in self.shards)

    def _keep(self, shard: int, table: ShardIndex) -> None:
        with self._lock:
            if shard not in self._tables:
                self._tables[shard] = table
                self._table_bytes += table.bytes_in_memory()
            while self._table_bytes > INDEX_MEMORY_BYTES and len(self._tables) > 1:
                _, oldest = self._tables.popitem(last=False)
                self._table_bytes -= oldest.bytes_in_memory()


def name_shards(sources: Sequence[str], what: str, fetcher: Fetcher) -> list[list[str | Consolidated]]:
    """Return what each source stands for: tars, and consolidated indices, opened. See Catalog.open.

    Raises:
        UserError: no shards match, or a shard is named twice.
    """
    if not sources:
        raise UserError(f"{what}: no shards are named; {_HOW_TO_MAKE}")
    named = [list(_expand(os.fspath(source), what, fetcher)) for source in sources]
    flat = [part for parts in named for part in parts]
    _refuse_twice([tar for part in flat for tar in (part.tars if isinstance(part, Consolidated) else [part])], what)
    return named


def _open_loose(tar: str, fetcher: Fetcher) -> tuple[Shard, ShardIndex]:
    """Open a shard that has its index beside it, or (a local one) none yet."""
    load = functools.partial(_load_remote, tar, fetcher) if is_remote(tar) else functools.partial(load_index, tar)
    index = load()
    digest = index.digest()

    def load_same() -> ShardIndex:
        again = load()
        if again.digest() != digest:
            raise Fault(f"{safe_name(tar)}: has changed since it was opened; restore it, or start again with the new")
        return again

    return Shard(tar, len(index), digest, load_same), index


def _load_remote(tar: str, fetcher: Fetcher) -> ShardIndex:
    data = fetcher.read_small(beside(tar, ".idx.npz"))
    index = None if data is None else index_from_bytes(data, tar)
    if index is None:
        state = "no index" if data is None else "a damaged index"
        raise UserError(
            f"{safe_name(tar)}: {state} beside it; index remote shards ahead: python tools/index_shards.py SHARDS --out"
            f" NAME{consolidated.SUFFIX}, and name that file instead"
        )
    return index


def _shards_of(book: Consolidated) -> list[Shard]:
    counts, digests = book.counts.tolist(), book.digests
    return [
        Shard(tar, counts[i], digests[i].tobytes(), functools.partial(_load_checked, book, i))
        for i, tar in enumerate(book.tars)
    ]


def _load_checked(book: Consolidated, number: int) -> ShardIndex:
    index = book.load(number)
    if not is_remote(index.tar) and number not in book.checked:  # a remote one is compared in size when it is fetched
        check_fresh(index)
        book.checked[number] = os.stat(index.tar).st_mtime_ns
    # A copy has another time than the index knows: what counts from here on is what was found.
    return replace(index, tar_mtime_ns=book.checked.get(number, index.tar_mtime_ns))


def _expand(source: str, what: str, fetcher: Fetcher) -> Iterator[str | Consolidated]:
    """Yield what one source names, in order: tars, and consolidated indices, opened."""
    if without_query(source).endswith(consolidated.SUFFIX):
        yield _open_book(source, what, fetcher)
    elif is_remote(source):
        if any(mark in source for mark in "*["):
            name = safe_name(source)
            raise UserError(
                f"{what}: {name}: addresses cannot be searched; use a brace pattern, such as {{00000..00041}}"
            )
        _refuse_other(source, what)
        yield from _braces(source, what)
    elif source.endswith(".txt"):
        yield from _expand_list(Path(source), what, fetcher)
    elif os.path.exists(source):  # a plain name wins over a pattern that it may look like
        yield from _tars_of(Path(source), what)
    else:
        for pattern in _braces(source, what):
            found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
            if not found:
                part = "" if pattern == source else f" ({pattern} is missing)"
                raise UserError(f"{what}: no shards match {source}{part}; {_HOW_TO_MAKE}")
            for path in found:
                yield from _tars_of(Path(path), what)


def _open_book(source: str, what: str, fetcher: Fetcher) -> Consolidated:
    if not is_remote(source):
        return Consolidated(source)
    data = fetcher.read_small(source, limit_bytes=MOST_BOOK_BYTES)
    if data is None:
        raise UserError(f"{what}: {safe_name(source)}: no such file")
    return Consolidated(io.BytesIO(data), source)


def _expand_list(path: Path, what: str, fetcher: Fetcher) -> Iterator[str | Consolidated]:
    """Yield what a file names, one source a line; names are relative to its folder, # begins a comment."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what}: {path}: no such list of shards") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: {path}: cannot be read as a list of shards ({error})") from None
    lines = [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]
    if not lines:
        raise UserError(f"{what}: {path}: the list names no shards")
    if told := describe_list(path, lines):
        raise UserError(f"{what}: {path}: {told}")
    for line in lines:
        if line.endswith(".txt"):
            raise UserError(f"{what}: {path}: a list within a list ({line}); name it beside the other")
        yield from _expand(line if is_remote(line) else os.path.join(path.parent, line), what, fetcher)


def _braces(source: str, what: str) -> list[str]:
    try:
        return list(braceexpand(source))
    except ValueError as error:
        raise UserError(f"{what}: {source}: not a brace pattern: {error}") from None


def _tars_of(path: Path, what: str) -> list[str]:
    if not path.is_dir():
        _refuse_other(str(path), what)
        return [str(path)]
    tars = sorted(path.glob("*.tar"))
    if not tars:
        below = sorted({tar.parent.name for tar in path.glob("*/*.tar")})
        hint = f"its folders {', '.join(below)} do: name one of them" if below else ""
        hint = hint or describe_folder(path) or _HOW_TO_MAKE
        raise UserError(f"{what}: no shards match {path}: the folder holds no *.tar; {hint}")
    return [str(tar) for tar in tars]


def _refuse_other(name: str, what: str) -> None:
    """Raise UserError for a file that is no shard by its name."""
    if told := describe_file(without_query(name)):
        raise UserError(f"{what}: {safe_name(name)}: {told}")


def _refuse_twice(tars: list[str], what: str) -> None:
    seen: set[str] = set()
    real_folder = functools.lru_cache(maxsize=None)(os.path.realpath)  # links are followed once a folder
    for tar in tars:
        place = tar if is_remote(tar) else os.path.join(real_folder(os.path.dirname(tar)), os.path.basename(tar))
        if place in seen:
            raise UserError(f"{what}: {safe_name(tar)} is named twice; every shard may come once")
        seen.add(place)
