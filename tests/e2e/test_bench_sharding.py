"""tools/bench/sharding.py: its answer for both tools, and that it refuses what cannot be measured."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Five pictures that are a folder of pairs and Flickr8k's original layout at once."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(5):
        file = io.BytesIO()
        Image.new("RGB", (20 + number, 20)).save(file, "JPEG")
        (folder / f"{number}_a.jpg").write_bytes(file.getvalue())
        (folder / f"{number}_a.txt").write_text(f"picture {number}")
    (folder / "Flickr8k.token.txt").write_text("".join(f"{n}_a.jpg#0\tpicture {n}\n" for n in range(5)))
    for split, numbers in {"train": range(3), "dev": [3], "test": [4]}.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{n}_a.jpg\n" for n in numbers))
    return folder


@pytest.mark.parametrize("tool", ["shard_pairs", "shard_flickr8k"])
def test_the_copy_has_the_shards_members(bench, tmp_path, source, tool, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    ended = bench(f"sharding --tool {tool} --processes 1 --repeats 2 --json", source)
    record = ended.record
    assert (record["tool"], record["samples"], record["members"], record["processes"]) == (tool, 5, 15, 1)
    assert len(record["sharded_s"]) == len(record["copied_s"]) == 2
    assert record["speed_percent"] > 0
    assert f"has {record['speed_percent']:.0f} % of the plain copy's speed" in ended.stdout
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SOURCE", "--repeats", 0], "--repeats 0: must be at least 1"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_input(refused, source, words, says):
    assert says in refused("sharding", *(str(source) if word == "SOURCE" else word for word in words))
