"""BatchNorm over fixed groups of G consecutive rows of the global batch, whatever the ranks and micro-batches.

A group of at most one forward pass is a pass of its own through the layer. One that spans ranks has its moments summed
over ranks, in the forward and in the backward pass. Views have groups of their own: each is one call of the tower. Rows
that are not valid take part, as without groups.

Shapes: b rows in a forward pass, C channels; a layer may have several rows for each image (LeViT: one for each patch).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.errors import UserError


class Groups:
    """The groups of a model, known to all of its BatchNorm layers.

    Args:
        size: G, in rows of the global batch.

    Attributes:
        rows: of the newest forward pass of the model on this rank.
    """

    def __init__(self, size: int) -> None:
        self.size, self.rows = size, 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """Note the rows of a forward pass: a hook before it. Every input has one row for each pair."""
        self.rows = next(len(value) for value in (*args, *inputs.values()) if isinstance(value, Tensor))


class GroupedBatchNorm(nn.Module):
    """Mixin of BatchNorm, of any subclass: in training it normalises over groups; see clipdist.models.towers.

    Running statistics do not move in the forward pass. RunningStatistics.average moves them once a step, by the mean
    over all groups of the step that `moments` has summed.

    Attributes:
        moments: fp32 [3, C], over the groups of the step: the sums of means and of unbiased variances, and the number
            of groups, of which a rank counts its share. None: statistics do not move.
    """

    groups: Groups
    moments: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [n b, C, ...], n rows of each image."""
        if not self.training:
            return super().forward(x)
        rows, size = self.groups.rows, self.groups.size
        if len(x) % rows or (rows % size and size % rows):
            raise UserError(
                f"model.batchnorm_group={size}: a {type(self).__name__} has {len(x)} rows for {rows} pairs, which are"
                " no whole groups; set it to 0"
            )
        # Torch's CPU kernel for channels_last adds up value by value: in fp32 to 3e-5 of a layer's output, where others
        # are exact to 5e-8. Groups within and over ranks would differ by that.
        as_given = x.dim() == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
        x = x.contiguous() if as_given else x
        y = self._over_ranks(x, size // rows) if size > rows else self._over_parts(x, len(x) // rows * size)
        return y.contiguous(memory_format=torch.channels_last) if as_given else y

    def _over_parts(self, x: Tensor, rows: int) -> Tensor:
        """Normalise each `rows` rows by themselves."""
        own, momentum = dict(self._buffers), self.momentum
        self.momentum: float | None = 1.0  # the running statistics, which are not the layer's own, become a group's
        for name, buffer in own.items():
            self._buffers[name] = None if buffer is None or name == "num_batches_tracked" else torch.zeros_like(buffer)
        outputs = []
        try:
            for part in x.split(rows):
                outputs.append(super().forward(part))
                if own["num_batches_tracked"] is not None:
                    self._count(self._buffers["running_mean"], self._buffers["running_var"], 1.0)
        finally:
            self.momentum = momentum
            self._buffers.update(own)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.compiler.disable  # collectives
    def _over_ranks(self, x: Tensor, ranks: int) -> Tensor:
        """Normalise over the rows that so many ranks have. Collective.

        The layer runs in evaluation mode with the group's moments for its statistics; _ThroughMoments adds what the
        gradient of the moments contributes.
        """
        dims, count = _all_but_channels(x), ranks * x.numel() // x.shape[1]
        with torch.no_grad():
            # Sums in float64: in fp32 the difference of squares would cancel.
            values = x.float()
            sums = [part.sum(dims, dtype=torch.float64) for part in (values, values.square())]
            mean, square = mean_over_ranks(torch.stack(sums) * (ranks / count), ranks)
            var = (square - mean.square()).clamp(min=0)
            if self.num_batches_tracked is not None:
                self._count(mean, var * (count / (count - 1)), 1 / ranks)
            scale = (var + self.eps).rsqrt().float()
        own, training = dict(self._buffers), self.training
        self._buffers.update(running_mean=mean.float(), running_var=var.float())
        self.training = False  # of this layer alone, not of the activation that some subclasses hold
        try:
            return super().forward(_ThroughMoments.apply(x, mean.float(), scale, ranks)).to(x.dtype)
        finally:
            self.training = training
            self._buffers.update(own)

    @torch.no_grad()
    def _count(self, mean: Tensor | None, var: Tensor | None, share: float) -> None:
        """Add the moments of a group, of which this rank has a share."""
        if self.moments is not None and mean is not None and var is not None:
            self.moments += share * torch.stack([mean, var, torch.ones_like(mean)])


class _ThroughMoments(torch.autograd.Function):
    """The identity in fp32, whose gradient is that of a normalisation: behind it the moments count as constants.

    In fp32, since most of the gradient for constant moments may cancel below: rounded to bf16 before, it would be lost.

    With x' = (x - mean) * scale and d the gradient of x for constant moments, the gradient is
    d - mean(d) - x' mean(d x'), with means over the group (Ioffe and Szegedy, arXiv:1502.03167, section 3).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, scale: Tensor, ranks: int) -> Tensor:
        ctx.save_for_backward(x, mean, scale)
        ctx.ranks = ranks
        return x.view_as(x) if x.dtype == torch.float32 else x.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, mean, scale = ctx.saved_tensors
        dims, shape = _all_but_channels(x), [1, -1, *[1] * (x.dim() - 2)]
        normal = (x.float() - mean.view(shape)) * scale.view(shape)
        means = torch.stack([grad.mean(dims), (grad * normal).mean(dims)]).double()
        first, second = mean_over_ranks(means, ctx.ranks).float()
        return (grad - first.view(shape) - normal * second.view(shape)).to(x.dtype), None, None, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def mean_over_ranks(values: Tensor, ranks: int) -> Tensor:
    """Return the mean of tensors of one shape over this rank's group of `ranks` consecutive ranks. Collective.

    One all-reduce over all ranks, of a table with a row for each group, instead of a process group for each.
    """
    rank, world = rank_and_world()
    table = values.new_zeros(world // ranks, *values.shape)
    table[rank // ranks] = values / ranks
    return all_reduce_sum(table)[rank // ranks]


# MoCo's shuffle


def interleaved(rows: int, group: int) -> Tensor:
    """Return the order in which keys pass the key tower: int64 [rows], for `keys[order]`.

    Within every block of 2 G rows first the even rows, then the odd ones. So a group of keys has half of one group of
    queries and half of the next, and what BatchNorm tells of a group does not tell which key belongs to a query (MoCo,
    He et al., arXiv:1911.05722, section 3.3, "Shuffling BN"). A function of the row alone: the same for every number of
    ranks and micro-batches of which each has whole blocks.

    Args:
        rows: of a forward pass, a multiple of 2 G.
        group: G, even.

    Raises:
        ValueError: the rows are no whole blocks, or G is odd.
    """
    if group < 2 or group % 2 or rows % (2 * group):
        raise ValueError(f"{rows} rows are no blocks of two groups of {group} rows, an even number")
    return torch.arange(rows).view(-1, group, 2).transpose(1, 2).reshape(-1)


def inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes one: x[order][inverse(order)] is x."""
    return torch.argsort(order)
