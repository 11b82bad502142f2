"""Compute what DINO and iBOT need of prototypes: targets of the teacher, the cross-entropy with them, their balance.

    target      p = softmax( (g - c) / tau_t )                    g: logits of the teacher, c: a centre [P]
    loss        H = - sum_k p_k log softmax( s / tau_s )_k        s: logits of the student

(Caron et al., arXiv:2104.14294, eq. 1.) The centre keeps all samples from choosing one prototype. It is an average of
the teacher's logits over all valid rows of all ranks, or what Sinkhorn-Knopp gives for the rows of one step (Caron et
al., arXiv:2006.09882, section 3.1; Oquab et al., arXiv:2304.07193, section 4).

A rank may have any number of rows. What is as large as the logits is made in chunks of rows, but for the targets.

Shapes: n rows of this rank, R of a chunk, P prototypes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, all_reduce_logsumexp, all_reduce_sum
from clipdist.losses.global_batch import NonFiniteFeatures, chunks
from clipdist.losses.tiles import choose_tile


def prototype_cross_entropy(
    student: Tensor, targets: Sequence[Tensor], temperature: float, weight: Tensor | None = None
) -> Tensor:
    """Return sum_i weight_i sum_t H(target_t,i, student_i), an fp32 scalar, differentiable. Not collective.

    Args:
        student: logits s, [n, P], any float dtype.
        targets: p of every teacher's view that is compared with this one, fp32 [n, P] each.
        temperature: tau_s.
        weight: fp32 [n], 0 for rows that are not valid: 1, or in iBOT 1 / the masked patches of the row's image; the
            caller divides by the count of all ranks. None: 1 for all rows.
    """
    if weight is None:
        weight = torch.ones(len(student), device=student.device)
    return _CrossEntropy.apply(student, weight, temperature, *targets)


class _CrossEntropy(torch.autograd.Function):
    """Autograd function that keeps the logits, the targets and the rows' log-sum-exps, and no other [n, P]."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor, temperature: float, *targets: Tensor) -> Tensor:
        total = weight.new_zeros((), dtype=torch.float64)
        normaliser = torch.empty_like(weight)
        for rows in _row_chunks(student):
            logits = student[rows].float() / temperature
            normaliser[rows] = logits.logsumexp(1)
            for target in targets:
                terms = normaliser[rows] - torch.linalg.vecdot(target[rows], logits)
                total += torch.where(weight[rows] > 0, weight[rows] * terms, 0.0).double().sum()
        ctx.save_for_backward(student, weight, normaliser, *targets)
        ctx.temperature = temperature
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, weight, normaliser, *targets = ctx.saved_tensors
        gradient = torch.empty_like(student)
        for rows in _row_chunks(student):
            slope = (student[rows].float() / ctx.temperature).sub_(normaliser[rows, None]).exp_().mul_(len(targets))
            for target in targets:
                slope -= target[rows]
            gradient[rows] = slope.mul_((grad / ctx.temperature * weight[rows])[:, None])
        return gradient, None, None, *[None] * len(targets)


@torch.no_grad()
def soft_targets(teacher: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Return p, fp32 [n, P].

    Args:
        teacher: logits g, [n, P], any float dtype.
        centre: c, fp32 [P].
        temperature: tau_t.
    """
    targets = torch.empty_like(teacher, dtype=torch.float32)
    for rows in _row_chunks(teacher):
        torch.softmax((teacher[rows].float() - centre).div_(temperature), dim=1, out=targets[rows])
    return targets


@torch.no_grad()
def sum_rows(teacher: Tensor, valid: Tensor) -> Tensor:
    """Return the sum of the logits [n, P] over valid rows (bool [n]), and their number after it: float64 [P + 1].

    Those of several views, and of micro-batches, may be added.
    """
    total = torch.zeros(teacher.shape[1] + 1, dtype=torch.float64, device=teacher.device)
    for rows in _row_chunks(teacher):
        total[:-1] += torch.where(valid[rows, None], teacher[rows].float(), 0.0).sum(0)
    total[-1] = valid.sum()
    return total


@torch.no_grad()
def update_centre(
    centre: Tensor, sums: Tensor, momentum: float, *, process_group: ProcessGroup | None = None
) -> Tensor:
    """Return momentum * c + (1 - momentum) * the mean over the valid rows of all ranks, fp32 [P]. Collective.

    Args:
        centre: c, fp32 [P]; not changed.
        sums: see sum_rows. Without a valid row the centre stays as it is.
    """
    sums = all_reduce_sum(sums, process_group)
    moved = momentum * centre.double() + (1 - momentum) * sums[:-1] / sums[-1].clamp(min=1)
    return torch.where(sums[-1] > 0, moved, centre.double()).float()


@torch.no_grad()
def sinkhorn_centre(
    logits: Callable[[slice], Tensor],
    valid: Tensor,
    prototypes: int,
    temperature: float,
    *,
    iterations: int = 3,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Return the centre whose targets are those of Sinkhorn-Knopp over the valid rows of all ranks. Collective.

    Sinkhorn-Knopp begins with exp(g / tau), and divides in turn by the sums of prototypes and by those of samples.
    So its result is exp(g_ik / tau) a_i b_k with rows that sum to 1: the softmax of (g - c) / tau with c = -tau log b.
    All is in the logarithm, where nothing overflows and no maximum need be subtracted. Each iteration computes the
    logits anew.

    Args:
        logits: returns g of the rows of a slice of 0 .. n, [R, P], any float dtype; called `iterations` times for each.
            It is not collective: ranks may have different numbers of rows.
        valid: bool [n].
        prototypes: P.
        temperature: tau_t.

    Returns:
        fp32 [P], the same on all ranks; 0 if no row is valid.

    Raises:
        NonFiniteFeatures: logits of valid rows contain inf or nan; on every rank.
    """
    tile = choose_tile(valid.device)
    parts = chunks(len(valid), max(1, tile.rows * tile.columns // prototypes))
    log_factor = torch.zeros(prototypes, dtype=torch.float64, device=valid.device)
    for iteration in range(iterations):
        sums, bad = torch.full_like(log_factor, -torch.inf), valid.new_zeros(1, dtype=torch.int64)
        for rows in parts:
            scaled = logits(rows).float() / temperature
            if iteration:
                scaled -= (scaled + log_factor.float()).logsumexp(1, keepdim=True)
            else:
                bad += (valid[rows] & ~scaled.sum(1).isfinite()).sum()
            scaled.masked_fill_(~valid[rows, None], -torch.inf)
            sums = torch.logaddexp(sums, scaled.logsumexp(0).double())
        if not iteration:
            _check_rows(bad, process_group)
        sums = all_reduce_logsumexp(sums, process_group)
        log_factor = torch.where(sums.isfinite(), sums.mean() - sums, 0.0)  # a common factor cancels
    return (-temperature * log_factor).float()


def _check_rows(bad: Tensor, group: ProcessGroup | None) -> None:
    """Raise NonFiniteFeatures on every rank if one has rows that are not finite, int64 [1]. Collective."""
    where = [(rank, "the teacher's logits", rows) for rank, rows in enumerate(all_gather(bad, group).tolist()) if rows]
    if where:
        raise NonFiniteFeatures(where)


def _row_chunks(logits: Tensor) -> list[slice]:
    tile = choose_tile(logits.device)
    return chunks(len(logits), max(1, tile.rows * tile.columns // max(logits.shape[1], 1)))
