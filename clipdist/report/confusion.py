"""Count the confusion matrix of labels and predictions, and draw it with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

MOST_CLASSES = 200  # beyond that a cell would be less than a few pixels of any screen
LONGEST_NAME = 24  # letters of a class' name; longer names end in an ellipsis
INK, QUIET, EMPTY = "#181c24", "#606876", "#e4e6ea"
DARK = "#08306b"  # of 100 %; 0 % is white
DPI = 72  # so that a point is a pixel


def confusion_matrix(labels: Tensor | np.ndarray, predictions: Tensor | np.ndarray, classes: int) -> np.ndarray:
    """Return int64 [c, c]: row = the true class, column = the predicted one, entry = number of images.

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


def confusion_image(matrix: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """Draw a square per pair of classes, darker for a larger share of its row, with the percentage where there is room.

    Rows are true classes, columns predictions. A class without images has a grey row. Names stand on every row and
    column; readable to 100 classes.

    Raises:
        ValueError: the matrix is not [c, c] of the c classes, or c is not in 1 .. MOST_CLASSES.
    """
    count = len(classes)
    if matrix.shape != (count, count) or not 1 <= count <= MOST_CLASSES:
        raise ValueError(f"a matrix {matrix.shape} of {count} classes (at most {MOST_CLASSES})")
    cell = max(9, min(44, 1100 // count))  # pixels
    names = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..." for name in classes]
    totals = matrix.sum(1, keepdims=True)
    shares = np.ma.masked_array(100 * matrix / np.maximum(totals, 1), np.broadcast_to(totals == 0, matrix.shape))
    # Lightness falls with the square root of the share: confusions of a few percent can be seen.
    colours = LinearSegmentedColormap.from_list("shares", ["white", DARK]).with_extremes(bad=EMPTY)
    with rc_context({"text.parse_math": False, "text.color": QUIET, "axes.labelcolor": QUIET}):
        side = cell * count
        figure = Figure(figsize=(side / DPI, side / DPI), dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))
        drawn = axes.imshow(shares, cmap=colours, norm=PowerNorm(0.5, 0, 100), aspect="auto", interpolation="nearest")
        key = axes.inset_axes((1 + 16 / side, 0, 10 / side, min(1.0, 160 / side)))
        figure.colorbar(drawn, key, ticks=[0, 10, 50, 100], format="%d %%").outline.set_visible(False)
        key.tick_params(length=0, labelsize=12)
        size = min(14, max(7, cell - 3))
        axes.set_xticks(range(count), names, rotation=90, fontsize=size, color=INK)
        axes.set_yticks(range(count), names, fontsize=size, color=INK)
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=EMPTY, linewidth=1)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("predicted class, in % of the true class' pictures", fontsize=13)
        axes.set_ylabel("true class", fontsize=13)
        if cell >= 26:
            _write_percentages(axes, shares.filled(0))
        file = io.BytesIO()
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.28, facecolor="white")
    return Image.open(file).convert("RGB")


def _write_percentages(axes: Axes, shares: np.ndarray) -> None:
    for row, column in np.argwhere(shares >= 0.5):
        ink = "white" if shares[row, column] > 50 else INK
        axes.text(column, row, f"{shares[row, column]:.0f}", color=ink, ha="center", va="center", fontsize=14)
