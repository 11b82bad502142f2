"""Decode images in threads, ahead of the model that takes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from clipdist.data.bad_sample import BadSample

T = TypeVar("T")
AHEAD = 3  # batches that are decoded while the model is busy


def decode_ahead(
    load: Callable[[T], Tensor],
    items: Iterable[T],
    shape: Sequence[int],
    batch: int,
    calls: int,
    threads: int,
    bad: dict[T, str],
) -> Iterator[tuple[Tensor, list[T]]]:
    """Yield exactly `calls` batches and the items in their rows, whatever the number of items and of damaged ones.

    Args:
        load: returns an item's image, uint8 of this shape; called by several threads.
        bad: takes the reason of every item for which `load` raises BadSample, before its batch is yielded.

    Yields:
        uint8 [batch, *shape], zeros in the rows of bad items and in those that fill a batch up; up to `batch`
        items.
    """

    def fill(item: T, row: Tensor) -> str | None:
        try:
            row.copy_(load(item))
        except BadSample as error:
            return error.reason
        return None

    with ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        upcoming = iter(items)

        def begin() -> tuple[Tensor, list[T], list[Future[str | None]]]:
            images = torch.zeros(batch, *shape, dtype=torch.uint8)
            part = list(islice(upcoming, batch))
            return images, part, [pool.submit(fill, item, row) for item, row in zip(part, images)]

        waiting = deque(begin() for _ in range(min(AHEAD, calls)))
        for call in range(calls):
            images, part, filling = waiting.popleft()
            if call + AHEAD < calls:
                waiting.append(begin())
            for item, future in zip(part, filling):
                if (reason := future.result()) is not None:
                    bad[item] = reason
            yield images, part
