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


def running_norms(module: nn.Module) -> list[_NormBase]:
    """The normalisation layers whose running statistics training updates."""
    return [layer for layer in module.modules() if isinstance(layer, _NormBase) and layer.track_running_stats]


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
