"""Change a whole tower in place: freeze it (LiT), checkpoint its activations, keep BatchNorm's statistics in fp32."""

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
from clipdist.models.norms import running_norms, statistics_frozen


def lock(tower: nn.Module, key: str, unlocked: int) -> None:
    """Freeze a tower except its last `unlocked` groups, as the tower defines them.

    Args:
        key: name of the setting, for the message.

    Raises:
        UserError: `unlocked` is negative, or this kind of tower cannot be unlocked in part.
    """
    if unlocked < 0:
        raise UserError(f"{key}={unlocked}: must not be negative")
    try:
        tower.lock(unlocked)  # type: ignore[operator]
    except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{key}={unlocked}: {_kind(tower)} cannot be unlocked in part; set it to 0") from error


def frozen_subtrees(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the largest submodules that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_subtrees(child)


def keep_statistics_fp32(tower: nn.Module) -> None:
    """Keep the running statistics of plain BatchNorm2d layers in fp32 when the tower is cast to bf16 or fp16.

    In bf16 a running mean is no longer updated once a batch is within 2 % of it. In fp32 results are bit-identical.
    """
    for module in tower.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNormFp32Statistics


class BatchNormFp32Statistics(nn.BatchNorm2d):
    """BatchNorm2d for low precision: activations in the dtype of the input, running statistics in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [b, C, H, W]; return the same shape and dtype."""
        tracking = self.training and self.track_running_stats
        share = self.momentum or 0.0
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # a plain mean over the batches so far, as in nn.BatchNorm2d
                share = 1 / float(self.num_batches_tracked)
        uses_statistics = tracking or not self.training
        # The kernels require affine parameters of the same dtype as the statistics.
        return F.batch_norm(
            x,
            self.running_mean if uses_statistics else None,
            self.running_var if uses_statistics else None,
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
    """Checkpoint the activations of an image tower. The second forward pass does not update BatchNorm's statistics.

    Raises:
        UserError: the tower is of a kind whose blocks are unknown.
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
    """Return the blocks of a ResNet's stages layer1, layer2 ..."""
    stages = [child for name, child in trunk.named_children() if re.fullmatch(r"layer\d+", name)]
    return [block for stage in stages for block in stage.children()]


class _Recomputed(nn.Module):
    """Mixin that checkpoints a block: mixed in before its class, so that parameter names and deep copies still work."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_frozen(running_norms(self))


def _no_checkpointing(trunk: nn.Module) -> UserError:
    return UserError(
        f"engine.activation_checkpointing=true: not known how for the image tower {_kind(trunk)};"
        " set it to false, or choose a ViT or a ResNet"
    )


def _kind(module: nn.Module) -> str:
    return type(module).__name__
