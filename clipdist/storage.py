"""A read that failed in, what it gives when the storage is back out: bears with a file system that is away for a while.

Objects behind addresses have patience of their own, in fetch.py.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from clipdist.data.index import Unreadable
from clipdist.errors import Fault

T = TypeVar("T")
AWAY = (OSError, Unreadable)  # what a read raises while the storage is away
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0


class Retry:
    """Tries failed reads again. Thread-safe: threads that wait for the same shard count as one.

    Args:
        seconds: after so long without success a shard is given up.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._away_since: dict[str, float] = {}  # shard -> monotonic time
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def until_success(self, shard: str, cause: Exception, read: Callable[[], T]) -> T:
        """What `read` gives, as soon as it does not raise one of AWAY any more.

        Raises:
            Fault: the shard was away for too long, or close() came.
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
        """Ends all waits."""
        self._closing.set()

    def _note_away(self, shard: str, cause: Exception) -> float:
        """Since when the shard is away."""
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
    """An error of reading in words, without the shard's name."""
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause).removeprefix(f"{shard}: ")
