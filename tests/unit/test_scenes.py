"""The drawn data set: determinism, layouts that the readers accept, and sentences that are true of their pictures."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist.datasets import scenes
from clipdist.datasets.flickr8k import Defects, read_source
from clipdist.datasets.labelled import open_labelled
from clipdist.datasets.scenes import COLOURS, SHAPES, Scene, Thing, render_scene, sample_scene, write_captions

COUNTS = {"train": 12, "dev": 3, "test": 5}
TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_scenes.py"


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    small = ["--train", "4", "--dev", "2", "--test", "2", "--labelled-train", "20", "--labelled-test", "10"]
    command = [sys.executable, str(TOOL), "--out", str(folder), *small, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def drawn(number: int, seed: int = 0) -> tuple[Scene, Image.Image, list[str]]:
    rng = np.random.default_rng((seed, number))
    scene = sample_scene(rng)
    return scene, render_scene(scene, rng), write_captions(scene, rng)


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed, processes in (("one", 3, 1), ("two", 3, 2), ("other", 4, 1)):
        scenes.write_scenes(tmp_path / name, seed, COUNTS, processes)
        scenes.write_labelled(tmp_path / name, seed, 20, 10, processes)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 20 + 4 + 30  # pictures, captions and lists, labelled pictures
    assert one == two
    pictures = [name for name in one if name.endswith(".jpg")]
    assert all(one[name] != other[name] for name in pictures)
    assert len({one[name] for name in pictures}) == 20


def test_the_flickr8k_reader_finds_nothing_wrong(tmp_path: Path) -> None:
    scenes.write_scenes(tmp_path, 0, COUNTS)
    defects = Defects()
    source = read_source([str(tmp_path)], defects)
    assert source.layout == "original"
    assert source.split is not None
    in_split = {split: sum(value == split for value in source.split.values()) for split in ("train", "val", "test")}
    assert in_split == {"train": 12, "val": 3, "test": 5}
    assert all(len(picture.captions) == 5 for picture in source.images.values())
    assert defects.report()["skipped"] == {}
    with Image.open(tmp_path / "Flicker8k_Dataset" / "scene_00019.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))


def test_progress_adds_up_to_all_pictures(tmp_path: Path) -> None:
    told: list[int] = []
    scenes.write_scenes(tmp_path, 0, {"train": 60, "dev": 1, "test": 1}, 1, told.append)
    assert sum(told) == 62
    assert len(told) > 1


def test_captions_name_every_thing() -> None:
    seen = set()
    for number in range(300):
        scene, _, captions = drawn(number)
        assert len(captions) == 5 == len(set(captions))
        for caption in captions:
            assert caption[0].isupper()
            assert caption.endswith(" .")
            for thing in scene.things:
                assert f"{thing.colour} {thing.shape}" in caption.lower()
                marks = {"plain": (), "striped": ("strip",), "dotted": ("dotted", "spotted", "dots")}[thing.texture]
                assert not marks or any(mark in caption for mark in marks)
        seen.add(scene.relation)
        said = sum(scene.background in caption.lower() for caption in captions)
        assert said >= 4
    assert seen == set(scenes.RELATIONS)


def test_counts_and_articles_are_grammatical() -> None:
    rng = np.random.default_rng(0)
    things = {
        Thing("cross", "red", "plain", "small", 3): "crosses",
        Thing("star", "blue", "plain", "small", 2): "stars",
    }
    for thing, plural in things.items():
        words = scenes._phrase(thing, rng).split()
        assert words[0] == {3: "three", 2: "two"}[thing.count]
        assert words[-1] == plural
    assert scenes._phrase(Thing("ring", "orange", "plain", "medium"), rng) == "an orange ring"
    assert scenes._phrase(Thing("ring", "red", "plain", "medium"), rng) == "a red ring"


def test_a_sentence_rarely_stands_on_two_pictures() -> None:
    owners: dict[str, set[int]] = {}
    for number in range(1000):
        rng = np.random.default_rng((0, number))
        for caption in write_captions(sample_scene(rng), rng):
            owners.setdefault(caption, set()).add(number)
    shared = sum(len(numbers) > 1 for numbers in owners.values())
    assert len(owners) > 4950
    assert shared < 10


@pytest.mark.parametrize(("relation", "axis"), [("left", 0), ("right", 0), ("above", 1), ("below", 1)])
def test_things_stand_where_the_sentence_says(relation: str, axis: int) -> None:
    things = (Thing("circle", "red", "plain", "large"), Thing("square", "blue", "plain", "small", 2))
    scene = Scene(things, relation, "white", checkered=False)
    for seed in range(5):
        pixels = np.asarray(render_scene(scene, np.random.default_rng(seed)), dtype=np.float64)
        first, second = (centre_of(pixels, COLOURS[thing.colour])[axis] for thing in things)
        assert (first < second) == (relation in ("left", "above"))
        assert abs(first - second) > 0.2 * scenes.SCENE_SIDE


def centre_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean (x, y) of the pixels that have nearly this colour."""
    y, x = np.nonzero(np.linalg.norm(pixels - np.asarray(colour), axis=2) < 60)
    assert len(x) > 50
    return float(x.mean()), float(y.mean())


