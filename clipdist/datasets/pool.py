"""Do work in several processes, with results in order and few of them in memory. No torch: workers start quickly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from clipdist.errors import Fault

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 3  # items per process: enough that none waits, few in memory


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], processes: int, ahead: int = AHEAD
) -> Iterator[Result]:
    """Yield work(item) for every item, in their order, whatever the number of processes.

    Args:
        work: a function that can be pickled, of a module that can be imported.
        processes: 0: one per core; 1: the work is done in this process.
        ahead: items per process that are prepared, and in memory.

    Raises:
        Fault: a worker process was killed.
    """
    processes = processes or len(os.sched_getaffinity(0))
    if isinstance(items, Sized):
        processes = min(processes, len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    # Not fork: the progress bar runs a thread.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= ahead * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise Fault("a worker process was killed, by want of memory perhaps; the same command goes on") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End a worker whose parent was killed outright: it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
