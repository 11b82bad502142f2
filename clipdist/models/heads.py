"""Heads of self-supervised objectives: trained behind the image tower, and dropped on export."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


def mlp(widths: Sequence[int], *, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Return linear layers with ReLU between them.

    Args:
        widths: of the input, of the hidden layers, of the output.
        norm: BatchNorm before each ReLU; linear layers then have no bias.
        last_norm: BatchNorm without gain and bias behind the last layer (SimCLR, arXiv:2002.05709; MoCo v3).
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for number, (narrow, wide) in enumerate(pairwise(widths)):
        normed = last_norm if number == last else norm
        layers.append(nn.Linear(narrow, wide, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(wide, affine=number < last))
        if number < last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class ProjectionHead(nn.Module):
    """A projector, and a predictor behind it that the teacher leaves out (BYOL, arXiv:2006.07733).

    Args:
        projector: [b, w] -> [b, P].
        predictor: [b, P] -> [b, P]; None: there is none.
    """

    def __init__(self, projector: nn.Module, predictor: nn.Module | None = None) -> None:
        super().__init__()
        self.projector = projector
        self.predictor = predictor

    def forward(self, hidden: Tensor, teaching: bool = False) -> Tensor:
        """Return [b, P] of features [b, w]."""
        projected = self.projector(hidden)
        return projected if self.predictor is None or teaching else self.predictor(projected)
