"""Labelled pictures from CIFAR's archives, image folders and shards: the same labels and pixels, and clear refusals."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cifar_files import write_cifar10
from pairs import Lengths
from PIL import Image

from clipdist.config import Data
from clipdist.data.bad_sample import BadSample
from clipdist.data.catalog import Catalog
from clipdist.data.decode import decode_pixels, eval_image, eval_pixels
from clipdist.data.loader import open_loader
from clipdist.data.order import OrderKey
from clipdist.data.reader import Reader
from clipdist.data.transform import EvalTransform
from clipdist.data.views import image_view
from clipdist.datasets.cifar import CIFAR_100, LabelledImages, read_cifar
from clipdist.datasets.labelled import LabelledSet, open_labelled
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError
from tools import shard_images

NAMES = ("circle", "square", "star")


def pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def labels_of(n: int) -> np.ndarray:
    return np.arange(n) % 3


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def check(data: LabelledSet, train: int = 9, test: int = 6) -> None:
    """Pixels of splits drawn from seeds 0 and 1, whatever their order."""
    assert data.train is not None
    assert data.classes == NAMES
    for split, count, seed in ((data.train, train, 0), (data.test, test, 1)):
        assert len(split) == count
        assert split.labels.dtype == np.int64
        expected = {pixels.tobytes(): label for pixels, label in zip(pictures(count, seed), labels_of(count))}
        found = {split.read(row).tobytes(): label for row, label in enumerate(split.labels.tolist())}
        assert found == expected
        assert split.read(0).shape == (32, 32, 3)


# CIFAR


def cifar10(folder: Path) -> Path:
    parts = [
        LabelledImages(pictures(n, seed).transpose(0, 3, 1, 2).copy(), labels_of(n)) for n, seed in ((9, 0), (6, 1))
    ]
    return write_cifar10(folder, parts[0], parts[1], NAMES, batches=2)


def test_cifar10(tmp_path: Path) -> None:
    folder = cifar10(tmp_path)
    archive = tmp_path / "copy.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    sets = [open_labelled(path) for path in (folder, tmp_path, archive)]
    for data in sets:
        check(data)
        assert data.name == "CIFAR-10"
    digests = {data.test.digest for data in sets}
    assert len(digests) == 1
    assert digests.isdisjoint({sets[0].train.digest, ""})  # type: ignore[union-attr]


def cifar100(folder: Path, **meta: Any) -> Path:
    out = folder / "cifar-100-python"
    out.mkdir()
    for name, count, seed in (("train", 9, 0), ("test", 6, 1)):
        batch = {
            b"data": pictures(count, seed).transpose(0, 3, 1, 2).reshape(count, -1),
            b"fine_labels": labels_of(count).tolist(),
            b"coarse_labels": [0] * count,
        }
        (out / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {b"fine_label_names": [name.encode() for name in NAMES], b"coarse_label_names": [b"shape"]} | meta
    (out / "meta").write_bytes(pickle.dumps(names, protocol=2))
    return out


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    folder = cifar100(tmp_path)
    archive = tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    for path in (folder, tmp_path, archive):
        data = open_labelled(path)
        check(data)
        assert data.name == "CIFAR-100"
    with pytest.raises(UserError, match="holds neither CIFAR-10's batches"):
        read_cifar(tmp_path)
    (folder / "test").unlink()
    with pytest.raises(UserError, match="holds no test; expected CIFAR-100"):
        read_cifar(folder, CIFAR_100)


def test_a_truncated_archive(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar10(tmp_path / "whole"), "cifar-10-batches-py")
    content = archive.read_bytes()
    for share in (0.1, 0.6, 0.95):
        archive.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz: damaged or truncated archive"):
            open_labelled(archive)


# Image folders


def image_folder(root: Path, test: str = "test") -> Path:
    for split, count, seed in (("train", 9, 0), (test, 6, 1)):
        for row, (pixels, label) in enumerate(zip(pictures(count, seed), labels_of(count))):
            place = root / split / NAMES[label] / ("deep" if row == 1 else "")
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{row}.PNG").write_bytes(png(pixels))
            (place / "notes.txt").write_text("no picture")
    return root


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path: Path, test: str) -> None:
    data = open_labelled(image_folder(tmp_path / "shapes", test))
    check(data)
    assert data.name == "shapes"
    alone = open_labelled(tmp_path / "shapes" / "train")
    assert alone.train is None
    assert (len(alone.test), alone.classes) == (9, NAMES)
    before = data.test.digest
    (tmp_path / "shapes" / test / "star" / "new.png").write_bytes(png(pictures(1, 7)[0]))
    assert open_labelled(tmp_path / "shapes").test.digest != before


def test_damaged_pictures_are_named_when_they_are_read(tmp_path: Path) -> None:
    root = image_folder(tmp_path)
    file = root / "test" / "circle" / "0.PNG"
    file.write_bytes(file.read_bytes()[:200])
    split = open_labelled(root).test
    with pytest.raises(BadSample, match=r"truncated image|not an image"):
        split.read(0)
    file.unlink()
    with pytest.raises(BadSample, match="missing image"):
        split.read(0)
    assert split.read(1).shape == (32, 32, 3)


def test_folders_that_are_no_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder; expected CIFAR's python version"):
        open_labelled(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no folders with pictures"):
        open_labelled(tmp_path / "empty")
    root = image_folder(tmp_path / "shapes")
    (root / "train" / "hexagon").mkdir()
    with pytest.raises(UserError, match="hexagon: a class without pictures"):
        open_labelled(root)
    (root / "train" / "hexagon").rmdir()
    (root / "test" / "hexagon").mkdir()
    (root / "test" / "hexagon" / "0.png").write_bytes(png(pictures(1, 0)[0]))
    with pytest.raises(UserError, match=r"test/hexagon: unknown label: .*train has no class hexagon"):
        open_labelled(root)
    (root / "test").rename(root / "other")
    with pytest.raises(UserError, match="holds train, but no test or val beside it"):
        open_labelled(root)


# Shards


def shards(
    folder: Path, count: int, seed: int, label_as: str, wrong: dict[int, dict[str, bytes]] | None = None
) -> Path:
    folder.mkdir(parents=True)
    samples = []
    for row, (pixels, label) in enumerate(zip(pictures(count, seed), labels_of(count).tolist())):
        written = NAMES[label] if label_as in ("class", "cls", "name.cls") else label
        members = {"png": png(pixels)}
        if label_as.endswith(".cls"):
            members["cls"] = str(written).encode()
        else:
            members["json"] = json.dumps({label_as: written}).encode()
        members |= (wrong or {}).get(row, {})
        samples.append(Sample(f"{row:09d}", {kind: data for kind, data in members.items() if data}))
    write_shard(folder / "00000.tar", samples)
    return folder


@pytest.mark.parametrize("label_as", ["label", "class", "cls", "number.cls", "name.cls"])
def test_shards(tmp_path: Path, label_as: str) -> None:
    shards(tmp_path / "train", 9, 0, label_as)
    shards(tmp_path / "test", 6, 1, label_as)
    if label_as in ("label", "number.cls"):
        assert open_labelled(tmp_path).classes == ("0", "1", "2")
        (tmp_path / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    data = open_labelled(tmp_path)
    check(data)
    for path in (tmp_path / "test", tmp_path / "test" / "00000.tar"):
        alone = open_labelled(path)
        assert alone.train is None
        assert len(alone.test) == 6
        assert np.array_equal(alone.test.read(5), data.test.read(5))


@pytest.mark.parametrize(
    ("label_as", "wrong", "says"),
    [
        ("label", {"json": b"{}"}, "sample 000000004 has no label"),
        ("label", {"json": b""}, "sample 000000004 has no label"),
        ("label", {"json": b'{"label": true}'}, "sample 000000004 has no label"),
        ("label", {"json": b'{"label": 1.5}'}, "sample 000000004 has no label"),
        ("label", {"json": b"{"}, "sample 000000004: not JSON"),
        ("label", {"json": b'{"label": "star"}'}, "some labels are numbers and some are names"),
        ("label", {"json": b'{"label": 7}'}, "sample 000000004: unknown label 7: not one of the 3 classes"),
        ("label", {"json": b'{"label": -1}'}, "sample 000000004: unknown label -1"),
        ("class", {"json": b'{"class": "hexagon"}'}, "sample 000000004: unknown label 'hexagon'"),
    ],
)
def test_labels_that_are_wrong(tmp_path: Path, label_as: str, wrong: dict[str, bytes], says: str) -> None:
    shards(tmp_path / "train", 9, 0, label_as)
    shards(tmp_path / "test", 6, 1, label_as, {4: wrong})
    with pytest.raises(UserError, match=says):
        open_labelled(tmp_path)


def test_numbers_that_are_no_classes(tmp_path: Path) -> None:
    shards(tmp_path / "one", 6, 1, "label", {4: {"json": b'{"label": 90210}'}})
    with pytest.raises(UserError, match="label 90210 with 6 pictures: classes without pictures"):
        open_labelled(tmp_path / "one")


def test_a_tar_that_holds_nothing_labelled(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match="shards without samples"):
        open_labelled(tmp_path / "empty.tar")


# Pixels


@pytest.mark.parametrize("shape", [(32, 32), (40, 61), (90, 33), (7, 9)])
def test_pixels_are_those_of_the_evaluation_transform(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert torch.equal(eval_pixels(pixels, EvalTransform(24)), eval_image(png(pixels), EvalTransform(24)))


def test_a_strip_is_refused() -> None:
    with pytest.raises(BadSample, match="too many pixels"):
        eval_pixels(np.zeros((1, 4000, 3), np.uint8), EvalTransform(224))


def sharded(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Path:
    """The shards that tools/shard_images.py makes of a folder."""
    out = folder.parent / "shards"
    monkeypatch.setattr("sys.argv", ["shard_images.py", str(folder), "--out", str(out), "--processes", "1", *words])
    shard_images.main()
    return out


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((8, 8, 3), 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{name}{number}.png")


@pytest.mark.parametrize("caption", ["random", "all"])
def test_shards_of_labelled_images_have_their_classes_as_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caption: str
) -> None:
    write_classes(tmp_path / "pets" / "train", {"cat": 5, "guinea_pig": 3})
    write_classes(tmp_path / "pets" / "test", {"cat": 1})
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}.\n" + ("the big {}.\n" if caption == "all" else ""))
    (tmp_path / "pets" / "train" / "stray.jpg").write_bytes(b"")
    out = sharded(tmp_path / "pets", monkeypatch, "--templates", str(templates))
    skipped = json.loads((out / "train" / "skipped.jsonl").read_text())
    assert skipped == {"file": "stray.jpg", "reason": "outside of the classes' folders"}
    found = open_labelled(out)
    assert found.train is not None
    assert sorted(found.train.labels) == [0] * 5 + [1] * 3
    assert found.classes == ("cat", "guinea_pig")
    assert found.train.labels.tolist() != sorted(found.train.labels.tolist())  # mixed
    cfg = Data(caption=caption)
    catalog = Catalog.open([str(out / "train")])
    loader = open_loader(catalog, OrderKey(0, 8, 1, 0), Lengths(), cfg, views=[image_view(cfg, 8)], rank=0, world=1)
    batch = loader.next()
    loader.close()
    groups = {tuple(row) for row in batch.group_id.view(8, -1).tolist()}
    assert len(groups) == 2  # the images of a class have the same captions
    texts = {"a cat.", "a guinea pig.", *(["the big cat.", "the big guinea pig."] if caption == "all" else [])}
    assert {tuple(row) for row in batch.tokens.view(-1, 2).tolist()} == set(map(tuple, Lengths()([*texts]).tolist()))
    before = {path.name: path.read_bytes() for path in (out / "train").glob("*.tar")}
    sharded(tmp_path / "pets", monkeypatch, "--templates", str(templates))
    assert before == {path.name: path.read_bytes() for path in (out / "train").glob("*.tar")}


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ({"cat": 2, "dog": 1}, "dog: a class with one picture; add some, or remove the folder"),
        ({"cat": 2, "dog": 0}, "dog: a class without pictures; add some, or remove the folder"),
        ({}, "no folders with pictures"),
        (
            {"train": 1},
            "holds train, but no test or val beside it; tools/shard_images.py --unlabelled takes",
        ),
        (None, "pets: no such folder; expected folders DIR/CLASS"),
    ],
)
def test_folders_of_which_no_shards_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[str, int] | None, told: str
) -> None:
    if counts is not None:
        (tmp_path / "pets").mkdir()
        write_classes(tmp_path / "pets", counts)
    with pytest.raises(UserError, match=told):
        sharded(tmp_path / "pets", monkeypatch)


def numbers(out: Path) -> list[int]:
    """The .cls of all samples."""
    reader = Reader(Catalog.open([str(out)]))
    found = [int(reader.sample(row).read("cls") or b"-1") for row in range(len(reader.catalog))]
    reader.close()
    return found


def test_shards_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = sharded(cifar10(tmp_path), monkeypatch)
    data = open_labelled(out)
    check(data)
    assert data.train is not None
    assert numbers(out / "train") == data.train.labels.tolist()
    assert numbers(out / "train") != sorted(numbers(out / "train"))  # mixed
    reader = Reader(Catalog.open([str(out / "test")]))
    assert sorted({reader.sample(row).captions()[0] for row in range(6)}) == [f"a photo of a {n}." for n in NAMES]
    reader.close()


@pytest.mark.parametrize("words", [[], ["--unlabelled"]])
def test_shards_of_any_folder_hold_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    root = tmp_path / "holidays"
    for row, pixels in enumerate(pictures(9, 0)):
        place = root / ("2019/coast" if words and row % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{row}.png").write_bytes(png(pixels))
    (root / "broken.jpg").write_bytes(b"no picture")
    out = sharded(root, monkeypatch, *words)
    said = capsys.readouterr().out
    assert f"{out}: 9 pictures, 1 shards" in said
    assert "no captions: for objectives that need no text" in said
    assert "1  not a picture" in said
    reader = Reader(Catalog.open([str(out)]))
    found = {decode_pixels(reader.sample(row).image()).tobytes() for row in range(9)}
    assert found == {pixels.tobytes() for pixels in pictures(9, 0)}
    assert set(reader.catalog.table(0).kinds) == {"png", "json"}
    assert not {"caption", "captions", "class"} & set(reader.sample(0).metadata())
    reader.close()
    before = (out / "00000.tar").read_bytes()
    sharded(root, monkeypatch, *words)
    assert (out / "00000.tar").read_bytes() == before
    cfg = Data()
    loader = open_loader(
        Catalog.open([str(out)]),
        OrderKey(0, 8, 1, 0),
        None,
        cfg,
        views=[image_view(cfg, 8)],
        rank=0,
        world=1,
        images_only=True,
    )
    batch = loader.next()
    loader.close()
    assert batch.valid["image"].all()
    assert batch.tokens.shape == (8, 0)


@pytest.mark.parametrize(
    ("files", "words", "told"),
    [
        ([], ["--unlabelled"], "holidays: no pictures in it"),
        (["a.png", "b.png"], ["--classes", "names.txt"], "--classes: .*holidays has no classes"),
        (["a.png", "b.png"], ["--templates", "a {}."], "--templates: .*holidays has no classes"),
        (["cat/a.png", "dog/b.png"], ["--unlabelled", "--templates", "a {}."], "--templates: .*has no classes"),
        (["cat\udcff/a.png", "cat\udcff/b.png"], [], r"the folder 'cat\\udcff' has a name that is not UTF-8"),
    ],
)
def test_images_that_cannot_be_sharded_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], words: list[str], told: str
) -> None:
    root = tmp_path / "holidays"
    root.mkdir()
    for name in files:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(png(pictures(1, 0)[0]))
    with pytest.raises(UserError, match=told):
        sharded(root, monkeypatch, *words)
