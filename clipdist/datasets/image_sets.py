"""Sets of images without a list: folders by class, CIFAR, or any folder, as pairs that become shards."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from clipdist.data.index import IMAGE_KINDS
from clipdist.datasets.cifar import LabelledImages, layout_of, read_cifar
from clipdist.datasets.labelled import class_folders, images_below, is_image
from clipdist.datasets.pair_lists import Pair, Skip
from clipdist.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images of one split. Iterating gives them in an order that mixes the classes, the same every time.

    Attributes:
        source: the folder or archive; relative file names start there.
        files: their names; of images that `pixels` holds, made up.
        labels: a place in `classes` for each; None: there are no classes.
        captions: by class; empty: there are none.
        pixels: uint8 [n, 3, h, w]; None: they are files.
        outside: images that are left out, since they lie in no class' folder.
    """

    source: Path
    files: Sequence[str]
    labels: Sequence[int] | None = None
    classes: tuple[str, ...] = ()
    captions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pixels: np.ndarray | None = None
    outside: Sequence[str] = ()

    @property
    def holds_images(self) -> bool:
        """Whether the images are not files."""
        return self.pixels is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """What is stored of a sample, for ShardPlan."""
        return ("file",) if self.labels is None else ("file", "captions", "cls")

    def __iter__(self) -> Iterator[Pair | Skip]:
        """Yield pairs; images that are no files as PNG."""
        yield from (Skip(0, name, "outside of the classes' folders") for name in self.outside)
        order = sorted(range(len(self.files)), key=lambda place: _mixed(self.files[place]))
        for row, place in enumerate(order, start=1):
            data = None if self.pixels is None else _png(self.pixels[place])
            if self.labels is None:
                yield Pair(row, self.files[place], (), data=data)
                continue
            label = self.labels[place]
            name = self.classes[label]
            captions = tuple(self.captions.get(name, ()))
            yield Pair(row, self.files[place], captions, {"class": name}, data, label)


def open_image_sets(path: Path, unlabelled: bool = False) -> dict[str, ImageSet]:
    """Return the images of CIFAR, of a folder by class, or of any folder, by split: "" where there is one.

    Args:
        unlabelled: folders are no classes: all images at any depth are one split.

    Raises:
        UserError: no such folder, no images, a name that is not UTF-8, or as read_cifar and class_folders.
    """
    may_be_cifar = path.is_dir() or {".tar", ".tgz"} & set(path.suffixes)
    layout = layout_of(path) if may_be_cifar and not unlabelled else None
    if layout is not None:
        data = read_cifar(path, layout)
        parts = {"train": data.train, "test": data.test}
        return {split: _of_arrays(path, split, part, data.classes) for split, part in parts.items()}
    if path.is_dir() and (unlabelled or _is_flat(path)):
        images = images_below(path)
        if not images:
            raise UserError(f"{path}: no pictures in it ({', '.join(IMAGE_KINDS)})")
        return {"": ImageSet(path, [str(image.relative_to(path)) for image in images])}
    try:
        splits = class_folders(path)
    except UserError as error:
        if path.is_dir() and images_below(path):
            hint = "tools/shard_images.py --unlabelled takes all pictures, without classes"
            raise UserError(f"{error}; {hint}") from None
        raise
    classes = tuple(next(iter(splits.values())))  # of what is trained on, where there are two
    for name in classes:
        if not _is_text(name):
            raise UserError(f"{path}: the folder {name!r} has a name that is not UTF-8; rename it")
    return {
        folder.name if len(splits) > 1 else "": _of_files(folder, images, classes) for folder, images in splits.items()
    }


def _is_flat(folder: Path) -> bool:
    """Return whether a folder holds images, and no folders that hold any."""
    images = images_below(folder)
    return bool(images) and all(image.parent == folder for image in images)


def _of_arrays(path: Path, split: str, part: LabelledImages, classes: tuple[str, ...]) -> ImageSet:
    files = [f"{split}/{row:05d}.png" for row in range(len(part))]
    return ImageSet(path, files, part.labels.tolist(), classes, pixels=part.images)


def _of_files(folder: Path, images: Mapping[str, Sequence[Path]], classes: tuple[str, ...]) -> ImageSet:
    places = {name: place for place, name in enumerate(classes)}
    found = [(str(file.relative_to(folder)), places[name]) for name, files in images.items() for file in files]
    outside = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and is_image(entry.name))
    return ImageSet(folder, [file for file, _ in found], [label for _, label in found], classes, outside=outside)


def _mixed(file: str) -> bytes:
    return hashlib.sha256(os.fsencode(file)).digest()


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)
