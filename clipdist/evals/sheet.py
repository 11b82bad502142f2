"""Draw contact sheets (Pillow images): a row of labelled images under each query."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import decode_pixels
from clipdist.data.reader import Reader, open_reader
from clipdist.evals.embed import Embeddings

TILE = 176  # side of an image's square, pixels
COLUMNS = 8  # images beside one another, at most
GAP = 12
MARGIN = 24
QUERY_SIZE, LABEL_SIZE = 20, 14  # of the fonts, pixels
QUERY_LINES, LABEL_LINES = 4, 5  # longer text ends in an ellipsis
PAPER, INK, QUIET, MAT = (255, 255, 255), (24, 28, 36), (96, 104, 118), (240, 242, 245)
CORRECT = (22, 163, 74)  # frame of the correct image
FRAME = 4  # its width, pixels

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
AnyImage = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class SheetRow:
    """One query and its images.

    Attributes:
        images: Pillow images, uint8 [h, w, 3] arrays or uint8 [3, h, w] tensors.
        labels: one per image, "" for none; line breaks are kept.
        correct: index of the image that gets a green frame, where one is known to be the answer.
    """

    query: str
    images: Sequence[AnyImage]
    labels: Sequence[str]
    correct: int | None = None


def contact_sheet(rows: Sequence[SheetRow], tile: int = TILE) -> Image.Image:
    """Draw the rows below one another. Images keep their aspect ratio inside a square of `tile` pixels.

    The width follows the longest row, up to COLUMNS images; longer rows are wrapped. The height follows the text.

    Raises:
        ValueError: no rows, or a row with another number of labels than of images.
    """
    if not rows or any(len(row.images) != len(row.labels) for row in rows):
        raise ValueError("a contact sheet needs rows, and as many labels as pictures in each")
    columns = min(COLUMNS, max(2, *(len(row.images) for row in rows)))
    width = 2 * MARGIN + columns * tile + (columns - 1) * GAP
    strips = []
    for row in rows:
        strips.append(_text_strip(row.query, width))
        for begin in range(0, len(row.images), columns):
            part = slice(begin, begin + columns)
            correct = None if row.correct is None else row.correct - begin
            strips.append(_image_strip(row.images[part], row.labels[part], correct, width, tile))
    sheet = Image.new("RGB", (width, MARGIN + sum(strip.height for strip in strips)), PAPER)
    y = MARGIN
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet


def hits_row(query: str, reader: Reader, sample_ids: Sequence[int], scores: Sequence[float]) -> SheetRow:
    """Return the row of a query's hits, best first: uncropped images, labelled with rank, score and first caption."""
    labels = []
    for rank, (sample_id, score) in enumerate(zip(sample_ids, scores), start=1):
        labels.append(f"{rank}.  {score:.3f}\n{first_caption(reader, sample_id)}")
    return SheetRow(query, [decode_pixels(reader.sample(sample_id).image()) for sample_id in sample_ids], labels)


def first_caption(reader: Reader, sample_id: int) -> str:
    """Return a sample's first caption, "" where it has none."""
    try:
        return reader.sample(sample_id).captions()[0]
    except BadSample:
        return ""


def retrieval_sheet(embeddings: Embeddings, catalog: Catalog, queries: int, hits: int = 6) -> Image.Image:
    """Draw the sheet of a validation: captions spread evenly over the set, each with the images that it retrieves.

    The caption's own image has a green frame where it is among the hits. The choice of captions is deterministic.

    Args:
        queries: number of captions, at most.
        hits: number of images for each, at most.
    """
    count = min(queries, len(embeddings.captions))
    chosen = [(2 * row + 1) * len(embeddings.captions) // (2 * count) for row in range(count)]
    scores = F.normalize(embeddings.text[chosen], dim=1) @ F.normalize(embeddings.image, dim=1).T
    top = scores.topk(min(hits, len(embeddings.keys)))
    reader = open_reader(catalog)
    try:
        rows = []
        for caption, values, images in zip(chosen, top.values, top.indices):
            row = hits_row(
                embeddings.captions[caption], reader, embeddings.sample_ids[images].tolist(), values.tolist()
            )
            correct = (images == embeddings.text_image[caption]).nonzero().flatten().tolist()
            rows.append(replace(row, correct=correct[0] if correct else None))
    finally:
        reader.close()
    return contact_sheet(rows)


def _text_strip(query: str, width: int) -> Image.Image:
    font = ImageFont.load_default(size=QUERY_SIZE)
    lines = _wrap(query, font, width - 2 * MARGIN, QUERY_LINES)
    strip = Image.new("RGB", (width, len(lines) * _line(QUERY_SIZE) + GAP // 2), PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((MARGIN, number * _line(QUERY_SIZE)), line, INK, font)
    return strip


def _image_strip(
    images: Sequence[AnyImage], labels: Sequence[str], correct: int | None, width: int, tile: int
) -> Image.Image:
    font = ImageFont.load_default(size=LABEL_SIZE)
    wrapped = [_wrap(label, font, tile, LABEL_LINES) for label in labels]
    labels_y = tile + GAP // 2
    height = labels_y + max(len(lines) for lines in wrapped) * _line(LABEL_SIZE) + MARGIN
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    for column, (image, lines) in enumerate(zip(images, wrapped)):
        x = MARGIN + column * (tile + GAP)
        draw.rectangle((x, 0, x + tile - 1, tile - 1), MAT)
        fitted = _fit(image, tile)
        strip.paste(fitted, (x + (tile - fitted.width) // 2, (tile - fitted.height) // 2))
        if column == correct:
            draw.rectangle((x, 0, x + tile - 1, tile - 1), outline=CORRECT, width=FRAME)
        for number, line in enumerate(lines):
            # The first line holds the rank and the score.
            draw.text((x, labels_y + number * _line(LABEL_SIZE)), line, INK if number == 0 else QUIET, font)
    return strip


def _fit(image: AnyImage, tile: int) -> Image.Image:
    """Scale an image, up or down, so that its longer side is `tile` pixels."""
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(np.ascontiguousarray(image))
    image = image.convert("RGB")
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))  # ImageOps.contain rounds to 0
    return image.resize(size, Image.Resampling.BICUBIC)


def _wrap(text: str, font: Font, width: int, most: int) -> list[str]:
    """Break text into at most `most` lines of at most `width` pixels; break words that are wider than a line too."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width and len(line) > 1:
                heads = [line[: count + 1] for count in range(len(line))]
                head = max(1, bisect_right(heads, float(width), key=font.getlength))  # characters
                lines.append(line[:head])
                line = line[head:]
        if line:
            lines.append(line)
    if len(lines) > most:
        last = lines[most - 1] + "..."
        while font.getlength(last) > width and len(last) > 4:
            last = last[:-4] + "..."
        lines = [*lines[: most - 1], last]
    return lines


def _line(size: int) -> int:
    return round(size * 1.35)
