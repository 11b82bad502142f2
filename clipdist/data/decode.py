"""Encoded pictures in, uint8 pixels [3, size, size] out: decoding, cropping, resizing.

EXIF orientation is not applied, whatever the decoder: that is what Pillow and open_clip do, so that a checkpoint sees
the same picture here and there. Resizing is antialiased bicubic on uint8, at most 2 grey levels away from Pillow's.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

MAX_PIXELS = 100_000_000
REASONS = ("missing image", "missing caption", "truncated image", "not an image", "too many pixels")


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one picture to uint8 [h, w, 3]; the pixel count is checked before decoding.

    JPEG goes through libjpeg-turbo, everything else (and JPEGs that it refuses, such as CMYK) through Pillow.

    Raises:
        BadSample: not a picture, truncated, or more than `max_pixels` pixels.
    """
    if data[:2] == b"\xff\xd8":
        try:
            height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
            if width * height > max_pixels:
                raise BadSample("too many pixels")
            if colour_space in ("YCbCr", "RGB", "GRAY", "Gray"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except ValueError:
            pass  # damaged or unusual: Pillow has the last word
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit comes first
            image = Image.open(io.BytesIO(data))
    except Exception:  # Pillow raises many kinds on hostile bytes
        raise BadSample("not an image") from None
    if image.width * image.height > max_pixels:
        raise BadSample("too many pixels")
    try:
        return np.asarray(image.convert("RGB"))
    except Exception:
        raise BadSample("truncated image") from None


def train_image(
    data: bytes, size: int, random: np.random.Generator, scale_min: float, max_pixels: int = MAX_PIXELS
) -> torch.Tensor:
    """A random crop of [scale_min, 1] of the area, aspect 3/4 to 4/3, resized: uint8 [3, size, size].

    The distribution is that of torchvision's RandomResizedCrop (Szegedy et al., arXiv:1409.4842).
    """
    pixels = decode_pixels(data, max_pixels)
    top, left, height, width = random_crop(pixels.shape[0], pixels.shape[1], random, scale_min)
    return _resize(pixels[top : top + height, left : left + width], size, size)


def eval_image(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """open_clip's evaluation transform: shorter side to `size`, centre crop: uint8 [3, size, size]."""
    pixels = decode_pixels(data, max_pixels)
    height, width = pixels.shape[:2]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    if tall * wide > max_pixels:  # a strip: small as a file, gigabytes when its short side is enlarged
        raise BadSample("too many pixels")
    resized = _resize(pixels, tall, wide)
    top, left = round((resized.shape[1] - size) / 2), round((resized.shape[2] - size) / 2)
    return resized[:, top : top + size, left : left + size]


def random_crop(height: int, width: int, random: np.random.Generator, scale_min: float) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop; after ten misses, the largest central one of a legal aspect."""
    area = height * width
    for _ in range(10):
        target = area * random.uniform(scale_min, 1.0)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """uint8 [h, w, 3] to uint8 [3, height, width]."""
    if not pixels.flags.writeable:
        pixels = pixels.copy()
    view = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # channels last in memory: the fast path
    if view.shape[2:] != (height, width):
        view = F.interpolate(view, size=(height, width), mode="bicubic", antialias=True)
    return view[0]
