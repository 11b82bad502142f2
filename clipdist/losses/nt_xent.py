"""Compute NT-Xent, the loss of SimCLR, and its gradients over the exact global batch.

    s_ij = cos(z_i, z_j) / tau                     between the 2N views z of the N valid samples of all ranks
    L    = 1/(2N) sum_i [ log sum_{k != i} exp s_ik - s_i,p(i) ]         p(i): the other view of the same sample

(Chen et al., arXiv:2002.05709, eq. 1.) With e_ij = exp s_ij and Z_i its sum over k != i, the gradient is

    dL/ds_ij = (e_ij / Z_i + e_ij / Z_j - 2 [j = p(i)]) / (2N)           s_ij and s_ji counted as one

Each rank computes its own rows against all columns, in tiles. The block of its own columns is symmetric, so that the
tiles on and above its diagonal suffice: on one rank half of all tiles. A rank has the whole gradient of its rows once
it knows the Z_j of the others. Collectives: all-gather of the views, all-gather of the sums; no gradients are sent.

Shapes: b samples of this rank, of which n are valid; M valid views of all ranks, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, rank_and_world
from clipdist.losses.global_batch import attach_gradients, check_agreement, chunks, inverse_norms, project
from clipdist.losses.tiles import Tile, choose_tile, inverse_temperature


@torch.compiler.disable
def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute NT-Xent of two views of every sample, with the views of all ranks as negatives. Collective.

    Args:
        first, second: features of the views, [b, D], not normalised, any float dtype; the same b on every rank.
        temperature: tau.
        valid: bool [b]; the views of a sample that is False are neither positives nor negatives. None: all are valid.
        process_group: None: all ranks.
        tile: the smaller side is that of the square tiles in memory at one time; None: chosen for the device.

    Returns:
        value: fp32 scalar; W * (this rank's share). Its mean over ranks is the global loss, and the mean over ranks of
            a parameter's gradients is the gradient of the global loss.
        statistics: fp32 scalars: "valid", this rank's valid samples; "correct_views", half the number of its views that
            have no view of all ranks nearer than the other one of their sample.

    Raises:
        UserError: the temperature is below 1/70; the features of ranks differ in shape or dtype, on every rank.
        NonFiniteFeatures: features contain inf or nan; on every rank.
    """
    if valid is None:
        valid = torch.ones(first.shape[:1], dtype=torch.bool, device=first.device)
    size = choose_tile(first.device, tile)
    with torch.no_grad():
        views = _Views.gather(first, second, temperature, valid, process_group)
        value, gradient, correct = _value_and_gradient(views, min(size.rows, size.columns))
        if views.kept is not None:
            gradient = gradient.new_zeros(2 * len(first), gradient.shape[1]).index_copy_(0, views.kept, gradient)
    known = [(first, gradient[: len(first)]), (second, gradient[len(first) :])]
    return attach_gradients(value, known), {"valid": valid.sum().float(), "correct_views": correct / 2}


