"""CIFAR-10's python layout for tests, as Python 3 pickles it."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipdist.datasets.cifar import FOLDER, LabelledImages


def write_cifar10(
    folder: Path, train: LabelledImages, test: LabelledImages, classes: Sequence[str], batches: int = 5
) -> Path:
    """Write FOLDER/cifar-10-batches-py and return it."""
    out = folder / FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(train)), batches), start=1):
        write_batch(out / f"data_batch_{number}", train.images[rows], train.labels[rows])
    write_batch(out / "test_batch", test.images, test.labels)
    (out / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in classes]}, protocol=2))
    return out


def write_batch(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    content = {b"data": images.reshape(len(images), -1), b"labels": [int(label) for label in labels]}
    path.write_bytes(pickle.dumps(content, protocol=2))
