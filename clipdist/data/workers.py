"""A pool of daemon threads: unlike those of an executor, a process may leave them behind when it ends."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
_Work = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_AT_EXIT_S = 1.0  # for threads that nobody closed: one that computes while the interpreter goes away may crash it


class Workers:
    """Daemon threads that run what is submitted, in that order.

    A read from a file server that is gone cannot be cancelled: neither close() nor the end of the process waits long
    for a thread that hangs in one.

    Args:
        begin: what each thread calls first.
    """

    def __init__(self, count: int, name: str, begin: Callable[[], object] | None = None) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [
            threading.Thread(target=_run, args=(self._work, begin), name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, _end, self._work, self._threads, _AT_EXIT_S)

    def submit(self, call: Callable[..., T], *args: Any) -> Future[T]:
        """Return the future of a call.

        Raises:
            RuntimeError: after close().
        """
        if self._closed:
            raise RuntimeError("work for threads that were ended")
        future: Future[T] = Future()
        self._work.put((future, call, args))
        return future

    def close(self, wait_s: float) -> None:
        """Cancel what has not begun, and wait for the threads to end, but not longer than `wait_s` in all."""
        self._closed = True
        self._end.detach()
        _end(self._work, self._threads, wait_s)


def _end(work: queue.SimpleQueue[_Work | None], threads: list[threading.Thread], wait_s: float) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            if (dropped := work.get_nowait()) is not None:
                dropped[0].cancel()
    for _ in threads:
        work.put(None)
    deadline = time.monotonic() + wait_s
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


def _run(work: queue.SimpleQueue[_Work | None], begin: Callable[[], object] | None) -> None:
    if begin is not None:
        begin()
    while (item := work.get()) is not None:
        future, call, args = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call(*args))
            except BaseException as error:
                future.set_exception(error)
        del item, future, call, args  # a thread that rests holds no batch
