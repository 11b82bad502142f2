"""The loss of DINO and iBOT, its centre and Sinkhorn-Knopp against their definitions, and against wrong ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from unit.test_nt_xent import LargestTensor

from clipdist.losses import prototypes, tiles
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.prototypes import (
    prototype_cross_entropy,
    sinkhorn_centre,
    soft_targets,
    sum_rows,
    update_centre,
)

VALID = torch.arange(40) % 7 != 3


def draw(n=40, p=23, seed=0, size=1.0):
    return size * torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of five rows each."""
    monkeypatch.setattr(prototypes, "choose_tile", lambda device: tiles.Tile(23, 5))


def test_cross_entropy_is_that_of_the_definition():
    student, teachers, centre = draw(), [draw(seed=1), draw(seed=2)], draw(1, seed=3)[0]
    weight = VALID / torch.arange(1, 41)
    leaf = student.clone().requires_grad_()
    targets = [soft_targets(teacher, centre, 0.07) for teacher in teachers]
    value = prototype_cross_entropy(leaf, targets, 0.1, weight)
    (3 * value).backward()
    exact = student.double().requires_grad_()
    expected = sum(
        -(((teacher - centre).double() / 0.07).softmax(1) * (exact / 0.1).log_softmax(1)).sum(1) @ weight.double()
        for teacher in teachers
    )
    (3 * expected).backward()
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert (leaf.grad.double() - exact.grad).norm() < 3e-6 * exact.grad.norm()
    assert leaf.grad[~VALID].abs().max() == 0
    assert float(prototype_cross_entropy(student, targets[:1], 0.1)) == pytest.approx(
        float(F.cross_entropy(student / 0.1, targets[0], reduction="sum")), rel=1e-6
    )


def test_the_forward_pass_copies_no_logits():
    """What it makes is as large as a chunk of rows; the backward pass makes the gradient alone."""
    student, targets = draw().requires_grad_(), [soft_targets(draw(seed=1), torch.zeros(23), 0.07)]
    with LargestTensor() as made:
        value = prototype_cross_entropy(student, targets, 0.1)
    assert made.elements == 5 * 23
    with LargestTensor() as made:
        value.backward()
    assert made.elements == 40 * 23


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    student, teacher = draw().to(dtype), draw(seed=1).to(dtype)
    targets = soft_targets(teacher, torch.zeros(23), 0.04)
    leaf = student.clone().requires_grad_()
    value = prototype_cross_entropy(leaf, [targets], 0.1)
    value.backward()
    exact = student.double().requires_grad_()
    expected = F.cross_entropy(exact / 0.1, (teacher.double() / 0.04).softmax(1), reduction="sum")
    expected.backward()
    assert targets.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert leaf.grad.dtype == dtype
    assert (leaf.grad.double() - exact.grad).norm() < (4e-3 if dtype == torch.bfloat16 else 1e-3) * exact.grad.norm()


def test_rows_without_weight_may_hold_anything_and_none_may_be_there():
    student = draw()
    student[~VALID] = 1e30
    value = prototype_cross_entropy(student, [soft_targets(draw(seed=1), torch.zeros(23), 0.07)], 0.1, VALID.float())
    assert value.isfinite()
    leaf = torch.zeros(0, 23, requires_grad=True)
    value = prototype_cross_entropy(leaf, [soft_targets(torch.zeros(0, 23), torch.zeros(23), 0.07)], 0.1)
    value.backward()
    assert value == 0


def test_the_centre_moves_towards_the_mean_of_all_valid_rows():
    centre, teacher, other = draw(1, seed=3)[0], draw(seed=1), draw(12, seed=2)
    sums = sum_rows(teacher, VALID) + sum_rows(other, torch.ones(12, dtype=torch.bool))
    moved = update_centre(centre, sums, 0.9)
    mean = torch.cat([teacher[VALID], other]).double().mean(0)
    torch.testing.assert_close(moved, (0.9 * centre.double() + 0.1 * mean).float())
    assert torch.equal(update_centre(centre, sum_rows(teacher, VALID & ~VALID), 0.9), centre)
    # Errors of other code: the sum of patches [1, n, P] divided by their length 1; the mean of the parts' means.
    patches = torch.cat([teacher[VALID], other])[None]
    for wrong in (patches.sum(1)[0] / len(patches), (teacher[VALID].mean(0) + other.mean(0)) / 2):
        assert not torch.allclose(moved, 0.9 * centre + 0.1 * wrong, rtol=1e-2)


