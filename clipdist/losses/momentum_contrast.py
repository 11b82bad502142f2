"""Contrast queries with keys of a momentum encoder: MoCo's queue, and MoCo v3's keys of the exact global batch.

    l_i = log( exp s_i+ + sum_j exp s_ij ) - s_i+          s = cos(query, key) / tau, s_i+ of the query's own key

(He et al., arXiv:1911.05722, eq. 1.) In MoCo the negatives j are the queue alone; the loss is a sum over samples. In
MoCo v3 (Chen et al., arXiv:2104.02057, algorithm 1) they are the other keys of the batch of all ranks.

Keys have no gradient, so that one sweep over tiles suffices: it adds up exp s_ij and exp s_ij times key j.

Shapes: b rows of this rank, D features, K places of the queue.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, rank_and_world
from clipdist.losses.global_batch import attach_gradients, check_agreement, chunks, inverse_norms, project
from clipdist.losses.tiles import Tile, choose_tile, inverse_temperature


def empty_queue(size: int, width: int) -> dict[str, Tensor]:
    """Return a queue without keys.

    Returns:
        "queue": fp32 [K, D], unit keys in the order of their places; "pointer": int64 [1], the place of the next key;
        "fill": int64 [1], how many places, from the first one on, have been filled.
    """
    return {
        "queue": torch.zeros(size, width),
        "pointer": torch.zeros(1, dtype=torch.int64),
        "fill": torch.zeros(1, dtype=torch.int64),
    }


@torch.no_grad()
def enqueue(
    state: Mapping[str, Tensor], keys: Tensor, *, valid: Tensor | None = None, process_group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Return the queue with the valid keys of the global batch in place of the oldest ones. Collective.

    They follow one another in sample order, from the pointer on, modulo K. It is called after the loss of their batch,
    whose positives would else be among its negatives. All ranks get the same.

    Args:
        state: see empty_queue; not changed.
        keys: [b, D], not normalised, any float dtype; at most K in all ranks together.
        valid: bool [b]; None: all rows.
    """
    queue, pointer, fill = state["queue"], state["pointer"], state["fill"]
    size = len(queue)
    if valid is None:
        valid = torch.ones(keys.shape[:1], dtype=torch.bool, device=keys.device)
    every, there = all_gather(keys, process_group), all_gather(valid, process_group)
    count = there.sum()
    place = torch.where(there, (pointer + there.cumsum(0) - 1) % size, size)  # one place more takes what is not valid
    unit = (every * inverse_norms(every)[:, None]).to(queue.dtype)
    queue = torch.cat([queue, torch.zeros_like(queue[:1])]).index_copy_(0, place, unit)[:size]
    return {"queue": queue, "pointer": (pointer + count) % size, "fill": (fill + count).clamp(max=size)}


