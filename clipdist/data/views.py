"""Views of an image, as a configuration describes them."""

from __future__ import annotations

from collections.abc import Sequence

from clipdist import config
from clipdist.data.augment import Augmentation, View


def views_of(name: str, augments: Sequence[config.Augment], image_size: int) -> tuple[View, ...]:
    """Return views NAME/0, NAME/1 ...

    Args:
        image_size: of views that say none.
    """
    return tuple(view_of(f"{name}/{number}", augment, image_size) for number, augment in enumerate(augments))


def view_of(name: str, augment: config.Augment, image_size: int) -> View:
    low, _ = augment.crop_scale
    brightness, contrast, saturation, hue = augment.jitter or (0.0, 0.0, 0.0, 0.0)
    augmentation = Augmentation(
        crop_scale_min=low,
        flip=augment.flip,
        jitter=(brightness, contrast, saturation, hue),
        jitter_probability=augment.jitter_probability,
        grayscale=augment.grayscale,
    )
    return View(name, augment.size or image_size, augmentation)
