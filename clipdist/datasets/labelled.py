"""Open a set of labelled images: CIFAR's archives, an image folder, or shards with labels.

Read as
- CIFAR-10 or CIFAR-100: the folder of their python version, or the tar archive as it is;
- shards: DIR/train/*.tar and DIR/test/*.tar (or DIR/val/*.tar), or DIR/*.tar or one tar, which are then the test set.
  A label is "label", "class" or "cls" of a sample's .json, or its .cls member: a number, or a class' name. Names of
  numbers stand in DIR/classnames.txt, one a line; without it they are called by their numbers. This is CLIP_benchmark's
  form: prompt templates in DIR/zeroshot_classification_templates.txt are read, and "shards in all" in nshards.txt;
- an image folder: DIR/train/CLASS/* and DIR/test/CLASS/* (or DIR/val), or DIR/CLASS/*, which is then the test set,
  in the order of the files' names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import decode_pixels
from clipdist.data.index import IMAGE_KINDS
from clipdist.data.reader import Reader, open_reader
from clipdist.datasets.cifar import LabelledImages, layout_of, read_cifar
from clipdist.datasets.files import walk
from clipdist.errors import UserError

CLASS_NAMES, TEMPLATES = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
)  # as CLIP_benchmark's shards have them
SHARD_COUNT = "nshards.txt"  # in the folder of a split
_TEST_FOLDERS = ("test", "val")

Label = int | str  # a number, or a class' name


@dataclass(frozen=True)
class Split:
    """n labelled images.

    Attributes:
        labels: int64 [n], numbers of classes.
        read: row -> uint8 [h, w, 3]; may be called by several threads. BadSample: it cannot be decoded.
        digest: hex digits that name the images, their order and labels, as a cache's key; "": not known.
    """

    labels: np.ndarray
    read: Callable[[int], np.ndarray]
    digest: str = ""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LabelledSet:
    """Images of named classes.

    Attributes:
        train: None where there is only one set of images.
        listed: whether the names are from a classnames.txt, which is written for prompts.
        templates: the set's own, as its file has them: "{c}" is where the class goes; none without a file.
    """

    name: str
    classes: tuple[str, ...]
    train: Split | None
    test: Split
    listed: bool = False
    templates: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """The classes as they stand in prompts: listed ones as they are, others with spaces for underscores."""
        return self.classes if self.listed else tuple(name.replace("_", " ") for name in self.classes)


def open_labelled(path: str | Path) -> LabelledSet:
    """Open a set; images of folders and shards are decoded when they are read.

    Raises:
        UserError: no such data, a damaged or truncated archive or shard, a class without images, a sample without a
            label, a label of the test set that the training set or the class names do not have.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {_EXPECTED}")
    layout = layout_of(path)
    if layout is not None:
        data = read_cifar(path, layout)
        return LabelledSet(layout.name, data.classes, _from_arrays(data.train), _from_arrays(data.test))
    train, test = _split_folders(path)
    if test is None or any(test.glob("*.tar")):
        return _open_shards(path, train, test)
    return _open_folder(path, train, test)


_EXPECTED = "expected CIFAR's python version, shards with labels, or folders DIR/train/CLASS and DIR/test/CLASS"


def _split_folders(path: Path) -> tuple[Path | None, Path | None]:
    """Return (folder of the training set or None, folder of the test set, which may be `path` itself; None: a tar).

    Raises:
        UserError: a training set without a test set.
    """
    if path.is_file():
        return None, None
    train = path / "train" if (path / "train").is_dir() else None
    test = next((path / name for name in _TEST_FOLDERS if (path / name).is_dir()), None)
    if train and not test:
        raise UserError(f"{path}: holds train, but no test or val beside it")
    return train, test or path


def _from_arrays(data: LabelledImages) -> Split:
    digest = hashlib.sha256(data.images.data)
    digest.update(data.labels.data)

    def read(row: int) -> np.ndarray:
        return data.images[row].transpose(1, 2, 0)

    return Split(data.labels, read, digest.hexdigest())


# An image folder


def class_folders(path: Path) -> dict[Path, dict[str, list[Path]]]:
    """Return the images of an image folder by class, of its training set, if it has one, and of its test set.

    Raises:
        UserError: no such folder, or as _images_by_class; a class of the test set that the training set does not have.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected folders DIR/CLASS, or DIR/train/CLASS and DIR/test/CLASS")
    train, test = _split_folders(path)
    assert test is not None  # only a tar has none
    files = {folder: _images_by_class(folder) for folder in (train, test) if folder}
    classes = files[train or test]
    unknown = sorted(set(files[test]) - set(classes))
    if unknown:
        raise UserError(f"{test / unknown[0]}: unknown label: {train} has no class {unknown[0]}")
    return files


def _open_folder(path: Path, train: Path | None, test: Path | None) -> LabelledSet:
    assert test is not None
    files = class_folders(path)
    classes = tuple(files[train or test])
    splits = {folder: _from_files(found, classes) for folder, found in files.items()}
    return LabelledSet(path.resolve().name, classes, splits[train] if train else None, splits[test])


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """Return class name -> its images at any depth, both sorted.

    Raises:
        UserError: no folders, or one without an image.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {entry.name: images_below(entry) for entry in classes}
    if not any(found.values()):
        raise UserError(f"{folder}: no folders with pictures; {_EXPECTED}")
    for name, images in found.items():
        if not images:
            raise UserError(f"{folder / name}: a class without pictures; add some, or remove the folder")
    return found


