"""Which code runs the sweeps over the tiles: a setting and the features' device in; a module with the sweeps out."""

from __future__ import annotations

from types import ModuleType

import torch

from clipdist.errors import UserError
from clipdist.losses import tiles


def sweeps(implementation: str, features: torch.Tensor) -> ModuleType:
    """auto: the fused kernels where they run, else the tiles of plain torch, which are their reference.

    Raises:
        UserError: kernel is asked for where it cannot run, or there is no such implementation.
    """
    if implementation == "tiles" or (implementation == "auto" and features.device.type != "cuda"):
        return tiles
    if implementation == "compiled":
        from clipdist.losses import compiled

        return compiled
    if implementation not in ("auto", "kernel"):
        raise UserError(f"loss.implementation={implementation}: choose auto, tiles, compiled or kernel")
    from clipdist.losses import kernels

    if kernels.available(features.device, features.dtype):
        return kernels
    if implementation == "kernel":
        raise UserError(f"loss.implementation=kernel: needs Triton and a GPU, the features are on {features.device}")
    return tiles
