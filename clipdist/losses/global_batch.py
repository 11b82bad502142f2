"""Gather the global batch, and compute the parts and gradients that InfoNCE and the sigmoid loss share.

The gradient is computed together with the value, tile by tile; the backward pass only multiplies it by the incoming
gradient. No b x N matrix is stored. docs/loss.md has the derivation.

Three parts of the loss need no sweep over all logits and are computed in closed form:

    own pairs    s_ii; its gradient avoids the difference p_ii - 1, which cancels
    group        sum_ij w_ij s_ij      over different valid pairs i, j of one group, which are positives too
    smoothing    sum_ij s_ij           = exp(t) (sum_i x_i/|x_i|) . (sum_j y_j/|y_j|) + bias * number of logits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, all_reduce_sum, rank_and_world, reduce_scatter_sum
from clipdist.errors import UserError
from clipdist.losses.tiles import Logits, Tile, choose_tile

LN_100 = math.log(100)
TOWERS = ("image", "text")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteFeatures(RuntimeError):
    """Features with inf or nan; raised on every rank, before any gradient exists.

    Attributes:
        where: (rank, tower, number of rows) of every affected tower of every rank.
    """

    def __init__(self, where: list[tuple[int, str, int]]) -> None:
        self.where = where
        named = "; ".join(f"rank {rank}: {rows} rows of the {tower} tower" for rank, tower, rows in where[:8])
        more = f" and {len(where) - 8} more" if len(where) > 8 else ""
        super().__init__(f"features are not finite: {named}{more}")


@dataclass(frozen=True)
class FeatureGradients:
    """Gradients of this rank's value.

    Attributes:
        image, text: fp32 [b, D], with respect to the unnormalised features.
        scale, bias: float64 scalars, with respect to the log scale t and the bias.
    """

    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


class GlobalBatch:
    """This rank's b rows of the global batch, and of all N rows what the losses need. Collective.

    Args:
        images, texts: unnormalised features [b, D], any float dtype.
        log_scale: t.  bias: of the logits.
        valid: bool [b]; None: all rows.
        group_id: int64 [b]; None: every row is a group of its own.
        group: the process group.

    Attributes:
        images, texts: as given, detached.  all_texts: [N, D], those of all ranks.
        valid: fp32 [b], 1 or 0.  all_valid: fp32 [N].  count: valid pairs of all ranks, at least 1.
        scale: exp(t), a Python float.  bias: a Python float.
        image_inverse, text_inverse, all_text_inverse: 1 / |features|, fp32 [b], [b] and [N], 0 where not valid.
        all_groups: int64 [N].  duplicates: the groups of more than one pair; None: there are none.
        own: this rank's slice of the N rows.

    Raises:
        UserError, NonFiniteFeatures: see check_agreement.
    """

    def __init__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        log_scale: float,
        bias: float,
        valid: torch.Tensor | None,
        group_id: torch.Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        self.rank, self.world = rank_and_world(group)
        self.process_group = group
        self.images, self.texts = images.detach(), texts.detach()
        check_agreement(self.images, self.texts, group)
        b, device = images.shape[0], images.device
        self.own = slice(self.rank * b, (self.rank + 1) * b)
        if valid is None:
            valid = torch.ones(b, dtype=torch.bool, device=device)
        ids = torch.arange(self.own.start, self.own.stop, device=device) if group_id is None else group_id
        rows = all_gather(torch.stack([ids.long(), valid.long()], dim=1), group)
        self.all_texts = all_gather(self.texts, group)
        self.all_valid = rows[:, 1].float()
        self.valid = self.all_valid[self.own]
        self.count = max(int(rows[:, 1].sum()), 1)
        self.scale, self.bias = math.exp(log_scale), bias
        self.image_inverse = _inverse_norms(self.images) * self.valid
        self.all_text_inverse = _inverse_norms(self.all_texts) * self.all_valid
        self.text_inverse = self.all_text_inverse[self.own]
        self.all_groups = rows[:, 0]
        self.duplicates = None if group_id is None else _Duplicates.find(self.all_groups, self.all_valid, self.own)

    def logits(self, tile: Tile | None) -> Logits:
        """Return the logits of this rank's images against all texts."""
        row_factor = self.image_inverse * self.scale
        tile = choose_tile(self.images.device, tile)
        return Logits(self.images, self.all_texts, row_factor, self.all_text_inverse, self.bias, self.own.start, tile)

    def unit_images(self, rows: slice) -> torch.Tensor:
        """Return normalised image features of this rank, fp32 [R, D]; 0 where not valid."""
        return self.images[rows].float() * self.image_inverse[rows, None]

    def unit_texts(self, rows: slice) -> torch.Tensor:
        """Return normalised text features of this rank, fp32 [R, D]; 0 where not valid."""
        return self.texts[rows].float() * self.text_inverse[rows, None]

    def all_unit_texts(self, rows: torch.Tensor) -> torch.Tensor:
        """Return normalised text features of the global batch at int64 rows [R], fp32 [R, D]; 0 where not valid."""
        return self.all_texts[rows].float() * self.all_text_inverse[rows, None]

    def own_logits(self) -> torch.Tensor:
        """Return s_ii of this rank's pairs, fp32 [b]; only the bias where not valid."""
        products = (self.unit_images(rows) * self.unit_texts(rows) for rows in self._chunks())
        cosines = torch.cat([product.sum(1, dtype=torch.float64) for product in products])
        return (cosines * self.scale + self.bias).float()

    def finish(
        self,
        image_sums: torch.Tensor,
        text_sums: torch.Tensor,
        own_logit_gradients: torch.Tensor,
        *,
        tile_weight: float,
        group_weight: float,
        uniform_groups: bool,
        all_weight: float,
    ) -> tuple[torch.Tensor, torch.Tensor, FeatureGradients]:
        """Add the closed-form parts to the sums over tiles, and return the gradients of the features. Collective.

        The loss is (1/N) [ f(tiles) + h(s_ii) - group_weight * sum_ij w_ij s_ij - all_weight * sum_ij s_ij ] with
        df/ds_ij = tile_weight * G_ij. Within a group of g pairs, w_ij moves a pair's weight 1 from itself to 1/g on
        each member (uniform_groups), or adds 1 on each other member.

        Args:
            image_sums: fp32 [b, D], sum_j G_ij y_j/|y_j|; overwritten.
            text_sums: fp32 [N, D], exp(t) sum_i G_ij x_i/|x_i| over this rank's rows; overwritten.
            own_logit_gradients: fp32 [b], dh/ds_ii.

        Returns:
            group_sum, logit_sum: float64 scalars, sum_ij w_ij s_ij and sum_ij s_ij over this rank's rows.
            gradients: of this rank's value, which is W times its share of the loss. The bias gradient is 0: the caller
                sets it.
        """
        weight = self.world * self.scale / self.count
        own_text_sums = text_sums[self.own]
        text_total = _weighted_sum(self.all_texts, self.all_text_inverse) if all_weight else None
        image_total = _weighted_sum(self.images, self.image_inverse) if all_weight else None
        image_sums *= tile_weight
        text_sums *= tile_weight
        for rows in self._chunks():
            own_text_sums[rows] += (own_logit_gradients[rows, None] * self.scale) * self.unit_images(rows)
            image_sums[rows] += own_logit_gradients[rows, None] * self.unit_texts(rows)
        group_sum = self.valid.new_zeros((), dtype=torch.float64)
        if self.duplicates is not None:
            group_sum = self._group_terms(self.duplicates, image_sums, text_sums, group_weight, uniform_groups)
        logit_sum = torch.zeros_like(group_sum)
        if text_total is not None and image_total is not None:
            image_sums -= all_weight * text_total
            text_sums -= (all_weight * self.scale) * image_total
            logit_sum = self.scale * image_total.double().dot(text_total.double())
            logit_sum += self.bias * self.valid.double().sum() * self.count
        text_gradient = reduce_scatter_sum(text_sums, self.texts.dtype, self.process_group)
        scale_gradient = torch.zeros_like(group_sum)
        for rows in self._chunks():
            scale_gradient += _project(image_sums, self.unit_images(rows), self.image_inverse, rows, weight)
            _project(text_gradient, self.unit_texts(rows), self.text_inverse, rows, weight / self.scale)
        gradients = FeatureGradients(image_sums, text_gradient, scale_gradient, torch.zeros_like(scale_gradient))
        return group_sum, logit_sum, gradients

    def _chunks(self) -> list[slice]:
        return _chunks(len(self.images))

    def _group_terms(
        self, dup: _Duplicates, image_sums: torch.Tensor, text_sums: torch.Tensor, weight: float, uniform: bool
    ) -> torch.Tensor:
        """Return sum_ij w_ij s_ij over this rank's rows, a float64 scalar; add -weight times its gradient to the sums.

        Args:
            image_sums, text_sums, weight, uniform: see finish.
        """
        size = dup.counts[:, None] if uniform else 1.0
        members = self.all_unit_texts(dup.members)
        text_means = members.new_zeros(len(dup.counts), members.shape[1]).index_add_(0, dup.group, members) / size
        local = dup.members[dup.local] - self.own.start
        images = self.images[local].float() * self.image_inverse[local, None]
        spread = text_means[dup.group[dup.local]] - members[dup.local]
        image_sums.index_add_(0, local, spread, alpha=-weight)
        image_means = torch.zeros_like(text_means).index_add_(0, dup.group[dup.local], images) / size
        text_sums.index_add_(0, dup.members, image_means[dup.group], alpha=-weight * self.scale)
        text_sums.index_add_(0, dup.members[dup.local], images, alpha=weight * self.scale)
        biases = 0.0 if uniform else self.bias * self.others_in_group().sum()
        return (images * spread).sum(dtype=torch.float64) * self.scale + biases

    def others_in_group(self) -> torch.Tensor:
        """Return how many other valid pairs of all ranks belong to each row's group, float64 [b]."""
        return torch.zeros_like(self.valid, dtype=torch.float64) if self.duplicates is None else self.duplicates.others


