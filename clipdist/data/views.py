"""Views of an image, as a configuration describes them."""

from __future__ import annotations

from collections.abc import Sequence

from clipdist import config
from clipdist.data.augment import View
from clipdist.data.loader import view_of


def views_of(name: str, augments: Sequence[config.Augment], image_size: int) -> tuple[View, ...]:
    """Return views NAME/0, NAME/1 ...

    Args:
        image_size: of views that say none.
    """
    return tuple(view_of(f"{name}/{number}", augment, image_size) for number, augment in enumerate(augments))