@torch.compiler.disable
def contrast_queue(
    queries: Tensor,
    keys: Tensor,
    state: Mapping[str, Tensor],
    temperature: float,
    *,
    valid: Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute MoCo's loss against the filled places of a queue: a sum over samples. Not collective.

    Args:
        queries: [b, D], not normalised, any float dtype.
        keys: [b, D], the positives of the same rows, not in the queue; they get no gradient.
        state: see empty_queue.
        temperature: tau.
        valid: bool [b]; None: all rows.
        tile: rows and columns of logits in memory at one time; None: chosen for the device.

    Returns:
        sum: fp32 scalar, the sum of l_i over this rank's valid rows. (It is not finite where features are not.)
        statistics: fp32 scalars: "valid"; "correct_keys", the valid queries to which no key of the queue is nearer than
            their own.

    Raises:
        UserError: the temperature is below 1/70.
    """
    scale, keys = inverse_temperature(temperature), keys.detach()
    if valid is None:
        valid = torch.ones(queries.shape[:1], dtype=torch.bool, device=queries.device)
    positives = keys * inverse_norms(keys)[:, None]
    places = torch.arange(len(state["queue"]), device=queries.device)
    added = torch.where(places < state["fill"], 0.0, -torch.inf)
    return _contrast(queries, positives, state["queue"], added, None, scale, valid, tile)


@torch.compiler.disable
def contrast_batch(
    queries: Tensor,
    keys: Tensor,
    temperature: float,
    *,
    valid: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute MoCo v3's loss of queries against the keys of the global batch, 2 tau times the mean of l_i. Collective.

    MoCo v3 adds that of the other views' queries and keys.

    Args:
        keys: [b, D], of the same rows; they get no gradient.
        The others, value and statistics: as for clipdist.losses.nt_xent.nt_xent, with "correct_keys" as for
        contrast_queue.

    Raises:
        UserError, NonFiniteFeatures: as nt_xent.
    """
    scale = inverse_temperature(temperature)
    if valid is None:
        valid = torch.ones(queries.shape[:1], dtype=torch.bool, device=queries.device)
    rank, world = rank_and_world(process_group)
    count = sum(check_agreement({"the queries": queries, "the keys": keys}, valid, group=process_group).valid)
    every = all_gather(keys, process_group)
    every = every * inverse_norms(every)[:, None]
    added = torch.where(all_gather(valid, process_group), 0.0, -torch.inf)
    first = rank * len(queries)
    positives = every[first : first + len(queries)]
    value, statistics = _contrast(queries, positives, every, added, first, scale, valid, tile)
    return value * (2 * temperature * world / max(count, 1)), statistics


def _contrast(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    added: Tensor,
    first: int | None,
    scale: float,
    valid: Tensor,
    tile: Tile | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of l_i over valid rows, fp32 and differentiable, and the statistics of contrast_queue.

    Args:
        queries: [b, D], not normalised.
        positives: fp32 [b, D], unit keys.
        negatives: fp32 [K, D], unit keys.  added: fp32 [K], to their logits: 0, or -inf for one that takes no part.
        first: negative first + i is not one of query i; None: all are.
        scale: 1 / tau.
    """
    with torch.no_grad():
        inverse = inverse_norms(queries) * valid
        logits = torch.cat([_positive_logits(queries, positives, inverse, rows) for rows in chunks(len(queries))])
        logits *= scale
        sums, gradient, largest = _sweep(
            queries, inverse * scale, negatives, added, first, choose_tile(queries.device, tile)
        )
        margin = sums.log() - logits  # l_i is softplus(margin): see clipdist.losses.nt_xent
        share = 1 / (sums + logits.exp())
        for rows in chunks(len(queries)):
            gradient[rows] *= share[rows, None]
            gradient[rows] -= margin[rows].sigmoid()[:, None] * positives[rows]
            project(gradient, queries[rows].float() * inverse[rows, None], inverse, rows, scale)
        total = torch.where(valid, F.softplus(margin), 0.0).double().sum()
        correct = (logits > largest) & valid
    return attach_gradients(total, [(queries, gradient)]), {
        "valid": valid.sum().float(),
        "correct_keys": correct.sum().float(),
    }


def _positive_logits(queries: Tensor, positives: Tensor, inverse: Tensor, rows: slice) -> Tensor:
    """Return the cosines of queries with their own keys, fp32 [R]."""
    products = queries[rows].float() * inverse[rows, None] * positives[rows]
    return products.sum(1, dtype=torch.float64).float()


def _sweep(
    queries: Tensor, factor: Tensor, negatives: Tensor, added: Tensor, first: int | None, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each query, over its negatives: the sum of exp s, the sum of exp s times the key, the largest s.

    Args:
        factor: fp32 [b], 1 / (tau |query|).
        The others: see _contrast.

    Returns:
        fp32 [b], [b, D] and [b].
    """
    sums = torch.zeros_like(factor, dtype=torch.float64)
    largest = torch.full_like(factor, -torch.inf)
    weighted = torch.zeros_like(queries, dtype=torch.float32, memory_format=torch.contiguous_format)
    for rows in chunks(len(queries), tile.rows):
        left = queries[rows].float() * factor[rows, None]
        for columns in chunks(len(negatives), tile.columns):
            right = negatives[columns]
            s = torch.addmm(added[columns], left, right.T)
            if first is not None:
                offset = rows.start + first - columns.start
                if -len(left) < offset < len(right):
                    s.diagonal(offset).fill_(-torch.inf)
            largest[rows] = torch.maximum(largest[rows], s.amax(1))
            e = s.exp_()
            sums[rows] += e.sum(1)
            weighted[rows].addmm_(e, right)
    return sums.float(), weighted, largest