@dataclass(frozen=True)
class _Duplicates:
    """The M valid pairs of all ranks, usually few, whose group has more than one member.

    Attributes:
        members: int64 [M], their rows in the global batch.
        group: int64 [M], 0 .. G-1.
        counts: fp32 [G], members of each group.
        local: bool [M], whether a member is a row of this rank.
        others: float64 [b], the number of other members of each row's group.
    """

    members: torch.Tensor
    group: torch.Tensor
    counts: torch.Tensor
    local: torch.Tensor
    others: torch.Tensor

    @classmethod
    def find(cls, groups: torch.Tensor, valid: torch.Tensor, own: slice) -> _Duplicates | None:
        """Find groups of more than one valid pair; None: there are none.

        Args:
            groups: int64 [N].  valid: fp32 [N].
            own: this rank's rows.
        """
        present = valid.nonzero()[:, 0]
        _, inverse, counts = torch.unique(groups[present], return_inverse=True, return_counts=True)
        several = counts[inverse] > 1
        if not bool(several.any()):
            return None
        members = present[several]
        _, group, sizes = torch.unique(inverse[several], return_inverse=True, return_counts=True)
        local = (members >= own.start) & (members < own.stop)
        others = torch.zeros(own.stop - own.start, dtype=torch.float64, device=groups.device)
        others[members[local] - own.start] = sizes[group[local]].double() - 1
        return cls(members, group, sizes.float(), local, others)


