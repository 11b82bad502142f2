"""Read CIFAR-10 and CIFAR-100 in their python layout, from a folder or its tar archive, without running pickled code.

Layout: A. Krizhevsky, 2009: data_batch_1 ... and test_batch, each a pickled dictionary with `data` [n, 3072] uint8 and
`labels` [n], and batches.meta with `label_names`; of CIFAR-100 train, test and meta, with `fine_labels` and
`fine_label_names`. The official files are protocol 2 from Python 2 (strings are bytes); later copies are protocol 3.
Pickles can run code, so these pass an unpickler that knows arrays and plain containers.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import pickle
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipdist.errors import UserError

SIDE = 32
FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"


@dataclass(frozen=True)
class CifarLayout:
    """Which files a set has, what they are called, and under which keys they keep labels and class names."""

    name: str
    classes: int
    folder: str
    archive: str
    train: re.Pattern[str]
    first_train: str  # the file that an error message names where there is none
    test: str
    meta: str
    labels: str
    class_names: str

    def wants(self, name: str) -> bool:
        return name in (self.test, self.meta) or self.train.fullmatch(name) is not None


CIFAR_10 = CifarLayout(
    "CIFAR-10", 10, FOLDER, ARCHIVE, re.compile(r"data_batch_\d+"), "data_batch_1", "test_batch", "batches.meta",
    "labels", "label_names",
)  # fmt: skip
CIFAR_100 = CifarLayout(
    "CIFAR-100", 100, "cifar-100-python", "cifar-100-python.tar.gz", re.compile("train"), "train", "test", "meta",
    "fine_labels", "fine_label_names",
)  # fmt: skip


@dataclass(frozen=True)
class LabelledImages:
    images: np.ndarray  # uint8 [n, 3, 32, 32]
    labels: np.ndarray  # int64 [n]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Cifar:
    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]


def layout_of(path: str | Path) -> CifarLayout | None:
    """Return which of the two sets a folder or tar archive holds; None: neither.

    Raises:
        UserError: an archive that is damaged before its first file of interest.
    """
    path = Path(path)
    for layout in (CIFAR_10, CIFAR_100):
        if path.is_dir() and (_folder_of(path, layout) or (path / layout.archive).is_file()):
            return layout
    if not path.is_file():
        return None
    with _open_archive(path) as archive:
        names = (Path(member.name).name for member in archive if member.isfile())
        return next((layout for name in names for layout in (CIFAR_10, CIFAR_100) if layout.wants(name)), None)


def read_cifar(path: str | Path, layout: CifarLayout = CIFAR_10) -> Cifar:
    """Read any number of training batches (at least one), the test batch and the class names (the fine ones).

    Args:
        path: the folder with the batches, the folder above it, or the tar archive (compressed or not), which is read
            in place.

    Raises:
        UserError: no such data, a damaged or truncated file, or a pickle that holds anything but arrays and containers.
    """
    path = Path(path)
    files = _read_files(path, layout)
    batches = sorted(filter(layout.train.fullmatch, files), key=lambda name: (len(name), name))  # batch 10 after 9
    for needed, found in ((layout.first_train, batches), (layout.test, layout.test in files)):
        if not found:
            where = f"({layout.folder} or {layout.archive})"
            raise UserError(f"{path}: holds no {needed}; expected {layout.name}'s python version {where}")
    parts = [_labelled(files[name], f"{path}: {name}", layout) for name in batches]
    images, train_labels = (np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "labels"))
    train = LabelledImages(images, train_labels)
    test = _labelled(files[layout.test], f"{path}: {layout.test}", layout)
    labels = np.concatenate([train.labels, test.labels])
    classes = _class_names(files.get(layout.meta), f"{path}: {layout.meta}", int(labels.max()) + 1, layout)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{path}: labels {labels.min()} to {labels.max()}, but {len(classes)} class names")
    return Cifar(train, test, classes)


def _read_files(path: Path, layout: CifarLayout) -> dict[str, bytes]:
    """Return name -> content of the layout's files, wherever under `path` they are."""
    if path.is_file():
        return _read_archive(path, layout)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; expected {layout.folder} or {layout.archive}")
    folder = _folder_of(path, layout)
    if folder is not None:
        return {entry.name: entry.read_bytes() for entry in sorted(folder.iterdir()) if layout.wants(entry.name)}
    if (path / layout.archive).is_file():
        return _read_archive(path / layout.archive, layout)
    raise UserError(f"{path}: holds neither {layout.name}'s batches, nor {layout.folder}, nor {layout.archive}")


