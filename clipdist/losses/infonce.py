"""Compute the InfoNCE loss and its gradients over the exact global batch.

    s_ij = exp(t) * cos(image_i, text_j)          logits, fp32, computed in tiles
    L    = 1/(2N) sum_i [ lse_j s_ij - s_i,pos ] + 1/(2N) sum_j [ lse_i s_ij - s_pos,j ]

over the N valid pairs of all ranks (Oord et al., arXiv:1807.03748, eq. 4; Radford et al., arXiv:2103.00020, figure 3).

Collectives: all-gather of the text features, all-reduce of the column sums, reduce-scatter of the text gradients; half
of the traffic of gathering images and texts. Matrix products: one for the sums of exponentials, one to recompute the
tiles, two for the gradients. docs/loss.md has the derivation.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, all_reduce_max, all_reduce_sum
from clipdist.losses import tiles
from clipdist.losses.choose import sweeps
from clipdist.losses.global_batch import LN_100, FeatureGradients, GlobalBatch, value_and_gradients
from clipdist.losses.tiles import SAFE_EXPONENT, Logits, Shift, Tile

# Below this a sum of exponentials may have lost terms to underflow.
_UNDERFLOW = 1e-25


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    group_id: torch.Tensor | None = None,
    process_group: ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    logit_scale_max: float = LN_100,
    implementation: str = "auto",
    tile: Tile | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute symmetric InfoNCE with the negatives of all ranks. Collective.

    Args:
        image_features, text_features: [b, D], not normalised, any float dtype; the same b on every rank.
        logit_scale: the log scale t, shape [1]; clamped to `logit_scale_max`.
        logit_bias: ignored: a constant added to all logits changes neither value nor gradients.
        valid: bool [b]; rows that are False are neither pairs nor negatives. None: all are valid.
        group_id: int64 [b]; pairs of equal id are positives of one another, uniformly weighted. None: the only positive
            of an image is the text of its row.
        process_group: None: all ranks.
        label_smoothing: the share of the target that is spread over all valid candidates.
        implementation: "auto", "tiles" or "kernel"; all compute the same.
        tile: rows and columns of logits in memory at one time; None: chosen for the device.

    Returns:
        value: fp32 scalar; W * (this rank's share). Its mean over ranks is the global loss, and the mean over ranks of
            a parameter's gradients is the gradient of the global loss.
        statistics: {"valid": the number of this rank's valid rows}, an fp32 scalar.

    Raises:
        UserError: the features of ranks differ in shape or dtype; on every rank.
        NonFiniteFeatures: features contain inf or nan; on every rank.
    """
    sweep = sweeps(implementation, image_features)
    return value_and_gradients(
        image_features,
        text_features,
        logit_scale,
        None,
        logit_scale_max,
        valid=valid,
        group_id=group_id,
        group=process_group,
        compute=partial(_value_and_gradients, smoothing=label_smoothing, sweep=sweep, tile=tile),
    )


def _value_and_gradients(
    batch: GlobalBatch, *, smoothing: float, sweep: ModuleType, tile: Tile | None
) -> tuple[torch.Tensor, FeatureGradients]:
    """Return this rank's value, a float64 scalar, and its gradients."""
    logits = batch.logits(tile)
    own = batch.own_logits()
    all_own = all_gather(own, batch.process_group)
    shift, row_sums, column_sums, sweep = _negative_sums(batch, logits, own, all_own, sweep)
    row_shift, column_shift = shift if isinstance(shift, tuple) else (shift, shift)
    row_inverse = batch.valid / (row_sums + (own - row_shift).exp())
    column_inverse = batch.all_valid / (column_sums + (all_own - column_shift).exp())
    image_sums, text_sums = sweep.softmax_gradients(logits, shift, row_inverse, column_inverse)
    # lse - s_ii = softplus(margin) and p_ii - 1 = -sigmoid(margin) do not cancel, however small they become.
    row_margin = row_sums.log() + row_shift - own
    column_margin = (column_sums.log() + column_shift)[batch.own] - own
    own_logit_gradients = batch.valid * (smoothing - (row_margin.sigmoid() + column_margin.sigmoid()) / 2)
    group_sum, logit_sum, gradients = batch.finish(
        image_sums,
        text_sums,
        own_logit_gradients,
        tile_weight=0.5,
        group_weight=1 - smoothing,
        uniform_groups=True,
        all_weight=smoothing / batch.count,
    )
    own_terms = (F.softplus(row_margin) + F.softplus(column_margin)) / 2 + smoothing * own
    own_terms = torch.where(batch.valid > 0, own_terms, 0.0).double().sum()
    share = own_terms - (1 - smoothing) * group_sum - smoothing / batch.count * logit_sum
    return share * (batch.world / batch.count), gradients


