"""The index of many shards: what was written comes back, from any folder, and damage is told."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import Consolidated, make_part, write_parts
from clipdist.data.index import ShardIndex, load_index
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError


def make_shards(folder: Path, counts: list[int]) -> list[ShardIndex]:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        samples = (Sample(f"{shard}-{row}", {"jpg": b"j" * row, "txt": b"t"}, {"width": row}) for row in range(count))
        write_shard(folder / f"{shard}.tar", samples)
    return [load_index(folder / f"{shard}.tar") for shard in range(len(counts))]


def test_comes_back_as_written(tmp_path: Path) -> None:
    indices = make_shards(tmp_path, [3, 1, 2])
    write_parts(tmp_path / "all.index.zip", map(make_part, iter(indices)), "width >= 0")
    book = Consolidated(tmp_path / "all.index.zip")
    assert len(book) == 3
    assert book.rule == "width >= 0"
    assert book.counts.tolist() == [3, 1, 2]
    assert book.tars == [index.tar for index in indices]
    for number, index in enumerate(indices):
        read = book.load(number)
        assert read.tar == index.tar
        assert (read.kinds, read.tar_bytes, read.tar_mtime_ns) == (index.kinds, index.tar_bytes, index.tar_mtime_ns)
        for name in ("keys", "offset", "size", "crc"):
            assert np.array_equal(getattr(read, name), getattr(index, name))
        assert read.columns["width"].tolist() == index.columns["width"].tolist()
        assert book.digests[number].tobytes() == index.digest() == read.digest()


def test_names_below_its_folder_move_with_it(tmp_path: Path) -> None:
    below, beside = make_shards(tmp_path / "set" / "a", [2]), make_shards(tmp_path / "other", [1])
    remote = [replace(below[0], tar="https://host/x.tar"), replace(below[0], tar="s3://bucket/y.tar")]
    write_parts(tmp_path / "set" / "all.index.zip", map(make_part, below + beside + remote))
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "set", moved)
    tars = [f"{moved}/a/0.tar", f"{tmp_path}/other/0.tar", "https://host/x.tar", "s3://bucket/y.tar"]
    assert Consolidated(moved / "all.index.zip").tars == tars
    with open(moved / "all.index.zip", "rb") as file:
        assert Consolidated(file, "https://host/set/all.index.zip").tars[0] == "https://host/set/a/0.tar"


def test_a_catalog_of_it_equals_one_of_the_shards(tmp_path: Path) -> None:
    indices = make_shards(tmp_path, [3, 1])
    write_parts(tmp_path / "all.index.zip", map(make_part, indices))
    loose, book = Catalog.open([f"{tmp_path}/*.tar"]), Catalog.open([str(tmp_path / "all.index.zip")])
    assert book.fingerprint() == loose.fingerprint()
    assert book.starts.tolist() == [0, 3, 4]
    assert book.table(0).keys.tolist() == ["0-0", "0-1", "0-2"]
    write_parts(tmp_path / "some.index.zip", map(make_part, [indices[0].select(np.array([0, 2])), indices[1]]))
    some = Catalog.open([str(tmp_path / "some.index.zip")])
    assert some.fingerprint() != loose.fingerprint()
    assert some.table(0).keys.tolist() == ["0-0", "0-2"]


def test_a_shard_that_changed_is_told_when_it_is_read(tmp_path: Path) -> None:
    write_parts(tmp_path / "all.index.zip", map(make_part, make_shards(tmp_path, [3, 1])))
    make_shards(tmp_path, [2])
    catalog = Catalog.open([str(tmp_path / "all.index.zip")])
    assert len(catalog.table(1)) == 1
    with pytest.raises(UserError, match=r"0\.tar: has changed since it was indexed"):
        catalog.table(0)


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "all.index.zip"
    write_parts(path, map(make_part, make_shards(tmp_path, [1])))
    old = path.read_bytes()

    def broken():
        yield from make_shards(tmp_path, [2])
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_parts(path, map(make_part, broken()))
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.tar", "0.tar.idx.npz", "all.index.zip"]


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.index.zip"
    with pytest.raises(UserError, match="no such file"):
        Consolidated(path)
    with pytest.raises(UserError, match="cannot be read"):
        Consolidated(tmp_path)
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="not an index of shards, or cut off"):
        Consolidated(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("head.npz", b"no arrays")
    with pytest.raises(UserError, match="not an index of shards, or cut off"):
        Consolidated(path)
    write_parts(path, map(make_part, make_shards(tmp_path, [4])))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="cut off"):
        Consolidated(path)


def test_a_head_that_does_not_fit_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.index.zip"
    for head in (
        {"counts": np.array([1, 2])},
        {"counts": np.array([-1])},
        {"counts": np.array([0.5])},
        {"digests": np.zeros((1, 3), dtype=np.uint8)},
        {"names": np.array([7])},
        {"names": np.array([["a"]])},
    ):
        arrays = {
            "version": np.int64(1),
            "names": np.array(["a.tar"]),
            "counts": np.array([1]),
            "digests": np.zeros((1, 16), dtype=np.uint8),
            "rule": np.str_(""),
        }
        np.savez(tmp_path / "head.npz", **{**arrays, **head})
        with zipfile.ZipFile(path, "w") as file:
            file.write(tmp_path / "head.npz", "head.npz")
        with pytest.raises(UserError, match="not an index of shards"):
            Consolidated(path)


def test_a_part_that_is_damaged_is_told_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "all.index.zip"
    parts = [make_part(index) for index in make_shards(tmp_path, [3, 2, 1])]
    write_parts(path, [parts[0]._replace(data=b"garbage"), parts[1]._replace(samples=7), parts[2]])
    book = Consolidated(path)
    for number in (0, 1):
        with pytest.raises(UserError, match=rf"the part for .*{number}\.tar is damaged"):
            book.load(number)
    assert len(book.load(2)) == 1
