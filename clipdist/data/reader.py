"""Read members of shards by their offsets, given sample ids, from any number of threads."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.cache import ShardCache
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.data.fetch import is_remote, safe_name, without_query
from clipdist.data.index import ShardIndex
from clipdist.data.members import CAPTIONS, Captions, is_json, texts_at
from clipdist.distributed.node import ranks_per_node
from clipdist.errors import Fault, Unreadable, UserError
from clipdist.storage import AWAY, Retry

T = TypeVar("T")
MAX_OPEN = 256  # shards that stay open, well under the usual limit of 1024 descriptors
_FEW_OPEN = 4  # of a cache's, by who reads front to back: what is open cannot make room for others
_SIZES_LOOKED_AT = 16  # shards of a catalog whose sizes stand for all
MAX_MEMBER_BYTES = 256 << 20  # a larger image is refused
MAX_TEXT_BYTES = 16 << 20  # of every other member: parsed JSON takes some twenty times its bytes


def open_reader(catalog: Catalog, cfg: config.Data | None = None, max_open: int = 0) -> Reader:
    """Return a reader with the cache that the configuration (or its defaults) asks for, where the catalog needs one.

    With a configuration it retries for data.retry_s; without one errors are raised at once.

    Args:
        max_open: shards of the cache that stay open; 0: a few, for who reads front to back.

    Raises:
        UserError: the cache's folder cannot be written, or its disk is too small.
    """
    retry_s = cfg.retry_s if cfg else 0.0
    cfg = cfg or config.Data()
    if not (cfg.stage or catalog.is_remote()):
        return Reader(catalog, retry_s=retry_s)
    folder = Path(cfg.cache) if cfg.cache else Path.home() / ".cache" / "clipdist" / "shards"
    cache = ShardCache(folder, int(cfg.cache_gb * 1e9), fetcher_of(cfg))
    if not max_open:
        fit = cache.limit_bytes // ranks_per_node() // max(1, typical_bytes(catalog))
        max_open = max(1, min(_FEW_OPEN, fit // 2))  # the other half for shards that go out, and other readers'
    return Reader(catalog, cache, cfg.stage, max_open, retry_s)


def typical_bytes(catalog: Catalog) -> int:
    """Return the largest size among some shards of the catalog."""
    some = np.linspace(0, len(catalog.shards) - 1, min(len(catalog.shards), _SIZES_LOOKED_AT)).astype(int)
    return max(catalog.table(number).tar_bytes for number in sorted(set(some.tolist())))


class Reader:
    """Reads samples of a catalog. Thread-safe: every read is one pread.

    Args:
        cache: where remote shards are kept; local ones pass it too with `stage`.
        max_open: shards that stay open; those of a cache cannot be evicted meanwhile.
        retry_s: a shard whose storage is unavailable is tried again for so long, and a local one is taken only if its
            size and time are those of its index; 0: errors are raised at once, and a shard is read as it is.
    """

    def __init__(
        self,
        catalog: Catalog,
        cache: ShardCache | None = None,
        stage: bool = False,
        max_open: int = MAX_OPEN,
        retry_s: float = 0.0,
    ) -> None:
        self.catalog, self.cache, self.stage, self.max_open = catalog, cache, stage, max_open
        self.members = catalog.members
        self._retry = Retry(retry_s) if retry_s else None
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def sample(self, sample_id: int) -> StoredSample:
        """Return one sample; see samples."""
        shard, row = self.catalog.locate(sample_id)
        return self._samples_of(shard, np.array([row]))[0]

    def samples(self, sample_ids: np.ndarray) -> list[StoredSample]:
        """Return samples; the members of each are read at once where they are neighbours, as in any shard of ours.

        Args:
            sample_ids: int64 [n], each in [0, N). What is needed of a shard is looked up once for all its samples.

        Raises:
            UserError, Fault: as Catalog.table, ShardCache.open and Retry.until_success.
            OSError: from a reader that does not retry.
        """
        starts = self.catalog.starts
        shards = starts.searchsorted(sample_ids, side="right") - 1
        found: dict[int, StoredSample] = {}
        for shard in dict.fromkeys(shards.tolist()):
            places = np.flatnonzero(shards == shard)
            found.update(zip(places.tolist(), self._samples_of(shard, sample_ids[places] - starts[shard])))
        return [found[place] for place in range(len(sample_ids))]

    def _samples_of(self, shard: int, rows: np.ndarray) -> list[StoredSample]:
        """Return samples of one shard by their rows, int64 [n]."""
        table = self._retried(shard, lambda: self.catalog.table(shard))
        spans = table.spans(self.members.is_read)[rows].tolist()

        def read() -> list[bytes]:
            if not any(length for _, length in spans):
                return [b""] * len(spans)
            with self._descriptor(shard) as descriptor:
                return [os.pread(descriptor, length, begin) if length else b"" for begin, length in spans]

        data = self._retried(shard, read)
        crc = [None] * len(rows) if table.crc is None else table.crc[rows].tolist()
        columns = zip(table.offset[rows].tolist(), table.size[rows].tolist(), crc, spans, data)
        return [
            StoredSample(self, shard, table, offset, size, own_crc, begin, own_data)
            for offset, size, own_crc, (begin, _), own_data in columns
        ]

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        """Return some bytes of a shard; fewer where it ends before."""

        def read() -> bytes:
            with self._descriptor(shard) as descriptor:
                return os.pread(descriptor, size, offset)

        return self._retried(shard, read)

    def _retried(self, shard: int, read: Callable[[], T]) -> T:
        """Return what `read` returns; retry while the storage of the shard is unavailable."""
        try:
            return read()
        except AWAY as error:
            if self._retry is None:
                raise
            return self._retry.until_success(self._name(shard), error, read)

    def _name(self, shard: int) -> str:
        return safe_name(self.catalog.shards[shard].tar)

    def key(self, sample_id: int) -> str:
        shard, row = self.catalog.locate(sample_id)
        return str(self.catalog.table(shard).keys[row])

    def shard_name(self, sample_id: int) -> str:
        return os.path.basename(without_query(self.catalog.shards[self.catalog.locate(sample_id)[0]].tar))

    def is_cached(self) -> bool:
        """Return whether any shard is read through the cache."""
        return self.cache is not None and (self.stage or self.catalog.is_remote())

    def prefetch(self, shard: int) -> None:
        """Begin to fetch a shard into the cache, where it is read through one."""
        if self._is_cached(shard) and self.cache is not None:
            self.cache.prefetch(self._address(shard), self.catalog.table(shard).tar_bytes)

    def stop(self) -> None:
        """End what threads wait for: fetches and retries. They get a Fault."""
        if self._retry is not None:
            self._retry.close()
        if self.cache is not None:
            self.cache.close()

    def close(self) -> None:
        """Close all files, without waiting for a read that hangs: its file is closed when it ends."""
        self.stop()
        with self._lock:
            self._open.clear()

    @contextmanager
    def _descriptor(self, shard: int) -> Iterator[int]:
        """An open descriptor of the shard; the least recently used one is let go when there are too many.

        After an error it is let go: a file system that was mounted again has no use for older descriptors.
        """
        with self._lock:
            held = self._open.setdefault(shard, _OpenShard())
            self._open.move_to_end(shard)
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
        try:
            with held.opening:  # others read other shards meanwhile: this may take a fetch
                if held.number is None:
                    held.number = self._open_shard(shard)
            yield held.number
        except OSError:
            with self._lock:
                if self._open.get(shard) is held:
                    del self._open[shard]
            raise
        finally:
            del held  # before an error with this frame in its traceback is kept while the read is tried again

    def _open_shard(self, shard: int) -> int:
        tar = self.catalog.shards[shard].tar
        if self._is_cached(shard) and self.cache is not None:
            try:
                return self.cache.open(self._address(shard), self.catalog.table(shard).tar_bytes)
            except UserError as error:
                if isinstance(error, Fault) or is_remote(tar) or os.path.isfile(tar):
                    raise
                raise Unreadable(f"{tar}: no such shard") from None  # staged, its storage is unavailable
        descriptor = os.open(tar, os.O_RDONLY)
        try:
            if self._retry is not None:
                self._check_same(shard, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_same(self, shard: int, now: os.stat_result) -> None:
        """Check that a local shard is the one that was indexed.

        Raises:
            Fault: its size or time differs.
        """
        table = self.catalog.table(shard)
        if now.st_size != table.tar_bytes or table.tar_mtime_ns not in (0, now.st_mtime_ns):
            raise Fault(
                f"{self._name(shard)}: has changed since it was opened (size or time); restore it, or start again: a"
                " start looks at the shards anew"
            )

    def _address(self, shard: int) -> str:
        """Return a shard's name in the cache. A staged one that was replaced has another, even at equal size."""
        tar = self.catalog.shards[shard].tar
        if is_remote(tar):
            return tar
        return f"{Path(tar).absolute().as_uri()}?{self.catalog.table(shard).tar_mtime_ns}"

    def _is_cached(self, shard: int) -> bool:
        return self.stage or is_remote(self.catalog.shards[shard].tar)