@dataclass(frozen=True)
class _Views:
    """The valid views of all ranks: of each rank the first ones of its samples, then the second ones.

    Attributes:
        unit: fp32 [M, D], unit features times 1 / sqrt(tau).
        scale: 1 / tau.
        own: the slice of this rank's 2n views.
        inverse: fp32 [2n], 1 / |features|.
        kept: int64 [2n], their places among the 2b views of this rank; None: all are valid.
        all_kept: int64 [M], those of all ranks among theirs; None: all are valid.
        slots: 2b.
        process_group: as given.
    """

    unit: Tensor
    scale: float
    own: slice
    inverse: Tensor
    kept: Tensor | None
    all_kept: Tensor | None
    slots: int
    process_group: ProcessGroup | None

    @classmethod
    def gather(
        cls, first: Tensor, second: Tensor, temperature: float, valid: Tensor, group: ProcessGroup | None
    ) -> _Views:
        """Gather the views. Collective. Arguments and errors: see nt_xent."""
        scale = inverse_temperature(temperature)
        rank, world = rank_and_world(group)
        agreed = check_agreement({"the first view": first, "the second view": second}, valid, group=group).valid
        gathered = all_gather(torch.cat([first, second]), group)
        inverse = inverse_norms(gathered)
        own = slice(2 * sum(agreed[:rank]), 2 * sum(agreed[: rank + 1]))
        kept = all_kept = None
        if sum(agreed) < world * len(first):
            there = valid.repeat(2)
            kept, all_kept = there.nonzero()[:, 0], all_gather(there, group).nonzero()[:, 0]
            gathered, inverse = gathered[all_kept], inverse[all_kept]
        unit = gathered * (inverse * math.sqrt(scale))[:, None]
        return cls(unit, scale, own, inverse[own], kept, all_kept, 2 * len(first), group)

    def all_of(self, own: Tensor) -> Tensor:
        """Return what all ranks have of their views, fp32 [M], from this rank's [2n]. Collective."""
        if self.kept is not None:
            own = own.new_zeros(self.slots).index_copy_(0, self.kept, own)
        every = all_gather(own, self.process_group)
        return every if self.all_kept is None else every[self.all_kept]

    def sweep(self, side: int) -> Iterator[tuple[slice, slice, bool, Tensor]]:
        """Iterate over the tiles of this rank's rows; of its own columns only over those on and above the diagonal.

        Yields:
            rows, columns: of `unit`.
            mirrored: whether the transposed tile belongs to this rank, too, and is not yielded.
            logits: fp32 [R, C], -inf for a view itself and for the other view of its sample; overwritten by the next.
        """
        start, stop, side = self.own.start, self.own.stop, max(1, min(side, len(self.unit)))
        blocks = chunks(stop, side, start)
        others = [*chunks(start, side), *chunks(len(self.unit), side, stop)]
        buffer = self.unit.new_empty(side * side)
        samples = (stop - start) // 2
        for number, rows in enumerate(blocks):
            for columns in [*blocks[number:], *others]:
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                logits = buffer[: shape[0] * shape[1]].view(shape)
                torch.mm(self.unit[rows], self.unit[columns].T, out=logits)
                within = start <= columns.start < stop
                for distance in (0, samples, -samples) if within else ():
                    offset = rows.start + distance - columns.start
                    if -shape[0] < offset < shape[1]:
                        logits.diagonal(offset).fill_(-torch.inf)
                yield rows, columns, within and columns.start > rows.start, logits


def _value_and_gradient(views: _Views, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return this rank's value, a float64 scalar, its gradient, fp32 [2n, D], and the number of correct views."""
    world, count = rank_and_world(views.process_group)[1], max(len(views.unit), 1)
    own = views.unit[views.own]
    samples = len(own) // 2
    products = (own[rows] * own[samples:][rows] for rows in chunks(samples))
    positive = torch.cat([own.new_zeros(0), *(product.sum(1, dtype=torch.float64).float() for product in products)])
    positive = positive.repeat(2)
    sums, largest = _negative_sums(views, side)
    # log Z_i - s_i,p(i) = softplus(margin) and p - 1 = -sigmoid(margin) do not cancel, however small they become.
    margin = sums.log() - positive
    gradient = _negative_gradients(views, views.all_of(1 / (sums + positive.exp())), side)
    pull = margin.sigmoid()
    pull += pull.roll(samples)
    weight, root = world / count, math.sqrt(views.scale)
    partner = own.roll(samples, 0)
    for rows in chunks(len(own)):
        gradient[rows] -= pull[rows, None] * partner[rows]
        project(gradient, own[rows] / root, views.inverse, rows, weight * root)
    return F.softplus(margin).double().sum() * weight, gradient, (positive > largest).sum().float()


def _negative_sums(views: _Views, side: int) -> tuple[Tensor, Tensor]:
    """Return the sum of exp(s) over the negatives of each own view, and the largest s among them: fp32 [2n] both."""
    start = views.own.start
    sums = views.inverse.new_zeros(len(views.inverse), dtype=torch.float64)
    largest = torch.full_like(views.inverse, -torch.inf)
    for rows, columns, mirrored, s in views.sweep(side):
        parts = [(rows, 1), (columns, 0)] if mirrored else [(rows, 1)]
        for part, dim in parts:
            torch.maximum(here := largest[part.start - start : part.stop - start], s.amax(dim), out=here)
        e = s.exp_()
        for part, dim in parts:
            sums[part.start - start : part.stop - start] += e.sum(dim)
    return sums.float(), largest


def _negative_gradients(views: _Views, inverse_sums: Tensor, side: int) -> Tensor:
    """Return sum_j e_ij (1/Z_i + 1/Z_j) unit_j over the negatives j of each own view i, fp32 [2n, D].

    Args:
        inverse_sums: fp32 [M], 1/Z.
    """
    start = views.own.start
    total = torch.zeros_like(views.unit[views.own])
    for rows, columns, mirrored, s in views.sweep(side):
        p = s.exp_().mul_(inverse_sums[rows, None] + inverse_sums[columns])
        total[rows.start - start : rows.stop - start].addmm_(p, views.unit[columns])
        if mirrored:
            total[columns.start - start : columns.stop - start].addmm_(p.T, views.unit[rows])
    return total
