"""Norms of the gradients and the size of the coming update, between backward and step.

After StableAdamW's RMS_t = sqrt(mean(g^2 / max(v, eps^2))), which jumps some steps before a contrastive loss does,
where the second moments v have lost touch with the gradients g (Wortsman et al., arXiv:2304.13013, section 3). Here v
is that of before the step, and the quotient is taken of a parameter's means, not element by element:

    size(tower)^2 = sum_p n_p [mean_p(g^2) / max(mean_p(v), eps^2)] / sum_p n_p      over its parameters p, n_p elements

An element of an embedding whose word has not come for a while has a v of next to nothing: the mean of the quotients
would show how rare a batch's words are. And v after the step, which holds g^2 itself, would bound every quotient by
1 / (1 - beta2). Steady gradients give 1. Only sums over gradients and moments are read; nothing of their size is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.engine.zero import Fragment, Zero

TOWERS = ("image", "text")
BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class GradientStatistics:
    """What one look at the reduced gradients tells; the same on every rank.

    Attributes:
        norms: L2, by part of the model, before clipping.
        sizes: of the coming update, by tower, after clipping; without towers that have no second moments yet.
        not_finite: parameters whose gradient holds inf or nan.
    """

    norms: dict[str, float]
    sizes: dict[str, float]
    not_finite: tuple[str, ...]


def gradient_statistics(zero: Zero, grad_clip: float, want_sizes: bool) -> GradientStatistics:
    """One pass over the gradients and second moments of this rank, and one all-reduce of three numbers a parameter.

    Args:
        zero: between backward and step.
        grad_clip: the norm that the step will clip to; 0: it does not clip.
        want_sizes: whether the second moments are read at all.
    """
    numel = zero.numel(trained_only=True)
    sums = _sums(zero, numel, want_sizes)
    squares = sums[:, 0] / zero.loss_scale**2
    seconds, steps = sums[:, 1], round(float(sums[:, 2].max()))
    parts = [zero.module.part_of(name) for name in numel]
    norms = {
        part: float(squares[[i for i, other in enumerate(parts) if other == part]].sum().sqrt())
        for part in dict.fromkeys(parts)
    }
    not_finite = tuple(name for name, finite in zip(numel, squares.isfinite().tolist()) if not finite)
    sizes: dict[str, float] = {}
    if want_sizes and steps and not not_finite:
        group = zero.optimizer_settings
        clip = min(1.0, grad_clip / (math.sqrt(float(squares.sum())) + 1e-6)) if grad_clip else 1.0
        count = torch.tensor(list(numel.values()), dtype=torch.float64)
        expected = (seconds / (1 - group["betas"][1] ** steps)).clamp_min(count * group["eps"] ** 2)
        weight = count * (seconds > 0)  # no second moments: a parameter that has had no gradient yet
        quotients = weight * squares * clip**2 / expected
        for tower in TOWERS:
            rows = [i for i, part in enumerate(parts) if part == tower]
            if rows and float(weight[rows].sum()):
                sizes[tower] = math.sqrt(float(quotients[rows].sum() / weight[rows].sum()))
    return GradientStatistics(norms, sizes, not_finite)


@torch.no_grad()
def _sums(zero: Zero, numel: dict[str, int], want_seconds: bool) -> torch.Tensor:
    """float64 [P, 3] on the CPU: a parameter's sum of g^2 (loss scale included), of v, and the optimiser's steps."""
    row = {name: number for number, name in enumerate(numel)}
    sums = torch.zeros(len(numel), 3, dtype=torch.float64, device=zero.device)
    for pieces in _batches(fragment for fragment in zero.fragments() if fragment.trained):
        rows = torch.tensor([row[piece.name] for piece in pieces], device=zero.device)
        norms = torch._foreach_norm([zero.gradient(piece) for piece in pieces], 2, dtype=torch.float32)
        sums[:, 0].index_add_(0, rows, torch.stack(norms).to(sums).square())
        seconds = {i: zero.moments(piece).get("exp_avg_sq") for i, piece in enumerate(pieces)} if want_seconds else {}
        held = {i: second for i, second in seconds.items() if second is not None}
        if held:  # nothing is held before the first step
            some, kept = rows[list(held)], [pieces[i] for i in held]
            totals = torch._foreach_norm(list(held.values()), 1)  # second moments are not negative
            sums[:, 1].index_add_(0, some, torch.stack(totals).to(sums))
            shares = torch.tensor([piece.numel / numel[piece.name] for piece in kept]).to(sums)
            sums[:, 2].index_add_(0, some, shares * torch.as_tensor(zero.optimizer_steps(kept[0])).to(sums))
    # What all ranks hold: the mean leaves the sums as they are, and makes them alike to the last bit on all ranks.
    copies = rank_and_world()[1] if zero.stage == 0 else 1
    return (all_reduce_sum(sums) / copies).cpu()


def _batches(pieces: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """Of at most BATCH_ELEMENTS or one piece: stage 3 in half precision gives copies of its gradients."""
    batch: list[Fragment] = []
    size = 0
    for piece in pieces:
        if batch and size + piece.numel > BATCH_ELEMENTS:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.numel
    if batch:
        yield batch
