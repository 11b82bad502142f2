"""The order of samples: every property that the design promises."""

from __future__ import annotations

import numpy as np
import pytest

from clipdist.data.order import Order, OrderKey, choose_streams, permute, sample_random

CASES = [  # shard sizes, B, V, w
    ([40, 3, 77], 16, 4, 0),
    ([40, 3, 77], 16, 16, 0),
    ([7] * 30, 48, 16, 3),
    ([170], 8, 1, 0),
    ([5, 5, 5, 1], 16, 2, 4),
    ([64, 64], 128, 64, 0),
]


def make(sizes: list[int], batch: int, streams: int, window: int, seed: int = 3) -> Order:
    return Order(np.concatenate([[0], np.cumsum(sizes)]), OrderKey(seed, batch, streams, window))


def epoch_ids(order: Order, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    return np.concatenate([order.ids(first + step) for step in range(order.steps_per_epoch)])


@pytest.mark.parametrize(("sizes", "batch", "streams", "window"), CASES)
def test_every_sample_at_most_once_and_n_mod_b_left_out(sizes, batch, streams, window):
    order = make(sizes, batch, streams, window)
    for epoch in range(4):
        ids = epoch_ids(order, epoch)
        assert len(ids) == sum(sizes) - sum(sizes) % batch
        assert len(set(ids.tolist())) == len(ids)
        assert ids.min() >= 0
        assert ids.max() < sum(sizes)


@pytest.mark.parametrize(("sizes", "batch", "streams", "window"), CASES)
def test_ranks_split_the_same_global_batch(sizes, batch, streams, window):
    whole = make(sizes, batch, streams, window)
    for position in (0, 1, 5, 17):
        for world in [w for w in (1, 2, 4, 8, 16) if batch % w == 0]:
            parts = [make(sizes, batch, streams, window).ids(position, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), whole.ids(position))


def test_a_position_needs_no_replay_and_epochs_differ():
    walked = make([40, 3, 77], 16, 4, 0)
    for position in range(40):
        last = walked.ids(position)
    assert np.array_equal(last, make([40, 3, 77], 16, 4, 0).ids(39))
    assert not np.array_equal(epoch_ids(walked, 0), epoch_ids(walked, 1))
    assert not np.array_equal(walked.ids(0), make([40, 3, 77], 16, 4, 0, seed=4).ids(0))


def test_the_left_out_samples_change_with_the_epoch():
    order = make([40, 3, 77, 9], 16, 4, 0)
    left_out = [frozenset(range(129)) - set(epoch_ids(order, epoch).tolist()) for epoch in range(10)]
    assert all(len(missing) == 1 for missing in left_out)
    assert len(set(left_out)) > 3


def test_ranks_share_no_shards_where_world_divides_streams():
    order = make([100] * 64, 64, 64, 0)
    shards = []
    for rank in range(4):
        ids = np.concatenate([order.ids(step, rank, 4) for step in range(order.steps_per_epoch)])
        shards.append(set((ids // 100).tolist()))
    shared = sum(len(shards[i] & shards[j]) for i in range(4) for j in range(i))
    assert shared <= 4  # only the shards that a cut between ranks runs through


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_permutation(n):
    out = permute(np.arange(n), np.full(n, n), np.uint64(n + 7))
    assert sorted(out.tolist()) == list(range(n))


def test_permute_looks_random():
    n = 10_000
    out = permute(np.arange(n), np.full(n, n), np.uint64(1))
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(out)) < 10) < 0.01


@pytest.mark.parametrize(("batch", "world"), [(128, 1), (128, 2), (128, 4), (96, 3), (100, 4), (7, 1), (512, 128)])
def test_chosen_streams_divide(batch, world):
    streams = choose_streams(batch, world)
    assert batch % streams == 0
    assert streams % world == 0


def test_streams_are_the_same_for_usual_rank_counts():
    assert len({choose_streams(256, world) for world in (1, 2, 4, 8, 16, 32, 64)}) == 1


def test_too_few_samples():
    with pytest.raises(ValueError, match="fewer"):
        make([5], 8, 1, 0)
    with pytest.raises(ValueError, match="divide"):
        make([50], 8, 3, 0)


def test_sample_random_depends_on_all_its_arguments():
    draws = {sample_random(*key).integers(1 << 60) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4
    assert sample_random(5, 6, 7).integers(1 << 60) == sample_random(5, 6, 7).integers(1 << 60)
