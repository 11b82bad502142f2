"""BatchNorm's running statistics when a step passes a layer more than once.

Activation checkpointing and micro-batches run a forward pass twice: the statistics must move in one of them only. And
however many micro-batches there are, they move once a step, by the mean of the micro-batches' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from clipdist.distributed.collectives import all_reduce_sum, rank_and_world


def running_norms(module: nn.Module) -> list[_NormBase]:
    """The normalisation layers whose running statistics training updates."""
    return [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]


class RunningStatistics:
    """The running statistics of a model over a training step, which may be left out.

    Args:
        module: layers and buffers of which are looked up once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = running_norms(module)
        moments = [(norm.running_mean, norm.running_var) for norm in self.norms]
        self._moments = [buffer for pair in moments for buffer in pair if buffer is not None]
        counts = [norm.num_batches_tracked for norm in self.norms if norm.num_batches_tracked is not None]
        self._buffers = [*self._moments, *counts]
        self._before = [torch.empty_like(buffer) for buffer in self._buffers]

    @torch.no_grad()
    def keep(self) -> None:
        """Remembers them: a step that is left out has gone through the forward pass, and may have taken inf along."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def put_back(self) -> None:
        """As they were at keep()."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)

    @torch.no_grad()
    def average(self) -> None:
        """The mean over ranks, each of which normalised over its own rows. Collective."""
        world = rank_and_world()[1]
        if not self.norms or world == 1:
            return
        mean = all_reduce_sum(torch.cat([buffer.float().view(-1) for buffer in self._moments])) / world
        for buffer, part in zip(self._moments, mean.split([buffer.numel() for buffer in self._moments])):
            buffer.copy_(part.view_as(buffer))


@contextmanager
def statistics_still(norms: list[_NormBase]) -> Iterator[None]:
    """BatchNorm normalises by the batch, but its running statistics do not move."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, count


@contextmanager
def statistics_once(norms: list[_NormBase]) -> Iterator[None]:
    """However many micro-batches pass, the running statistics move once, by the mean of theirs."""
    active = [norm for norm in norms if norm.training]  # a locked tower's stay as they are
    before = []
    for norm in active:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        before.append((norm.momentum, norm.num_batches_tracked, norm.running_mean.clone(), norm.running_var.clone()))
        norm.momentum = None  # torch's sign for a plain mean over the batches since the count was 0
        norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (momentum, count, mean, var) in zip(active, before):
            norm.momentum = momentum
            norm.num_batches_tracked = count.add_(1)
            share = 1 / float(count) if momentum is None else momentum
            for running, old in ((norm.running_mean, mean), (norm.running_var, var)):
                assert running is not None
                running.copy_(old.lerp(running, share))
