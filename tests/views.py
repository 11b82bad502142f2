"""One view of one encoded image, as training makes it."""

from __future__ import annotations

import numpy as np
import torch

from clipdist.data.augment import Augmentation, View, train_views
from clipdist.data.bad_sample import MAX_PIXELS


def train_image(
    data: bytes,
    size: int,
    uniforms: np.ndarray,
    augmentation: Augmentation,
    max_pixels: int = MAX_PIXELS,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """uint8 [3, size, size]."""
    out = torch.empty(3, size, size, dtype=torch.uint8) if out is None else out
    train_views(data, [View("image", size, augmentation)], uniforms[None], [out], max_pixels)
    return out
