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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_gather, all_reduce_sum, rank_and_world, reduce_scatter_sum
from clipdist.distributed.rank import upload
from clipdist.errors import UserError
from clipdist.losses.tiles import Logits, Tile, choose_tile

LN_100 = math.log(100)
TOWERS = ("image", "text")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteFeatures(RuntimeError):
    """Features with inf or nan; raised on every rank, before any gradient exists.

    Attributes:
        where: (rank, tower or other name, number of rows) of all affected features of every rank.
    """

    def __init__(self, where: list[tuple[int, str, int]]) -> None:
        self.where = where
        named = "; ".join(
            f"rank {rank}: {rows} rows of {f'the {name} tower' if name in TOWERS else name}"
            for rank, name, rows in where[:8]
        )
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
        log_scale: t, [1]; 0 if None.  log_scale_max: its maximum.
        bias: of the logits, [1]; 0 if None.
        valid: bool [b]; None: all rows.
        group_id: int64 [b]; None: every row is a group of its own.
        group: the process group.

    Attributes:
        images, texts: as given, detached.  all_texts: [N, D], those of all ranks.
        valid: fp32 [b], 1 or 0.  all_valid: fp32 [N].  count: valid pairs of all ranks, at least 1.
        scale: exp(t), a Python float.  bias: a Python float.
        image_inverse, text_inverse, all_text_inverse: 1 / |features|, fp32 [b], [b] and [N], 0 where not valid.
        all_groups: int64 [N].  duplicates: the groups of more than one pair; None: there are none, or no fetch() yet.
        own: this rank's slice of the N rows.

    The host waits for the device once here, and once in fetch().

    Raises:
        UserError, NonFiniteFeatures: see check_agreement.
    """

    def __init__(
        self,
        images: torch.Tensor,
        texts: torch.Tensor,
        log_scale: torch.Tensor | None,
        log_scale_max: float,
        bias: torch.Tensor | None,
        valid: torch.Tensor | None,
        group_id: torch.Tensor | None,
        group: ProcessGroup | None,
    ) -> None:
        self.rank, self.world = rank_and_world(group)
        self.process_group = group
        self.images, self.texts = images.detach(), texts.detach()
        if valid is None:
            valid = torch.ones(images.shape[:1], dtype=torch.bool, device=images.device)
        scalars = [images.new_zeros(1) if scalar is None else scalar.detach() for scalar in (log_scale, bias)]
        agreed = check_agreement(dict(zip(TOWERS, (self.images, self.texts))), valid, scalars, group)
        t, self.bias = agreed.scalars
        self.scale, self.count = math.exp(min(t, log_scale_max)), max(sum(agreed.valid), 1)
        b = len(images)
        self.own = slice(self.rank * b, (self.rank + 1) * b)
        ids = torch.arange(self.own.start, self.own.stop, device=images.device) if group_id is None else group_id
        rows = all_gather(torch.stack([ids.long(), valid.long()], dim=1), group)
        self.all_texts = all_gather(self.texts, group)
        self.all_valid = rows[:, 1].float()
        self.valid = self.all_valid[self.own]
        self.image_inverse = inverse_norms(self.images) * self.valid
        self.all_text_inverse = inverse_norms(self.all_texts) * self.all_valid
        self.text_inverse = self.all_text_inverse[self.own]
        self.all_groups = rows[:, 0]
        self.duplicates: _Duplicates | None = None
        self._grouped = group_id is not None

    def fetch(self, *numbers: torch.Tensor) -> list[float]:
        """Find the duplicates, and return 0-D tensors as Python numbers; the host waits once for both."""
        groups = _Groups.of(self.all_groups, self.all_valid > 0, self.own) if self._grouped else None
        wanted = [number.double() for number in (*numbers, *(groups.sizes if groups else ()))]
        found = torch.stack(wanted).tolist() if wanted else []
        if groups and found[-1]:
            self.duplicates = groups.duplicates(*map(int, found[len(numbers) :]))
        return found[: len(numbers)]

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
            scale_gradient += project(image_sums, self.unit_images(rows), self.image_inverse, rows, weight)
            project(text_gradient, self.unit_texts(rows), self.text_inverse, rows, weight / self.scale)
        gradients = FeatureGradients(image_sums, text_gradient, scale_gradient, torch.zeros_like(scale_gradient))
        return group_sum, logit_sum, gradients

    def _chunks(self) -> list[slice]:
        return chunks(len(self.images))

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
        local: the slice of 0 .. M-1 whose members are rows of this rank.
        others: float64 [b], the number of other members of each row's group.
    """

    members: torch.Tensor
    group: torch.Tensor
    counts: torch.Tensor
    local: slice
    others: torch.Tensor


