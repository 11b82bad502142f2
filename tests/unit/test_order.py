"""The order of samples: every property that the design promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.data.order import (
    MOST_PARTS,
    Order,
    OrderKey,
    choose_streams,
    next_position,
    permute,
    sample_uniforms,
    schedule,
    whole_parts,
)

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


def permute_one(n: int, key: int) -> np.ndarray:
    return permute(np.arange(n), np.array([n]), np.array([key], dtype=np.uint64), np.array([n]))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_permutation(n):
    assert sorted(permute_one(n, n + 7).tolist()) == list(range(n))


def test_permute_of_several_runs_is_each_on_its_own():
    sizes, keys = np.array([5, 1000, 3]), np.array([9, 1, 2**63 + 5], dtype=np.uint64)
    together = permute(np.concatenate([np.arange(n) for n in sizes]), sizes, keys, sizes)
    apart = [permute_one(int(n), int(key)) for n, key in zip(sizes, keys)]
    assert np.array_equal(together, np.concatenate(apart))


def test_permute_reaches_large_numbers():
    n = 10**15 + 37
    x = np.random.default_rng(0).integers(0, n, 5000)
    out = permute(x, np.array([n]), np.array([3], dtype=np.uint64), np.array([5000]))
    assert len(set(out.tolist())) == len(set(x.tolist()))
    assert (out >= 0).all()
    assert (out < n).all()
    assert abs(out.mean() / n - 0.5) < 0.02


def test_permute_looks_random():
    n = 10_000
    out = permute_one(n, 1)
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(out)) < 10) < 0.01
    assert np.mean(out == permute_one(n, 2)) < 0.002


def test_permutations_of_few_elements_are_all_about_as_likely():
    seen = {}
    for key in range(2400):
        order = tuple(permute_one(4, key * 7919).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert max(seen.values()) < 200  # of 100 each, were they drawn at random


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


def test_uniforms_depend_on_all_their_arguments():
    def draw(seed, epoch, sample_id):
        return sample_uniforms(seed, np.array([epoch]), np.array([sample_id]), 5)[0]

    rows = [draw(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert len({value for row in rows for value in row.tolist()}) == 20
    assert np.array_equal(draw(5, 6, 7), sample_uniforms(5, np.array([1, 6]), np.array([3, 7]), 9)[1, :5])


def test_uniforms_are_uniform():
    drawn = sample_uniforms(1, np.zeros(20_000, dtype=np.int64), np.arange(20_000), 4)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(np.quantile(drawn, [0.1, 0.5, 0.9], axis=0) - [[0.1], [0.5], [0.9]]).max() < 0.02
    assert np.abs(np.corrcoef(drawn.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.03


@st.composite
def orders(draw):
    """Shards of unequal sizes, few or many, some of them empty; B, V and w of every kind."""
    batch = draw(st.integers(1, 48))
    streams = draw(st.sampled_from([v for v in range(1, batch + 1) if batch % v == 0]))
    sizes = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= batch))
    return sizes, batch, streams, draw(st.integers(0, 40)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(orders(), st.data())
def test_any_order_holds_what_it_promises(described, data):
    order = make(*described[:4], seed=described[4])
    total, batch = sum(described[0]), described[1]
    epoch = data.draw(st.integers(0, 3))
    ids = epoch_ids(order, epoch)
    assert len(ids) == total - total % batch  # exactly N mod B are left out
    assert len(set(ids.tolist())) == len(ids)  # at most once an epoch
    assert ids.min() >= 0
    assert ids.max() < total
    # Any resume point, any rank count that divides B: the same rows.
    position = epoch * order.steps_per_epoch + data.draw(st.integers(0, order.steps_per_epoch - 1))
    world = data.draw(st.sampled_from([w for w in range(1, batch + 1) if batch % w == 0]))
    fresh = make(*described[:4], seed=described[4])
    parts = [fresh.draws(position, rank, world) for rank in range(world)]
    step = position - epoch * order.steps_per_epoch
    assert np.array_equal(np.concatenate([part.ids for part in parts]), ids[step * batch : (step + 1) * batch])
    assert all((part.epochs == epoch).all() for part in parts)


weights = st.lists(st.integers(1, 50), min_size=1, max_size=7)


@settings(max_examples=50, deadline=None)
@given(weights)
def test_every_prefix_of_a_mixture_has_its_shares_give_or_take_one(parts):
    total = sum(parts)
    counted = schedule(parts)
    for draws in range(2 * total + 1):
        counts = counted.counts(draws)
        assert counts.sum() == draws
        exact = draws * np.array(parts)
        assert (np.abs(counts * total - exact) < total).all(), (draws, counts)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_mixture_runs_epochs_of_each_source(data):
    sources = [
        data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)) for _ in range(data.draw(st.integers(1, 3)))
    ]
    parts = tuple(data.draw(st.integers(1, 9)) for _ in sources)
    batch = data.draw(st.sampled_from([4, 12, 24]))
    if sum(map(sum, sources)) < batch:
        return
    streams, window = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(0, 20))
    flat = [size for sizes in sources for size in sizes]
    bounds = np.concatenate([[0], np.cumsum([len(sizes) for sizes in sources])])
    ranges = list(zip(bounds[:-1].tolist(), bounds[1:].tolist()))
    starts = np.concatenate([[0], np.cumsum(flat)])
    order = Order(starts, OrderKey(data.draw(st.integers(0, 99)), batch, streams, window, parts), ranges)

    world = data.draw(st.sampled_from([1, 2, 4]))
    ids, epochs = [], []
    for position in range(40):
        parts_of_ranks = [order.draws(position, rank, world) for rank in range(world)]
        whole = order.draws(position)
        assert np.array_equal(np.concatenate([part.ids for part in parts_of_ranks]), whole.ids)
        ids.append(whole.ids)
        epochs.append(whole.epochs)
        drawn = np.concatenate(ids)
        for number, (first, end) in enumerate(ranges):
            mine = ((drawn >= starts[first]) & (drawn < starts[end])).sum()
            assert abs(mine - len(drawn) * parts[number] / sum(parts)) < 1
    drawn, when = np.concatenate(ids), np.concatenate(epochs)
    for first, end in ranges:
        mine = (drawn >= starts[first]) & (drawn < starts[end])
        count = int(starts[end] - starts[first])
        whole_streams = count - count % min(streams, count)
        for epoch in range(int(when[mine].max(initial=0)) + 1):
            of_epoch = drawn[mine & (when == epoch)]
            assert len(set(of_epoch.tolist())) == len(of_epoch)
            if epoch < when[mine].max():
                assert len(of_epoch) == whole_streams


def test_ranks_of_a_mixture_share_few_shards():
    starts = np.arange(0, 128001, 1000)
    order = Order(starts, OrderKey(0, 640, 32, 1000, (3, 1)), [(0, 64), (64, 128)])
    ids = [np.concatenate([order.ids(step, rank, 4) for step in range(40)]) for rank in range(4)]
    shards = [set((own // 1000).tolist()) for own in ids]
    assert not shards[0] & shards[2]
    assert not shards[1] & shards[3]
    assert sum(map(len, shards)) < 1.5 * len(set().union(*shards))


@pytest.mark.parametrize(
    ("weights", "parts"),
    [([3, 1], (3, 1)), ([0.1, 0.2], (1, 2)), ([0.5, 0.25, 0.25], (2, 1, 1)), ([6, 4], (3, 2)), ([1e-9, 1], (1, 65536))],
)
def test_weights_become_whole_parts(weights, parts):
    assert whole_parts(weights) == parts


def test_odd_weights_are_rounded_to_a_bounded_schedule():
    parts = whole_parts([400123457, 2905954, 0.37])
    assert sum(parts) <= MOST_PARTS + len(parts)
    assert min(parts) == 1
    assert abs(parts[1] / parts[0] - 2905954 / 400123457) < 1e-5


@given(st.integers(0, 40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=6))
def test_the_next_position_is_the_first_that_is_not_skipped(position, ranges):
    outside = [p for p in range(position, 82) if not any(first <= p < end for first, end in ranges)]
    assert next_position(position, [list(pair) for pair in ranges]) == outside[0]
