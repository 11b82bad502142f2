"""Work in processes: results in order, few items taken ahead, and a worker that is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from clipdist.datasets.pool import in_order
from clipdist.errors import Fault


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_order_and_items_are_taken_as_they_are_wanted(processes: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield -number

    results = in_order(abs, items(), processes)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) <= 5 + 3 * processes
    assert list(results) == list(range(5, 100))


def test_a_killed_worker_is_a_fault() -> None:
    with pytest.raises(Fault, match="a worker process was killed"):
        list(in_order(os._exit, [1, 1], 2))
