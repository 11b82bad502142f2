"""Make the page of a search: queries and the images found for them, in one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clipdist.evals.search import Hit
from clipdist.report.page import data_uri, render

SIDE = 384  # longer side of an image on the page, pixels: sharp where two stand beside one another on a phone
QUALITY = 82  # of its JPEG


@dataclass(frozen=True)
class Answer:
    """A query and its hits.

    Attributes:
        pixels: of each hit, uint8 [h, w, 3].
        query_pixels: uint8 [h, w, 3] where the query is an image.
    """

    query: str
    hits: Sequence[Hit]
    pixels: Sequence[np.ndarray]
    query_pixels: np.ndarray | None = None


def search_page(title: str, remarks: Sequence[str], answers: Sequence[Answer]) -> str:
    """Return the page: a section per query with a grid of its images; rank, score, first caption and name under each.

    Args:
        title: of the page; the first answer's query is a good one.
        remarks: lines under it.
    """
    return render("search.html", title=title, remarks=remarks, answers=answers, thumbnail=thumbnail)


def thumbnail(pixels: np.ndarray) -> str:
    """Return the image uint8 [h, w, 3], shrunk to SIDE at most, as a data: address that holds a JPEG."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    return data_uri(image, "JPEG", QUALITY)