def _folder_of(path: Path, layout: CifarLayout) -> Path | None:
    """`path` or the layout's folder in it, whichever holds files (not folders) of the layout's names."""
    for folder in (path, path / layout.folder):
        if folder.is_dir() and any(layout.wants(entry.name) and entry.is_file() for entry in folder.iterdir()):
            return folder
    return None


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:*") as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error}); download it again") from None


def _read_archive(path: Path, layout: CifarLayout) -> dict[str, bytes]:
    files = {}
    with _open_archive(path) as archive:
        for member in archive:
            name = Path(member.name).name
            if member.isfile() and layout.wants(name):
                stream = archive.extractfile(member)
                assert stream is not None  # a plain file always has content
                files[name] = stream.read()
                if len(files[name]) < member.size:  # an uncompressed archive ends without an error
                    raise EOFError(f"{name} is cut off")
    return files


def _labelled(data: bytes, where: str, layout: CifarLayout) -> LabelledImages:
    batch = _unpickle(data, where)
    try:
        images, labels = _as_array(batch["data"]), _as_array(batch[layout.labels])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a {layout.name} batch ({type(error).__name__}: {error})") from None
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * SIDE * SIDE:
        raise UserError(f"{where}: `data` is {images.dtype} {list(images.shape)}, not uint8 [n, {3 * SIDE * SIDE}]")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels):
        raise UserError(f"{where}: {labels.size} integer labels expected to match {len(images)} pictures, at least one")
    return LabelledImages(images.reshape(-1, 3, SIDE, SIDE).copy(), labels.astype(np.int64))


def _class_names(data: bytes | None, where: str, count: int, layout: CifarLayout) -> tuple[str, ...]:
    """Return the names, or numbers as names where the file with them was lost."""
    if data is None:
        return tuple(str(label) for label in range(max(count, layout.classes)))
    names = _unpickle(data, where).get(layout.class_names)
    if not isinstance(names, list) or not names or not all(isinstance(name, bytes | str) for name in names):
        raise UserError(f"{where}: holds no list `{layout.class_names}`")
    return tuple(_text(name) for name in names)


class _DType:
    """Stands in for numpy.dtype while a pickle is read."""

    def __init__(self, code: Any, *_flags: Any) -> None:
        self.code = _text(code)
        self.order = "|"

    def __setstate__(self, state: tuple) -> None:
        self.order = _text(state[1])


class _Array:
    """Stands in for numpy.ndarray: keeps the pickled state and lets no code of numpy read it."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


def _reconstruct(*_arguments: Any) -> _Array:
    return _Array()


def _encode(text: str, _codec: str) -> bytes:
    """Undo how Python 3 writes bytes at protocol 2; only ever with latin1."""
    return text.encode("latin1")


_ADMITTED = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("_codecs", "encode"): _encode,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused {module}.{name}: only arrays and containers are read") from None


def _unpickle(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{where}: damaged, truncated or not a file of CIFAR ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}: holds {type(tree).__name__}, expected a dictionary")
    return {_text(key): value for key, value in tree.items() if isinstance(key, bytes | str)}


def _as_array(value: Any) -> np.ndarray:
    """Take a list of numbers, or an array's pickled state (version, shape, dtype, column-major, bytes)."""
    if not isinstance(value, _Array):
        return np.asarray(value)
    _version, shape, dtype, column_major, raw = value.state
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    kind = np.dtype((dtype.order if dtype.order in "<>" else "") + dtype.code)
    if kind.kind not in "iu":
        raise ValueError(f"an array of {kind}")
    return np.frombuffer(raw, kind).reshape(shape, order="F" if column_major else "C")


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)
