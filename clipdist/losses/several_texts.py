"""Compute InfoNCE or the sigmoid loss with several texts per image over the exact global batch, with their gradients.

N images, M texts of all ranks, of which T are captions; the others are negatives: candidates of images alone. y_ij = 1
if text j is a positive of image i: a caption of its own, or one equal to it (groups).

    InfoNCE   1/(2N) sum_i [ lse_j s_ij - sum_j y_ij s_ij / sum_j y_ij ]         each image among all M texts
            + 1/(2T) sum_j [ lse_i s_ij - sum_i y_ij s_ij / sum_i y_ij ]         each caption among all N images
    sigmoid   1/N sum_ij [ softplus(s_ij) - y_ij s_ij ]

The mean over an image's positives stands outside the logarithm (Khosla et al., arXiv:2004.11362, eq. 2; both
directions: Yang et al., UniCL, arXiv:2204.03610); negatives as in Yuksekgonul et al., arXiv:2210.01936 (NegCLIP).
With one caption per image it is clipdist.losses.infonce or clipdist.losses.sigmoid.

The sweeps over the tiles have all texts as columns. The targets need none: those of a group are sums of its members.

Shapes: b images and b K texts of this rank, D features. The slots of a rank's images without a text are not valid.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import (
    all_gather,
    all_reduce_max,
    all_reduce_sum,
    rank_and_world,
    reduce_scatter_sum,
)
from clipdist.errors import UserError
from clipdist.losses import tiles
from clipdist.losses.global_batch import (
    LN_100,
    TOWERS,
    FeatureGradients,
    check_agreement,
    chunks,
    inverse_norms,
    project,
    value_and_gradients,
)
from clipdist.losses.infonce import count_underflows, shift_by_maximum
from clipdist.losses.tiles import SAFE_EXPONENT, Logits, Shift, Tile, choose_tile

_NO_GROUP = torch.iinfo(torch.int64).max


def contrast_texts(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    loss: Literal["infonce", "sigmoid"],
    captions: Tensor,
    candidates: Tensor | None = None,
    valid: Tensor | None = None,
    group_id: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    logit_scale_max: float = LN_100,
    tile: Tile | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of images with several texts each. Collective.

    Args:
        image_features: [b, D], not normalised, any float dtype; the same b on every rank.
        text_features: [b, K, D], the texts of each image; K may differ between ranks.
        logit_bias: [1], of the sigmoid loss.
        captions: bool [b, K], which texts are captions of their images.
        candidates: bool [b, K], which are texts at all: captions, and negatives. None: captions alone.
        valid: bool [b]; None: all images. An image without a caption is not valid.
        group_id: int64 [b, K]; an image has all captions of the ids of its own as positives, and negatives of these ids
            as well. None: it has its own captions.
        label_smoothing: e; InfoNCE spreads it over all candidates of each direction, the sigmoid loss turns y into
            (1 - e) y + e / 2.
        The others, value and statistics: as for clipdist.losses.infonce.info_nce.

    Raises:
        UserError, NonFiniteFeatures: as info_nce and sigmoid_loss.
    """
    if loss == "sigmoid" and logit_bias is None:
        raise UserError("the sigmoid loss needs a logit_bias: build the model with objectives.clip.loss=sigmoid")
    valid = _captioned(captions, valid)
    return value_and_gradients(
        image_features,
        text_features,
        logit_scale,
        logit_bias if loss == "sigmoid" else None,
        logit_scale_max,
        valid=valid,
        group_id=group_id,
        group=process_group,
        make_batch=partial(GlobalTexts, captions=captions, candidates=candidates),
        compute=partial(_sigmoid if loss == "sigmoid" else _info_nce, smoothing=label_smoothing, tile=tile),
    )


def _captioned(captions: Tensor, valid: Tensor | None) -> Tensor:
    return captions.any(1) if valid is None else captions.any(1) & valid


