"""Choose the implementation of the sweeps over the tiles: plain torch or the fused kernels."""

from __future__ import annotations

from types import ModuleType

import torch

from clipdist.errors import UserError
from clipdist.losses import tiles


def sweeps(implementation: str, features: torch.Tensor) -> ModuleType:
    """Return the module that implements the sweeps.

    Args:
        implementation: "tiles": plain torch, the reference; "kernel": the fused kernels; "auto": the kernels where they
            run, else the tiles.
        features: [b, D]; their device, dtype and width decide.

    Raises:
        UserError: the kernels are requested where they cannot run, or the implementation is unknown.
    """
    if implementation == "tiles" or (implementation == "auto" and features.device.type != "cuda"):
        return tiles
    if implementation not in ("auto", "kernel"):
        raise UserError(f"objectives.clip.implementation={implementation}: choose auto, tiles or kernel")
    from clipdist.losses import kernels

    if kernels.available(features.device, features.dtype, features.shape[-1]):
        return kernels
    if implementation == "kernel":
        raise UserError(
            f"objectives.clip.implementation=kernel: needs Triton and a GPU, the features are on {features.device}"
        )
    return tiles