def _negative_sums(
    batch: GlobalBatch, logits: Logits, own: torch.Tensor, all_own: torch.Tensor, sweep: ModuleType
) -> tuple[Shift, torch.Tensor, torch.Tensor, ModuleType]:
    """Return sums of exp(s - shift) over the negatives: of this rank's rows, and of all columns over all ranks.

    One shift for all logits lets the column sums of the ranks be added. It suffices while |s| <= exp(t) < 70, and in
    practice up to scale 100. If a whole row or column would underflow (at scale 100: no cosine above -0.28, its own
    pair included), every row and column is shifted by its largest logit instead. Collective.

    Returns:
        the shift, fp32 [b] row sums, fp32 [N] column sums, and the module whose sweeps take that shift.
    """
    shift = max(0.0, batch.scale - SAFE_EXPONENT)
    row_sums, column_sums = sweep.exponential_sums(logits, shift, batch.valid, batch.all_valid)
    underflows = count_underflows(row_sums + (own - shift).exp(), batch.valid)
    packed = all_reduce_sum(torch.cat([column_sums, underflows[None]]), batch.process_group)
    column_sums = packed[:-1]
    underflows = packed[-1] + count_underflows(column_sums + (all_own - shift).exp(), batch.all_valid)
    if any(batch.fetch(*([underflows] if shift else []))):
        return *shift_by_maximum(logits, own, all_own, batch.valid, batch.all_valid, batch.process_group), tiles
    return shift, row_sums, column_sums, sweep


def count_underflows(sums: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return how many valid sums may have lost terms to underflow, an fp32 scalar."""
    return ((sums < _UNDERFLOW) & (valid > 0)).sum().float()


def shift_by_maximum(
    logits: Logits,
    own: torch.Tensor,
    all_own: torch.Tensor,
    valid: torch.Tensor,
    all_valid: torch.Tensor,
    group: ProcessGroup | None,
) -> tuple[Shift, torch.Tensor, torch.Tensor]:
    """Return shift and sums with each row and column shifted by its largest logit. Collective.

    Args:
        own, all_own: fp32 [b], [N]: the shift of rows and columns without a candidate.
        valid, all_valid: fp32 [b], [N].
    """
    row_max, _, column_max, _ = tiles.largest_logits(logits, valid, all_valid)
    column_max = all_reduce_max(column_max, group)
    # Without negatives: the pair's own logit, whose exponential must not overflow fp32 either.
    shift = torch.where(row_max.isfinite(), row_max, own), torch.where(column_max.isfinite(), column_max, all_own)
    row_sums, column_sums = tiles.exponential_sums(logits, shift, valid, all_valid)
    return shift, row_sums, all_reduce_sum(column_sums, group)


@torch.no_grad()
def batch_accuracy(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    *,
    valid: torch.Tensor | None = None,
    group_id: torch.Tensor | None = None,
    process_group: ProcessGroup | None = None,
    tile: Tile | None = None,
) -> dict[str, torch.Tensor]:
    """Count this rank's images and texts whose most similar candidate of the global batch is a positive. Collective.

    It costs one more matrix product, therefore only logged steps call it. Arguments: see info_nce.

    Returns:
        fp32 scalars "correct_i2t" and "correct_t2i".
    """
    batch = GlobalBatch(image_features, text_features, None, 0.0, None, valid, group_id, process_group)
    row_max, row_argmax, column_max, column_argmax = tiles.largest_logits(
        batch.logits(tile), batch.valid, batch.all_valid
    )
    own, groups = batch.own_logits(), batch.all_groups
    own_groups = groups[batch.own]
    i2t = ((own > row_max) | (groups[row_argmax] == own_groups)) & (batch.valid > 0)
    # The most similar image may be on another rank, which then decides whether it is a positive.
    global_max = all_reduce_max(column_max, process_group)
    positive = (column_max == global_max) & (own_groups[column_argmax] == groups)
    positive = all_reduce_max(positive.float(), process_group)[batch.own] > 0
    t2i = ((own > global_max[batch.own]) | positive) & (batch.valid > 0)
    return {"correct_i2t": i2t.sum().float(), "correct_t2i": t2i.sum().float()}
