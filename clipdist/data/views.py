"""Views of an image, as a configuration describes them."""

from __future__ import annotations

from collections.abc import Sequence

from clipdist import config
from clipdist.data.augment import Augmentation, View
from clipdist.data.batch import IMAGE
from clipdist.data.native_view import NativeView
from clipdist.data.transform import EvalTransform, NativeAspect


def views_of(name: str, augments: Sequence[config.Augment], image_size: int) -> tuple[View, ...]:
    """Return views NAME/0, NAME/1 ...

    Args:
        image_size: of views that say none.
    """
    return tuple(view_of(f"{name}/{number}", augment, image_size) for number, augment in enumerate(augments))


def image_view(cfg: config.Data, size: int, transform: EvalTransform | None = None) -> View:
    """Return the view that CLIP trains on, `size` pixels a side.

    Args:
        transform: the model's in evaluation. Of one that squashes whole images, crops keep their aspect ratio; of
            NativeAspect they are shown at it, whatever `size`.
    """
    brightness, contrast, saturation, hue = cfg.jitter or (0.0, 0.0, 0.0, 0.0)
    augmentation = Augmentation(
        crop_scale_min=cfg.crop_scale_min,
        dct_scaling=cfg.dct_scaling,
        flip=cfg.flip,
        jitter=(brightness, contrast, saturation, hue),
        jitter_probability=cfg.jitter_probability,
        grayscale=cfg.grayscale,
    )
    if isinstance(transform, NativeAspect):
        return NativeView(IMAGE, size, augmentation, own_aspect=True, transform=transform)
    squashed = transform is not None and transform.resize_mode == "squash"
    return View(IMAGE, size, augmentation, own_aspect=squashed)


def view_of(name: str, augment: config.Augment, model_size: int) -> View:
    """Return a view as a recipe describes it.

    Args:
        model_size: pixels a side where the description has none.
    """
    brightness, contrast, saturation, hue = augment.jitter or (0.0, 0.0, 0.0, 0.0)
    crop_scale_min, crop_scale_max = augment.crop_scale
    augmentation = Augmentation(
        crop_scale_min=crop_scale_min,
        crop_scale_max=crop_scale_max,
        flip=augment.flip,
        jitter=(brightness, contrast, saturation, hue),
        jitter_probability=augment.jitter_probability,
        grayscale=augment.grayscale,
        blur=augment.blur,
        solarise=augment.solarise,
    )
    return View(name, augment.size or model_size, augmentation)
