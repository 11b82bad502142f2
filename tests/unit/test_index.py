"""The shard index: every member's place, freshness, and shards that are not what they should be."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipdist.data.index import INDEX_VERSION, ShardIndex, index_path, load_index, scan_shard, write_index
from clipdist.errors import UserError


def make_tar(path: Path, members: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def contents(index: ShardIndex) -> dict[tuple[str, str], bytes]:
    """{(key, kind): bytes}, read at the places that the index gives."""
    data = index.tar.read_bytes()
    return {
        (str(index.keys[row]), kind): data[index.offset[row, column] :][: index.size[row, column]]
        for row in range(len(index))
        for column, kind in enumerate(index.kinds)
        if index.offset[row, column] >= 0
    }


MEMBERS = {
    "a.jpg": b"A" * 700,
    "a.txt": b"",
    "a.json": b"{}",
    "b.jpg": b"B",
    "b.seg.PNG": b"p" * 512,
    "d/c.1.jpg": b"C",
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_finds_every_member(tmp_path: Path, format: int) -> None:
    long = "x" * 150  # beyond the header's field: needs the extensions of GNU and PAX, or USTAR's prefix
    name = f"{long[:90]}/{long[:60]}.jpg"
    index = scan_shard(make_tar(tmp_path / "0.tar", {**MEMBERS, name: b"L" * 513}, format))
    assert index.keys.tolist() == ["a", "b", "d/c", name[:-4]]
    assert index.kinds == ("jpg", "txt", "json", "seg.png", "1.jpg")
    assert index.offset.dtype == index.size.dtype == np.int64
    assert index.offset.shape == index.size.shape == (4, 5)
    assert contents(index) == {
        ("a", "jpg"): b"A" * 700,
        ("a", "txt"): b"",
        ("a", "json"): b"{}",
        ("b", "jpg"): b"B",
        ("b", "seg.png"): b"p" * 512,
        ("d/c", "1.jpg"): b"C",
        (name[:-4], "jpg"): b"L" * 513,
    }
    assert (index.size[index.offset < 0] == 0).all()
    assert index.columns == {}


def test_members_that_are_no_plain_file_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("dir.x", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
        for name in ("._a.jpg", ".hidden", "README", "a.jpg"):
            archive.addfile(tarfile.TarInfo(name))
    assert scan_shard(path).keys.tolist() == ["a"]


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    index = load_index(make_tar(tmp_path / "0.tar", {}))
    assert len(index) == 0
    assert index.offset.shape == (0, 0)
    assert len(load_index(index.tar)) == 0


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg", "a.txt"], ["a.jpg", "a.jpg"], ["a.jpg", "a.JPG"]], ids=["apart", "same", "case"]
)
def test_a_key_that_occurs_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"0\.tar: the key 'a' occurs twice"):
        scan_shard(path)


def test_any_cut_is_noticed(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", {"a.jpg": b"A" * 700, "b.jpg": b"B"}).read_bytes()
    end = 512 + 1024 + 512 + 512  # of the last member; the zeros of the end mark follow
    for length in (0, 1, 511, 512, 600, 512 + 700, 1536, 1600, 2048, 2049, end, end + 511):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.tar: not a tar file, or cut off"):
            scan_shard(cut)
    cut.write_bytes(whole[: end + 512])
    assert len(scan_shard(cut)) == 2


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_text("no tar at all\n" * 100)
    good = make_tar(tmp_path / "good.tar", {"a.jpg": b"A"}).read_bytes()
    (tmp_path / "garbage.tar").write_bytes(good[:1024] + b"\x01garbage" * 200)
    for name in ("text.tar", "garbage.tar"):
        with pytest.raises(UserError, match=name):
            load_index(tmp_path / name)
    with pytest.raises(UserError, match="no such shard"):
        load_index(tmp_path / "absent.tar")
    with pytest.raises(UserError, match="no such shard"):
        scan_shard(tmp_path / "absent.tar")


def stored(tar: Path) -> ShardIndex:
    """An index that a scan would not give: shows where load_index took it from."""
    index = scan_shard(tar)
    return ShardIndex(tar, index.keys, index.kinds, index.offset, index.size, {"width": np.arange(len(index))})


def test_a_fresh_index_is_used_and_comes_back_as_written(tmp_path: Path) -> None:
    written = stored(make_tar(tmp_path / "00000.tar", MEMBERS))
    write_index(written)
    assert index_path(written.tar) == tmp_path / "00000.tar.idx.npz"
    read = load_index(written.tar)
    assert read.tar == written.tar
    assert read.kinds == written.kinds
    for name in ("keys", "offset", "size"):
        assert np.array_equal(getattr(read, name), getattr(written, name))
    assert read.columns["width"].tolist() == [0, 1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.tar", "00000.tar.idx.npz"]


def test_a_changed_shard_is_scanned_again_and_remembered(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", {"a.jpg": b"A", "b.jpg": b"B"})
    write_index(stored(tar))
    make_tar(tar, {"a.jpg": b"A", "z.jpg": b"Z"})  # as large as before
    os.utime(tar, ns=(1, 1))
    assert load_index(tar).keys.tolist() == ["a", "z"]
    assert load_index(tar).columns == {}
    with np.load(index_path(tar), allow_pickle=False) as file:
        assert file["keys"].tolist() == ["a", "z"]
        assert int(file["version"]) == INDEX_VERSION


def test_a_copy_keeps_the_columns(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", MEMBERS)
    write_index(stored(tar))
    os.utime(tar, ns=(1, 1))  # what a copy does
    assert load_index(tar).columns["width"].tolist() == [0, 1, 2]
    assert load_index(tar).columns["width"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("damage", ["garbage", "cut", "pickle", "version", "shape"])
def test_a_damaged_index_file_is_replaced(tmp_path: Path, damage: str) -> None:
    tar = make_tar(tmp_path / "0.tar", MEMBERS)
    write_index(stored(tar))
    path = index_path(tar)
    with np.load(path) as file:
        arrays = dict(file)
    if damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        if damage == "pickle":
            arrays["keys"] = np.array(["a", "b", None], dtype=object)
        elif damage == "version":
            arrays["version"] = np.int64(INDEX_VERSION + 1)
        else:
            arrays["offset"] = arrays["offset"][:1]
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    index = load_index(tar)
    assert index.keys.tolist() == ["a", "b", "d/c"]
    assert index.columns == {}
    with np.load(path, allow_pickle=False) as file:
        assert file["offset"].shape == (3, 5)


def test_a_folder_that_cannot_be_written_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = make_tar(tmp_path / "0.tar", MEMBERS)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(load_index(tar)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["0.tar"]
