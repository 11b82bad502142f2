"""Training augmentation: crops and flips of one image at a time, colour changes of a whole batch.

An image is decoded once for all its views. Colours change afterwards, on the batch's device. Everything is a pure
function of the uniform numbers of a sample: the same numbers give the same pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipdist.data.bad_sample import MAX_PIXELS
from clipdist.data.decode import decode_jpeg, decode_pixels, jpeg_shape, resize
from clipdist.errors import UserError

_ATTEMPTS = 10  # at a crop, as torchvision's RandomResizedCrop
# Where the uniform numbers of a sample go: area and aspect of every attempt, then these.
_TOP, _LEFT, _FLIP, _JITTER, _FACTORS, _ORDER, _GREY = (2 * _ATTEMPTS + i for i in (0, 1, 2, 3, 4, 8, 9))
UNIFORMS = _GREY + 1
_LOG_ASPECT = math.log(4 / 3)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it
_HUE = 3  # operations are numbered as ColorJitter's arguments: brightness, contrast, saturation, hue
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.float32)
_CHUNK = 64  # images that are coloured at once: bounds the memory of float32 copies


@dataclass(frozen=True)
class Augmentation:
    """How training images vary.

    Raises:
        UserError: a value outside its range.
    """

    crop_scale_min: float  # the crop's share of the area is drawn from [crop_scale_min, 1]
    dct_scaling: bool = False  # decode large JPEGs at 1/2, 1/4 or 1/8 where the crop has pixels to spare
    flip: float = 0.0  # probability of a left-right flip
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # as ColorJitter's arguments
    jitter_probability: float = 0.0
    grayscale: float = 0.0  # probability of all three channels showing the luma

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale_min <= 1:
            raise UserError(f"crop_scale_min={self.crop_scale_min}: give a share of the area above 0, at most 1")
        for name in ("flip", "jitter_probability", "grayscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: give a probability from 0 to 1")
        if len(self.jitter) != 4 or not all(value >= 0 for value in self.jitter) or self.jitter[_HUE] > 0.5:
            raise UserError(
                f"jitter={self.jitter}: give brightness, contrast, saturation and hue, none negative, hue at most 0.5"
            )


@dataclass(frozen=True)
class View:
    """One view of an image: how it is cropped and changed, and its side in pixels."""

    name: str
    size: int
    augmentation: Augmentation


def train_views(
    data: bytes, views: Sequence[View], uniforms: np.ndarray, outs: Sequence[Tensor], max_pixels: int = MAX_PIXELS
) -> None:
    """All views of one encoded image, from one decode: each a random crop, resized, perhaps flipped.

    Args:
        uniforms: float64 [len(views), UNIFORMS], numbers in [0, 1).
        outs: of every view uint8 [3, size, size] or [1, 3, size, size] to write into; as decode.resize.

    Raises:
        BadSample: as decode_pixels. `outs` are then as they were.
    """
    drawn = uniforms.tolist()
    pixels, factor, boxes = decode_for(data, views, drawn, max_pixels)
    for view, numbers, box, out in zip(views, drawn, boxes, outs, strict=True):
        top, left, height, width = (side // factor for side in box)
        image = resize(pixels[top : top + height, left : left + width], view.size, view.size, out)
        if numbers[_FLIP] < view.augmentation.flip:
            image.copy_(image.flip(-1))


def decode_for(
    data: bytes, views: Sequence[View], drawn: list[list[float]], max_pixels: int
) -> tuple[np.ndarray, int, list[tuple[int, int, int, int]]]:
    """Decode an image once for the crops of all its views.

    Returns:
        pixels uint8 [h, w, 3], the factor by which they were reduced, and the crops (top, left, height, width) at full
        size.
    """

    def crops(height: int, width: int) -> list[tuple[int, int, int, int]]:
        return [random_crop(height, width, n, v.augmentation.crop_scale_min) for v, n in zip(views, drawn, strict=True)]

    scaling = all(view.augmentation.dct_scaling for view in views)
    shape = jpeg_shape(data, max_pixels) if scaling else None
    if shape is not None:
        boxes = crops(*shape)
        factor = min(dct_factor(box, view.size) for box, view in zip(boxes, views, strict=True))
        # whole blocks of factor x factor, or the crop would lie between pixels
        if factor > 1 and (reduced := decode_jpeg(data, shape, factor)) is not None:
            return reduced, factor, boxes
    pixels = decode_pixels(data, max_pixels)
    return pixels, 1, crops(*pixels.shape[:2])


def random_crop(height: int, width: int, drawn: list[float], scale_min: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of [scale_min, 1] of the area and of aspect 3/4 to 4/3.

    The distribution is that of torchvision's RandomResizedCrop (Szegedy et al., arXiv:1409.4842): ten attempts, then
    the largest central crop of a legal aspect.
    """
    area = height * width
    for attempt in range(0, 2 * _ATTEMPTS, 2):
        target = area * (scale_min + (1 - scale_min) * drawn[attempt])
        aspect = math.exp(_LOG_ASPECT * (2 * drawn[attempt + 1] - 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(drawn[_TOP] * (height - h + 1)), int(drawn[_LEFT] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def dct_factor(box: tuple[int, int, int, int], size: int) -> int:
    """The largest reduction, of 8, 4, 2 and 1, that leaves a crop (top, left, height, width) `size` pixels a side."""
    short = min(box[2:])
    return next((factor for factor in (8, 4, 2) if short // factor >= size), 1)


def colour_parameters(uniforms: np.ndarray, augmentation: Augmentation) -> Tensor | None:
    """What apply_colour is to do to every sample; None where it would have nothing to do.

    Args:
        uniforms: float64 [n, UNIFORMS], as train_views took them for one view.

    Returns:
        float32 [n, 9] on the CPU: factors of brightness, contrast and saturation, shift of the hue in turns, the four
        operations in the order in which they come, 1 for grayscale. Without a jitter: factors 1 and shift 0.
    """
    jitter = np.array(augmentation.jitter) * (augmentation.jitter_probability > 0)
    if not jitter.any() and not augmentation.grayscale:
        return None
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(neutral - jitter, [0.0, 0.0, 0.0, -0.5])
    factors = low + (neutral + jitter - low) * uniforms[:, _FACTORS : _FACTORS + 4]
    factors = np.where(uniforms[:, [_JITTER]] < augmentation.jitter_probability, factors, neutral)
    order = _ORDERS[(uniforms[:, _ORDER] * len(_ORDERS)).astype(np.int64)]
    grey = uniforms[:, [_GREY]] < augmentation.grayscale
    return torch.from_numpy(np.concatenate([factors, order, grey], axis=1).astype(np.float32))


def apply_colour(images: Tensor, parameters: Tensor) -> Tensor:
    """Jitters colours as torchvision's ColorJitter, each sample with factors and an order of its own.

    Between the operations values stay float32 (torchvision cuts them to integers): at most 2 grey levels from it for
    one operation.

    Args:
        images: uint8 [b, 3, H, W] on any device.
        parameters: float32 [b, 9] of colour_parameters, best left on the CPU: the device is then never waited for.

    Returns:
        uint8 [b, 3, H, W]: a new tensor.
    """
    chosen = parameters.cpu()
    return torch.cat(
        [_colour(part, values) for part, values in zip(images.split(_CHUNK), chosen.split(_CHUNK), strict=True)]
    )


def _colour(images: Tensor, parameters: Tensor) -> Tensor:
    """apply_colour on a few images: uint8 [b, 3, H, W]; parameters float32 [b, 9] on the CPU."""
    shift, order, grey = parameters[:, _HUE], parameters[:, 4:8], parameters[:, 8] > 0
    blended, shifted = bool((parameters[:, :_HUE] != 1).any()), shift != 0
    colours = images.float()
    for place in range(4):
        if blended:
            colours = _blend(colours, parameters[:, :_HUE], order[:, place])
        rows = torch.nonzero(shifted & (order[:, place] == _HUE))[:, 0]
        if len(rows):
            here = rows.to(images.device, non_blocking=True)
            turns = shift[rows].to(images.device, non_blocking=True)
            colours.index_copy_(0, here, _shift_hue(colours[here], turns))
    rows = torch.nonzero(grey)[:, 0].to(images.device, non_blocking=True)
    if len(rows):
        colours.index_copy_(0, rows, _luma(colours[rows]).expand(-1, 3, -1, -1))
    return colours.round_().to(torch.uint8)


def _blend(colours: Tensor, factors: Tensor, operation: Tensor) -> Tensor:
    """One operation a sample, of brightness, contrast and saturation: f * colours + (1 - f) * (0, mean luma, luma).

    Args:
        colours: float32 [b, 3, H, W], 0 to 255.  factors: float32 [b, 3].
        operation: float32 [b], the number of the operation; hue leaves a sample as it is.
    """
    factor = torch.where(operation == _HUE, 1.0, factors.gather(1, operation.long().clamp(max=2)[:, None])[:, 0])
    weights = torch.stack([factor, (1 - factor) * (operation == 1), (1 - factor) * (operation == 2)])
    factor, to_mean, to_luma = weights[:, :, None, None, None].to(colours.device, non_blocking=True)
    luma = _luma(colours)
    base = to_mean * luma.mean((2, 3), keepdim=True) + to_luma * luma
    return torch.addcmul(base, factor, colours).clamp_(0, 255)


def _shift_hue(colours: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue of the HSV hexcone: colours float32 [b, 3, H, W], 0 to 255; turns float32 [b], -0.5 to 0.5."""
    red, green, blue = colours.unbind(1)
    value, low = colours.amax(1), colours.amin(1)
    chroma = value - low
    divisor = chroma.clamp(min=1e-3)  # grey has no hue and no chroma: any will do
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns[:, None, None]
    sextants = torch.stack([hue + 5, hue + 3, hue + 1], dim=1) % 6  # of red, green and blue
    return value[:, None] - chroma[:, None] * torch.minimum(sextants, 4 - sextants).clamp_(0, 1)


def _luma(colours: Tensor) -> Tensor:
    """[b, 3, H, W] to [b, 1, H, W]."""
    red, green, blue = colours.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]
