"""Heads of self-supervised objectives: trained behind the image tower, and dropped on export."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdist.models.masked_patches import MaskToken


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


class PrototypeHead(nn.Module):
    """DINO's head: linear layers with GELU between them, a unit vector, and its products with prototypes.

    Args:
        widths: of the input, of the hidden layers, of the vector.
        prototypes: P.
        free_norm: prototypes have any norm; False: norm 1.
    """

    def __init__(self, widths: Sequence[int], prototypes: int, free_norm: bool) -> None:
        super().__init__()
        layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.GELU())]
        self.projector = nn.Sequential(*layers[:-1])
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(widths[-1], prototypes, free_norm)

    def forward(self, hidden: Tensor, teaching: bool = False) -> Tensor:
        """Return logits [b, P] of features [b, w]."""
        return self.last_layer(F.normalize(self.projector(hidden).float(), dim=1).to(hidden.dtype))


class PatchHead(PrototypeHead):
    """A head of patches' tokens, and the token that stands for masked patches (iBOT, Zhou et al., arXiv:2111.07832)."""

    def __init__(self, widths: Sequence[int], prototypes: int, free_norm: bool) -> None:
        super().__init__(widths, prototypes, free_norm)
        self.mask_token = MaskToken(widths[0])


class Prototypes(nn.Module):
    """A linear layer whose rows are normalised (weight normalisation, Salimans and Kingma, arXiv:1602.07868)."""

    def __init__(self, width: int, prototypes: int, free_norm: bool) -> None:
        super().__init__()
        self.weight = nn.Linear(width, prototypes, bias=False).weight
        self.norm = nn.Parameter(torch.ones(prototypes)) if free_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, P] of unit vectors [b, w]."""
        unit = F.normalize(self.weight.float(), dim=1).to(x.dtype)
        logits = F.linear(x, unit)
        return logits if self.norm is None else logits * self.norm.to(x.dtype)


class VariationalHead(nn.Module):
    """Mean and variance of a code, and a decoder of transposed 3 x 3 convolutions.

    Args:
        width: w of the input.
        latent: Z, width of the code.
        size: side S of what is decoded, a power of two.
        channels: of the decoder at 4 x 4; half of them at each doubling.
    """

    def __init__(self, width: int, latent: int, size: int, channels: int) -> None:
        super().__init__()
        self.moments = nn.Linear(width, 2 * latent)
        self.grid = nn.Linear(latent, 16 * channels)
        layers: list[nn.Module] = []
        side = 4
        while side < size:
            layers += [nn.ReLU(), nn.ConvTranspose2d(channels, channels // 2, 4, stride=2, padding=1)]
            side, channels = 2 * side, channels // 2
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, hidden: Tensor, teaching: bool = False, noise: Tensor | None = None) -> Tensor:
        """Return [b, Z + Z + 3 S S]: means, logarithms of variances, and values around 0..1 of the decoded code.

        Args:
            hidden: [b, w].
            noise: standard normal, [b, Z]; None: the mean is decoded.
        """
        moments = self.moments(hidden)
        mean, log_variance = moments.float().chunk(2, dim=1)
        code = mean if noise is None else mean + noise * (log_variance / 2).exp()
        decoded = self.decoder(self.grid(code.to(hidden.dtype)).unflatten(1, (-1, 4, 4)))
        return torch.cat([moments, decoded.flatten(1)], dim=1)
