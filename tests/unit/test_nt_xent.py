"""NT-Xent in one process against its definition in float64, and wrong ones that the comparison finds out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipdist.errors import UserError
from clipdist.losses.global_batch import NonFiniteFeatures, global_statistics
from clipdist.losses.nt_xent import nt_xent
from clipdist.losses.tiles import Tile

VALID = torch.ones(37, dtype=torch.bool)
VALID[[3, 20]] = False


def dense(first, second, temperature, valid=None, partner=None, leave_out=None):
    """The definition on the whole matrix, in the dtype of the features, by autograd.

    `partner` and `leave_out` (rows, columns) make it a wrong one.
    """
    if valid is not None:
        first, second = first[valid], second[valid]
    views = F.normalize(torch.cat([first, second]), dim=1)
    rows = torch.arange(len(views))
    s = views @ views.T / temperature
    left_out = torch.eye(len(views), dtype=torch.bool)
    if leave_out is not None:
        left_out = torch.zeros_like(left_out)
        left_out[leave_out(rows)] = True
    partner = (rows + len(first)) % len(views) if partner is None else partner(rows)
    return F.cross_entropy(s.masked_fill(left_out, -torch.inf), partner)


def draw(b=37, d=19, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(b, d, generator=generator) + 0.3
    return first, 2 * first + 2 * noise * torch.randn(b, d, generator=generator)


def value_and_gradients(function, inputs, dtype=torch.float32, **options):
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    value = function(*leaves, **options)
    value = value[0] if isinstance(value, tuple) else value
    value.backward()
    return [value.detach().double(), *(x.grad.double() for x in leaves)]


def worst(found, exact):
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact))


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made within it."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.element_size() for x in tensors}
            for tensors in ([x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in (args, result))
        )
        self.elements = max([self.elements, *(size for storage, size in made.items() if storage not in given)])
        return result


@pytest.mark.parametrize("side", [1, 5, 16, 37, 40, 1000])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.015])
def test_value_and_gradients_are_those_of_the_definition(side, valid, temperature):
    inputs, options = draw(), {"temperature": temperature, "valid": valid}
    found = value_and_gradients(nt_xent, inputs, tile=Tile(side, side + 3), **options)
    exact = value_and_gradients(dense, inputs, torch.float64, **options)
    assert worst(found, exact) < 3e-6


@pytest.mark.parametrize("noise", [0.1, 0.01])
@pytest.mark.parametrize("temperature", [0.1, 0.05])
def test_a_small_loss_is_as_exact_as_a_large_one(noise, temperature):
    inputs, options = draw(d=64, noise=noise), {"temperature": temperature}
    exact = value_and_gradients(dense, inputs, torch.float64, **options)
    assert exact[0] < 2e-2
    ours = worst(value_and_gradients(nt_xent, inputs, **options), exact)
    theirs = worst(value_and_gradients(dense, inputs, **options), exact)
    assert ours < 3e-6
    assert ours <= max(1.5 * theirs, 1e-6)


WRONG = {
    "a positive for views that alternate": {"partner": lambda rows: rows ^ 1},
    "the view itself among the negatives": {"leave_out": lambda rows: (rows[:0], rows[:0])},
    "the view that alternate order has beside it left out": {"leave_out": lambda rows: (rows, rows ^ 1)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_one_is_found_out(wrong):
    inputs = draw(b=36)
    found = value_and_gradients(nt_xent, inputs, temperature=0.2)
    assert worst(found, value_and_gradients(dense, inputs, torch.float64, temperature=0.2)) < 3e-6
    assert worst(found, value_and_gradients(dense, inputs, torch.float64, temperature=0.2, **WRONG[wrong])) > 1e-2


def test_views_that_agree_have_a_loss_far_below_that_of_chance():
    """With positives of another order of the views the loss never falls below about ln(2N - 1)."""
    first, _ = draw(b=64, d=256)
    value, statistics = nt_xent(first, first.clone(), 0.05)
    assert value < 0.01
    assert dense(first, first, 0.05, partner=lambda rows: rows ^ 1) > math.log(2 * 64 - 1)
    assert global_statistics(statistics) == {"valid": 64, "batch_views_r1": 100}


def test_accuracy_counts_views_that_are_nearest_to_their_other_view():
    first = torch.eye(4)
    second = first[[0, 1, 3, 2]] + 0.01 * torch.ones(4, 4)  # the last two samples are mistaken for one another
    for side in (1, 3, 8):
        statistics = nt_xent(first, second, 0.1, tile=Tile(side, side))[1]
        assert global_statistics(statistics)["batch_views_r1"] == 50
    statistics = nt_xent(first, second, 0.1, valid=torch.tensor([True, True, True, False]))[1]
    assert global_statistics(statistics)["batch_views_r1"] == pytest.approx(100 * 2 / 3)


def test_rows_that_are_not_valid_take_no_part():
    first, second = draw()
    plain = value_and_gradients(nt_xent, (first, second), temperature=0.2, valid=VALID)
    first, second = first.clone(), second.clone()
    first[~VALID], second[~VALID] = 1e6, -1e6
    moved = value_and_gradients(nt_xent, (first, second), temperature=0.2, valid=VALID)
    for a, b in zip(plain, moved):
        assert torch.equal(a, b)
    assert plain[1][~VALID].abs().max() == 0
    assert plain[2][~VALID].abs().max() == 0


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_batch_of_few_samples_is_finite(keep):
    valid = torch.arange(37) < keep
    found = value_and_gradients(nt_xent, draw(), temperature=0.1, valid=valid)
    assert all(bool(torch.isfinite(x).all()) for x in found)
    if keep < 2:
        assert max(float(x.abs().max()) for x in found) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_have_fp32_logits_and_half_gradients(dtype):
    first, second = (x.to(dtype).requires_grad_() for x in draw())
    value, _ = nt_xent(first, second, 0.1)
    value.backward()
    exact = value_and_gradients(dense, (first, second), torch.float64, temperature=0.1)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(exact[0]), rel=1e-6)
    assert first.grad.dtype == second.grad.dtype == dtype
    assert worst([first.grad.double(), second.grad.double()], exact[1:]) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_bad_input():
    first, second = draw()
    with pytest.raises(UserError, match=r"temperature=0\.01: must be at least 0\.0143"):
        nt_xent(first, second, 0.01)
    for wrong in (second[:5], second[:, :7], second.bfloat16()):
        with pytest.raises(UserError, match="do not fit together"):
            nt_xent(first, wrong, 0.1)
    second = second.clone()
    second[[2, 4], 1] = torch.nan
    with pytest.raises(NonFiniteFeatures, match=r"rank 0: 2 rows of the second view$"):
        nt_xent(first, second, 0.1)


def test_memory_is_that_of_the_features():
    """No tensor is as large as the matrix of similarities, forward and backward."""
    first, second = (x.requires_grad_() for x in draw(b=400, d=8))
    with LargestTensor() as largest:
        nt_xent(first, second, 0.1, tile=Tile(64, 64))[0].backward()
    assert 64 * 64 <= largest.elements <= 2 * 400 * 8
