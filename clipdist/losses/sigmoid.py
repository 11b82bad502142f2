"""Compute the pairwise sigmoid loss of SigLIP and its gradients over the exact global batch.

    s_ij = exp(t) * cos(image_i, text_j) + bias
    L    = 1/N sum_ij [ softplus(s_ij) - y_ij s_ij ]        y_ij = 1 for positives, else 0

over the N valid images and N valid texts of all ranks (Zhai et al., arXiv:2303.15343, eq. 1: the same as
- log sigmoid(z_ij s_ij) with z = 2y - 1). Value and gradients take one sweep with three matrix products.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from clipdist.errors import UserError
from clipdist.losses.choose import sweeps
from clipdist.losses.global_batch import LN_100, FeatureGradients, GlobalBatch, value_and_gradients
from clipdist.losses.tiles import Tile


def sigmoid_loss(
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
    """Compute the sigmoid loss with the negatives of all ranks. Collective.

    Args:
        logit_bias: shape [1], learned; the paper starts it at -10.
        group_id: int64 [b]; pairs of equal id are positives of one another. None: the only positive of an image is the
            text of its row.
        label_smoothing: e turns y into (1 - e) y + e / 2.
        The others, value and statistics: as for clipdist.losses.infonce.info_nce.

    Raises:
        UserError: no bias; or the features of ranks differ in shape or dtype, on every rank.
        NonFiniteFeatures: features contain inf or nan; on every rank.
    """
    if logit_bias is None:
        raise UserError("the sigmoid loss needs a logit_bias: build the model with objectives.clip.loss=sigmoid")
    sweep = sweeps(implementation, image_features)
    return value_and_gradients(
        image_features,
        text_features,
        logit_scale,
        logit_bias,
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
    softplus_sum, sigmoid_sum, image_sums, text_sums = sweep.sigmoid_sweep(
        batch.logits(tile), batch.valid, batch.all_valid
    )
    batch.fetch()
    own = batch.own_logits()
    own_logit_gradients = batch.valid * (smoothing - torch.sigmoid(-own))
    group_sum, logit_sum, gradients = batch.finish(
        image_sums,
        text_sums,
        own_logit_gradients,
        tile_weight=1.0,
        group_weight=1 - smoothing,
        uniform_groups=False,
        all_weight=smoothing / 2,
    )
    own_terms = (batch.valid * (F.softplus(-own) + smoothing * own)).double().sum()
    share = softplus_sum + own_terms - (1 - smoothing) * group_sum - smoothing / 2 * logit_sum
    logit_count = batch.valid.double().sum() * batch.count
    others = (1 - smoothing) * batch.others_in_group().sum()
    weight = batch.world / batch.count
    gradients.bias.copy_(
        weight * (sigmoid_sum + own_logit_gradients.double().sum() - others - smoothing / 2 * logit_count)
    )
    return share * weight, gradients
