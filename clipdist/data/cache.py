"""Keep whole local copies of remote shards in a bounded folder that all processes of a node share.

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

MOST_CACHE_BYTES = 64 * 10**9  # of a cache whose size nobody has set
_OURS = re.compile(r"(whole|part)-[0-9a-f]{32}-")  # nothing else in the folder is ever deleted
_LOCK = ".lock"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_LOOK_AGAIN_S = 0.05
_CLOSE_S = 0.6  # for fetches to end; one that hangs is left behind, and its part removed by the next start


class _NoRoom(Exception):
    """A prefetch would have to wait for room."""


class _Closed(Fault):
    """The cache was closed while a shard was fetched."""


@dataclass
class ShardCache:
    """A bounded cache of whole objects. Thread-safe, and safe among processes that use the same folder.

    Descriptors that it gave out must not be inherited by a fork: an entry is held until all copies are closed.

    Attributes:
        folder: on a file system of this node; made with mode 0700.
        limit_bytes: most that the files in the folder hold together, downloads included; 0: half of what the disk
            has for them, at most MOST_CACHE_BYTES.
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
                    if path.name.startswith("part-") and _OURS.match(path.name) and _is_idle(path):
                        path.unlink()
                free = shutil.disk_usage(self.folder).free
                held = sum(entry.st_size for _, entry in self._files())
                self.limit_bytes = self.limit_bytes or min(MOST_CACHE_BYTES, (free + held) // 2)
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
        """Return a read-only descriptor of the whole local copy, for the caller to close; fetch it where it is missing.

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
        """Begin to fetch in the background if there is room; an error is raised by the next open() of this URL."""
        with self._mutex:
            if url in self._ahead or self._closing.is_set():
                return
            future = self._ahead[url] = self._pool.submit(self._prefetch, url, size)
        future.add_done_callback(lambda done: self._forget(url, done))

    def close(self) -> None:
        """End all fetches, those that open() waits for too. Descriptors that were given out stay good.

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
            if entry is not None:
                _mark_used(entry, opened=False)  # as fetched just now, or the next prefetch would evict it
                os.close(entry)
                return
            part = self._claim(url)
        if part is not None:
            with contextlib.suppress(_NoRoom, _Closed):
                os.close(self._download(url, size, part, is_prefetch=True))

    def _download(self, url: str, size: int | None, part: int, is_prefetch: bool = False) -> int:
        """Fetch into the claimed part and make it an entry; return its descriptor, with a shared lock.

        Args:
            is_prefetch: it does not wait for room.
        """
        path = self._path("part", url)
        reserved = 0

        def room(bytes_needed: int) -> None:
            nonlocal reserved
            self._check_open()
            if bytes_needed > reserved:
                self._reserve(part, bytes_needed, is_prefetch)
                reserved = bytes_needed

        try:
            while True:
                try:
                    self.fetcher.fetch(url, path, size, room)
                    break
                except OSError as error:
                    if error.errno not in _DISK_FULL:
                        raise Fault(f"{path}: cannot be written ({error.strerror})") from None
                    self._free_disk(part, size, is_prefetch)
                    reserved = 0
            with self._locked():
                # New descriptor: entries are read-only for whoever holds them. Nobody evicts under our lock.
                entry = os.open(path, os.O_RDONLY)
                os.rename(path, self._path("whole", url))
                os.close(part)
                part = -1
                lock(entry, shared=True)
                if not is_prefetch:
                    _mark_used(entry)
            return entry
        finally:
            if part >= 0:
                with self._locked():
                    path.unlink(missing_ok=True)
                    os.close(part)

    def _open_entry(self, url: str, size: int | None) -> int | None:
        """Return the entry with a shared lock, or None where there is none of that size. Under the folder's lock."""
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
        """Return the part of a URL, empty and locked, or None where another holds it. Under the folder's lock."""
        part = os.open(self._path("part", url), os.O_RDWR | os.O_CREAT, 0o600)
        if not _try_lock(part):
            os.close(part)
            return None
        os.ftruncate(part, 0)  # of a process that died
        return part

    def _wait_for_other(self, url: str) -> None:
        """Wait until the process or thread that downloads this URL has finished, failed or died."""
        with contextlib.suppress(FileNotFoundError), open(self._path("part", url), "rb") as part:
            lock(part.fileno(), shared=True)

    def _reserve(self, part: int, size: int, is_prefetch: bool) -> None:
        """Make a locked part `size` bytes long, after making room for it: its length is its claim on the limit.

        Raises:
            _NoRoom: this is a prefetch and there is no room at once.
            Fault: there was no room for room_wait_s.
        """
        deadline = time.monotonic() + self.room_wait_s
        while True:
            with self._locked():
                held = sum(entry.st_size for _, entry in self._files())
                more = size - os.fstat(part).st_size
                if self._evict(held + more - self.limit_bytes, spare_unopened=is_prefetch):
                    return os.ftruncate(part, size)
            if is_prefetch:
                raise _NoRoom
            if size > self.limit_bytes or time.monotonic() > deadline:
                raise self._too_small(size)
            time.sleep(_LOOK_AGAIN_S)
            self._check_open()

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise _Closed("the cache of shards was closed")

    def _evict(self, excess_bytes: int, spare_unopened: bool) -> bool:
        """Delete entries that nobody holds, least recently used first, if that frees enough; else none at all."""
        if excess_bytes <= 0:
            return True
        victims = []
        with contextlib.ExitStack() as locked:
            for path, entry in sorted(self._files(), key=lambda file: file[1].st_mtime_ns):
                dead_part = path.name.startswith("part-")
                if not _OURS.match(path.name) or (spare_unopened and not dead_part and entry.st_mode & stat.S_IWUSR):
                    continue
                if not _try_lock(locked.enter_context(open(path, "rb")).fileno()):
                    continue
                victims.append(path)
                excess_bytes -= entry.st_size
                if excess_bytes <= 0:
                    for victim in victims:
                        victim.unlink()
                    return True
        return False

    def _free_disk(self, part: int, size: int | None, is_prefetch: bool) -> None:
        """Free as much as the object needs, at least one entry, on a disk that something else fills.

        Raises:
            _NoRoom, Fault: there is nothing to evict.
        """
        with self._locked():
            freed = self._evict(max(1, size or 0, os.fstat(part).st_size), is_prefetch) or self._evict(1, is_prefetch)
        if not freed:
            if is_prefetch:
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
        base = safe_name(url).rstrip("/").rpartition("/")[2]
        return self.folder / f"{kind}-{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', base)[-80:]}"

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        """The folder's lock; held for a few file operations at a time, never while bytes are fetched."""
        with open(self.folder / _LOCK, "ab") as file:
            lock(file.fileno())  # of this descriptor: it keeps threads apart as well
            yield


def _mark_used(entry: int, opened: bool = True) -> None:
    """Set the time that eviction goes by. Read-only means opened: a prefetch leaves its entry writable."""
    os.utime(entry, ns=(time.time_ns(), time.time_ns()))
    os.fchmod(entry, 0o400 if opened else 0o600)


def _try_lock(descriptor: int) -> bool:
    try:
        lock(descriptor, wait_s=0)
    except BlockingIOError:
        return False
    return True


def _is_idle(path: Path) -> bool:
    """Return whether nobody holds a file. Under the folder's lock."""
    with open(path, "rb") as file:
        return _try_lock(file.fileno())


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
