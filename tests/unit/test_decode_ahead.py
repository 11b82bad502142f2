"""Decoding ahead: rows in order, exactly the asked number of batches, damaged items as zeros and named."""

from __future__ import annotations

import time

import pytest
import torch

from clipdist.data.bad_sample import BadSample
from clipdist.evals.decode_ahead import AHEAD, decode_ahead

SHAPE = (3, 4, 4)


def level(item: int) -> torch.Tensor:
    if item in (2, 7):
        raise BadSample("truncated image")
    time.sleep(0.002 * (item % 3))  # later items may be done first
    return torch.full(SHAPE, 10 * item + 1, dtype=torch.uint8)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("batch", "calls"), [(3, 4), (4, 3), (4, 5), (16, 1)])
def test_rows_in_order_and_damage_as_zeros(batch: int, calls: int, threads: int) -> None:
    bad: dict[int, str] = {}
    batches = list(decode_ahead(level, iter(range(10)), SHAPE, batch, calls, threads, bad))
    assert [images.shape for images, _ in batches] == [(batch, *SHAPE)] * calls
    assert [item for _, items in batches for item in items] == list(range(10))
    rows = torch.cat([images for images, _ in batches])[:, 0, 0, 0].tolist()
    assert rows == [0 if item in bad else 10 * item + 1 for item in range(10)] + [0] * (batch * calls - 10)
    assert bad == {2: "truncated image", 7: "truncated image"}


def test_it_runs_a_few_batches_ahead_and_no_further() -> None:
    taken: list[int] = []

    def items():
        for item in range(100, 200):
            taken.append(item)
            yield item

    batches = decode_ahead(lambda item: torch.zeros(SHAPE), items(), SHAPE, 5, 20, 2, {})
    next(batches)
    assert len(taken) == 5 * (AHEAD + 1)
    batches.close()


def test_an_error_that_is_no_damage_ends_it() -> None:
    def broken(item: int) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(decode_ahead(broken, range(3), SHAPE, 2, 2, 2, {}))
