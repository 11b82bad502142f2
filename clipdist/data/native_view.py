"""The training view of a model whose images keep their aspect ratio: crops as patches within a budget."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from clipdist.data.augment import FLIP, Box, View, apply_colour, colour_parameters
from clipdist.data.bad_sample import BadSample
from clipdist.data.decode import ELONGATED, channels_last, resize
from clipdist.data.patches import write_patches
from clipdist.data.transform import NativeAspect


@dataclass(frozen=True)
class NativeView(View):
    """A view that is written as patches; its colours are changed image by image, before it is cut up.

    Attributes:
        transform: the evaluation transform: which grid shows a crop.
    """

    transform: NativeAspect = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """See View.shape."""
        return self.transform.shape

    @property
    def defers_colour(self) -> bool:
        """See View.defers_colour."""
        return False

    def crop(self, height: int, width: int, numbers: list[float]) -> Box:
        """See View.crop.

        Raises:
            BadSample: the image is more elongated than the budget can show.
        """
        if not self.transform.shows(height, width):
            raise BadSample(ELONGATED)
        return super().crop(height, width, numbers)

    def target(self, box: Box) -> tuple[int, int]:
        """See View.target: that of the grid which shows the crop."""
        return self.transform.resized(*box[2:])

    def write(self, image: np.ndarray, target: tuple[int, int], numbers: list[float], out: Tensor) -> None:
        """See View.write; out: a row of a buffer, [1, 1 + n, 3 * P * P]."""
        resized = resize(image, *target, channels_last(*target))
        if numbers[FLIP] < self.augmentation.flip:
            resized = resized.flip(-1)
        colour = colour_parameters(np.array([numbers]), self.augmentation)
        if colour is not None:
            resized = apply_colour(resized[None], colour)[0]
        write_patches(resized, out[0], self.transform.patch)