class GlobalTexts:
    """This rank's images, and the texts of all ranks. Collective.

    Args:
        texts, group_id, captions, candidates: see contrast_texts.
        The others: see clipdist.losses.global_batch.GlobalBatch.

    Attributes:
        given: K of this rank.
        images: [b, D], detached.  valid: fp32 [b].  count: N, at least 1.  scale: exp(t).  bias: a Python float.
        slots: the largest K of all ranks, to which the texts are padded; b K and W b K below are with it.
        texts: [b K, D], and all_texts: [W b K, D], in the order of the images; own: this rank's slice of them.
        all_valid, all_captions: fp32 [W b K], whether a text is a candidate of images, and whether it is a caption.
        image_inverse, all_text_inverse: 1 / |features|, fp32 [b] and [W b K], 0 where not valid.
        slot: int64 [W b K], the number of a text's group, 0 .. b K - 1, if an image of this rank has a caption of it,
            as `known`, fp32 [W b K], says.
        first: fp32 [b, K], whether a caption is the first of its image in its group.
        positives: fp32 [b], the texts that are positives of an image: sum_j y_ij.
        owners: fp32 [W b K], the images of all ranks of which a text is a positive: sum_i y_ij; 1 if not known.
    """

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        log_scale: Tensor | None,
        log_scale_max: float,
        bias: Tensor | None,
        valid: Tensor,
        group_id: Tensor | None,
        group: ProcessGroup | None,
        *,
        captions: Tensor,
        candidates: Tensor | None,
    ) -> None:
        self.rank, self.world = rank_and_world(group)
        self.process_group = group
        self.images = images.detach()
        scalars = [images.new_zeros(1) if scalar is None else scalar.detach() for scalar in (log_scale, bias)]
        agreed = check_agreement(dict(zip(TOWERS, (self.images, texts.detach()))), valid, scalars, group)
        (t, self.bias), self.slots = agreed.scalars, agreed.slots
        self.scale, self.count = math.exp(min(t, log_scale_max)), max(sum(agreed.valid), 1)
        b, self.given = len(images), texts.shape[1]
        more = self.slots - self.given
        self.texts = F.pad(texts.detach(), (0, 0, 0, more)).flatten(0, 1)
        captions, candidates = (
            F.pad(kind & valid[:, None], (0, more))
            for kind in (captions, captions if candidates is None else candidates)
        )
        flat = torch.arange(captions.numel(), device=images.device).view_as(captions) + self.rank * captions.numel()
        if group_id is None:
            ids = torch.where(captions, flat // self.slots, -1 - flat)
        else:
            ids = F.pad(group_id, (0, more))
        rows = all_gather(torch.stack([ids, captions.long(), candidates.long()], dim=2).flatten(0, 1), group)
        self.all_texts = all_gather(self.texts, group)
        self.own = slice(self.rank * b * self.slots, (self.rank + 1) * b * self.slots)
        self.all_groups, all_captions, all_candidates = rows.T.contiguous()
        self.all_valid, self.all_captions = all_candidates.float(), all_captions.float()
        self.valid = valid.float()
        self.image_inverse = inverse_norms(self.images) * self.valid
        self.all_text_inverse = inverse_norms(self.all_texts) * self.all_valid
        self._find_groups()

    def _find_groups(self) -> None:
        captions = self.all_captions.view(-1, self.slots) > 0
        groups = self.all_groups.view_as(captions)
        before = ((groups[:, :, None] == groups[:, None, :]) & captions[:, None, :]).tril(-1).any(2)
        all_first = (captions & ~before).flatten()
        # No group of other ranks alone is of use here, so that the sums of groups take no more than this rank's texts.
        table = torch.where(all_first[self.own], self.all_groups[self.own], _NO_GROUP).sort().values
        self.slot = torch.searchsorted(table, self.all_groups).clamp_(max=len(table) - 1)
        self.known = ((table[self.slot] == self.all_groups) & (self.all_valid > 0)).float()
        members = torch.zeros_like(table, dtype=torch.float32).index_add_(0, self.slot, self.known)
        owners = torch.zeros_like(members).index_add_(0, self.slot, self.known * all_first)
        self.first = all_first[self.own].view(-1, self.slots).float()
        self.own_slot = self.slot[self.own].view(-1, self.slots)
        self.positives = (members[self.own_slot] * self.first).sum(1)
        self.owners = torch.where(self.known > 0, owners[self.slot], 1.0)

    def logits(self, tile: Tile | None) -> Logits:
        """Return the logits of this rank's images against all texts; no pair is excluded from the sweeps."""
        row_factor = self.image_inverse * self.scale
        tile = choose_tile(self.images.device, tile)
        no_pair = len(self.all_texts)
        return Logits(self.images, self.all_texts, row_factor, self.all_text_inverse, self.bias, no_pair, tile)

    def unit_images(self, rows: slice) -> Tensor:
        """Return normalised image features of this rank, fp32 [R, D]; 0 where not valid."""
        return self.images[rows].float() * self.image_inverse[rows, None]

    def unit_texts(self, rows: slice) -> Tensor:
        """Return normalised text features of the global batch, fp32 [R, D]; 0 where not valid."""
        return self.all_texts[rows].float() * self.all_text_inverse[rows, None]

    def finish(
        self,
        image_sums: Tensor,
        text_sums: Tensor,
        image_weight: Tensor,
        text_weight: Tensor,
        all_weight: Tensor,
    ) -> tuple[Tensor, FeatureGradients]:
        """Subtract the targets z_ij from the sums over tiles, and return the gradients of the features. Collective.

        The loss is f(tiles) - sum_ij z_ij s_ij with z_ij = y_ij (image_weight_i + text_weight_j) + all_weight_j.

        Args:
            image_sums: fp32 [b, D], sum_j df/ds_ij y_j/|y_j|; overwritten.
            text_sums: fp32 [W b K, D], exp(t) sum_i df/ds_ij x_i/|x_i| over this rank's rows; overwritten.
            image_weight: fp32 [b].  text_weight, all_weight: fp32 [W b K], 0 where not valid.

        Returns:
            sum_ij z_ij s_ij over this rank's rows without the bias, a float64 scalar; and the gradients of this rank's
            value, which is W times its share of the loss. The bias gradient is 0: the caller sets it.
        """
        groups, width = self.own_slot.numel(), self.images.shape[1]
        texts, weighted = (image_sums.new_zeros(groups, width) for _ in range(2))
        everywhere = image_sums.new_zeros(width)
        for rows in chunks(len(self.all_texts)):
            unit = self.unit_texts(rows)
            everywhere += all_weight[rows] @ unit
            unit *= self.known[rows, None]
            texts.index_add_(0, self.slot[rows], unit)
            weighted.index_add_(0, self.slot[rows], unit * text_weight[rows, None])
        target_sum = image_sums.new_zeros((), dtype=torch.float64)
        images, scaled = (image_sums.new_zeros(groups, width) for _ in range(2))
        total = torch.zeros_like(everywhere)
        for rows in chunks(len(self.images)):
            unit, slots, first = self.unit_images(rows), self.own_slot[rows], self.first[rows, :, None]
            share = (texts[slots] * first).sum(1) * image_weight[rows, None]
            target = share + (weighted[slots] * first).sum(1) + everywhere
            target_sum += (unit * target).sum(dtype=torch.float64) * self.scale
            image_sums[rows] -= target
            total += unit.sum(0)
            spread = unit[:, None] * first
            images.index_add_(0, slots.flatten(), spread.flatten(0, 1))
            scaled.index_add_(0, slots.flatten(), (spread * image_weight[rows, None, None]).flatten(0, 1))
        for rows in chunks(len(self.all_texts)):
            slots = self.slot[rows]
            target = (scaled[slots] + images[slots] * text_weight[rows, None]) * self.known[rows, None]
            text_sums[rows] -= self.scale * (target + all_weight[rows, None] * total)
        text_gradient = reduce_scatter_sum(text_sums, self.texts.dtype, self.process_group)
        scale_gradient = torch.zeros_like(target_sum)
        for rows in chunks(len(self.images)):
            unit = self.unit_images(rows)
            scale_gradient += project(image_sums, unit, self.image_inverse, rows, self.world * self.scale)
        inverse = self.all_text_inverse[self.own]
        for rows in chunks(len(text_gradient)):
            unit = self.texts[rows].float() * inverse[rows, None]
            project(text_gradient, unit, inverse, rows, self.world)
        text_gradient = text_gradient.view(len(self.images), self.slots, width)[:, : self.given]
        return target_sum, FeatureGradients(image_sums, text_gradient, scale_gradient, torch.zeros_like(target_sum))


def _info_nce(batch: GlobalTexts, *, smoothing: float, tile: Tile | None) -> tuple[Tensor, FeatureGradients]:
    """Return this rank's value, a float64 scalar, and its gradients."""
    logits = batch.logits(tile)
    shift, row_sums, column_sums = _exponential_sums(batch, logits)
    row_shift, column_shift = shift if isinstance(shift, tuple) else (shift, shift)
    row_weight = batch.valid / (2 * batch.count)
    column_weight = batch.all_captions / (2 * batch.all_captions.sum().clamp(min=1))
    image_sums, text_sums = tiles.softmax_gradients(
        logits, shift, _quotient(row_weight, row_sums), _quotient(column_weight, column_sums)
    )
    candidates = batch.all_valid / batch.all_valid.sum().clamp(min=1)
    target_sum, gradients = batch.finish(
        image_sums,
        text_sums,
        (1 - smoothing) * _quotient(row_weight, batch.positives),
        (1 - smoothing) * column_weight / batch.owners,
        smoothing * (candidates / 2 + column_weight) / batch.count,
    )
    rows = torch.where(batch.valid > 0, (row_sums.log() + row_shift) * row_weight, 0.0)
    columns = torch.where(column_weight > 0, (column_sums.log() + column_shift) * column_weight, 0.0)
    share = rows.double().sum() + columns[batch.own].double().sum() - target_sum
    return share * batch.world, gradients


def _exponential_sums(batch: GlobalTexts, logits: Logits) -> tuple[Shift, Tensor, Tensor]:
    """Return the shift, and sums of exp(s - shift) over candidates: fp32 [b], [W b K] over all ranks. Collective.

    See clipdist.losses.infonce for the shift.
    """
    shift = max(0.0, batch.scale - SAFE_EXPONENT)
    row_sums, column_sums = tiles.exponential_sums(logits, shift, batch.valid, batch.all_valid)
    underflows = count_underflows(row_sums, batch.valid)
    packed = all_reduce_sum(torch.cat([column_sums, underflows[None]]), batch.process_group)
    column_sums = packed[:-1]
    if shift and float(packed[-1] + count_underflows(column_sums, batch.all_valid)):
        none = torch.zeros_like(row_sums), torch.zeros_like(column_sums)
        return shift_by_maximum(logits, *none, batch.valid, batch.all_valid, batch.process_group)
    return shift, row_sums, column_sums


def _quotient(weight: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(weight > 0, weight / divisor, 0.0)


def _sigmoid(batch: GlobalTexts, *, smoothing: float, tile: Tile | None) -> tuple[Tensor, FeatureGradients]:
    """Return this rank's value, a float64 scalar, and its gradients."""
    softplus_sum, sigmoid_sum, image_sums, text_sums = tiles.sigmoid_sweep(
        batch.logits(tile), batch.valid, batch.all_valid
    )
    n = batch.count
    image_weight = (1 - smoothing) / n * batch.valid
    all_weight = smoothing / (2 * n) * batch.all_valid
    target_sum, gradients = batch.finish(
        image_sums.div_(n), text_sums.div_(n), image_weight, torch.zeros_like(all_weight), all_weight
    )
    target = (image_weight * batch.positives).double().sum() + all_weight.double().sum() * batch.valid.sum()
    gradients.bias.copy_((sigmoid_sum / n - target) * batch.world)
    return (softplus_sum / n - target_sum - batch.bias * target) * batch.world, gradients


@torch.no_grad()
def texts_accuracy(
    image_features: Tensor,
    text_features: Tensor,
    *,
    captions: Tensor,
    candidates: Tensor | None = None,
    valid: Tensor | None = None,
    group_id: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    tile: Tile | None = None,
) -> dict[str, Tensor]:
    """Count this rank's images and captions whose most similar candidate is a positive. Collective.

    Arguments: see contrast_texts.

    Returns:
        fp32 scalars "correct_i2t" and "correct_t2i", and "captions": of this rank.
    """
    valid = _captioned(captions, valid)
    arguments = image_features, text_features, None, 0.0, None, valid, group_id, process_group
    batch = GlobalTexts(*arguments, captions=captions, candidates=candidates)
    _, row_argmax, column_max, column_argmax = tiles.largest_logits(batch.logits(tile), batch.valid, batch.all_valid)
    groups = torch.where(batch.first > 0, batch.all_groups[batch.own].view_as(batch.own_slot), _NO_GROUP)
    i2t = (groups == batch.all_groups[row_argmax][:, None]).any(1) & (batch.valid > 0)
    # The most similar image may be on another rank, which then decides whether it is a positive.
    positive = (groups[column_argmax] == batch.all_groups[:, None]).any(1)
    positive &= column_max == all_reduce_max(column_max, process_group)
    t2i = (all_reduce_max(positive.float(), process_group) * batch.all_captions)[batch.own]
    asked = batch.all_captions[batch.own].sum()
    return {"correct_i2t": i2t.sum().float(), "correct_t2i": t2i.sum(), "captions": asked}
