"""The catalog: what names which shards, which sample is where, and what the fingerprint sees."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipdist.data.catalog import Catalog
from clipdist.data.shards import Sample, write_shard
from clipdist.errors import UserError


def make_shards(folder: Path, counts: list[int], text: bytes = b"t") -> Path:
    folder.mkdir(parents=True)
    for shard, count in enumerate(counts):
        samples = (Sample(f"{shard}-{row}", {"jpg": b"j" * row, "txt": text}) for row in range(count))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


def names(catalog: Catalog) -> list[str]:
    return [f"{shard.tar.parent.name}/{shard.tar.name}" for shard in catalog.shards]


def test_folders_patterns_globs_and_tars_in_the_order_given(tmp_path: Path) -> None:
    a, b = make_shards(tmp_path / "a", [1, 1, 1]), make_shards(tmp_path / "b", [1, 1])
    folder = ["a/00000.tar", "a/00001.tar", "a/00002.tar"]
    assert names(Catalog.open([str(a)])) == folder
    assert names(Catalog.open([f"{a}/*.tar"])) == folder
    assert names(Catalog.open([f"{a}/{{00000..00002}}.tar"])) == folder
    assert names(Catalog.open([f"{a}/00001.tar"])) == folder[1:2]
    assert names(Catalog.open([f"{a}/{{00002,00000}}.tar"])) == [folder[2], folder[0]]
    assert names(Catalog.open([str(b), f"{a}/0000[12].tar"])) == ["b/00000.tar", "b/00001.tar", *folder[1:]]
    assert names(Catalog.open([f"{tmp_path}/{{b,a}}"])) == ["b/00000.tar", "b/00001.tar", *folder]


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "set [v1] {x,y}", [2])
    assert len(Catalog.open([str(folder)])) == 2


def test_locate_covers_every_sample_once(tmp_path: Path) -> None:
    catalog = Catalog.open([str(make_shards(tmp_path / "a", [3, 0, 2, 0, 1]))])
    assert catalog.starts.dtype == np.int64
    assert catalog.starts.tolist() == [0, 3, 3, 5, 5, 6]
    assert len(catalog) == 6
    assert [catalog.locate(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (4, 0)]
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            catalog.locate(outside)


def test_fingerprint_stays_with_a_copy_and_changes_with_the_samples(tmp_path: Path) -> None:
    first = make_shards(tmp_path / "a", [2, 2])
    copy = tmp_path / "elsewhere"
    shutil.copytree(first, copy)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    want = Catalog.open([str(first)]).fingerprint()
    assert Catalog.open([str(copy)]).fingerprint() == want
    for file in copy.glob("*.npz"):
        file.unlink()
    assert Catalog.open([str(copy)]).fingerprint() == want
    others = [
        [str(make_shards(tmp_path / "more", [2, 3]))],
        [str(make_shards(tmp_path / "longer", [2, 2], text=b"tt"))],
        [f"{first}/{{00001,00000}}.tar"],
        [f"{first}/00000.tar"],
    ]
    found = {Catalog.open(sources).fingerprint() for sources in others}
    assert len(found | {want}) == 5


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere", "data.val: no shards match .*nowhere; make them with"),
        ("a/x*.tar", "no shards match"),
        ("a/{00000..00003}.tar", r"no shards match .*\(.*00002.tar is missing\)"),
        ("a/{00000..", "no shards match|not a brace pattern"),
        ("empty", r"empty: the folder holds no \*.tar; make them"),
        ("", r"folders a do: name one of them"),
        ("a/0000?.txt", "no shards match"),
    ],
)
def test_what_matches_nothing_is_told(tmp_path: Path, source: str, text: str) -> None:
    make_shards(tmp_path / "a", [1, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=text):
        Catalog.open([str(tmp_path / source)], "data.val")


def test_no_sources_and_shards_named_twice(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "a", [1])
    with pytest.raises(UserError, match=r"data\.train: no shards are named"):
        Catalog.open([])
    with pytest.raises(UserError, match="named twice"):
        Catalog.open([str(folder), f"{folder}/*.tar"])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "a", [1, 1])
    (folder / "00001.tar").write_bytes(b"short")
    with pytest.raises(UserError, match=r"00001\.tar"):
        Catalog.open([str(folder)])
