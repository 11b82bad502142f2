"""Compute the distance of features by their cosine."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos of [..., D] and [..., D], fp32 [...], as half a squared distance: near 0 nothing cancels.

    Twice that is BYOL's loss, 2 - 2 cos (Grill et al., arXiv:2006.07733, eq. 2).
    """
    difference = F.normalize(x.float(), dim=-1) - F.normalize(y.float(), dim=-1)
    return difference.square().sum(-1) / 2