@dataclass(eq=False, repr=False)
class StoredSample:
    """One sample as it lies in its shard: members are checked when they are read.

    Attributes:
        offset, size, crc: of its members, by the column of their kind in `table`; crc: None without checksums.
        begin: place in the shard of `data`, the bytes that are read already.
    """

    reader: Reader
    shard: int
    table: ShardIndex
    offset: list[int]
    size: list[int]
    crc: list[int] | None
    begin: int
    data: bytes
    _parsed: dict[str, Any] = field(default_factory=dict)  # JSON values by the kind of their members

    def read(self, kind: str) -> bytes | None:
        """Return the bytes of one member (`kind` is its extension), or None where the sample has none of that kind.

        Raises:
            BadSample: the member is not whole, not what the index' checksum says, or too large.
        """
        column = self.table.column_of.get(kind)
        if column is None:
            return None
        offset, size = self.offset[column], self.size[column]
        if offset < 0:
            return None
        if size > (MAX_MEMBER_BYTES if kind in self.reader.members.images else MAX_TEXT_BYTES):
            raise BadSample("too large")
        inside = offset - self.begin
        data = self.data[inside : inside + size] if inside >= 0 else b""
        if len(data) != size:
            data = self.reader.pread(self.shard, offset, size)
        if len(data) != size:
            raise BadSample("shard cut off")
        if self.crc is not None and zlib.crc32(data) != self.crc[column]:
            raise BadSample("wrong checksum")
        return data

    def image(self) -> bytes:
        """Return the encoded image.

        Raises:
            BadSample: the sample has none.
        """
        for kind in self.reader.members.images:
            data = self.read(kind)
            if data:
                return data
        raise BadSample("missing image")

    def captions(self) -> list[str]:
        """Return all captions. Raises: as find_captions."""
        return self.find_captions().texts

    def find_captions(self) -> Captions:
        """Return all captions, and where they come from: the first place of Members.captions that has any.

        Raises:
            BadSample: there are none, or they are no text.
        """
        found = self._first_texts(self.reader.members.captions)
        if not found.texts:
            raise BadSample("missing caption")
        return found

    def find_negatives(self) -> Captions:
        """Return the texts that are no captions of the image, and where they come from: none, or as find_captions.

        Raises:
            BadSample: they are no text.
        """
        return self._first_texts(self.reader.members.negatives)

    def _first_texts(self, sources: tuple[str, ...]) -> Captions:
        for source in sources:
            found = self._captions_of(source)
            if not found.texts:
                continue
            try:
                "".join(found.texts).encode()
            except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which is no text
                raise BadSample("caption not UTF-8") from None
            return found
        return Captions([], "")

    def _captions_of(self, source: str) -> Captions:
        kind, _, field = source.partition(":")
        if is_json(source):
            return Captions(texts_at(self.json(kind), field), source)
        try:
            text = (self.read(kind) or b"").decode("utf-8")
        except UnicodeDecodeError:
            raise BadSample("caption not UTF-8") from None
        return self.reader.members.split(kind, text, self.json())

    def metadata(self) -> dict:
        """Return the .json as a dict; empty where there is none. Raises: as json."""
        record = self.json()
        return record if isinstance(record, dict) else {}

    def json(self, kind: str = "json") -> Any:
        """Return what a JSON member holds; an empty dict where there is none.

        Raises:
            BadSample: it is no JSON, or no JSON object although nobody asked for captions in another form.
        """
        value = self.parse(kind)
        if not isinstance(value, dict) and self.reader.members.captions == CAPTIONS:
            raise BadSample("not JSON")
        return value

    def parse(self, kind: str) -> Any:
        """Return what a JSON member holds, of any form. Raises: BadSample: it is no JSON."""
        if kind not in self._parsed:
            try:
                self._parsed[kind] = json.loads(self.read(kind) or b"{}")
            except (ValueError, RecursionError):
                raise BadSample("not JSON") from None
        return self._parsed[kind]


class _OpenShard:
    """The descriptor of a shard, closed with the last reference to it: a thread may read what the reader let go."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.opening = threading.Lock()

    def __del__(self) -> None:
        if self.number is not None:
            os.close(self.number)