@dataclass(frozen=True)
class _Groups:
    """The groups of the N pairs of all ranks, found without waiting for the device.

    Attributes:
        several: bool [N], whether a row is a valid pair of a group of several.
        number: int64 [N], of a row's group among those of several.
        sizes: 0-D: members on lower ranks, and on ranks up to this one; groups of several, and their members M.
        own: this rank's rows.
    """

    several: torch.Tensor
    number: torch.Tensor
    sizes: tuple[torch.Tensor, ...]
    own: slice

    @classmethod
    def of(cls, groups: torch.Tensor, valid: torch.Tensor, own: slice) -> _Groups:
        """Find the groups of int64 [N], of the pairs that are valid, bool [N]."""
        order = groups.argsort(stable=True)
        order = order[(~valid[order]).to(torch.uint8).argsort(stable=True)]  # valid pairs by group, then the others
        sorted_groups, sorted_valid = groups[order], valid[order]
        first = torch.ones_like(valid)  # of its group
        first[1:] = (sorted_groups[1:] != sorted_groups[:-1]) | ~sorted_valid[1:]
        group = first.cumsum(0) - 1
        counts = torch.zeros_like(groups).index_add_(0, group, sorted_valid.long())
        several = counts[group] > 1
        first &= several
        by_row = torch.empty_like(several).scatter_(0, order, several)
        number = torch.empty_like(groups).scatter_(0, order, first.cumsum(0) - 1)
        sizes = by_row[: own.start].sum(), by_row[: own.stop].sum(), first.sum(), by_row.sum()
        return cls(by_row, number, sizes, own)

    def duplicates(self, start: int, stop: int, groups: int, total: int) -> _Duplicates:
        """Return the members of groups of several; the arguments are `sizes`."""
        members = (~self.several).to(torch.uint8).argsort(stable=True)[:total]
        group, local = self.number[members], slice(start, stop)
        counts = torch.zeros(groups, device=members.device).index_add_(0, group, torch.ones_like(group).float())
        others = torch.zeros(self.own.stop - self.own.start, dtype=torch.float64, device=members.device)
        others[members[local] - self.own.start] = counts[group[local]].double() - 1
        return _Duplicates(members, group, counts, local, others)


class Agreement(NamedTuple):
    """What check_agreement found.

    Attributes:
        valid: the number of valid rows of every rank.
        scalars: as Python numbers.
        slots: the largest K of all ranks.
    """

    valid: list[int]
    scalars: list[float]
    slots: int


def check_agreement(
    features: Mapping[str, torch.Tensor],
    valid: torch.Tensor,
    scalars: Sequence[torch.Tensor] = (),
    group: ProcessGroup | None = None,
) -> Agreement:
    """Check that all ranks have features of the same shape and dtype, and that they are finite. Collective.

    Args:
        features: by name, which NonFiniteFeatures tells: [b, D], the others as well or [b, K, D] with any K.
        valid: bool [b].
        scalars: [1] each, of this rank.

    The host waits for the device once.

    Raises:
        UserError: shapes or dtypes differ; on every rank (the next collective would hang or mix up rows).
        NonFiniteFeatures: on every rank.
    """
    # A local error is sent as a shape that cannot agree, because the other ranks wait in the collective.
    first, *others = features.values()
    last = [first, *others][-1]
    fits = first.ndim == 2 and all(
        x.ndim in (2, 3) and (*x.shape[:1], *x.shape[-1:]) == (*first.shape,) and x.dtype == first.dtype for x in others
    )
    shape = [*first.shape, _DTYPES.index(first.dtype)] if fits else [-1, -1, -1]
    slots = last.shape[1] if last.ndim == 3 else 1
    bad = [(~torch.isfinite(x)).any(dim=-1).sum() for x in features.values()]
    own = torch.cat([upload([*shape, slots], torch.float64, first.device), torch.stack([*bad, valid.sum()]).double()])
    gathered = all_gather(own[None], group)
    numbers = torch.cat([gathered.view(-1), *(scalar.double().view(1) for scalar in scalars)]).tolist()
    table = [[int(n) for n in numbers[row * len(own) :][: len(own)]] for row in range(len(gathered))]
    if any(row[:3] != table[0][:3] for row in table) or table[0][0] < 0:
        sizes = ", ".join(f"rank {rank}: {row[0]} x {row[1]}" for rank, row in enumerate(table[:16]))
        raise UserError(
            f"the ranks' features do not fit together ({sizes}; -1: features of different shapes):"
            " every rank must bring the same number of rows, features of one width and one dtype"
        )
    where = [
        (rank, name, row[4 + i]) for rank, row in enumerate(table) for i, name in enumerate(features) if row[4 + i]
    ]
    if where:
        raise NonFiniteFeatures(where)
    valid_rows, scalar_numbers = [row[-1] for row in table], numbers[len(table) * len(own) :]
    return Agreement(valid_rows, scalar_numbers, max(row[3] for row in table))


