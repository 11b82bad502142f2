"""Division of images: by their bytes, every class in both parts, nothing unusable, no copies across, bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pairs import draw_pair, write_pairs
from PIL import Image

from clipdist.data.catalog import Catalog
from clipdist.data.reader import Reader
from clipdist.datasets.hold_out import HELD_OUT, TRAIN, divide
from clipdist.errors import UserError


def images_of(index: Path) -> list[bytes]:
    reader = Reader(Catalog.open([str(index)]))
    return [reader.sample(number).image() for number in range(len(reader.catalog))]


def labelled(folder: Path, counts: Mapping[str, int]) -> Path:
    """Shards whose captions name the class."""
    names = [name for name, count in counts.items() for _ in range(count)]
    more: dict[int, dict[str, Any]] = {
        number: {"class": name, "captions": [f"a photo of a {name}."]} for number, name in enumerate(names)
    }
    return write_pairs(folder, len(names), more=more)


def test_the_parts_share_no_image_and_leave_out_what_cannot_be_used(tmp_path: Path) -> None:
    copy = draw_pair(3)[0]
    shards = write_pairs(tmp_path / "shards", 100, bad={7: b"junk", 50: copy, 90: copy}, without_caption=[8])
    parts = divide(Catalog.open([str(shards)]), tmp_path)
    train, held = images_of(tmp_path / TRAIN), images_of(tmp_path / HELD_OUT)
    assert not set(train) & set(held)
    assert {*train, *held} == {draw_pair(number)[0] for number in range(100)} - {
        draw_pair(n)[0] for n in (7, 8, 50, 90)
    }
    assert (parts.train, parts.held_out, parts.images) == (len(train), len(held), 96)
    assert len(set(held)) == 10
    assert sum(parts.unusable.values()) == 2
    assert (parts.classes, parts.captions, parts.pixels) == ([], (2, 2), 32)


def test_the_division_depends_on_the_images_alone(tmp_path: Path) -> None:
    for name, per_shard in (("a", 20), ("b", 7)):
        (tmp_path / name).mkdir()
        shards = write_pairs(tmp_path / name / "shards", 60, per_shard=per_shard)
        divide(Catalog.open([str(shards)]), tmp_path / name)
    assert images_of(tmp_path / "a" / HELD_OUT) == images_of(tmp_path / "b" / HELD_OUT)


def test_every_class_is_in_both_parts(tmp_path: Path) -> None:
    shards = labelled(tmp_path / "shards", {"cat": 40, "dog": 3, "rare one": 2})
    parts = divide(Catalog.open([str(shards)]), tmp_path)
    assert parts.classes == ["cat", "dog", "rare one"]
    for name in (TRAIN, HELD_OUT):
        reader = Reader(Catalog.open([str(tmp_path / name)]))
        found = {json.loads(reader.sample(n).read("json") or b"")["class"] for n in range(len(reader.catalog))}
        assert found == {"cat", "dog", "rare one"}
    assert parts.held_out == 4 + 1 + 1


def test_a_given_part_is_held_out_as_it_is(tmp_path: Path) -> None:
    given = [draw_pair(number)[0] for number in (0, 1)]
    train = write_pairs(tmp_path / "train", 40)
    val = write_pairs(tmp_path / "val", 5, bad={2: given[0]})  # its 0 and 1 are the first of train, too
    parts = divide(Catalog.open([str(train), str(val)]), tmp_path)
    assert len(images_of(tmp_path / HELD_OUT)) == parts.held_out == 5
    assert parts.in_both == 4
    assert not set(images_of(tmp_path / TRAIN)) & set(images_of(tmp_path / HELD_OUT))
    assert parts.train == 36


@pytest.mark.parametrize(
    ("counts", "told"),
    [({"cat": 30, "dog": 1}, "class dog: one usable image"), (None, "12 usable images: too few")],
)
def test_too_few_images_are_told(tmp_path: Path, counts: dict[str, int] | None, told: str) -> None:
    shards = labelled(tmp_path / "shards", counts) if counts else write_pairs(tmp_path / "shards", 12)
    with pytest.raises(UserError, match=told):
        divide(Catalog.open([str(shards)]), tmp_path)
    assert not list(tmp_path.glob("*.zip"))


def test_images_that_are_all_bad_are_told(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    shards = write_pairs(tmp_path / "shards", 3, bad=dict.fromkeys(range(3), file.getvalue()[:40]))
    with pytest.raises(UserError, match="none of 3 images can be used: "):
        divide(Catalog.open([str(shards)]), tmp_path)
