"""Compute the KoLeo regulariser and its gradients over groups of samples of the exact global batch.

    L = -1/N sum_i log( |u_i - u_n(i)| + eps )         u: unit features, n(i): the nearest other row of i's group

(Sablayrolles et al., arXiv:1806.03198, eq. 2; Oquab et al., arXiv:2304.07193, section 4.) It spreads features over
the sphere. A group is G consecutive samples of the global batch, whatever the number of ranks.

Each rank looks for the neighbours of its own rows. Every row that has an own one as its neighbour gives that one a
gradient, too; once all ranks know all neighbours, each has the whole gradient of its rows. Collectives: all-gather of
validity; of features and neighbours as well, unless no group spans ranks. No gradients are sent.

Shapes: b rows of this rank, M rows of all ranks (or of this one, if no group spans ranks), D features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, rank_and_world
from clipdist.losses.global_batch import attach_gradients, check_agreement, chunks, inverse_norms, project
from clipdist.losses.tiles import Tile, choose_tile


@torch.compiler.disable
def koleo(
    features: Tensor,
    *,
    group_size: int = 0,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    eps: float = 1e-8,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute KoLeo. Collective.

    Args:
        features: [b, D], not normalised, any float dtype; the same b on every rank.
        group_size: G; 0: all samples are one group. The last group is smaller where G does not divide their number.
        valid: bool [b]; a row that is False is no neighbour. None: all are valid.
        process_group: None: all ranks.
        eps: added to distances. Two equal rows have the term -log(eps), and no gradient.
        tile: rows and columns of cosines in memory at one time; None: chosen for the device.

    Returns:
        value: fp32 scalar; W * (this rank's share): see clipdist.losses.nt_xent.nt_xent. N counts the valid rows with
            another valid row in their group.
        statistics: {"valid": the number of this rank's valid rows}, an fp32 scalar.

    Raises:
        UserError, NonFiniteFeatures: the features of ranks differ in shape or dtype, or contain inf or nan; on every
            rank.
    """
    if valid is None:
        valid = torch.ones(features.shape[:1], dtype=torch.bool, device=features.device)
    check_agreement({"the features": features}, valid, group=process_group)
    with torch.no_grad():
        value, gradient = _value_and_gradient(
            features, valid, group_size, process_group, eps, choose_tile(features.device, tile)
        )
    return attach_gradients(value, [(features, gradient)]), {"valid": valid.sum().float()}


def _value_and_gradient(
    features: Tensor, valid: Tensor, group_size: int, process_group: ProcessGroup | None, eps: float, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Return this rank's value, a float64 scalar, and its gradient, fp32 [b, D]. Collective."""
    (rank, world), b = rank_and_world(process_group), len(features)
    there = all_gather(valid, process_group)
    size = group_size or len(there)
    group = torch.arange(len(there), device=features.device) // size
    members = torch.zeros_like(group).index_add_(0, group, there.long())
    count = (there & (members[group] > 1)).sum().clamp(min=1)
    alone = b % size == 0  # no group spans ranks
    start = 0 if alone else rank * b
    unit = features if alone else all_gather(features, process_group)
    inverse = inverse_norms(unit)
    unit = unit * inverse[:, None]
    neighbour = _neighbours(unit, valid if alone else there, slice(start, start + b), size, tile)
    neighbours = neighbour if alone else all_gather(neighbour, process_group)

    gradient = unit.new_zeros(b + 1, unit.shape[1])  # the last row takes what belongs to other ranks
    value = unit.new_zeros((), dtype=torch.float64)
    for rows in chunks(len(unit)):
        row, near = torch.arange(rows.start, rows.stop, device=unit.device), neighbours[rows]
        difference = unit[rows] - unit[near.clamp(min=0)]
        distance = torch.linalg.vector_norm(difference, dim=1)
        there = near >= 0
        own = (row >= start) & (row < start + b)
        value -= torch.where(there & own, (distance + eps).log(), 0.0).double().sum()
        difference *= torch.where(there & (distance > 0), 1 / (distance * (distance + eps)), 0.0)[:, None]
        for sign, place in ((-1, row - start), (1, near - start)):
            place = torch.where((place >= 0) & (place < b), place, b)
            gradient.index_add_(0, place, difference, alpha=sign)
    gradient = gradient[:b]
    for rows in chunks(b):
        mine = slice(start + rows.start, start + rows.stop)
        project(gradient, unit[mine], inverse[start : start + b], rows, 1.0)
    return value * world / count, gradient.mul_(world / count)


def _neighbours(unit: Tensor, valid: Tensor, own: slice, size: int, tile: Tile) -> Tensor:
    """Return the row of the nearest other valid row in the group of each row of `own`, int64 [b]; -1: there is none.

    Args:
        unit: fp32 [M, D], unit features.  valid: bool [M].
        size: rows of a group; one begins at row 0.
    """
    found = torch.full((own.stop - own.start,), -1, dtype=torch.int64, device=unit.device)
    for begin in range(own.start // size * size, own.stop, size):
        end = min(begin + size, len(unit))
        for rows in chunks(min(end, own.stop), tile.rows, max(begin, own.start)):
            nearest = found[rows.start - own.start : rows.stop - own.start]
            largest = torch.full_like(nearest, -torch.inf, dtype=torch.float32)
            for columns in chunks(end, tile.columns, begin):
                cosines = torch.mm(unit[rows], unit[columns].T).masked_fill_(~valid[columns], -torch.inf)
                offset = rows.start - columns.start
                if -len(largest) < offset < cosines.shape[1]:
                    cosines.diagonal(offset).fill_(-torch.inf)
                value, index = cosines.max(dim=1)
                larger = value > largest
                largest = torch.where(larger, value, largest)
                nearest.copy_(torch.where(larger, index + columns.start, nearest))
    return torch.where(valid[own], found, -1)
