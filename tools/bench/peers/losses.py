"""Compute other packages' losses on the unnormalised features that clipdist's losses take.

open_clip's losses are those of the installed package, in its exact modes: local_loss with gather_with_grad for
ClipLoss, the exchange between neighbours (its default) for SigLipLoss. memeff's is a loss in Triton kernels, of one
GPU, whose temperature is a constant. lightly's is its NT-Xent. No training of clipdist's depends on this file.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from clipdist.errors import UserError


def open_clip_losses() -> ModuleType:
    """Import open_clip/loss.py, which needs torch alone; the package around it would bring timm and torchvision.

    Raises:
        UserError: open_clip is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("open_clip is not installed: pip install open_clip_torch")
    path = Path(package.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_loss(op: str, *, rank: int, world: int) -> Callable[..., torch.Tensor]:
    """Return ClipLoss (infonce) or SigLipLoss: a function of image and text features [b, D], log scale and bias [1].

    Its value is a scalar whose mean over ranks is the loss. In the features' dtype and outside autocast, which costs
    less memory than under it (a cross-entropy in fp32).
    """
    losses = open_clip_losses()
    if op == "infonce":
        loss = losses.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    else:
        loss = losses.SigLipLoss(rank=rank, world_size=world)

    def call(images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        scales = [log_scale.exp()[0]] if op == "infonce" else [log_scale.exp()[0], bias[0]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch: of the collectives that it uses
            return loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), *scales)

    return call


def memeff_loss(log_scale: float) -> Callable[..., torch.Tensor]:
    """Return memeff's InfoNCE: a function as open_clip_loss returns, which gives log scale and bias no gradient.

    Args:
        log_scale: the temperature is exp(-log_scale), whatever the function is called with.
    """
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, its default, multiplies the gradients by another factor.
    loss = MemoryEfficientCLIPLoss(temperature=math.exp(-log_scale), stable=False)
    return lambda images, texts, *_: loss(images, texts)


def lightly_loss(temperature: float) -> Callable[..., torch.Tensor]:
    """Return lightly's NTXentLoss: a function of the features of two views [b, D], in one process."""
    from lightly.loss.ntx_ent_loss import NTXentLoss

    return NTXentLoss(temperature)
