"""Measure gradient norms and the size of the next update, between backward pass and optimiser step.

The update size follows StableAdamW's RMS_t = sqrt(mean(g^2 / max(v, eps^2))), which rises some steps before a
contrastive loss does, where the second moments v lag behind the gradients g (Wortsman et al., arXiv:2304.13013,
section 3). Here v is that before the step, and the quotient is that of a parameter's means:

    size(tower)^2 = sum_p n_p [mean_p(g^2) / max(mean_p(v), eps^2)] / sum_p n_p      over its parameters p, n_p elements

Stationary gradients give 1. The mean of element-wise quotients would measure how rare the words of a batch are, since
v of an embedding decays while its word does not occur; v after the step contains g^2 and bounds the quotient by
1 / (1 - beta2). Only sums are computed: no temporary tensor is as large as the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from clipdist import config
from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.distributed.rank import upload
from clipdist.engine.fragment import Fragment
from clipdist.engine.zero import Zero

TOWERS = ("image", "text")
BATCH_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class GradientStatistics:
    """Statistics of the reduced gradients of one step, the same on every rank.

    Attributes:
        norms: L2 norms by part of the model, before clipping.
        sizes: update sizes by tower, after clipping; without towers that have no second moments yet.
        not_finite: names of parameters whose gradient contains inf or nan.
        loss: the global loss.
    """

    norms: dict[str, float]
    sizes: dict[str, float]
    not_finite: tuple[str, ...]
    loss: float


def gradient_statistics(zero: Zero, value: torch.Tensor, optim: config.Optim, want_sizes: bool) -> GradientStatistics:
    """Return statistics of the gradients: one pass over them, and an all-reduce of 2 numbers per parameter. Collective.

    The host waits once for the device.

    Args:
        zero: between backward pass and step.
        value: this rank's loss, a scalar.
        optim: whose clipping the step will apply.
        want_sizes: whether to read the second moments and measure update sizes.
    """
    numel, world = zero.numel(trained_only=True), rank_and_world()[1]
    own = torch.cat([_sums(zero, numel, want_sizes).view(-1), value.detach().double().view(1).to(zero.device)])
    *totals, loss = all_reduce_sum(own).tolist()
    # At stage 0 all ranks have all gradients: the mean makes the sums equal to the bit on all ranks.
    sums = torch.tensor(totals, dtype=torch.float64).view(-1, 2) / (world if zero.stage == 0 else 1)
    squares, seconds = sums[:, 0] / zero.loss_scale**2, sums[:, 1]
    parts = [zero.module.part_of(name) for name in numel]
    norms = {
        part: float(squares[[i for i, other in enumerate(parts) if other == part]].sum().sqrt())
        for part in dict.fromkeys(parts)
    }
    not_finite = tuple(name for name, finite in zip(numel, squares.isfinite().tolist()) if not finite)
    sizes: dict[str, float] = {}
    if want_sizes and float(seconds.sum()) and not not_finite:
        limit = optim.clip_each or optim.grad_clip or math.inf
        clip = (limit / ((squares if optim.clip_each else squares.sum()).sqrt() + 1e-6)).clamp(max=1)
        count = torch.tensor(list(numel.values()), dtype=torch.float64)
        steps = torch.tensor([zero.optimizer_steps(name) for name in numel], dtype=torch.float64)
        expected = (seconds / (1 - optim.beta2 ** steps.clamp_min(1))).clamp_min(count * optim.eps**2)
        weight = count * (seconds > 0)  # without second moments: a parameter that has not had a gradient yet
        quotients = weight * squares * clip**2 / expected
        for tower in TOWERS:
            rows = [i for i, part in enumerate(parts) if part == tower]
            if rows and float(weight[rows].sum()):
                sizes[tower] = math.sqrt(float(quotients[rows].sum() / weight[rows].sum()))
    return GradientStatistics(norms, sizes, not_finite, loss / world)


@torch.no_grad()
def _sums(zero: Zero, numel: dict[str, int], want_seconds: bool) -> torch.Tensor:
    """Return this rank's sums of P parameters, float64 [P, 2]: g^2 (loss scale included), v.

    Args:
        numel: elements of each parameter by name.
        want_seconds: whether to read v.
    """
    row = {name: number for number, name in enumerate(numel)}
    sums = torch.zeros(len(numel), 2, dtype=torch.float64, device=zero.device)
    for pieces in _batches(fragment for fragment in zero.fragments() if fragment.trained):
        rows = [row[piece.name] for piece in pieces]
        norms = torch._foreach_norm([zero.gradient(piece) for piece in pieces], 2, dtype=torch.float32)
        sums[:, 0].index_add_(0, upload(rows, torch.int64, zero.device), torch.stack(norms).to(sums).square())
        seconds = {i: zero.moments(piece).get("exp_avg_sq") for i, piece in enumerate(pieces)} if want_seconds else {}
        present = {i: second for i, second in seconds.items() if second is not None}
        if present:  # there are none before the first step
            present_rows = upload([rows[i] for i in present], torch.int64, zero.device)
            totals = torch._foreach_norm(list(present.values()), 1)  # second moments are not negative
            sums[:, 1].index_add_(0, present_rows, torch.stack(totals).to(sums))
    return sums


def _batches(pieces: Iterable[Fragment]) -> Iterator[list[Fragment]]:
    """Group fragments to at most BATCH_ELEMENTS elements: stage 3 in half precision copies the gradients it returns."""
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
