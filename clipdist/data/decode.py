"""Decode images to uint8 pixels, resize them, and apply the evaluation transform.

EXIF orientation is never applied, as in Pillow and open_clip: a checkpoint sees the same image in all of them. Resizing
is antialiased on uint8 and differs from Pillow's by at most 2 grey levels in photographs; by more in noise, where
bicubic overshoots are clipped. The C functions release the GIL, so threads decode in parallel.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

from clipdist.data.bad_sample import MAX_PIXELS, BadSample
from clipdist.data.patches import write_patches
from clipdist.data.transform import EvalTransform, NativeAspect

# Formats that Pillow may open. It starts other programs for some formats, and TIFF is a container of many codecs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Decoding a progressive JPEG visits all pixels once per scan. Encoders write about ten scans, but a scan may take only
# 30 bytes, so that a small file could take minutes. Checked where a scan takes milliseconds.
_MAX_SCANS, _MANY_PIXELS = 100, 1_000_000
ELONGATED = "too elongated for the patch budget"

# Pillow warns of large images, which max_pixels covers, and of harmless defects. Set once, because changing warning
# filters is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image, or the first frame of an animation, to uint8 [h, w, 3]. Check its size before.

    libjpeg-turbo decodes JPEG; Pillow decodes other formats, CMYK, and files for which libjpeg-turbo warns.

    Raises:
        BadSample: not an image, truncated, or more than `max_pixels` pixels.
    """
    if jpeg_shape(data, max_pixels) is not None:
        pixels = decode_jpeg(data)
        if pixels is not None:
            return pixels
    return _decode_by_pillow(data, max_pixels)


def eval_image(data: bytes, transform: EvalTransform, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode an image and apply a model's evaluation transform: return uint8 of shape transform.shape.

    Raises:
        BadSample: see decode_pixels and eval_pixels.
    """
    return eval_pixels(decode_pixels(data, max_pixels), transform, max_pixels)


def eval_pixels(pixels: np.ndarray, transform: EvalTransform, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Apply a model's evaluation transform: resize, then crop the centre or fill up to the square, or cut into patches.

    Args:
        pixels: uint8 [h, w, 3].

    Returns:
        uint8 of shape transform.shape.

    Raises:
        BadSample: an elongated image would have more than `max_pixels` pixels after resizing, or does not fit a budget
            of patches.
    """
    if isinstance(transform, NativeAspect):
        return _patches(pixels, transform)
    tall, wide = transform.resized(*pixels.shape[:2])
    if tall * wide > max_pixels:
        raise BadSample("too many pixels")
    resized = resize(pixels, tall, wide, interpolation=transform.interpolation)
    size, top, left = transform.size, transform.offset(tall), transform.offset(wide)
    if min(tall, wide) >= size:
        return resized[:, top : top + size, left : left + size]
    square = torch.tensor(transform.fill_color, dtype=torch.uint8).view(3, 1, 1).repeat(1, size, size)
    inside = resized[:, max(0, top) : max(0, top) + size, max(0, left) : max(0, left) + size]
    height, width = inside.shape[1:]
    square[:, max(0, -top) : max(0, -top) + height, max(0, -left) : max(0, -left) + width] = inside
    return square


def _patches(pixels: np.ndarray, transform: NativeAspect) -> torch.Tensor:
    height, width = pixels.shape[:2]
    if not transform.shows(height, width):
        raise BadSample(ELONGATED)
    out = torch.empty(transform.shape, dtype=torch.uint8)
    target = transform.resized(height, width)
    image = resize(pixels, *target, channels_last(*target), transform.interpolation)
    write_patches(image, out, transform.patch)
    return out


def jpeg_shape(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """Return (height, width) from the header of a JPEG; None if it is not a JPEG or must be decoded by Pillow.

    Raises:
        BadSample: more than `max_pixels` pixels, or too many scans.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # a damaged header: Pillow decides, and names the damage
        return None
    _check_size(data, height, width, max_pixels)
    return (height, width) if colour_space in ("YCbCr", "RGB", "Gray") else None


def decode_jpeg(data: bytes, shape: tuple[int, int] = (0, 0), factor: int = 1) -> np.ndarray | None:
    """Decode a JPEG to uint8 [h, w, 3]; return None if libjpeg-turbo warns, so that Pillow decides.

    Args:
        data: for which jpeg_shape has returned a shape.
        shape: that shape; needed for a factor above 1.
        factor: 1, 2, 4 or 8: decode to [ceil(h/factor), ceil(w/factor), 3] from the low frequencies of every block,
            which is faster.

    Raises:
        BadSample: data is missing.
    """
    height, width = (-(-side // factor) for side in shape)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=factor)
    except Exception as error:
        # If a marker follows the missing data, Pillow would fill it with grey.
        if "premature end of data segment" in str(error):
            raise BadSample("truncated image") from None
        return None


def resize(
    pixels: np.ndarray, height: int, width: int, out: torch.Tensor | None = None, interpolation: str = "bicubic"
) -> torch.Tensor:
    """Resize by antialiased interpolation.

    Args:
        pixels: uint8 [h, w, 3], which may be a window of a larger image.
        out: output, uint8 [3, height, width] or [1, 3, height, width]; fastest if its memory format is channels_last,
            which saves a transposition (20 to 33 % of the time). None: a new tensor.
        interpolation: "bicubic" or "bilinear".

    Returns:
        uint8 [3, height, width].
    """
    if pixels.shape[:2] == (height, width):
        whole = torch.from_numpy(pixels.transpose(2, 0, 1))
        return whole.contiguous() if out is None else out.copy_(whole)
    # NumPy makes views faster than torch.
    view = torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
    into = out if out is None or out.dim() == 4 else out.unsqueeze(0)
    # F.interpolate(antialias=True) calls them, but has no argument `out`.
    kernels = torch._C._nn._upsample_bicubic2d_aa, torch._C._nn._upsample_bilinear2d_aa
    kernel: Any = kernels[interpolation == "bilinear"]
    resized = kernel(view, (height, width), False, None, None, out=into)
    return resized[0] if out is None else out


def channels_last(height: int, width: int) -> torch.Tensor:
    """Return uninitialised memory for an image that is cut into patches, uint8 [3, height, width], fastest so."""
    return torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)


def _decode_by_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:  # Pillow raises errors of many types
        raise BadSample("not an image") from None
    _check_size(data, image.height, image.width, max_pixels)
    if image.height * image.width > _MANY_PIXELS and any(tile[0] == "bmp_rle" for tile in image.tile):
        raise BadSample("too many pixels")  # Pillow decodes these in Python, 1 us per pixel
    try:
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips values above 255
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))
    except Exception:
        raise BadSample("truncated image") from None


def _check_size(data: bytes, height: int, width: int, max_pixels: int) -> None:
    pixels = height * width
    many_scans = pixels > _MANY_PIXELS and data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > _MAX_SCANS
    if pixels > max_pixels or many_scans:
        raise BadSample("too many pixels")
