"""Render self-contained HTML pages from the templates in templates/, which escape all text.

The pages follow the reader's choice of light or dark, fit a phone, print on A4, and forbid themselves to load anything.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from clipdist.report import curves

IMAGE_WIDTH = 1600  # pixels at most; a page with images should still go by mail

_TEMPLATES = Environment(
    loader=PackageLoader("clipdist.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"colour": lambda number: number % curves.COLOURS, "dash": curves.dash}

parts: Any = _TEMPLATES.get_template("parts.html").module  # its macros are functions that return Markup


def render(template: str, **values: Any) -> str:
    """Return the page that a template makes of the values."""
    return _TEMPLATES.get_template(template).render(values)


def data_uri(image: Image.Image, kind: str, quality: int) -> str:
    """Return a data: address that holds the image as JPEG or WEBP."""
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_figure(path: Path, caption: str) -> Markup:
    """Embed an image file, no wider than IMAGE_WIDTH; return a note where it cannot be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((IMAGE_WIDTH, 8 * IMAGE_WIDTH))
        return parts.image_figure(data_uri(image, "WEBP", 85), image.width, image.height, caption)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return parts.missing(f"{path.name}: cannot be read as a picture.")