def check_agreement(images: torch.Tensor, texts: torch.Tensor, group: ProcessGroup | None) -> None:
    """Check that all ranks have features of the same shape and dtype, and that they are finite. Collective.

    Raises:
        UserError: shapes or dtypes differ; on every rank (the next collective would hang or mix up rows).
        NonFiniteFeatures: on every rank.
    """
    # A local error is sent as a shape that cannot agree, because the other ranks wait in the collective.
    fits = images.ndim == 2 and images.shape == texts.shape and images.dtype == texts.dtype
    shape = [*images.shape, _DTYPES.index(images.dtype)] if fits else [-1, -1, -1]
    bad = [(~torch.isfinite(features)).any(dim=-1).sum() for features in (images, texts)]
    own = torch.cat([torch.tensor(shape, device=images.device), torch.stack(bad)])
    table = all_gather(own[None], group).tolist()
    if any(row[:3] != table[0][:3] for row in table) or table[0][0] < 0:
        sizes = ", ".join(f"rank {rank}: {row[0]} x {row[1]}" for rank, row in enumerate(table[:16]))
        raise UserError(
            f"the ranks' features do not fit together ({sizes}; -1: image and text features of different shapes):"
            " every rank must bring the same number of pairs, features of one width and one dtype"
        )
    where = [(rank, TOWERS[i], row[3 + i]) for rank, row in enumerate(table) for i in range(2) if row[3 + i]]
    if where:
        raise NonFiniteFeatures(where)


