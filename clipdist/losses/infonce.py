"""InfoNCE over the exact global batch: unnormalised features of this rank in, this rank's share of the loss out.

    s_ij = exp(t) * cos(image_i, text_j)          logits, fp32, only ever in tiles
    L    = 1/(2N) sum_i [ lse_j s_ij - s_i,pos ] + 1/(2N) sum_j [ lse_i s_ij - s_pos,j ]

over the N valid pairs of all ranks (Oord et al., arXiv:1807.03748, eq. 4; Radford et al., arXiv:2103.00020, figure 3).
One gather of the text features, one product for the row and column sums of the exponentials (the columns' are added
over ranks), one more for the tiles again and two for the gradients, one reduce-scatter: four products, half of the
traffic of gathering both sides. docs/loss.md derives it.
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

# A sum of exponentials below it may have lost terms to underflow.
_LOST = 1e-25


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
    """Symmetric InfoNCE with the negatives of all ranks.

    Args:
        image_features, text_features: [b, D] as the projections give them, any float dtype; the same b on every rank.
        logit_scale: the log scale t, shape [1]; read as at most `logit_scale_max`.
        logit_bias: taken for the interface's sake; a constant on all logits changes neither value nor gradients.
        valid: bool [b]; rows that are False count neither as pairs nor as negatives. None: all are valid.
        group_id: int64 [b]; pairs of equal id are positives of one another, uniformly weighted. None: only a
            pair's own other half is.
        label_smoothing: the share of the target that is spread over all valid candidates.
        implementation: auto, tiles or kernel; all compute the same.
        tile: rows and columns of logits that exist at one time; None: chosen for the device.

    Returns:
        value: fp32 scalar; W * (this rank's share), so that its mean over ranks is the global loss, and the mean over
            ranks of any parameter's gradients is the gradient of the global loss: towers and temperature alike.
        statistics: {"valid": this rank's valid rows}, an fp32 scalar.

    Raises:
        UserError: ranks whose features differ in shape or dtype.
        NonFiniteFeatures: a tower gave inf or nan; on every rank.
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
    logits = batch.logits(tile)
    own = batch.own_logits()
    all_own = all_gather(own, batch.process_group)
    shift, row_sums, column_sums, sweep = _negative_sums(batch, logits, own, all_own, sweep)
    row_shift, column_shift = shift if isinstance(shift, tuple) else (shift, shift)
    row_inverse = batch.valid / (row_sums + (own - row_shift).exp())
    column_inverse = batch.all_valid / (column_sums + (all_own - column_shift).exp())
    image_sums, text_sums = sweep.softmax_gradients(logits, shift, row_inverse, column_inverse)
    # lse - s_ii = softplus(margin) and p_ii - 1 = -sigmoid(margin): nothing is lost however small they become.
    row_margin = row_sums.log() + row_shift - own
    column_margin = (column_sums.log() + column_shift)[batch.own] - own
    own_slopes = batch.valid * (smoothing - (row_margin.sigmoid() + column_margin.sigmoid()) / 2)
    grouped, pairs, gradients = batch.finish(
        image_sums,
        text_sums,
        own_slopes,
        pair_weight=0.5,
        group_weight=1 - smoothing,
        uniform_groups=True,
        all_weight=smoothing / batch.count,
    )
    own_terms = (F.softplus(row_margin) + F.softplus(column_margin)) / 2 + smoothing * own
    own_terms = torch.where(batch.valid > 0, own_terms, 0.0).double().sum()
    share = own_terms - (1 - smoothing) * grouped - smoothing / batch.count * pairs
    return share * (batch.world / batch.count), gradients


def _negative_sums(
    batch: GlobalBatch, logits: Logits, own: torch.Tensor, all_own: torch.Tensor, sweep: ModuleType
) -> tuple[Shift, torch.Tensor, torch.Tensor, ModuleType]:
    """Sums of exp(s - shift) over the negatives of own rows and, over all ranks, of all columns.

    One shift for all suffices for any logits within +-70, and in practice up to scale 100: |s| is at most exp(t). Then
    the columns' sums of the ranks simply add up. Only where a whole row or column lies below what fp32 can hold under
    it (at scale 100: no cosine above -0.28, its own included) each row and column gets its own largest logit as shift.
    """
    shift = max(0.0, batch.scale - SAFE_EXPONENT)
    row_sums, column_sums = sweep.exponential_sums(logits, shift, batch.valid, batch.all_valid)
    lost = _lost(row_sums, own - shift, batch.valid)
    packed = all_reduce_sum(torch.cat([column_sums, lost[None]]), batch.process_group)
    column_sums = packed[:-1]
    if shift and float(packed[-1] + _lost(column_sums, all_own - shift, batch.all_valid)) > 0:
        return _own_shifts(batch, logits, own, all_own)
    return shift, row_sums, column_sums, sweep


def _lost(sums: torch.Tensor, own: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """fp32 scalar: how many rows are so small that terms may have vanished."""
    return ((sums + own.exp() < _LOST) & (valid > 0)).sum().float()


def _own_shifts(
    batch: GlobalBatch, logits: Logits, own: torch.Tensor, all_own: torch.Tensor
) -> tuple[Shift, torch.Tensor, torch.Tensor, ModuleType]:
    row_best, _, column_best, _ = tiles.best(logits, batch.valid, batch.all_valid)
    column_best = all_reduce_max(column_best, batch.process_group)
    # Where there is no negative at all, the pair's own logit: its exponential must stay within fp32, too.
    shift = torch.where(row_best.isfinite(), row_best, own), torch.where(column_best.isfinite(), column_best, all_own)
    row_sums, column_sums = tiles.exponential_sums(logits, shift, batch.valid, batch.all_valid)
    return shift, row_sums, all_reduce_sum(column_sums, batch.process_group), tiles


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
    """How many of this rank's pictures, and of its texts, find a positive as the most similar of the global batch.

    One more product: for logged steps, not for every step. Arguments as for info_nce.

    Returns:
        fp32 scalars "correct_i2t" and "correct_t2i".
    """
    batch = GlobalBatch(image_features, text_features, 0.0, 0.0, valid, group_id, process_group)
    row_best, row_at, column_best, column_at = tiles.best(batch.logits(tile), batch.valid, batch.all_valid)
    own, groups = batch.own_logits(), batch.all_groups
    own_groups = groups[batch.own]
    i2t = ((own > row_best) | (groups[row_at] == own_groups)) & (batch.valid > 0)
    # A text's best picture may be another rank's: the rank that has it says whether it is a positive.
    most = all_reduce_max(column_best, process_group)
    positive = (column_best == most) & (own_groups[column_at] == groups)
    positive = all_reduce_max(positive.float(), process_group)[batch.own] > 0
    t2i = ((own > most[batch.own]) | positive) & (batch.valid > 0)
    return {"correct_i2t": i2t.sum().float(), "correct_t2i": t2i.sum().float()}
