"""Compute open_clip's losses on the unnormalised features that clipdist's losses take.

open_clip's losses are those of the installed package, in its exact modes: local_loss with gather_with_grad for
ClipLoss, the exchange between neighbours (its default) for SigLipLoss. No training of clipdist's depends on this file.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from clipdist.errors import UserError


@lru_cache
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


def clip_loss(
    images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor, *, rank: int = 0, world: int = 1
) -> torch.Tensor:
    """Compute ClipLoss on a tower's features [b, D], log scale [1]: a scalar whose mean over ranks is the loss.

    In the features' dtype and outside autocast, which costs less memory than under it (a cross-entropy in fp32).
    """
    loss = open_clip_losses().ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch: of the collectives that it uses
        return loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), log_scale.exp()[0])


def siglip_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    rank: int = 0,
    world: int = 1,
) -> torch.Tensor:
    """Compute SigLipLoss, as clip_loss; bias [1]."""
    loss = open_clip_losses().SigLipLoss(rank=rank, world_size=world)
    return loss(F.normalize(images, dim=-1), F.normalize(texts, dim=-1), log_scale.exp()[0], bias[0])
