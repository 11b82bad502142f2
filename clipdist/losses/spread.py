"""Measure in how many directions features spread: a representation that collapses uses few of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from clipdist.distributed.collectives import all_reduce_sum
from clipdist.losses.global_batch import check_agreement, chunks


@torch.no_grad()
def effective_rank(
    features: Tensor, *, valid: Tensor | None = None, process_group: ProcessGroup | None = None
) -> float:
    """Return the effective rank of the features of all ranks, in 1 .. D; 0 where all are 0. Collective.

    It is exp(- sum_k p_k log p_k) with p_k the singular values of the [N, D] matrix divided by their sum (Roy and
    Vetterli, "The effective rank", EUSIPCO 2007). They are the roots of the eigenvalues of the sum of x x^T over the
    rows, D x D in float64, which is added up over ranks. The mean is not subtracted: features that have collapsed to
    one point, and noise around it, have a rank near 1.

    Args:
        features: [b, D], any float dtype; the same b on every rank.
        valid: bool [b]; None: all rows.

    Raises:
        UserError, NonFiniteFeatures: as clipdist.losses.nt_xent.nt_xent.
    """
    if valid is None:
        valid = torch.ones(features.shape[:1], dtype=torch.bool, device=features.device)
    check_agreement({"the features": features}, valid, group=process_group)
    products = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for rows in chunks(len(features)):
        part = features[rows].double() * valid[rows, None]
        products.addmm_(part.T, part)
    squares = torch.linalg.eigvalsh(all_reduce_sum(products, process_group))
    values = squares.clamp(min=0).sqrt()
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
