"""Encoded pictures in, uint8 pixels out: decoding, resizing, and the transform of evaluation.

EXIF orientation is not applied, whatever the format and the decoder: that is what Pillow and open_clip do, so that a
checkpoint sees the same picture here and there. Resizing is antialiased bicubic on uint8, at most 2 grey levels away
from Pillow's. The C calls let other threads run: several threads decode at once.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image

from clipdist.data.bad_sample import MAX_PIXELS, BadSample

# What Pillow may open. It would start other programs for some formats, and TIFF is a container of many codecs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A progressive JPEG goes over all of its pixels once a scan (encoders write about ten), and a scan may take 30 bytes: a
# small file can ask for minutes. Checked where a scan costs milliseconds.
_MAX_SCANS, _MANY_PIXELS = 100, 1_000_000

# Pillow warns of large pictures, which our own limit covers, and of oddities that do not stop it. Set once: changing
# the filters around every call is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one picture, or the first of an animation, to uint8 [h, w, 3]; its size is checked before decoding.

    JPEG goes through libjpeg-turbo; what is left of JPEG (CMYK, files it warns of) and other formats through Pillow.

    Raises:
        BadSample: not a picture, truncated, or more than `max_pixels` pixels.
    """
    if jpeg_shape(data, max_pixels) is not None:
        pixels = decode_jpeg(data)
        if pixels is not None:
            return pixels
    return _decode_by_pillow(data, max_pixels)


def eval_image(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """open_clip's evaluation transform of an encoded picture: uint8 [3, size, size].

    Raises:
        BadSample: as decode_pixels and eval_pixels.
    """
    return eval_pixels(decode_pixels(data, max_pixels), size, max_pixels)


def eval_pixels(pixels: np.ndarray, size: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """open_clip's evaluation transform: uint8 [h, w, 3], shorter side to `size`, centre crop: uint8 [3, size, size].

    Raises:
        BadSample: a strip that would have too many pixels once its short side is enlarged.
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    if tall * wide > max_pixels:
        raise BadSample("too many pixels")
    resized = resize(pixels, tall, wide)
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return resized[:, top : top + size, left : left + size]


def jpeg_shape(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int] | None:
    """(height, width) of a JPEG from its header; None for what is not one, or has colours that are left to Pillow.

    Raises:
        BadSample: more than `max_pixels` pixels, or very many scans.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # a damaged header: Pillow has the last word, and names the damage
        return None
    _check_size(data, height, width, max_pixels)
    return (height, width) if colour_space in ("YCbCr", "RGB", "Gray") else None


def decode_jpeg(data: bytes, shape: tuple[int, int] = (0, 0), factor: int = 1) -> np.ndarray | None:
    """Pixels of a JPEG, uint8 [h, w, 3]; None where libjpeg-turbo warns and Pillow has the last word.

    Args:
        data: one for which jpeg_shape has given a shape.
        shape: that shape; needed for a factor above 1.
        factor: 1, 2, 4 or 8: decodes to [ceil(h/factor), ceil(w/factor), 3] from the low frequencies of every block, in
            a fraction of the time.

    Raises:
        BadSample: some of its data is missing.
    """
    height, width = (-(-side // factor) for side in shape)
    try:
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=factor)
    except Exception as error:
        # Where a marker follows the cut, Pillow would take grey for what is missing.
        if "premature end of data segment" in str(error):
            raise BadSample("truncated image") from None
        return None


def resize(pixels: np.ndarray, height: int, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Antialiased bicubic: uint8 [h, w, 3], which may be a window of a larger picture, to uint8 [3, height, width].

    Args:
        out: where to write, uint8 [3, height, width] or [1, 3, height, width]. Fastest where its channels are last in
            memory, which saves the transposition (a fifth to a third of the time): a row of a batch with
            memory_format=torch.channels_last.
    """
    if pixels.shape[:2] == (height, width):
        whole = torch.from_numpy(pixels.transpose(2, 0, 1))
        return whole.contiguous() if out is None else out.copy_(whole)
    # Channels last in memory is the fast path. NumPy makes views in a fraction of the time that torch takes.
    view = torch.from_numpy(pixels[None].transpose(0, 3, 1, 2))
    into = out if out is None or out.dim() == 4 else out.unsqueeze(0)
    # The function below F.interpolate(mode="bicubic", antialias=True), which cannot write into `out`.
    resized = torch._C._nn._upsample_bicubic2d_aa(  # type: ignore[call-arg]  # its stub leaves `out` out
        view, (height, width), False, None, None, out=into
    )
    return resized[0] if out is None else out


def _decode_by_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise BadSample("too many pixels") from None
    except Exception:  # Pillow raises many kinds on hostile bytes
        raise BadSample("not an image") from None
    _check_size(data, image.height, image.width, max_pixels)
    if image.height * image.width > _MANY_PIXELS and any(tile[0] == "bmp_rle" for tile in image.tile):
        raise BadSample("too many pixels")  # Pillow decodes these in Python, a microsecond a pixel
    try:
        if image.mode.startswith("I"):  # 16 bits of grey: Pillow's own conversion cuts off all above 255
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
