"""Sample ids in, bytes out: reads members of shards by their offsets, from any number of threads."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from clipdist import config
from clipdist.data.cache import ShardCache, ranks_per_node
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.data.decode import BadSample
from clipdist.data.fetch import is_remote, safe_name, without_query
from clipdist.data.index import PICTURE_KINDS, ShardIndex
from clipdist.errors import Fault, Unreadable, UserError
from clipdist.storage import AWAY, Retry

# Descriptors that stay open, well under the usual limit of 1024.
MAX_OPEN = 256
_FEW_OPEN = 4  # of a cache's, by who reads front to back: what is open cannot make room for others
_SIZES_LOOKED_AT = 16  # shards of a catalog whose sizes stand for all
MOST_CACHE_BYTES = 64 * 10**9  # of a cache whose size nobody has set
MAX_MEMBER_BYTES = 256 << 20  # a larger picture is none
MAX_TEXT_BYTES = 16 << 20  # of every other member: parsed JSON takes some twenty times its bytes


def open_reader(catalog: Catalog, cfg: config.Data | None = None, max_open: int = 0) -> Reader:
    """A reader with the cache that the configuration (or its defaults) asks for, where the catalog needs one.

    With a configuration it is patient; without one, for programs that someone waits for, errors come at once.

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
    cache = ShardCache(folder, int(cfg.cache_gb * 1e9) or usual_limit(folder), fetcher_of(cfg))
    if not max_open:
        fit = cache.limit_bytes // ranks_per_node() // max(1, typical_bytes(catalog))
        max_open = max(1, min(_FEW_OPEN, fit // 2))  # the other half for shards that go out, and other readers'
    return Reader(catalog, cache, cfg.stage, max_open, retry_s)


def typical_bytes(catalog: Catalog) -> int:
    """The largest size among some shards of the catalog."""
    some = np.linspace(0, len(catalog.shards) - 1, min(len(catalog.shards), _SIZES_LOOKED_AT)).astype(int)
    return max(catalog.table(number).tar_bytes for number in sorted(set(some.tolist())))


def usual_limit(folder: Path) -> int:
    """Bytes of a cache whose size nobody has set: half of what its disk has for it, at most MOST_CACHE_BYTES."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    held = 0
    for entry in folder.iterdir() if there == folder else ():
        with suppress(FileNotFoundError):  # another process may evict meanwhile
            held += entry.stat().st_size
    return min(MOST_CACHE_BYTES, (shutil.disk_usage(there).free + held) // 2)


class Reader:
    """Reads samples of a catalog. Thread-safe: every read is one pread.

    Nothing is taken from a shard but plain members of the kinds that training uses: pictures, .txt, .json and .ids.

    Args:
        cache: where remote shards are kept; local ones pass it too with `stage`.
        max_open: shards that stay open; those of a cache cannot be evicted meanwhile.
        retry_s: a shard whose storage is away is tried again for so long, and a local one is taken only if its size
            and time are those of its index; 0: an OSError or Unreadable comes at once, and a shard is read as it is.
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
        self._retry = Retry(retry_s) if retry_s else None
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def sample(self, sample_id: int) -> StoredSample:
        """One sample, its members read at once where they are neighbours, as they are in any shard of ours.

        Raises:
            UserError, Fault: as Catalog.table, ShardCache.open and Retry.until_success.
            OSError: from a reader without patience.
        """
        shard, row = self.catalog.locate(sample_id)
        table = self._table(shard)
        begin, length = table.spans[row].tolist()
        return StoredSample(self, shard, row, table, begin, self.pread(shard, begin, length) if length else b"")

    def read(self, sample_id: int, kind: str) -> bytes | None:
        """The bytes of one member (`kind` is its extension). See StoredSample.read."""
        return self.sample(sample_id).read(kind)

    def image(self, sample_id: int) -> bytes:
        """The encoded picture. See StoredSample.image."""
        return self.sample(sample_id).image()

    def captions(self, sample_id: int) -> list[str]:
        """All captions of a sample. See StoredSample.captions."""
        return self.sample(sample_id).captions()

    def metadata(self, sample_id: int) -> dict:
        """The sample's .json. See StoredSample.metadata."""
        return self.sample(sample_id).metadata()

    def pread(self, shard: int, offset: int, size: int) -> bytes:
        """Some bytes of a shard; fewer where it ends before."""
        try:
            return self._pread(shard, offset, size)
        except AWAY as error:
            if self._retry is None:
                raise
            return self._retry.until_success(self._name(shard), error, lambda: self._pread(shard, offset, size))

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        with self._descriptor(shard) as descriptor:
            return os.pread(descriptor, size, offset)

    def _table(self, shard: int) -> ShardIndex:
        """Catalog.table, with patience."""
        try:
            return self.catalog.table(shard)
        except AWAY as error:
            if self._retry is None:
                raise
            return self._retry.until_success(self._name(shard), error, lambda: self.catalog.table(shard))

    def _name(self, shard: int) -> str:
        return safe_name(self.catalog.shards[shard].tar)

    def key(self, sample_id: int) -> str:
        shard, row = self.catalog.locate(sample_id)
        return str(self.catalog.table(shard).keys[row])

    def shard_name(self, sample_id: int) -> str:
        return os.path.basename(without_query(self.catalog.shards[self.catalog.locate(sample_id)[0]].tar))

    def is_cached(self) -> bool:
        """Whether any shard passes the cache."""
        return self.cache is not None and (self.stage or self.catalog.is_remote())

    def prefetch(self, shard: int) -> None:
        """Begins to fetch a shard into the cache, where it passes one."""
        if self._is_cached(shard) and self.cache is not None:
            self.cache.prefetch(self._address(shard), self.catalog.table(shard).tar_bytes)

    def stop(self) -> None:
        """Ends what threads wait for: fetches, and storage that is away. They get a Fault."""
        if self._retry is not None:
            self._retry.close()
        if self.cache is not None:
            self.cache.close()

    def close(self) -> None:
        """Returns soon even where a read hangs; its descriptor is closed when it ends."""
        self.stop()
        with self._lock:
            for descriptor in self._open.values():
                descriptor.dismiss()
            self._open.clear()

    @contextmanager
    def _descriptor(self, shard: int) -> Iterator[int]:
        """An open descriptor of the shard; the one that has rested longest is closed when there are too many.

        After an error it is given up: a file system that was mounted again has no use for older descriptors.
        """
        with self._lock:
            held = self._open.get(shard)
            if held is None:
                held = self._open[shard] = _Descriptor()
            self._open.move_to_end(shard)
            held.users += 1
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)[1].dismiss()
        try:
            with held.opening:  # others read other shards meanwhile, which may take a fetch
                if held.number is None:
                    held.number = self._open_shard(shard)
            yield held.number
        except OSError:
            with self._lock:
                if self._open.get(shard) is held:
                    del self._open[shard]
                    held.dismissed = True
            raise
        finally:
            with self._lock:
                held.users -= 1
                if held.dismissed and not held.users:
                    held.close()

    def _open_shard(self, shard: int) -> int:
        tar = self.catalog.shards[shard].tar
        if self._is_cached(shard) and self.cache is not None:
            try:
                return self.cache.open(self._address(shard), self.catalog.table(shard).tar_bytes)
            except UserError as error:
                if isinstance(error, Fault) or is_remote(tar) or os.path.isfile(tar):
                    raise
                raise Unreadable(f"{tar}: no such shard") from None  # a staged one whose storage is away
        descriptor = os.open(tar, os.O_RDONLY)
        try:
            if self._retry is not None:
                self._check_same(shard, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_same(self, shard: int, now: os.stat_result) -> None:
        """
        Raises:
            Fault: the shard is not the one whose members the index has.
        """
        table = self.catalog.table(shard)
        if now.st_size != table.tar_bytes or table.tar_mtime_ns not in (0, now.st_mtime_ns):
            raise Fault(
                f"{self._name(shard)}: has changed since it was opened (size or time); restore it, or start again: a"
                " start looks at the shards anew"
            )

    def _address(self, shard: int) -> str:
        """What a shard is called in the cache. A staged one that is replaced, by one of equal size even, is another."""
        tar = self.catalog.shards[shard].tar
        if is_remote(tar):
            return tar
        return f"{Path(tar).absolute().as_uri()}?{self.catalog.table(shard).tar_mtime_ns}"

    def _is_cached(self, shard: int) -> bool:
        return self.stage or is_remote(self.catalog.shards[shard].tar)


class StoredSample:
    """One sample as it lies in its shard: members that are checked when they are taken."""

    def __init__(
        self,
        reader: Reader,
        shard: int,
        row: int,
        table: ShardIndex,
        begin: int,
        data: bytes,
    ) -> None:
        self._reader, self._shard, self._row, self._table = reader, shard, row, table
        self._begin, self._data = begin, data  # the bytes of the shard from `begin` on that are read already

    def read(self, kind: str) -> bytes | None:
        """The bytes of one member (`kind` is its extension), or None where the sample has none of that kind.

        Raises:
            BadSample: the member is not whole, not what the index' checksum says, or too large.
        """
        column = self._table.column_of.get(kind)
        if column is None:
            return None
        offset, size = int(self._table.offset[self._row, column]), int(self._table.size[self._row, column])
        if offset < 0:
            return None
        if size > (MAX_MEMBER_BYTES if kind in PICTURE_KINDS else MAX_TEXT_BYTES):
            raise BadSample("too large")
        inside = offset - self._begin
        data = self._data[inside : inside + size] if inside >= 0 else b""
        if len(data) != size:
            data = self._reader.pread(self._shard, offset, size)
        if len(data) != size:
            raise BadSample("shard cut off")
        if self._table.crc is not None and zlib.crc32(data) != self._table.crc[self._row, column]:
            raise BadSample("wrong checksum")
        return data

    def image(self) -> bytes:
        """The encoded picture.

        Raises:
            BadSample: the sample has none.
        """
        for kind in PICTURE_KINDS:
            data = self.read(kind)
            if data:
                return data
        raise BadSample("missing image")

    def captions(self) -> list[str]:
        """All captions: "captions" of the .json, else the .txt.

        Raises:
            BadSample: there are none, or they are no text.
        """
        listed = self.metadata().get("captions")
        listed = listed if isinstance(listed, list) else []
        captions = [caption for caption in listed if isinstance(caption, str) and caption.strip()]
        if not captions:
            try:
                text = (self.read("txt") or b"").decode("utf-8").strip()
            except UnicodeDecodeError:
                raise BadSample("caption not UTF-8") from None
            captions = [text] if text else []
        if not captions:
            raise BadSample("missing caption")
        try:
            "".join(captions).encode()
        except UnicodeEncodeError:  # JSON may hold half a surrogate pair, which is no text
            raise BadSample("caption not UTF-8") from None
        return captions

    def metadata(self) -> dict:
        """The .json as a dict; empty where there is none.

        Raises:
            BadSample: it is no JSON object.
        """
        try:
            record = json.loads(self.read("json") or b"{}")
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise BadSample("not JSON")
        return record


class _Descriptor:
    """An open file with a count of the threads that read from it: closed by the last one after it was dismissed."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.users = 0
        self.dismissed = False
        self.opening = threading.Lock()

    def dismiss(self) -> None:
        """To be called under the reader's lock."""
        self.dismissed = True
        if not self.users:
            self.close()

    def close(self) -> None:
        if self.number is not None:
            os.close(self.number)
            self.number = None
