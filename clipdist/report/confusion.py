"""Labels and predictions of c classes in, their confusion matrix and a picture of it (a Pillow image) out."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN = 20
NAME_WIDTH = 150  # of a class' name at most, pixels; longer names end in an ellipsis
MOST_CLASSES = 200  # beyond that a cell would be less than a few pixels of any screen
PAPER, INK, QUIET, EMPTY = (255, 255, 255), (24, 28, 36), (96, 104, 118), (228, 230, 234)
DARK = (8, 48, 107)  # of 100 %; 0 % is PAPER
_KEY_WIDTH, _KEY_HEIGHT = 160, 10
_FOOTER_WIDTH = 290

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def confusion_matrix(labels: Tensor | np.ndarray, predictions: Tensor | np.ndarray, classes: int) -> np.ndarray:
    """int64 [c, c]: row = the true class, column = the predicted one, entry = how many pictures.

    Args:
        labels, predictions: integers [n] in 0 .. classes - 1.

    Raises:
        ValueError: lengths that differ, or a number out of range.
    """
    rows, columns = (np.asarray(numbers, dtype=np.int64) for numbers in (labels, predictions))
    if rows.shape != columns.shape or rows.ndim != 1:
        raise ValueError(f"{rows.shape} labels and {columns.shape} predictions")
    for numbers in (rows, columns):
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < classes:
            raise ValueError(f"classes {numbers.min()} to {numbers.max()}, of {classes}")
    return np.bincount(rows * classes + columns, minlength=classes * classes).reshape(classes, classes)


def confusion_picture(matrix: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A square per pair of classes, darker for a larger share of its row; the percentage in it where there is room.

    Rows are true classes, columns predictions. A class without pictures has a grey row. Names stand on every row and
    column; readable to 100 classes.

    Raises:
        ValueError: the matrix is not [c, c] of the c classes, or c is not in 1 .. MOST_CLASSES.
    """
    if matrix.shape != (len(classes), len(classes)) or not 1 <= len(classes) <= MOST_CLASSES:
        raise ValueError(f"a matrix {matrix.shape} of {len(classes)} classes (at most {MOST_CLASSES})")
    side = _cell(len(classes))
    font = ImageFont.load_default(size=min(14, max(8, side - 3)))
    names = [_shortened(name, font, NAME_WIDTH) for name in classes]
    left = MARGIN + 22 + round(max(font.getlength(name) for name in names)) + 8  # 22: the axis' title
    top = MARGIN + 40 + left - MARGIN - 22  # 40: title and colour key; names of columns are as long as those of rows
    end = side * len(classes)
    width = left + max(end, _FOOTER_WIDTH) + MARGIN
    picture = Image.new("RGB", (width, top + end + MARGIN), PAPER)
    _draw_cells(picture, matrix, side, (left, top), font)
    draw = ImageDraw.Draw(picture)
    _draw_key(draw)
    for number, name in enumerate(names):
        middle = number * side + side // 2
        draw.text((left - 8, top + middle), name, INK, font, anchor="rm")
        _paste_upright(picture, name, font, (left + middle, top - 8), INK)
    title = ImageFont.load_default(size=13)
    draw.text((left, top + end + 3), "predicted class, in % of the true class' pictures", QUIET, title)
    _paste_upright(picture, "true class", title, (MARGIN, top + min(end, 80)), QUIET)
    return picture


def _cell(classes: int) -> int:
    """Side of a square, pixels: a percentage fits from 26 on."""
    return max(9, min(44, 1100 // classes))


def _draw_cells(picture: Image.Image, matrix: np.ndarray, side: int, corner: tuple[int, int], font: Font) -> None:
    left, top = corner
    totals = matrix.sum(1)
    shares = matrix / np.maximum(totals, 1)[:, None]
    cells = _shades(shares)
    cells[totals == 0] = EMPTY
    cells = cells.repeat(side, 0).repeat(side, 1)
    lines = np.arange(len(cells)) % side % (side - 1) == 0  # the first and the last pixel of every square
    cells[lines] = cells[:, lines] = EMPTY
    picture.paste(Image.fromarray(cells), corner)
    if side < 26:  # no room for figures
        return
    draw = ImageDraw.Draw(picture)
    for row, column in np.argwhere(shares >= 0.005):
        share = float(shares[row, column])
        middle = (left + column * side + side // 2, top + row * side + side // 2)
        draw.text(middle, f"{100 * share:.0f}", PAPER if share > 0.5 else INK, font, anchor="mm")


def _draw_key(draw: ImageDraw.ImageDraw) -> None:
    font = ImageFont.load_default(size=12)
    draw.text((MARGIN, MARGIN + 6), "0 %", QUIET, font, anchor="lm")
    for x, colour in enumerate(_shades(np.linspace(0, 1, _KEY_WIDTH)).tolist()):
        place = MARGIN + 30 + x
        draw.line((place, MARGIN, place, MARGIN + _KEY_HEIGHT), tuple(colour))
    draw.text((MARGIN + 36 + _KEY_WIDTH, MARGIN + 6), "100 %", QUIET, font, anchor="lm")


def _shades(shares: np.ndarray) -> np.ndarray:
    """Shares [...] in [0, 1] -> colours uint8 [..., 3].

    Lightness falls with the square root of the share: confusions of a few percent can be seen.
    """
    paper, dark = np.array(PAPER, dtype=np.float64), np.array(DARK, dtype=np.float64)
    return (paper + np.sqrt(shares)[..., None] * (dark - paper)).round().astype(np.uint8)


def _paste_upright(
    picture: Image.Image, text: str, font: Font, end: tuple[int, int], ink: tuple[int, int, int]
) -> None:
    """Text that reads upwards; `end` is (x of its middle, y of its first letter)."""
    length, height = max(1, round(font.getlength(text))), round(getattr(font, "size", 12) * 1.3)
    strip = Image.new("L", (length, height), 0)
    ImageDraw.Draw(strip).text((0, height // 2), text, 255, font, anchor="lm")
    mask = strip.rotate(90, expand=True)
    picture.paste(ink, (end[0] - height // 2, end[1] - length), mask)


def _shortened(name: str, font: Font, width: int) -> str:
    if font.getlength(name) <= width:
        return name

    def length_of(letters: int) -> float:
        return float(font.getlength(name[:letters] + "..."))

    too_many = bisect.bisect(range(len(name)), float(width), key=length_of)
    return name[: max(0, too_many - 1)] + "..."
