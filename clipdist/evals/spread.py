"""Measure in how many directions features spread: a representation that collapses uses few of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def effective_rank(features: Tensor) -> float:
    """Return the effective rank of features, scaled to unit length, in 1 .. D; 0 where all are 0.

    It is exp(-sum_k p_k ln p_k) with p_k the singular values of the [n, D] matrix divided by their sum (Roy and
    Vetterli, "The effective rank", EUSIPCO 2007). The mean is not subtracted: features that have collapsed to one point
    have a rank near 1. The singular values are the roots of the eigenvalues of a D x D matrix, in float64.

    Args:
        features: [n, D], any float dtype.
    """
    products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in features.split(ROWS):
        unit = F.normalize(rows.double(), dim=1).cpu()
        products.addmm_(unit.T, unit)
    values = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total else 0.0


ROWS = 65536  # features in float64 at a time
