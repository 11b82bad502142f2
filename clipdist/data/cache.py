"""URLs of shards in, open descriptors of whole local copies out: a bounded folder that all processes of a node share.

The state is the folder itself. `whole-*` are entries, `part-*` are downloads; a lock (flock) on such a file is held as
long as a descriptor of it is open: shared by readers of an entry, exclusive by the process that downloads a part. The
kernel releases the locks of a process that dies, so whatever is not locked is not in use. Entries appear, disappear
and are locked only under the lock of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from clipdist.data.fetch import Fetcher, safe_name
from clipdist.data.workers import Workers
from clipdist.errors import Fault, UserError
from clipdist.storage import lock

_OURS = re.compile(r"(whole|part)-[0-9a-f]{32}-")  # nothing else in the folder is ever deleted
_LOCK = ".lock"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOOK_AGAIN_S = 0.05
_CLOSE_S = 0.6  # for fetches to end; one that hangs is left behind, and its part removed by the next start


class _NoRoom(Exception):
    """A prefetch that would have to wait."""


class _Closed(Fault):
    """The cache was closed while a shard was fetched."""


@dataclass
class ShardCache:
    """A bounded cache of whole objects. Thread-safe, and safe among processes that use the same folder.

    Descriptors that it gave out must not be inherited by a fork: an entry is held until all copies are closed.

    Attributes:
        folder: on a file system of this node; made with mode 0700.
        limit_bytes: most that the files in the folder hold together, downloads included.
        fetcher: what fetches.
        threads: most prefetches at one time.
        room_wait_s: how long open() waits for other readers to let go of entries.
    """

    folder: Path
    limit_bytes: int
    fetcher: Fetcher
    threads: int = 4
    room_wait_s: float = 60.0
    _ahead: dict[str, Future[None]] = field(default_factory=dict, init=False, repr=False)
    _mutex: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises: UserError: the folder cannot be written or locked, or the disk is too small for the limit."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                for path, _ in self._files():
                    if path.name.startswith("part-"):
                        _remove_unlocked(path)
                free = shutil.disk_usage(self.folder).free
                held = sum(entry.st_size for _, entry in self._files())
                self._evict(held - self.limit_bytes, spare_unopened=False)  # the limit may have been lowered
        except OSError as error:
            raise UserError(
                f"data.cache {self.folder}: cannot be written or locked ({error.strerror}); "
                "name a folder on a local disk"
            ) from None
        if self.limit_bytes > free + held:
            raise UserError(
                f"data.cache_gb: {_gb(self.limit_bytes)} is more than {self.folder} can hold: {_gb(free)} are free and "
                f"{_gb(held)} are in the cache already; set data.cache_gb lower or choose another disk"
            )
        self._pool = Workers(self.threads, "prefetch")

    def open(self, url: str, size: int | None = None) -> int:
        """A read-only descriptor of the whole local copy, for the caller to close; fetched first where it is missing.

        Args:
            size: bytes that the object must have; an entry of another size is fetched again.

        Raises:
            UserError, Fault: as Fetcher.fetch, of an earlier prefetch too; Fault: there is no room, or close() came.
        """
        with self._mutex:
            prefetched = self._ahead.pop(url, None)
        if prefetched is not None and not prefetched.cancel():
            prefetched.result()
        while True:
            with self._locked():
                entry = self._open_entry(url, size)
                if entry is not None:
                    _mark_used(entry)
                    return entry
                part = self._claim(url)
            if part is not None:
                return self._download(url, size, part)
            self._wait_for_other(url)

    def prefetch(self, url: str, size: int | None = None) -> None:
        """Begins to fetch in the background if there is room; an error is raised by the next open() of this URL."""
        with self._mutex:
            if url in self._ahead or self._closing.is_set():
                return
            future = self._ahead[url] = self._pool.submit(self._prefetch, url, size)
        future.add_done_callback(lambda done: self._forget(url, done))

    def close(self) -> None:
        """Ends all fetches, those that open() waits for too. Descriptors that were given out stay good.

        Returns soon even where a fetch hangs.
        """
        with self._mutex:
            closed = self._closing.is_set()
            self._closing.set()
        self._pool.close(0.0 if closed else _CLOSE_S)

    def _forget(self, url: str, done: Future[None]) -> None:
        if done.cancelled() or done.exception() is None:
            with self._mutex:
                if self._ahead.get(url) is done:
                    del self._ahead[url]

    def _prefetch(self, url: str, size: int | None) -> None:
        with self._locked():
            entry = self._open_entry(url, size)
            part = None if entry is not None else self._claim(url)
            if entry is not None:
                _mark_used(entry, opened=False)  # as one that was fetched just now, or the next prefetch would evict it
                os.close(entry)
        if part is not None:
            with contextlib.suppress(_NoRoom, _Closed):
                os.close(self._download(url, size, part, advice=True))

    def _download(self, url: str, size: int | None, part: int, advice: bool = False) -> int:
        """Fetches into the claimed part and makes it an entry; its descriptor, with a shared lock."""
        path = self._path("part", url)
        try:
            while True:
                try:
                    self.fetcher.fetch(url, path, size, _Room(self, part, advice))
                    break
                except OSError as error:
                    if error.errno not in _DISK_FULL:
                        raise Fault(f"{path}: cannot be written ({error.strerror})") from None
                    self._free_disk(part, size, advice)
            with self._locked():
                # New descriptor: entries are read-only for whoever holds them. Nobody evicts under our lock.
                entry = os.open(path, os.O_RDONLY)
                os.rename(path, self._path("whole", url))
                os.close(part)
                part = -1
                lock(entry, shared=True)
                if not advice:
                    _mark_used(entry)
            return entry
        finally:
            if part >= 0:
                with self._locked():
                    path.unlink(missing_ok=True)
                    os.close(part)

    def _open_entry(self, url: str, size: int | None) -> int | None:
        """The entry with a shared lock; None where there is none of that size. Under the folder's lock."""
        path = self._path("whole", url)
        try:
            entry = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(entry).st_size != size:
            os.close(entry)
            path.unlink()  # whoever has it open keeps it
            return None
        # This does not wait: exclusive locks on entries are held under the lock of the folder only.
        lock(entry, shared=True)
        return entry

    def _claim(self, url: str) -> int | None:
        """The part of a URL, empty and locked; None where another holds it. Under the folder's lock."""
        part = os.open(self._path("part", url), os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(part):
            os.close(part)
            return None
        os.ftruncate(part, 0)  # of a process that died
        return part

    def _wait_for_other(self, url: str) -> None:
        """Returns when the process or thread that downloads this URL has finished, failed or died."""
        try:
            part = os.open(self._path("part", url), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            lock(part, shared=True)
        finally:
            os.close(part)

    def reserve(self, part: int, size: int, advice: bool) -> None:
        """Makes a locked part `size` bytes long, after making room for it: its length is its claim on the limit.

        Raises:
            _NoRoom: this is advice and there is no room at once.
            Fault: there was no room for room_wait_s.
        """
        deadline = time.monotonic() + self.room_wait_s
        while True:
            with self._locked():
                held = sum(entry.st_size for _, entry in self._files())
                more = size - os.fstat(part).st_size
                if self._evict(held + more - self.limit_bytes, spare_unopened=advice):
                    return os.ftruncate(part, size)
            if advice:
                raise _NoRoom
            if size > self.limit_bytes or time.monotonic() > deadline:
                raise self._too_small(size)
            time.sleep(_LOOK_AGAIN_S)
            self.check_open()

    def check_open(self) -> None:
        if self._closing.is_set():
            raise _Closed("the cache of shards was closed")

    def _evict(self, excess_bytes: int, spare_unopened: bool) -> bool:
        """Deletes entries that nobody holds, least recently used first, if that frees enough; else none at all."""
        if excess_bytes <= 0:
            return True
        victims: list[tuple[Path, int]] = []
        try:
            for path, entry in sorted(self._files(), key=lambda file: file[1].st_mtime_ns):
                dead_part = path.name.startswith("part-")
                if not _OURS.match(path.name) or (spare_unopened and not dead_part and entry.st_mode & stat.S_IWUSR):
                    continue
                descriptor = os.open(path, os.O_RDONLY)
                victims.append((path, descriptor))
                if not _try_lock(descriptor):
                    os.close(victims.pop()[1])
                    continue
                excess_bytes -= entry.st_size
                if excess_bytes <= 0:
                    for victim, _ in victims:
                        victim.unlink()
                    return True
            return False
        finally:
            for _, descriptor in victims:
                os.close(descriptor)

    def _free_disk(self, part: int, size: int | None, advice: bool) -> None:
        """Something else fills the disk: frees as much as the object needs, at least one entry.

        Raises:
            _NoRoom, Fault: there is nothing to evict.
        """
        with self._locked():
            freed = self._evict(max(1, size or 0, os.fstat(part).st_size), advice) or self._evict(1, advice)
        if not freed:
            if advice:
                raise _NoRoom
            raise Fault(
                f"data.cache {self.folder}: the disk is full, and every shard in the cache is in use; "
                "free some space or set data.cache_gb lower"
            )

    def _too_small(self, size: int) -> Fault:
        with self._locked():
            held = sum(entry.st_size for path, entry in self._files() if not _is_idle(path))
        return Fault(
            f"data.cache {self.folder}: {_gb(self.limit_bytes)} are too small: {_gb(held)} are in use at one time and "
            f"a shard of {_gb(size)} is to be added; set data.cache_gb higher, or data.streams or data.window lower"
        )

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        """All plain files in the folder. Under the folder's lock."""
        with os.scandir(self.folder) as entries:
            return [(Path(e.path), e.stat(follow_symlinks=False)) for e in entries if e.is_file(follow_symlinks=False)]

    def _path(self, kind: str, url: str) -> Path:
        digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        base = "pipe" if url.startswith("pipe:") else safe_name(url).rstrip("/").rpartition("/")[2]
        return self.folder / f"{kind}-{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-80:]}"

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """The folder's lock; held for a few file operations at a time, never while bytes are fetched."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock(descriptor)  # of this descriptor: it keeps threads apart as well
            yield
        finally:
            os.close(descriptor)


@dataclass
class _Room:
    """What a download asks before its part grows."""

    cache: ShardCache
    part: int
    advice: bool
    reserved: int = 0

    def __call__(self, size: int) -> None:
        self.cache.check_open()
        if size > self.reserved:
            self.cache.reserve(self.part, size, self.advice)
            self.reserved = size


def _mark_used(entry: int, opened: bool = True) -> None:
    """Sets the time that eviction goes by. Read-only means opened: a prefetch leaves its entry writable."""
    os.utime(entry, ns=(time.time_ns(), time.time_ns()))
    os.fchmod(entry, 0o400 if opened else 0o600)


def ranks_per_node() -> int:
    """How many ranks share the folder, and the cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def _try_lock(descriptor: int) -> bool:
    try:
        lock(descriptor, wait_s=0)
    except BlockingIOError:
        return False
    return True


def _is_idle(path: Path) -> bool:
    """Whether nobody holds a file. Under the folder's lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _remove_unlocked(path: Path) -> None:
    if _OURS.match(path.name) and _is_idle(path):
        path.unlink()


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
