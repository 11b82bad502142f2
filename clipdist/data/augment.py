"""Augment training images: crop and flip one image at a time, change the colours of a whole batch.

An image is decoded once for all its views. Colours, blur and solarisation follow later, on the batch's device. All
randomness comes from the uniform numbers of a sample: the same numbers give the same pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.bad_sample import MAX_PIXELS, BadSample
from clipdist.data.decode import decode_jpeg, decode_pixels, jpeg_shape, resize
from clipdist.data.order import mix, sample_uniforms
from clipdist.errors import UserError

_ATTEMPTS = 10  # at a crop, as in torchvision's RandomResizedCrop
# Positions in the uniform numbers of a sample: area and aspect ratio of every attempt, then these.
_TOP, _LEFT, FLIP, _JITTER, _FACTORS, _ORDER, _GREY = (2 * _ATTEMPTS + i for i in (0, 1, 2, 3, 4, 8, 9))
UNIFORMS = _GREY + 1
_BLUR, _SIGMA, _SOLARISE = (UNIFORMS + i for i in range(3))  # of another key: the numbers before keep their places
VIEW_UNIFORMS = _SOLARISE + 1
_LOG_ASPECT = math.log(4 / 3)
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it
_HUE = 3  # number of the operation, in the order of ColorJitter's arguments: brightness, contrast, saturation, hue
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.float32)
_SIGMAS = (0.1, 2.0)  # of the blur, in pixels (SimCLR, appendix A)
_FILTERS = 59  # the key of the uniform numbers of blur and solarisation
# Values of the images whose colours are changed at once: bounds the memory of float32 copies, on a CPU to its caches.
_CHUNK, _CPU_CHUNK = 10 << 20, 2 << 20


@dataclass(frozen=True)
class Augmentation:
    """Parameters of the random augmentation of training images.

    Raises:
        UserError: a value outside its range.
    """

    crop_scale_min: float  # the crop's share of the area is drawn from [crop_scale_min, crop_scale_max]
    dct_scaling: bool = False  # decode JPEGs at 1/2, 1/4 or 1/8 if the crop still has enough pixels
    flip: float = 0.0  # probability of a left-right flip
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # as ColorJitter's arguments
    jitter_probability: float = 0.0
    grayscale: float = 0.0  # probability of replacing all three channels by the luma
    crop_scale_max: float = 1.0
    blur: float = 0.0  # probability of a Gaussian blur
    solarise: float = 0.0  # probability of inverting values of 128 and more

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale_min <= 1:
            raise UserError(f"crop_scale_min={self.crop_scale_min}: give a share of the area above 0, at most 1")
        if not self.crop_scale_min <= self.crop_scale_max <= 1:
            raise UserError(f"crop_scale_max={self.crop_scale_max}: give a share from crop_scale_min to 1")
        for name in ("flip", "jitter_probability", "grayscale", "blur", "solarise"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)}: give a probability from 0 to 1")
        if len(self.jitter) != 4 or not all(value >= 0 for value in self.jitter) or self.jitter[_HUE] > 0.5:
            raise UserError(
                f"jitter={self.jitter}: give brightness, contrast, saturation and hue, none negative, hue at most 0.5"
            )


Box = tuple[int, int, int, int]  # a crop: top, left, height, width


@dataclass(frozen=True)
class View:
    """One view of an image.

    Attributes:
        size: side in pixels.
        own_aspect: crops have the image's own aspect ratio, times 3/4 to 4/3, instead of 3/4 to 4/3: of a model that
            squashes whole images in evaluation, or keeps their aspect ratio.
    """

    name: str
    size: int
    augmentation: Augmentation
    own_aspect: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image as it lies in memory."""
        return self.size, self.size, 3

    @property
    def defers_colour(self) -> bool:
        """Whether colours are changed later, for a whole batch."""
        return True

    def crop(self, height: int, width: int, numbers: list[float]) -> Box:
        """Return the crop that an image's UNIFORMS numbers give."""
        scales = self.augmentation.crop_scale_min, self.augmentation.crop_scale_max
        if not self.own_aspect or height == width:
            return random_crop(height, width, numbers, *scales)
        side = max(height, width)  # the crop of a square, stretched as the image is
        top, left, tall, wide = random_crop(side, side, numbers, *scales)
        tall, wide = max(1, tall * height // side), max(1, wide * width // side)
        return min(top * height // side, height - tall), min(left * width // side, width - wide), tall, wide

    def target(self, box: Box) -> tuple[int, int]:
        """Return the height and width to which a crop is resized, pixels."""
        return self.size, self.size

    def write(self, image: np.ndarray, target: tuple[int, int], numbers: list[float], out: Tensor) -> None:
        """Write a crop, uint8 [h, w, 3], resized to `target` and flipped as its numbers say."""
        resized = resize(image, *target, out)
        if numbers[FLIP] < self.augmentation.flip:
            resized.copy_(resized.flip(-1))


def fill_views(
    images: Sequence[bytes | None], views: Sequence[View], uniforms: np.ndarray, outs: Sequence[Tensor], max_pixels: int
) -> dict[int, str]:
    """Write all views of several images: see train_views. Rows without a usable image get zeros.

    Args:
        images: n encoded images; None: there is none.
        uniforms: float64 [n, len(views), at least UNIFORMS].
        outs: the output of every view, n rows each: see train_views.

    Returns:
        By row, the reasons of images that cannot be used.
    """
    rows_of_views = list(zip(*(out.split(1) for out in outs)))
    bad: dict[int, str] = {}
    for row, (data, rows) in enumerate(zip(images, rows_of_views, strict=True)):
        try:
            if data is not None:
                train_views(data, views, uniforms[row], rows, max_pixels)
        except BadSample as error:
            bad[row] = error.reason
        if data is None or row in bad:
            for pixels in rows:
                pixels.zero_()
    return bad


def train_views(
    data: bytes, views: Sequence[View], uniforms: np.ndarray, outs: Sequence[Tensor], max_pixels: int = MAX_PIXELS
) -> None:
    """Write all views of one encoded image: random crops, resized, and flipped at random.

    Args:
        data: the encoded image, decoded once.
        uniforms: float64 [len(views), at least UNIFORMS], numbers in [0, 1).
        outs: the output of every view, uint8 [3, size, size] or [1, 3, size, size] (see decode.resize), or what another
            class of views writes.

    Raises:
        BadSample: see decode_pixels. `outs` are then unchanged.
    """
    numbers_of_views = uniforms.tolist()
    pixels, factor, boxes = decode_for(data, views, numbers_of_views, max_pixels)
    for view, numbers, box, out in zip(views, numbers_of_views, boxes, outs, strict=True):
        top, left, height, width = (side // factor for side in box)
        view.write(pixels[top : top + height, left : left + width], view.target(box), numbers, out)


def decode_for(
    data: bytes, views: Sequence[View], uniforms: list[list[float]], max_pixels: int
) -> tuple[np.ndarray, int, list[Box]]:
    """Decode an image once for the crops of all its views.

    Args:
        uniforms: at least UNIFORMS numbers in [0, 1) for every view.

    Returns:
        pixels uint8 [h, w, 3], the factor by which their sides were reduced, and the crops (top, left, height, width)
        in pixels of the full size.

    Raises:
        BadSample: see decode_pixels.
    """

    def crops(height: int, width: int) -> list[Box]:
        return [view.crop(height, width, numbers) for view, numbers in zip(views, uniforms, strict=True)]

    scaling = all(view.augmentation.dct_scaling for view in views)
    shape = jpeg_shape(data, max_pixels) if scaling else None
    if shape is not None:
        boxes = crops(*shape)
        factor = min(dct_factor(box, *view.target(box)) for box, view in zip(boxes, views, strict=True))
        # train_views then cuts crops to whole pixels of the reduced image
        if factor > 1 and (reduced := decode_jpeg(data, shape, factor)) is not None:
            return reduced, factor, boxes
    pixels = decode_pixels(data, max_pixels)
    return pixels, 1, crops(*pixels.shape[:2])


def random_crop(height: int, width: int, uniforms: list[float], scale_min: float, scale_max: float = 1.0) -> Box:
    """Return a random crop (top, left, height, width), its aspect ratio 3/4 to 4/3.

    The distribution is that of torchvision's RandomResizedCrop (Szegedy et al., arXiv:1409.4842): ten attempts, then
    the largest central crop of an allowed aspect ratio.

    Args:
        uniforms: at least UNIFORMS numbers in [0, 1).
        scale_min, scale_max: range of the crop's share of the area.
    """
    area = height * width
    for attempt in range(0, 2 * _ATTEMPTS, 2):
        target = area * (scale_min + (scale_max - scale_min) * uniforms[attempt])
        aspect = math.exp(_LOG_ASPECT * (2 * uniforms[attempt + 1] - 1))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[_TOP] * (height - h + 1)), int(uniforms[_LEFT] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def dct_factor(box: Box, height: int, width: int) -> int:
    """Return the largest of 8, 4, 2 and 1 by which a crop can shrink and keep height and width at least."""
    return next((factor for factor in (8, 4, 2) if box[2] // factor >= height and box[3] // factor >= width), 1)


def filter_uniforms(seed: int, epochs: np.ndarray, sample_ids: np.ndarray, views: int) -> np.ndarray:
    """Draw the numbers of blur and solarisation: float64 [n, views, VIEW_UNIFORMS - UNIFORMS] in [0, 1).

    They are a function of (seed, epoch, sample, view), whatever else is drawn of a sample.

    Args:
        epochs, sample_ids: int64 [n].
    """
    each = VIEW_UNIFORMS - UNIFORMS
    drawn = sample_uniforms(int(mix(seed, _FILTERS)), epochs, sample_ids, views * each)
    return drawn.reshape(len(sample_ids), views, each)


def colour_parameters(uniforms: np.ndarray, augmentation: Augmentation) -> Tensor | None:
    """Return the parameters of apply_colour for every sample; None if the augmentation changes no colours.

    Args:
        uniforms: float64 [n, VIEW_UNIFORMS]: those of train_views for one view, then its filter_uniforms.

    Returns:
        float32 [n, 11] on the CPU: factors of brightness, contrast and saturation, hue shift in turns, the numbers of
        the four operations in the order of application, 1 for grayscale, the blur's sigma in pixels (0: none), 1 for
        solarisation. Without jitter factors are 1 and the shift 0.
    """
    jitter = np.array(augmentation.jitter) * (augmentation.jitter_probability > 0)
    if not (jitter.any() or augmentation.grayscale or augmentation.blur or augmentation.solarise):
        return None
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(neutral - jitter, [0.0, 0.0, 0.0, -0.5])
    factors = low + (neutral + jitter - low) * uniforms[:, _FACTORS : _FACTORS + 4]
    factors = np.where(uniforms[:, [_JITTER]] < augmentation.jitter_probability, factors, neutral)
    order = _ORDERS[(uniforms[:, _ORDER] * len(_ORDERS)).astype(np.int64)]
    grey = uniforms[:, [_GREY]] < augmentation.grayscale
    sigma = _SIGMAS[0] + (_SIGMAS[1] - _SIGMAS[0]) * uniforms[:, [_SIGMA]]
    sigma = sigma * (uniforms[:, [_BLUR]] < augmentation.blur)
    solarised = uniforms[:, [_SOLARISE]] < augmentation.solarise
    return torch.from_numpy(np.concatenate([factors, order, grey, sigma, solarised], axis=1).astype(np.float32))


def apply_colour(images: Tensor, parameters: Tensor) -> Tensor:
    """Jitter colours as torchvision's ColorJitter, with factors and an order per sample; then grey, blur, solarise.

    Values stay float32 up to the blur's end (torchvision truncates them to integers after each operation): one
    operation differs from it by at most 2 grey levels.

    Args:
        images: uint8 [b, 3, H, W] on any device.
        parameters: float32 [b, 11] of colour_parameters, preferably on the CPU, to avoid synchronising with the device.

    Returns:
        uint8 [b, 3, H, W]: a new tensor.
    """
    changed = torch.empty_like(images)
    rows = max(1, (_CPU_CHUNK if images.device.type == "cpu" else _CHUNK) // images.shape[1:].numel())
    for part, chosen, out in zip(images.split(rows), parameters.cpu().split(rows), changed.split(rows), strict=True):
        out.copy_(_colour(part, chosen))
    return changed


def _colour(images: Tensor, parameters: Tensor) -> Tensor:
    """Compute apply_colour for a chunk of images, with parameters on the CPU."""
    shift, order, grey = parameters[:, _HUE], parameters[:, 4:8], parameters[:, 8] > 0
    sigma, solarised = parameters[:, 9], parameters[:, 10] > 0
    blended, shifted = bool((parameters[:, :_HUE] != 1).any()), shift != 0
    colours = images.to(torch.float32, memory_format=torch.contiguous_format)  # faster than channels_last
    for position in range(4):
        if blended:
            colours = _blend(colours, parameters[:, :_HUE], order[:, position])
        at_hue = shifted & (order[:, position] == _HUE)
        _change(colours, at_hue, lambda part, rows: _shift_hue(part, shift[rows].to(part.device, non_blocking=True)))
    _change(colours, grey, lambda part, rows: _luma(part).expand(-1, 3, -1, -1))
    _change(colours, sigma > 0, lambda part, rows: _blur(part, sigma[rows]))
    changed = colours.round_().to(torch.uint8)
    _change(changed, solarised, lambda part, rows: torch.where(part >= 128, 255 - part, part))
    return changed


def _change(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the chosen images by what `change` makes of them and their row numbers.

    Args:
        images: [b, 3, H, W].
        chosen: bool [b] on the CPU.
        change: (images [n, 3, H, W], rows int64 [n] on the CPU) -> [n, 3, H, W].
    """
    rows = torch.nonzero(chosen)[:, 0]
    if len(rows):
        device_rows = rows.to(images.device, non_blocking=True)
        images.index_copy_(0, device_rows, change(images[device_rows], rows))


def _blend(colours: Tensor, factors: Tensor, operation: Tensor) -> Tensor:
    """Change brightness, contrast or saturation of every sample: f * colours + (1 - f) * (0, mean luma, luma).

    Args:
        colours: float32 [b, 3, H, W], 0 to 255.  factors: float32 [b, 3].
        operation: float32 [b], the number of the operation; samples with that of hue are unchanged.
    """
    factor = torch.where(operation == _HUE, 1.0, factors.gather(1, operation.long().clamp(max=2)[:, None])[:, 0])
    weights = torch.stack([factor, (1 - factor) * (operation == 1), (1 - factor) * (operation == 2)])
    factor, to_mean, to_luma = weights[:, :, None, None, None].to(colours.device, non_blocking=True)
    luma = _luma(colours)
    base = to_mean * luma.mean((2, 3), keepdim=True) + to_luma * luma
    return torch.addcmul(base, factor, colours).clamp_(0, 255)


def _shift_hue(colours: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of HSV: colours float32 [b, 3, H, W], 0 to 255; turns float32 [b], -0.5 to 0.5."""
    red, green, blue = colours.unbind(1)
    value, low = colours.amax(1), colours.amin(1)
    chroma = value - low
    divisor = chroma.clamp(min=1e-3)  # the hue of grey, whose chroma is 0, has no effect
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turns[:, None, None]
    sextants = torch.stack([hue + 5, hue + 3, hue + 1], dim=1) % 6  # of red, green and blue
    return value[:, None] - chroma[:, None] * torch.minimum(sextants, 4 - sextants).clamp_(0, 1)


def _blur(colours: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own, with mirrored borders, as torchvision's gaussian_blur.

    The kernel has a tenth of the image's height in pixels, an odd number of at least 3 (SimCLR, arXiv:2002.05709).

    Args:
        colours: float32 [b, 3, H, W].
        sigma: float32 [b] in pixels, on the CPU.
    """
    n, channels, height, width = colours.shape
    radius = blur_radius(height)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).to(colours.device, non_blocking=True)
    kernels = weights.repeat_interleave(channels, 0)[:, None]
    planes = colours.reshape(1, n * channels, height, width)  # a group each: a sample does not depend on the others
    planes = F.pad(planes, (radius, radius, 0, 0), mode="reflect")
    planes = F.conv2d(planes, kernels[:, :, None], groups=n * channels)
    planes = F.pad(planes, (0, 0, radius, radius), mode="reflect")
    return F.conv2d(planes, kernels[..., None], groups=n * channels).view_as(colours)


def blur_radius(height: int) -> int:
    """Return the pixels on either side of the centre of the blur's kernel."""
    return max(1, height // 10 // 2)


def _luma(colours: Tensor) -> Tensor:
    """Return the luma [b, 1, H, W] of colours [b, 3, H, W]."""
    red, green, blue = colours.unbind(1)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue)[:, None]