def dense_sinkhorn(logits, temperature, iterations=3, shift=lambda scaled: scaled.max()):
    """Targets [n, P] as published, on the whole matrix: exp, then prototypes and samples in turn.

    The logits are shifted by their largest one. Another shift makes it a wrong one.
    """
    scaled = logits / temperature
    q = (scaled - shift(scaled)).exp().T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * len(q)
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T


def sinkhorn_targets(logits, temperature, valid=None, **options):
    valid = torch.ones(len(logits), dtype=torch.bool) if valid is None else valid
    centre = sinkhorn_centre(lambda rows: logits[rows], valid, logits.shape[1], temperature, **options)
    assert centre.dtype == torch.float32
    return soft_targets(logits, centre, temperature).double()


@pytest.mark.parametrize("temperature", [0.07, 0.04, 0.5])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("valid", [None, VALID])
def test_sinkhorn_gives_the_published_targets(temperature, iterations, valid):
    logits = draw(size=0.3) + draw(1, seed=5)  # some prototypes are preferred by all
    found = sinkhorn_targets(logits, temperature, valid, iterations=iterations)
    kept = slice(None) if valid is None else valid
    exact = dense_sinkhorn(logits[kept].double(), temperature, iterations)
    assert (found[kept] - exact).norm() < 2e-5 * exact.norm()


def test_rows_that_are_not_valid_do_not_count_in_sinkhorn():
    logits = draw()
    found = sinkhorn_targets(logits, 0.1, VALID)
    logits[~VALID] = torch.nan
    assert torch.equal(sinkhorn_targets(logits, 0.1, VALID)[VALID], found[VALID])
    assert (found - sinkhorn_targets(draw(), 0.1)).norm() > 1e-3


def test_sinkhorn_neither_overflows_nor_is_it_that_of_a_shift_by_rows():
    logits = draw(size=0.5) + torch.linspace(0, 2, 40)[:, None] + 900.0  # fp32: exp(900 / 0.07) is inf
    exact = dense_sinkhorn(logits.double(), 0.07)
    assert exact.isfinite().all()
    assert dense_sinkhorn(logits, 0.07, shift=lambda scaled: 0).isnan().any()
    assert (sinkhorn_targets(logits, 0.07) - exact).norm() < 1e-3 * exact.norm()  # at 900 fp32 has steps of 6e-5
    by_rows = dense_sinkhorn(logits.double(), 0.07, shift=lambda scaled: scaled.amax(1, keepdim=True))
    assert (by_rows - exact).norm() > 1e-2 * exact.norm()
    assert sinkhorn_targets(1e4 * draw(), 0.04).isfinite().all()


def test_sinkhorn_takes_the_logits_in_chunks_of_rows():
    logits, asked = draw(), []

    def part(rows):
        asked.append(rows)
        return logits[rows]

    sinkhorn_centre(part, VALID, 23, 0.1)
    assert asked == 3 * [slice(start, start + 5) for start in range(0, 40, 5)]


def test_sinkhorn_without_rows_and_with_bad_ones():
    assert torch.equal(sinkhorn_centre(lambda rows: draw(), VALID[:0], 23, 0.1), torch.zeros(23))
    assert torch.equal(sinkhorn_centre(lambda rows: draw()[rows], VALID & ~VALID, 23, 0.1), torch.zeros(23))
    logits = draw()
    logits[[0, 8], 2] = torch.inf
    with pytest.raises(NonFiniteFeatures, match=r"rank 0: 2 rows of the teacher's logits$"):
        sinkhorn_centre(lambda rows: logits[rows], VALID, 23, 0.1)
