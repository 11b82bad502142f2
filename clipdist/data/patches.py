"""Images at their own aspect ratio as patches: a row of fixed length for each, so that a batch stays one tensor.

A buffer is uint8 [b, 1 + n, 3 * P * P] for at most n patches of P x P pixels. Place 0 of a row holds the grid: its rows
and columns of patches, two bytes each, the lower byte first. The patches follow, row by row, each with its pixels as
(y, x, channel), as timm's NaFlexVit takes them; the rest is zero. A row of zeros alone, which stands for an image that
cannot be used, is one black patch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from clipdist.data.transform import EvalTransform, NativeAspect


def write_patches(image: Tensor, out: Tensor, patch: int) -> None:
    """Write an image to a row of a buffer.

    Args:
        image: uint8 [3, h * patch, w * patch].
        out: uint8 [1 + n, 3 * patch * patch], n >= h * w; contiguous.
    """
    height, width = image.shape[1] // patch, image.shape[2] // patch
    end = 1 + height * width
    out[0].zero_()
    out[0, :4] = torch.from_numpy(np.array([height, width], dtype="<u2").view(np.uint8))
    patches = image.view(3, height, patch, width, patch).permute(1, 3, 2, 4, 0)
    out[1:end].view(patches.shape).copy_(patches)
    out[end:].zero_()


def grids(buffer: Tensor) -> list[tuple[int, int]]:
    """Return the rows and columns of every image's grid.

    Args:
        buffer: uint8 [b, 1 + n, 3 * P * P]; on a GPU the host waits for it.
    """
    sides = buffer[:, 0, :4].cpu().contiguous().numpy().view("<u2")
    return [(max(1, rows), max(1, columns)) for rows, columns in sides.tolist()]


def full_images(rows: int, transform: EvalTransform, device: str | torch.device) -> Tensor:
    """Return black images of the most pixels, [rows, *transform.shape], on the device; patches on the CPU."""
    if not isinstance(transform, NativeAspect):
        return torch.zeros(rows, *transform.shape, dtype=torch.uint8, device=device)
    buffer = torch.zeros(rows, *transform.shape, dtype=torch.uint8, device="cpu")
    height = math.isqrt(transform.budget)
    sides = np.array([height, transform.budget // height], dtype="<u2")
    buffer[:, 0, :4] = torch.from_numpy(sides.view(np.uint8))
    return buffer


def is_buffer(images: Tensor) -> bool:
    """Whether these are patches in a buffer, not images [b, 3, H, W]."""
    return images.dim() == 3 and images.dtype == torch.uint8