def _inverse_norms(features: torch.Tensor) -> torch.Tensor:
    """Return 1 / |x| of every row, fp32 [rows]; norms are at least 1e-12, as in torch.nn.functional.normalize."""
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).clamp_(min=1e-12).reciprocal_()


def _chunks(b: int, rows: int = 1024) -> list[slice]:
    """Return slices of 0 .. b: work in chunks avoids a second copy of the features."""
    return [slice(i, min(i + rows, b)) for i in range(0, b, rows)]


def _weighted_sum(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of weight * features, fp32 [D]."""
    parts = [torch.mv(features[rows].float().T, weights[rows]) for rows in _chunks(len(features))]
    return torch.stack(parts).sum(0)


def _project(sums: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor, rows: slice, weight: float) -> torch.Tensor:
    """Replace gradients g of unit features u by those of the unnormalised features, weight * (g - (g.u) u) / |x|.

    Args:
        sums: fp32 [b, D], g; `rows` of it are overwritten.
        unit: fp32 [R, D], u of these rows.
        inverse: fp32 [b], 1 / |x|.

    Returns:
        float64 scalar, the sum of weight * g.u: the gradient of t.
    """
    along = (sums[rows] * unit).sum(1, keepdim=True)
    sums[rows].sub_(along * unit).mul_(inverse[rows, None] * weight)
    return along.double().sum() * weight


Compute = Callable[[GlobalBatch], tuple[torch.Tensor, FeatureGradients]]


class _ValueAndGradients(torch.autograd.Function):
    """Autograd function of a loss whose `compute` returns the value together with its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        log_scale: torch.Tensor,
        bias: torch.Tensor | None,
        log_scale_max: float,
        valid: torch.Tensor | None,
        group_id: torch.Tensor | None,
        group: ProcessGroup | None,
        compute: Compute,
    ) -> torch.Tensor:
        t = min(float(log_scale), log_scale_max)
        value, ctx.gradients = compute(
            GlobalBatch(images, texts, t, 0.0 if bias is None else float(bias), valid, group_id, group)
        )
        ctx.like = (images.dtype, texts.dtype, log_scale, bias)
        return value.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss' gradients were used already: call the loss again for another backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        image_dtype, text_dtype, log_scale, bias = ctx.like
        scalars = [
            None if like is None else (g * grad).to(like.dtype).expand_as(like)
            for g, like in ((gradients.scale, log_scale), (gradients.bias, bias))
        ]
        image = gradients.image.mul_(grad).to(image_dtype)
        return image, gradients.text.mul_(grad).to(text_dtype), *scalars, None, None, None, None, None


@torch.compiler.disable
def value_and_gradients(
    images: torch.Tensor,
    texts: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor | None,
    log_scale_max: float,
    *,
    valid: torch.Tensor | None,
    group_id: torch.Tensor | None,
    group: ProcessGroup | None,
    compute: Compute,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute a loss over the global batch. Collective.

    Args:
        log_scale_max: t is clamped to this maximum; its gradient is that of the identity.
        compute: computes this rank's value and its gradients from the global batch.
        The others: see clipdist.losses.infonce.info_nce.

    Returns:
        value: fp32 scalar, differentiable.
        statistics: {"valid": the number of this rank's valid rows}, an fp32 scalar.
    """
    value = _ValueAndGradients.apply(images, texts, log_scale, bias, log_scale_max, valid, group_id, group, compute)
    rows = torch.ones(len(images), device=images.device) if valid is None else valid
    return value, {"valid": rows.detach().sum().float()}


def global_statistics(
    statistics: dict[str, torch.Tensor], process_group: ProcessGroup | None = None
) -> dict[str, float]:
    """Return the number of valid pairs and the in-batch accuracies (percent), where measured. Collective."""
    names = sorted(statistics)
    sums = all_reduce_sum(torch.stack([statistics[name] for name in names]), process_group).tolist()
    found = dict(zip(names, sums))
    valid = found.pop("valid")
    accuracies = {f"batch_{name.removeprefix('correct_')}_r1": 100 * n / max(valid, 1) for name, n in found.items()}
    return {"valid": valid, **accuracies}
