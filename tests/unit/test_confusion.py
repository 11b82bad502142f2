"""The confusion matrix counted by hand, and its picture looked at pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipdist.report.confusion import confusion_image, confusion_matrix

DARK, EMPTY, PAPER = (8, 48, 107), (228, 230, 234), (255, 255, 255)


def test_rows_are_true_classes_and_columns_predictions() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 1, 1, 3]), torch.tensor([0, 1, 1, 1, 3, 0])
    matrix = confusion_matrix(labels, predictions, 4)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert confusion_matrix(np.array([], int), np.array([], int), 2).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("labels", "predictions"), [([0, 4], [0, 0]), ([0], [-1]), ([0, 1], [0])])
def test_what_is_no_class_is_refused(labels: list[int], predictions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"classes|labels"):
        confusion_matrix(np.array(labels), np.array(predictions), 4)


def share_of(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((picture == np.array(colour)).all(2).mean())


def test_the_diagonal_of_a_perfect_classifier_is_dark() -> None:
    names = ["a", "b", "c"]
    perfect = np.asarray(confusion_image(np.diag([5, 1, 2]), names))
    nothing = np.asarray(confusion_image(np.zeros((3, 3), np.int64), names))
    assert perfect.shape == nothing.shape
    assert share_of(perfect, DARK) > 3 * 38 * 38 / perfect.shape[0] / perfect.shape[1]  # three cells, less their text
    assert share_of(nothing, EMPTY) > 9 * 40 * 40 / perfect.shape[0] / perfect.shape[1]
    wrong = np.asarray(confusion_image(np.diag([5, 1, 2])[::-1], names))
    moved = (perfect != wrong).any(2)
    assert share_of(wrong, DARK) == pytest.approx(share_of(perfect, DARK), rel=0.1)
    assert moved.sum() > 3 * 38 * 38  # the dark cells stand elsewhere


@pytest.mark.parametrize("classes", [1, 2, 10, 100])
def test_pictures_of_all_sizes_hold_their_cells_and_names(classes: int) -> None:
    matrix = np.eye(classes, dtype=np.int64)
    short = confusion_image(matrix, [str(label) for label in range(classes)])
    long = confusion_image(matrix, ["a class whose name never comes to an end" * 3] * classes)
    assert short.height < long.height < short.height + 200  # names are cut
    assert max(long.size) < 1600
    for picture in (np.asarray(short), np.asarray(long)):
        edges = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edges == PAPER).all()  # nothing is cut off


def test_a_matrix_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 classes"):
        confusion_image(np.zeros((2, 2), np.int64), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at most"):
        confusion_image(np.zeros((0, 0), np.int64), [])