def test_everything_lies_in_the_picture() -> None:
    for number in range(300):
        rng = np.random.default_rng((1, number))
        scene = sample_scene(rng)
        places = list(scenes._places(scene, rng))
        assert len(places) == sum(thing.count for thing in scene.things)
        for thing, (x, y) in places:
            radius = scenes.RADIUS["large" if scene.relation == "inside" else thing.size][1]
            assert radius - 0.02 <= min(x, y)
            assert max(x, y) <= 1.02 - radius


def test_colours_stand_out_from_what_is_behind_them() -> None:
    for number in range(300):
        scene, _, _ = drawn(number, seed=2)
        behind = scenes.BACKGROUNDS[scene.background]
        assert all(math.dist(COLOURS[thing.colour], behind) >= scenes.MIN_CONTRAST for thing in scene.things)
        assert len({thing.colour for thing in scene.things}) == len(scene.things)


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_circle(shape: str) -> None:
    outline = scenes._outlines(shape)[0]
    reach = np.linalg.norm(outline, axis=1)
    assert 0.9 < reach.max() <= 1.36
    assert np.ptp(outline, axis=0).max() > 1.5


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        scenes._outlines("blob")


def test_labelled_colours_by_class(tmp_path: Path) -> None:
    scenes.write_labelled(tmp_path, 0, 60, 20)
    data = open_labelled(tmp_path)
    assert data.classes == tuple(sorted(COLOURS))
    assert data.train is not None
    assert (len(data.train), data.train.read(0).shape) == (60, (32, 32, 3))
    assert [data.classes[label] for label in data.train.labels] == [name for name in sorted(COLOURS) for _ in range(6)]
    assert np.bincount(data.test.labels).tolist() == [2] * 10
    flat = {split.read(row).tobytes() for split in (data.train, data.test) for row in range(len(split))}
    assert len(flat) == 80


def test_the_tool_writes_once_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    first = make(tmp_path / "set", "--json")
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout.splitlines()[-1])["written"] is True
    before = digests(tmp_path / "set")
    again = make(tmp_path / "set", "--json")
    assert "nothing to do" in again.stdout
    assert json.loads(again.stdout.splitlines()[-1])["written"] is False

    stamp = tmp_path / "set" / "made.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "complete": False}))
    (tmp_path / "set" / "scenes" / "Flicker8k_Dataset" / "scene_99999.jpg").write_bytes(b"cut off")
    assert make(tmp_path / "set").returncode == 0
    assert digests(tmp_path / "set") == before
    assert make(tmp_path / "set", "--seed", "1").returncode == 0
    assert digests(tmp_path / "set") != before


def test_the_tool_leaves_other_peoples_pictures_alone(tmp_path: Path) -> None:
    picture = tmp_path / "scenes" / "holiday.jpg"
    picture.parent.mkdir()
    picture.write_bytes(b"precious")
    refused = make(tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1
    assert picture.read_bytes() == b"precious"


@pytest.mark.parametrize("options", [("--train", "0"), ("--seed", "-1"), ("--processes", "-2"), ("--workers", "2")])
def test_the_tool_refuses_nonsense(tmp_path: Path, options: tuple[str, str]) -> None:
    refused = make(tmp_path, *options)
    assert refused.returncode == 2
    assert options[0] in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
