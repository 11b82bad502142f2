"""MoCo's loss, its queue and MoCo v3's loss in one process against their definitions, and against wrong ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from unit.test_nt_xent import draw, value_and_gradients, worst

from clipdist.errors import UserError
from clipdist.losses.global_batch import NonFiniteFeatures, global_statistics
from clipdist.losses.momentum_contrast import contrast_batch, contrast_queue, empty_queue, enqueue
from clipdist.losses.tiles import Tile

VALID = torch.arange(37) % 9 != 4


def dense_queue(queries, keys, negatives, temperature, valid=None):
    """The sum over samples of the definition, in the dtype of the queries, by autograd."""
    valid = torch.ones(len(queries), dtype=torch.bool) if valid is None else valid
    queries, keys = F.normalize(queries, dim=1), F.normalize(keys.to(queries.dtype), dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ negatives.to(queries.dtype).T], dim=1)
    return (F.cross_entropy(logits / temperature, torch.zeros(len(logits)).long(), reduction="none") * valid).sum()


def dense_batch(queries, keys, temperature, valid=None):
    valid = torch.ones(len(queries), dtype=torch.bool) if valid is None else valid
    queries, keys = F.normalize(queries[valid], dim=1), F.normalize(keys[valid].to(queries.dtype), dim=1)
    return 2 * temperature * F.cross_entropy(queries @ keys.T / temperature, torch.arange(len(keys)))


def filled(keys, size=64):
    return enqueue(empty_queue(size, keys.shape[1]), keys)


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(7, 16), None])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("temperature", [0.2, 0.07, 0.015])
@pytest.mark.parametrize("number", [64, 40, 0])
def test_the_queue_is_contrasted_as_defined(tile, valid, temperature, number):
    """Full, filled in part, and empty: places without a key are no negatives."""
    queries, keys = draw()
    others = draw(b=max(number, 1), seed=1)[0][:number]
    state, options = filled(others), {"temperature": temperature, "valid": valid}
    found = value_and_gradients(lambda x: contrast_queue(x, keys, state, tile=tile, **options), [queries])
    negatives = F.normalize(others.double(), dim=1)
    exact = value_and_gradients(lambda x: dense_queue(x, keys, negatives, **options), [queries], torch.float64)
    if number:
        assert worst(found, exact) < 3e-6
    else:
        assert max(float(x.abs().max()) for x in found) == 0


@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(7, 16), None])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 0.015])
def test_the_keys_of_the_batch_are_contrasted_as_defined(tile, valid, temperature):
    queries, keys = draw()
    options = {"temperature": temperature, "valid": valid}
    found = value_and_gradients(lambda x: contrast_batch(x, keys, tile=tile, **options), [queries])
    exact = value_and_gradients(lambda x: dense_batch(x, keys, **options), [queries], torch.float64)
    assert worst(found, exact) < 3e-6


def test_keys_get_no_gradient():
    for loss in (lambda *x: contrast_batch(*x, 0.2), lambda *x: contrast_queue(*x, filled(draw(seed=1)[0]), 0.2)):
        queries, keys = (x.requires_grad_() for x in draw())
        loss(queries, keys)[0].backward()
        assert queries.grad.abs().min(1).values.max() > 0
        assert keys.grad is None


def test_samples_add_up_over_micro_batches():
    queries, keys = draw()
    state = filled(draw(seed=1)[0])

    def of_rows(rows):
        loss = partial(contrast_queue, keys=keys[rows], state=state, temperature=0.1, valid=VALID[rows])
        return value_and_gradients(loss, [queries[rows]])

    whole, parts = of_rows(slice(0, 37)), [of_rows(slice(0, 10)), of_rows(slice(10, 37))]
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole[0]), rel=1e-6)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1], rtol=1e-5, atol=1e-7)


def test_a_positive_already_among_the_negatives_is_found_out():
    """Enqueued before the loss instead of after it."""
    queries, keys = draw()
    before = filled(draw(seed=1)[0])
    negatives = before["queue"][:37].double()
    exact = value_and_gradients(lambda x: dense_queue(x, keys, negatives, 0.2), [queries], torch.float64)
    found = value_and_gradients(lambda x: contrast_queue(x, keys, before, 0.2), [queries])
    early = value_and_gradients(lambda x: contrast_queue(x, keys, enqueue(before, keys), 0.2), [queries])
    assert worst(found, exact) < 3e-6
    assert worst(early, exact) > 1e-2


def test_keys_follow_one_another_in_a_ring():
    """Batches that do not divide the queue, the last of them smaller; rows that are not valid leave no place free."""
    state, expected, at = empty_queue(10, 5), torch.zeros(10, 5), 0
    for step, rows in enumerate([4, 4, 4, 3, 10, 1]):
        keys = torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))
        valid = torch.arange(rows) != 1
        old = {name: value.clone() for name, value in state.items()}
        new = enqueue(state, keys, valid=valid)
        assert all(torch.equal(state[name], old[name]) for name in old)  # a step that is left out keeps its queue
        for key in F.normalize(keys[valid], dim=1):
            expected[at % 10] = key
            at += 1
        state = new
        torch.testing.assert_close(state["queue"], expected)
        assert (state["pointer"].tolist(), state["fill"].tolist()) == ([at % 10], [min(at, 10)])


def test_a_slice_that_ends_with_the_queue_is_found_out():
    """queue[pointer : pointer + B] = keys loses what is beyond the end, or fails."""
    keys = torch.randn(14, 5, generator=torch.Generator().manual_seed(0))
    state = enqueue(enqueue(empty_queue(10, 5), keys[:7]), keys[7:])
    torch.testing.assert_close(state["queue"], F.normalize(torch.cat([keys[10:], keys[4:10]]), dim=1))
    assert state["pointer"].tolist() == [4]


def test_accuracy_counts_queries_whose_own_key_is_nearest():
    queries, keys = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    statistics = contrast_batch(queries, keys, 0.2)[1]
    assert global_statistics(statistics) == {"valid": 4, "batch_keys_r1": 50}
    state = filled(torch.eye(4)[2:], size=4)
    statistics = contrast_queue(queries, torch.eye(4) + 0.1, state, 0.2, valid=torch.arange(4) > 0)[1]
    assert {name: float(value) for name, value in statistics.items()} == {"valid": 3, "correct_keys": 1}


def test_half_precision_queries():
    queries, keys = (x.bfloat16() for x in draw())
    state = filled(draw(seed=1)[0])
    for function, exact in (
        (lambda x: contrast_queue(x, keys, state, 0.2), lambda x: dense_queue(x, keys, state["queue"][:37], 0.2)),
        (lambda x: contrast_batch(x, keys, 0.2), lambda x: dense_batch(x, keys, 0.2)),
    ):
        found = value_and_gradients(function, [queries], torch.bfloat16)
        reference = value_and_gradients(exact, [queries], torch.float64)
        assert float(found[0]) == pytest.approx(float(reference[0]), rel=1e-6)
        assert worst(found, reference) < 4e-3


def test_bad_input():
    queries, keys = draw()
    with pytest.raises(UserError, match=r"temperature=0: must be at least 0\.0143"):
        contrast_batch(queries, keys, 0)
    with pytest.raises(UserError, match=r"temperature=-1: must"):
        contrast_queue(queries, keys, empty_queue(8, 19), -1)
    keys[3] = torch.nan
    with pytest.raises(NonFiniteFeatures, match=r"rank 0: 1 rows of the keys$"):
        contrast_batch(queries, keys, 0.2)
    assert contrast_queue(queries, keys, filled(draw(seed=1)[0]), 0.2)[0].isnan()  # a sum: the step's guard sees it