def images_below(folder: Path) -> list[Path]:
    """Return the images of a folder at any depth, sorted."""
    return sorted(Path(here) / name for here, _, names in walk(folder) for name in names if is_image(name))


def is_image(name: str) -> bool:
    """Return whether a file is an image by its name, and not hidden."""
    return name.rpartition(".")[2].lower() in IMAGE_KINDS and not name.startswith(".")


def _from_files(found: dict[str, list[Path]], classes: tuple[str, ...]) -> Split:
    number = {name: label for label, name in enumerate(classes)}
    files = [(file, number[name]) for name, images in found.items() for file in images]
    digest = hashlib.sha256()
    for file, label in files:
        stat = file.stat()
        digest.update(f"{file.name}\n{stat.st_size}\n{stat.st_mtime_ns}\n{label}\n".encode("utf-8", "surrogateescape"))

    def read(row: int) -> np.ndarray:
        try:
            return decode_pixels(files[row][0].read_bytes())
        except OSError:
            raise BadSample("missing image") from None

    return Split(np.array([label for _, label in files], dtype=np.int64), read, digest.hexdigest())


# Shards


def _open_shards(path: Path, train: Path | None, test: Path | None) -> LabelledSet:
    sources = [source for source in (train, test or path) if source]
    for source in sources:
        require_all_shards(source)
    readers = [open_reader(Catalog.open([str(source)], what="--data")) for source in sources]
    labels = [_labels_of(reader, source) for reader, source in zip(readers, sources)]
    beside = path if path.is_dir() else path.parent
    listed = read_lines(beside / CLASS_NAMES)
    classes = listed or _class_names(path, labels[0])
    splits = [_from_shards(reader, own, classes, source) for reader, own, source in zip(readers, labels, sources)]
    name = path.resolve().stem if path.is_file() else path.resolve().name
    train_split = splits[0] if train else None
    return LabelledSet(name, classes, train_split, splits[-1], bool(listed), read_lines(beside / TEMPLATES))


def read_lines(path: Path) -> tuple[str, ...]:
    """Return the lines of a text file that are not blank; none without a file.

    Raises:
        UserError: not UTF-8.
    """
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except ValueError:
        raise UserError(f"{path}: not UTF-8") from None


def require_all_shards(folder: Path) -> None:
    """Raise UserError where a folder does not hold as many shards as its nshards.txt says."""
    stated = read_lines(folder / SHARD_COUNT)
    if stated and stated[0] != str(found := len(list(folder.glob("*.tar")))):
        raise UserError(f"{folder}: holds {found} shards, but its {SHARD_COUNT} says {stated[0]}; fetch the others")


def _labels_of(reader: Reader, source: Path) -> list[Label]:
    labels = [_label_of(reader, sample_id, source) for sample_id in range(len(reader.catalog))]
    if not labels:
        raise UserError(f"{source}: shards without samples")
    if len({type(label) for label in labels}) > 1:
        raise UserError(f"{source}: some labels are numbers and some are names; write all in one way")
    return labels


def _label_of(reader: Reader, sample_id: int, source: Path) -> Label:
    try:
        sample = reader.sample(sample_id)
        record = sample.metadata()
        written = next((record[key] for key in ("label", "class", "cls") if key in record), None)
        if written is None:
            written = (sample.read("cls") or b"").decode("utf-8", "replace").strip()
            written = int(written) if written.isdecimal() else written
    except BadSample as error:
        raise UserError(f"{source}: sample {reader.key(sample_id)}: {error.reason}") from None
    if isinstance(written, bool) or not isinstance(written, int | str) or written == "":
        raise UserError(
            f'{source}: sample {reader.key(sample_id)} has no label: wanted is "label" (a number) or "class" (a name)'
            " in its .json, or a .cls member"
        )
    return written


def _class_names(path: Path, labels: Sequence[Label]) -> tuple[str, ...]:
    """Return the names that occur, sorted, or numbers up to the largest."""
    names = sorted({label for label in labels if isinstance(label, str)})
    if names:
        return tuple(names)
    most = max(label for label in labels if isinstance(label, int))
    if most >= len(labels):  # a number that is no class, such as an identity
        raise UserError(f"{path}: label {most} with {len(labels)} pictures: classes without pictures; number from 0")
    return tuple(str(label) for label in range(most + 1))


def _from_shards(reader: Reader, labels: Sequence[Label], classes: tuple[str, ...], source: Path) -> Split:
    numbers = {name: number for number, name in enumerate(classes)}
    known = []
    for sample_id, label in enumerate(labels):
        number = label if isinstance(label, int) else numbers.get(label, -1)
        if not 0 <= number < len(classes):
            raise UserError(
                f"{source}: sample {reader.key(sample_id)}: unknown label {label!r}: not one of the {len(classes)}"
                " classes of the training set or classnames.txt"
            )
        known.append(number)
    array = np.array(known, dtype=np.int64)
    digest = hashlib.sha256(reader.catalog.fingerprint().encode() + array.tobytes())

    def read(row: int) -> np.ndarray:
        return decode_pixels(reader.sample(row).image())

    return Split(array, read, digest.hexdigest())
