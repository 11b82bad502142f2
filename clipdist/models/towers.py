"""What is done to a tower as a whole: a tower in, the same tower out, frozen (LiT), with recomputed activations, or
with BatchNorm that keeps fp32 statistics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clipdist.errors import UserError
from clipdist.models.norms import running_norms, statistics_still


def lock(tower: nn.Module, key: str, unlocked: int) -> None:
    """Freezes a tower but for its last `unlocked` groups, as the tower itself counts them.

    Raises:
        UserError: this kind of tower cannot be unlocked in part; `key` names the setting.
    """
    if unlocked < 0:
        raise UserError(f"{key}={unlocked}: must not be negative")
    try:
        tower.lock(unlocked)  # type: ignore[operator]
    except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{key}={unlocked}: {_kind(tower)} cannot be unlocked in part; set it to 0") from error


def frozen_subtrees(module: nn.Module) -> Iterator[nn.Module]:
    """The largest submodules that have parameters, none of which trains."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_subtrees(child)


def keep_statistics_fp32(tower: nn.Module) -> None:
    """Lets plain BatchNorm2d layers keep fp32 running statistics when the tower is cast to bf16 or fp16.

    In bf16 a running mean stops moving once a batch is within 2 % of it; in fp32 nothing changes, to the bit.
    """
    for module in tower.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNormFp32Statistics


class BatchNormFp32Statistics(nn.BatchNorm2d):
    """BatchNorm2d for low precision: activations in the input's dtype, statistics in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, C, H, W] -> the same shape and dtype."""
        tracking = self.training and self.track_running_stats
        share = self.momentum or 0.0
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean over the batches so far, as nn.BatchNorm2d has it
                share = 1 / float(self.num_batches_tracked)
        known = tracking or not self.training
        # The kernels take low-precision inputs with fp32 affine parameters and statistics, not a mixture of the two.
        return F.batch_norm(
            x,
            self.running_mean if known else None,
            self.running_var if known else None,
            self.weight.float(),
            self.bias.float(),
            self.training,
            share,
            self.eps,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNormFp32Statistics:
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, statistics in before.items():
            after = getattr(self, name)
            if after.dtype != statistics.dtype and not after.is_meta:
                setattr(self, name, statistics.to(after.device))
        return self


def checkpoint_image_tower(tower: nn.Module) -> None:
    """Activation checkpointing, exact for BatchNorm as well: the second forward pass leaves the statistics alone.

    Raises:
        UserError: the tower's blocks are not known.
    """
    trunk: Any = getattr(tower, "trunk", tower)  # timm's model inside open_clip's adapter, or open_clip's own
    if any(isinstance(module, _BatchNorm) for module in trunk.modules()):
        blocks = _residual_blocks(trunk)
        if not blocks:
            raise _no_checkpointing(trunk)
        for block in blocks:
            block.__class__ = type(block.__class__.__name__, (_Recomputed, block.__class__), {})
        return
    try:
        trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise _no_checkpointing(trunk) from error


def _residual_blocks(trunk: nn.Module) -> list[nn.Module]:
    """The blocks of the stages layer1, layer2 ... that every ResNet here has."""
    stages = [child for name, child in trunk.named_children() if re.fullmatch(r"layer\d+", name)]
    return [block for stage in stages for block in stage.children()]


class _Recomputed(nn.Module):
    """Mixed in before a block's own class (parameter names and deep copies stay as they are)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_still(running_norms(self))


def _no_checkpointing(trunk: nn.Module) -> UserError:
    return UserError(
        f"engine.activation_checkpointing=true: not known how for the image tower {_kind(trunk)};"
        " set it to false, or choose a ViT or a ResNet"
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__
