"""Control when BatchNorm's running statistics are updated.

Activation checkpointing and micro-batches run a forward pass twice: only one of them may update the statistics. With
micro-batches, or several views of an image, they are updated once per step, by the mean over all of these; with groups
of BatchNorm (clipdist.models.grouped_norms) by the mean over all groups of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.models.grouped_norms import GroupedBatchNorm


def running_norms(module: nn.Module) -> list[_NormBase]:
    """Return the normalisation layers that track running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]


class RunningStatistics:
    """The running statistics of a model, saved before a step and restored if the step is skipped.

    Args:
        module: the model; its layers and buffers must stay the same objects.

    Attributes:
        norms: its normalisation layers with running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = running_norms(module)
        self._grouped: list[Any] = [norm for norm in self.norms if isinstance(norm, GroupedBatchNorm)]
        others = [norm for norm in self.norms if not isinstance(norm, GroupedBatchNorm)]
        moments = [(norm.running_mean, norm.running_var) for norm in others]
        self._moments = [buffer for pair in moments for buffer in pair if buffer is not None]
        counts = [norm.num_batches_tracked for norm in others if norm.num_batches_tracked is not None]
        self._buffers = [*self._moments, *counts]
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def save(self) -> None:
        """Save the statistics before the forward pass, which updates them even if the step is skipped later.

        Those over groups are not updated there: their sums begin anew.
        """
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        for norm in self._grouped:
            norm.moments = torch.zeros(3, norm.num_features, device=norm.running_mean.device)

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the saved statistics."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)

    @torch.no_grad()
    def average(self) -> None:
        """Average the statistics over ranks, each of which normalises over its own rows. Collective.

        Those over groups move by the mean over all groups of the step, the same for any number of ranks.
        """
        self._move_grouped()
        world = rank_and_world()[1]
        if not self._moments or world == 1:
            return
        mean = all_reduce_sum(torch.cat([buffer.float().view(-1) for buffer in self._moments])) / world
        for buffer, part in zip(self._moments, mean.split([buffer.numel() for buffer in self._moments])):
            buffer.copy_(part.view_as(buffer))

    def _move_grouped(self) -> None:
        """Move the statistics of grouped layers once; those of a layer that the step did not use stay."""
        if not self._grouped:
            return
        tables = [norm.moments.flatten() for norm in self._grouped]
        totals = all_reduce_sum(torch.cat(tables)).split([len(table) for table in tables])
        for norm, total in zip(self._grouped, totals):
            mean, var, groups = total.view(3, -1)
            used = groups > 0
            norm.num_batches_tracked += used[0]
            share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            for running, new in ((norm.running_mean, mean), (norm.running_var, var)):
                running.copy_(torch.where(used, running.lerp(new / groups, share), running))


@contextmanager
def statistics_frozen(norms: list[_NormBase]) -> Iterator[None]:
    """Freeze running statistics: forward passes normalise by the batch, but do not update them."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


@contextmanager
def statistics_updated_once(norms: list[_NormBase]) -> Iterator[Callable[[Collection[nn.Module]], None]]:
    """Update running statistics once, by the mean over the passes inside, such as those of micro-batches.

    Yields:
        a function to call after each pass, with the layers that it has run.
    """
    # Not those of a locked tower, nor grouped ones, which sum their moments by themselves.
    active = [norm for norm in norms if norm.training and not isinstance(norm, GroupedBatchNorm)]
    moments = {norm: [m for m in (norm.running_mean, norm.running_var) if m is not None] for norm in active}
    before = {norm: [moment.clone() for moment in own] for norm, own in moments.items()}
    sums = {norm: [torch.zeros_like(moment) for moment in own] for norm, own in moments.items()}
    passes = dict.fromkeys(active, 0)
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in active]
    for norm in active:  # the running statistics become those of one pass
        norm.momentum, norm.num_batches_tracked = 1.0, None

    @torch.no_grad()
    def add(ran: Collection[nn.Module]) -> None:
        own = [norm for norm in active if norm in ran]
        for norm in own:
            passes[norm] += 1
        if own:
            torch._foreach_add_([total for norm in own for total in sums[norm]], [m for n in own for m in moments[n]])

    try:
        yield add
    finally:
        for norm, (momentum, count) in zip(active, settings):
            assert count is not None
            norm.momentum, norm.num_batches_tracked = momentum, count.add_(bool(passes[norm]))
            share = 1 / count if momentum is None else momentum
            for running, old, total in zip(moments[norm], before[norm], sums[norm]):
                # .data: the backward pass, which may be still to come, does not read them, but counts changes.
                running.data.copy_(old.lerp(total / passes[norm], share) if passes[norm] else old)


@contextmanager
def statistics_of_views(module: Any, norms: list[_NormBase]) -> Iterator[None]:
    """Update running statistics once, by the mean over the views of an image and the micro-batches inside.

    Args:
        module: a clipdist.models.dual_encoder.DualEncoder.
        norms: its layers with running statistics.
    """
    with statistics_updated_once(norms) as updated:
        module.after_view = lambda view: updated([*module.modules_of(view)])
        try:
            yield
        finally:
            del module.after_view
