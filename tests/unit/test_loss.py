"""InfoNCE in one process against the dense formula in float64; several processes are tests/dist's matter."""

from __future__ import annotations

import math

import pytest
import torch

from clipdist.loss.contrastive import global_statistics, info_nce


def dense(images, texts, t, valid=None, group_id=None):
    """The definition, written out row by row in float64."""
    images, texts, t = images.double(), texts.double(), t.double()
    keep = range(len(images)) if valid is None else valid.nonzero().flatten().tolist()
    group = list(range(len(images))) if group_id is None else group_id.tolist()
    cosine = torch.nn.functional.cosine_similarity
    total = torch.zeros((), dtype=torch.float64)
    for i in keep:
        positive = [j for j in keep if group[j] == group[i]]
        row = {j: t.exp()[0] * cosine(images[i], texts[j], dim=0) for j in keep}
        column = {j: t.exp()[0] * cosine(images[j], texts[i], dim=0) for j in keep}
        for logits in (row, column):
            lse = torch.stack(list(logits.values())).logsumexp(0)
            total = total + lse - sum(logits[j] for j in positive) / len(positive)
    return total / (2 * len(keep))


def draw(b=6, d=8, dtype=torch.float32, t=2.0):
    torch.manual_seed(1)
    images = torch.randn(b, d, requires_grad=True)
    texts = torch.randn(b, d, requires_grad=True)
    scale = torch.tensor([t], requires_grad=True)
    return images, texts, scale, dtype


CASES = {
    "plain": (None, None),
    "masked": (torch.tensor([1, 1, 0, 1, 0, 1]).bool(), None),
    "groups": (None, torch.tensor([5, 7, 5, 9, 7, 5])),
    "masked groups": (torch.tensor([1, 0, 1, 1, 1, 1]).bool(), torch.tensor([5, 7, 5, 9, 7, 5])),
    "one valid": (torch.tensor([0, 0, 0, 1, 0, 0]).bool(), None),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("t", [0.0, 2.659, math.log(100)])
def test_value_and_gradients_are_those_of_the_definition(case, t):
    valid, group_id = CASES[case]
    images, texts, scale, _ = draw(t=t)
    value, _ = info_nce(images, texts, scale, valid=valid, group_id=group_id)
    ours = torch.autograd.grad(value, (images, texts, scale))
    expected = dense(images, texts, scale, valid, group_id)
    theirs = torch.autograd.grad(expected, (images, texts, scale), allow_unused=True)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)


def test_masked_rows_get_no_gradient_and_give_none():
    images, texts, scale, _ = draw()
    valid = CASES["masked"][0]
    value, _ = info_nce(images, texts, scale, valid=valid)
    gradient, *_ = torch.autograd.grad(value, (images, texts))
    assert gradient[~valid].abs().max() == 0
    assert gradient[valid].abs().min() > 0
    moved = images.detach().clone()
    moved[~valid] = 1e6
    assert info_nce(moved, texts, scale, valid=valid)[0].item() == value.item()


def test_a_batch_without_valid_rows_is_zero_and_finite():
    images, texts, scale, _ = draw()
    value, statistics = info_nce(images, texts, scale, valid=torch.zeros(6, dtype=torch.bool))
    gradients = torch.autograd.grad(value, (images, texts, scale))
    assert value.item() == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert global_statistics(value, statistics)["valid"] == 0


def test_equal_captions_are_positives_only_where_ids_say_so():
    images, texts, scale, _ = draw()
    same = torch.zeros(6, dtype=torch.int64)
    apart, _ = info_nce(images, texts, scale, group_id=torch.arange(6))
    assert apart.item() == info_nce(images, texts, scale)[0].item()
    assert info_nce(images, texts, scale, group_id=same)[0].item() != pytest.approx(apart.item(), abs=1e-3)


def test_temperature_is_read_as_at_most_its_bound():
    images, texts, _, _ = draw()
    at_bound, _ = info_nce(images, texts, torch.tensor([math.log(100)]))
    above, _ = info_nce(images, texts, torch.tensor([9.0]))
    assert above.item() == at_bound.item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_summed_in_fp32(dtype):
    images, texts, scale, _ = draw(b=64, d=32)
    images, texts = images.to(dtype), texts.to(dtype)
    value, _ = info_nce(images, texts, scale)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(dense(images, texts, scale).item(), rel=1e-5)


def test_statistics_count_rows_whose_best_candidate_is_a_positive():
    features = torch.eye(4)
    value, statistics = info_nce(features, features[[0, 1, 3, 2]], torch.tensor([2.0]))
    numbers = global_statistics(value, statistics)
    assert numbers["batch_i2t_r1"] == 50
    assert numbers["batch_t2i_r1"] == 50
    assert numbers["loss"] == pytest.approx(value.item())
