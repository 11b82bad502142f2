"""Files: replace them atomically, sync and lock them, and retry reads while the storage is unavailable. No torch.

Retries of objects behind addresses are in clipdist/data/fetch.py.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from clipdist.errors import Fault, Unreadable

T = TypeVar("T")
AWAY = (OSError, Unreadable)  # what a read raises while the storage is unavailable
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LOCK_POLL_S = 0.2


@contextmanager
def replacing(path: Path, *, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, then rename what was written there to `path`; remove it after an error.

    Args:
        path: file, or folder that is missing or empty; its parent folder must exist.
        durable: sync the content and the folder's entry, so that they survive a power failure.
        shared: several processes may write at once: take a unique temporary name. Otherwise it is PATH.tmp, which the
            next write overwrites should this one be killed.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
        raise
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace the content of a file atomically, in UTF-8. For `durable` see `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line; pass over what is none, such as a line that a kill cut off."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def sync(path: Path) -> None:
    """Have the storage keep a file's content, or a folder's entries, before anything that is written later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: int | IO[str], *, shared: bool = False, wait_s: float = math.inf) -> None:
    """Lock an open file or folder (flock). The lock ends when all copies of the descriptor are closed.

    Args:
        shared: allow other shared locks beside this one.
        wait_s: how long to wait for another holder.

    Raises:
        BlockingIOError: another descriptor still holds the lock after `wait_s`.
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if wait_s == math.inf:
        return fcntl.flock(file, kind)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOCK_POLL_S)


class Retry:
    """Retry failed reads. Thread-safe: threads that wait for the same shard share its deadline and its messages.

    Args:
        seconds: how long to retry a shard that cannot be read.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._away_since: dict[str, float] = {}  # shard -> monotonic time
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def until_success(self, shard: str, cause: Exception, read: Callable[[], T]) -> T:
        """Call `read`, with growing pauses, until it raises none of AWAY. Return its value.

        Args:
            shard: name for messages and deadlines.
            cause: error of the first attempt, which the caller made.

        Raises:
            Fault: no success within `seconds`, or `close` was called.
        """
        began = self._note_away(shard, cause)
        pause_s = _FIRST_PAUSE_S
        while (left_s := began + self.seconds - time.monotonic()) > 0:
            if self._closing.wait(min(left_s, random.uniform(0.5, 1) * pause_s)):
                raise Fault(f"{shard}: reading was ended while the shard was away ({reason(shard, cause)})")
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            try:
                found = read()
            except AWAY as error:
                cause = error
                continue
            self._note_back(shard)
            return found
        raise Fault(f"{shard}: cannot be read, tried for {self.seconds:g} s (data.retry_s): {reason(shard, cause)}")

    def close(self) -> None:
        """End all waits."""
        self._closing.set()

    def _note_away(self, shard: str, cause: Exception) -> float:
        """Return since when the shard cannot be read."""
        with self._lock:
            known = shard in self._away_since
            since = self._away_since.setdefault(shard, time.monotonic())
        if not known:
            print(
                f"note: {shard}: cannot be read ({reason(shard, cause)}); tried again for {self.seconds:g} s",
                file=sys.stderr,
                flush=True,
            )
        return since

    def _note_back(self, shard: str) -> None:
        with self._lock:
            since = self._away_since.pop(shard, None)
        if since is not None:
            away_s = time.monotonic() - since
            print(f"note: {shard}: can be read again after {away_s:.1f} s", file=sys.stderr, flush=True)


def reason(shard: str, cause: Exception) -> str:
    """Return the text of a read error without the shard's name."""
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause).removeprefix(f"{shard}: ")
