"""What a model does to a decoded image before it normalises the pixels; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

RESIZE_MODES = ("shortest", "longest", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
# Patches of an image at its own aspect ratio: with fewer, ordinary aspect ratios would not fit; with more, a side of
# the grid would not fit into the two bytes that data/patches.py has for it.
BUDGET_MIN, BUDGET_MAX = 4, (1 << 16) - 1


@dataclass(frozen=True)
class EvalTransform:
    """The evaluation transform of a model, which data/decode.py applies; names as in open_clip's PreprocessCfg.

    Attributes:
        size: side of the square that the model takes, pixels.
        resize_mode: "shortest": the shorter side is resized to `resize_size`, and the centre is cropped; "longest": the
            longer side is, and the rest is filled; "squash": both sides are, whatever the aspect ratio.
        interpolation: "bicubic" or "bilinear", both antialiased.
        fill_color: red, green and blue (0 to 255) of what "longest" fills.
        resize_size: pixels; 0: `size`.
        floor_crop: round the crop's offset down, as transformers does; False: to the nearest even number, as
            torchvision and open_clip do.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: tuple[int, int, int] = (0, 0, 0)
    resize_size: int = 0
    floor_crop: bool = False

    def __str__(self) -> str:
        side, target = f"{self.size} x {self.size}", self.resize_size or self.size
        how = {
            "shortest": f"shorter side resized to {target}, centre of {side} cropped",
            "longest": f"longer side resized to {target}, filled to {side} with {self.fill_color}",
            "squash": f"squashed to {target} x {target}" + f", centre of {side} cropped" * (target > self.size),
        }
        return f"{how[self.resize_mode]}, {self.interpolation}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image as the model takes it."""
        return 3, self.size, self.size

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image after resizing; "longest" rounds, "shortest" cuts, as open_clip."""
        target = self.resize_size or self.size
        if self.resize_mode == "squash":
            return target, target
        if self.resize_mode == "longest":
            ratio = max(height, width) / target
            return max(1, round(height / ratio)), max(1, round(width / ratio))
        short = min(height, width)
        return int(target * height / short), int(target * width / short)

    def offset(self, side: int) -> int:
        """Return where the crop begins on a side of so many pixels after resizing; negative: so much is filled."""
        if side < self.size:
            return -((self.size - side) // 2)
        return (side - self.size) // 2 if self.floor_crop else round((side - self.size) / 2)


@dataclass(frozen=True)
class NativeAspect(EvalTransform):
    """The evaluation transform of a model whose images keep their aspect ratio (NaFlex, arXiv:2502.14786, 2.4.2).

    Attributes:
        patch: side of a patch, pixels.
        budget: patches of an image at most.
        size, resize_mode, fill_color, resize_size, floor_crop: without effect.
    """

    patch: int = 16
    budget: int = 256

    def __str__(self) -> str:
        return f"own aspect ratio, at most {self.budget} patches of {self.patch} x {self.patch}, {self.interpolation}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image as the model takes it: see clipdist.data.patches."""
        return 1 + self.budget, 3 * self.patch**2

    def shows(self, height: int, width: int) -> bool:
        """Whether the budget has a grid as elongated as the image."""
        return max(height, width) <= self.budget * min(height, width)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of an image after resizing, multiples of `patch`."""
        rows, columns = patch_grid(height, width, self.budget)
        return rows * self.patch, columns * self.patch


def patch_grid(height: int, width: int, budget: int) -> tuple[int, int]:
    """Return how many rows and columns of patches show an image the largest, with `budget` patches at most.

    The grid is that of the largest scale whose height and width, both rounded up to whole patches, are within the
    budget, as in SigLIP 2 and timm. The image is then stretched to it: by less than a patch.
    """
    # The scale of a grid is the lower of rows / height and columns / width. With more rows fewer columns fit, so the
    # best number of rows is the last that limits the scale, or the next, which the columns limit.
    rows = math.isqrt(budget * height // width)
    while rows and rows * width > budget // rows * height:
        rows -= 1
    while (rows + 1) * width <= budget // (rows + 1) * height:
        rows += 1
    columns = budget // (rows + 1)
    if rows * width >= columns * height:
        return rows, -(-rows * width // height)
    return -(-columns * height // width), columns