def inverse_norms(features: torch.Tensor) -> torch.Tensor:
    """Return 1 / |x| of every row, fp32 [rows]; norms are at least 1e-12, as in torch.nn.functional.normalize."""
    return torch.linalg.vector_norm(features, dim=1, dtype=torch.float32).clamp_(min=1e-12).reciprocal_()


def chunks(stop: int, rows: int = 1024, start: int = 0) -> list[slice]:
    """Return slices of start .. stop: work in chunks avoids a second copy of the features."""
    return [slice(i, min(i + rows, stop)) for i in range(start, stop, rows)]


def _weighted_sum(features: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum over rows of weight * features, fp32 [D]."""
    parts = [torch.mv(features[rows].float().T, weights[rows]) for rows in chunks(len(features))]
    return torch.stack(parts).sum(0)


def project(sums: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor, rows: slice, weight: float) -> torch.Tensor:
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


MakeBatch = Callable[..., Any]  # of the arguments of GlobalBatch
Compute = Callable[[Any], tuple[torch.Tensor, FeatureGradients]]  # of what MakeBatch returns


class _Attached(torch.autograd.Function):
    """Autograd function of a value whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *leaves: torch.Tensor) -> torch.Tensor:
        ctx.gradients, ctx.like = gradients, [(leaf.dtype, leaf.shape) for leaf in leaves]
        return value.to(torch.float32, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss' gradients were used already: call the loss again for another backward pass")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (g.mul_(grad).to(dtype).expand(shape) for g, (dtype, shape) in zip(gradients, ctx.like))
        return None, None, *scaled


def attach_gradients(value: torch.Tensor, known: Sequence[tuple[torch.Tensor | None, torch.Tensor]]) -> torch.Tensor:
    """Return the value, an fp32 scalar whose backward pass multiplies known gradients by the incoming one.

    Args:
        value: scalar.
        known: leaves and the value's gradients with respect to them, fp32 or float64, which are overwritten.
    """
    leaves, gradients = zip(*((leaf, gradient) for leaf, gradient in known if leaf is not None))
    return _Attached.apply(value, [*gradients], *leaves)


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
    make_batch: MakeBatch = GlobalBatch,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute a loss over the global batch. Collective.

    Args:
        log_scale_max: t is clamped to this maximum; its gradient is that of the identity.
        compute: computes this rank's value and its gradients from the global batch, which make_batch makes.
        The others: see clipdist.losses.infonce.info_nce.

    Returns:
        value: fp32 scalar, differentiable.
        statistics: {"valid": the number of this rank's valid rows}, an fp32 scalar.
    """
    with torch.no_grad():
        value, found = compute(make_batch(images, texts, log_scale, log_scale_max, bias, valid, group_id, group))
    known = [(images, found.image), (texts, found.text), (log_scale, found.scale), (bias, found.bias)]
    value = attach_gradients(value, known)
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
    queries = {"correct_t2i": found.pop("captions", valid)}  # an image may have several
    accuracies = {
        f"batch_{name.removeprefix('correct_')}_r1": 100 * n / max(queries.get(name, valid), 1)
        for name, n in found.items()
    }
    return {"valid": valid, **accuracies}
