"""The shard index: every member's place, freshness, and shards that are not what they should be."""

from __future__ import annotations

import io
import os
import re
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipdist.data.index import (
    INDEX_VERSION,
    MOST_KINDS,
    MOST_PLACES,
    ShardIndex,
    check_fresh,
    index_from_bytes,
    index_from_members,
    index_path,
    index_to_bytes,
    load_index,
    scan_shard,
    scan_whole_samples,
    write_index,
)
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
    data = Path(index.tar).read_bytes()
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


TWICE = "the key 'a' occurs twice"
APART = "the members of {} samples ('a' is the first) do not stand together, as those of a shard must; write it sorted"


@pytest.mark.parametrize(
    ("names", "text", "whole"),
    [
        (["a.jpg", "a.jpg", "b.jpg", "b.txt"], TWICE, ["b"]),
        (["a.jpg", "a.JPG"], TWICE, []),
        (["a.jpg", "b.jpg", "a.jpg", "b.txt"], TWICE, []),
        (["a.jpg", "b.jpg", "b.txt", "a.txt", "c.jpg"], APART.format(1), ["b", "c"]),
        (["a.jpg", "b.jpg", "c.jpg", "a.txt", "b.txt", "c.txt"], APART.format(3), []),
    ],
)
def test_samples_that_are_torn_are_refused_and_not_salvaged(tmp_path, names, text: str, whole: list[str]) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=re.escape(f"{path}: {text}")):
        scan_shard(path)
    assert scan_whole_samples(path)[0].keys.tolist() == whole


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
    return replace(index, columns={"width": np.arange(len(index))})


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


def header(
    name: str, size: bytes | int = 0, type: bytes = b"0", data: bytes = b"", magic: bytes = b"ustar\x0000"
) -> bytes:
    """A tar header made by hand, with `data` behind it; a size in bytes goes into the field as it is."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    block[0:100] = name.encode("utf-8", "surrogateescape").ljust(100, b"\0")
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = field
    block[136:148] = b"00000000000\0"
    block[156:157] = type
    block[257:265] = magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % 512)


def base256(value: int) -> bytes:
    """A size as GNU tar writes what does not fit in octal digits."""
    return (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)


def pax(**records: str) -> bytes:
    """An extended header for the next member."""
    data = b""
    for name, value in records.items():
        body = f" {name.replace('__', '.')}={value}\n".encode("utf-8", "surrogateescape")
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        data += str(length).encode() + body
    return header("pax", len(data), b"x", data)


GOOD = header("good.jpg", 3, data=b"jpg") + header("good.txt", 3, data=b"txt")
NEXT = header("next.jpg", 4, data=b"next")
END = bytes(1024)


def hostile(tmp_path: Path, *blocks: bytes) -> ShardIndex | str:
    """The index of a tar of GOOD, the blocks, NEXT; or what is said against it."""
    path = tmp_path / "evil.tar"
    path.write_bytes(b"".join([GOOD, *blocks, NEXT, END]))
    tracemalloc.start()
    try:
        index, damage = scan_whole_samples(path)
        assert [p.name for p in tmp_path.iterdir()] == ["evil.tar"]
        assert (index.offset + index.size <= path.stat().st_size).all()
        written = index_from_bytes(index_to_bytes(index), path)  # what is found can be kept, too
        assert written is not None
        assert written.keys.tolist() == index.keys.tolist()
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
        return damage or index
    except UserError as error:
        return str(error)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("blocks", "keys"),
    [
        ([header("../../up.jpg", 1, data=b"x")], ["../../up"]),  # names are labels: nothing is written by them
        ([header("/etc/passwd.jpg", 1, data=b"x")], ["/etc/passwd"]),
        ([header("run.pyd", 1, data=b"x"), header("run.pkl", 1, data=b"x"), header("run.pth", 1, data=b"x")], ["run"]),
        ([header("a\nb.jpg", 1, data=b"x")], ["a\nb"]),
        ([header("\udcff\udcfe.jpg", 1, data=b"x")], ["\udcff\udcfe"]),
        ([header("link.jpg", 0, b"2"), header("hard.jpg", 0, b"1")], []),
        ([header("char.jpg", 0, b"3"), header("block.jpg", 0, b"4"), header("fifo.jpg", 0, b"6")], []),
        ([header("sparse.jpg", 0, b"S", magic=b"ustar  \0")], []),
        (
            [pax(GNU__sparse__major="0", GNU__sparse__size="9", GNU__sparse__map="0,1"), header("s.jpg", 1, data=b"x")],
            [],
        ),
        ([pax(path="../other.jpg"), header("named.jpg", 1, data=b"x")], ["../other"]),
        ([pax(path="nul\0.jpg"), header("named.jpg", 1, data=b"x")], []),
        ([pax(size="2"), header("short.jpg", 0, data=b"xy")], ["short"]),
        ([header("big.jpg", base256(2), data=b"xy")], ["big"]),
    ],
    ids=["up", "absolute", "pickles", "newline", "bytes", "links", "devices", "sparse", "pax sparse", "path", "nul"]
    + ["size", "base-256"],
)
def test_odd_members_are_taken_as_data_or_passed_over(tmp_path: Path, blocks: list[bytes], keys: list[str]) -> None:
    index = hostile(tmp_path, *blocks)
    assert isinstance(index, ShardIndex)
    assert index.keys.tolist() == ["good", *keys, "next"]
    assert contents(index)["next", "jpg"] == b"next"


@pytest.mark.parametrize(
    "blocks",
    [
        [header("a.jpg", base256(1 << 62))],
        [header("a.jpg", base256(1 << 80))],
        [header("a.jpg", base256(-512))],
        [header("a.jpg", base256(-(1 << 60)))],
        [header("a.jpg", b"notoctal\0\0\0\0")],
        [header("a.jpg", 100_000)],
        [pax(size="-1024"), header("a.jpg", 1, data=b"x")],
        [pax(size="9" * 30), header("a.jpg", 1, data=b"x")],
        [pax(size="99999"), header("a.jpg", 1, data=b"x")],
        [pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="a.jpg"), header("a.jpg", 1, data=b"x")],
        [pax(path="x" * 5000 + ".jpg"), header("a.jpg", 1, data=b"x")],
        [header("pax", 20, b"x", b"0 path=zero-length\n\n"), header("a.jpg", 1, data=b"x")],
        [header("pax", 60_000, b"x", b"9" * 60_000), header("a.jpg", 1, data=b"x")],
        [header("pax", base256(1 << 40), b"x")],
        [header("pax", base256(-512), b"x")],
        [header("././@LongLink", base256(1 << 40), b"L")],
        [header("././@LongLink", base256(-512), b"L")],
        [header("././@LongLink", 1 << 30, b"L", b"name.jpg")],
        [header("././@LongLink", 2, b"L", b"a\0")] * 3000,
        [header("good.jpg", 1, data=b"x")],
        [header("x.jpg", 1, data=b"x"), header("good.json", 2, data=b"{}")],
        [header(f"k.{number}", 0) for number in range(10_000)],
    ],
    ids=["huge", "over 64 bits", "negative", "very negative", "not octal", "past the end", "pax negative", "pax huge"]
    + [
        "pax past the end",
        "pax sparse map",
        "long name",
        "pax length 0",
        "pax digits",
        "pax bomb",
        "pax negative length",
    ]
    + ["long link bomb", "long link negative", "long link cut off", "chain of long links", "key twice", "key apart"]
    + ["10000 kinds"],
)
def test_hostile_headers_are_refused(tmp_path: Path, blocks: list[bytes]) -> None:
    damage = hostile(tmp_path, *blocks)
    assert isinstance(damage, str)
    assert damage.startswith(str(tmp_path / "evil.tar"))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar"):
        with pytest.raises(UserError, match=f"{name}: not a file"):
            scan_shard(tmp_path / name)


def test_many_samples_of_many_kinds_are_no_shard(tmp_path: Path) -> None:
    members = {"k": {str(kind): (0, 0) for kind in range(MOST_KINDS)}}
    members |= {str(row): {"0": (0, 0)} for row in range(MOST_PLACES // MOST_KINDS)}
    with pytest.raises(UserError, match=r"0\.tar: .*too large for a shard"):
        index_from_members("0.tar", members)


def test_whole_samples_before_a_damage(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "0.tar", {"a.jpg": b"A", "a.txt": b"t", "b.jpg": b"B", "c.jpg": b"C" * 700})
    path.write_bytes(path.read_bytes()[: 4 * 1024 - 100])  # in the data of c
    index, damage = scan_whole_samples(path)
    assert index.keys.tolist() == ["a", "b"] or index.keys.tolist() == ["a"]
    assert f"{path}: not a tar file, or cut off" in damage
    assert index.tar_bytes == path.stat().st_size
    assert scan_whole_samples(make_tar(tmp_path / "1.tar", MEMBERS))[1] == ""


def test_digest_sees_the_samples_and_not_the_place(tmp_path: Path) -> None:
    one = scan_shard(make_tar(tmp_path / "one.tar", MEMBERS))
    two = scan_shard(make_tar(tmp_path / "two.tar", MEMBERS))
    assert len(one.digest()) == 16
    assert one.digest() == two.digest() == replace(two, columns={"x": np.zeros(3)}, tar_mtime_ns=1).digest()
    others = [
        one.select(np.array([0, 1])),
        one.select(np.array([1, 0, 2])),
        replace(one, size=one.size + 1),
        replace(one, kinds=("jpeg", *one.kinds[1:])),
    ]
    assert len({index.digest() for index in (one, *others)}) == 5


def test_select_takes_rows_of_everything(tmp_path: Path) -> None:
    index = scan_shard(make_tar(tmp_path / "0.tar", MEMBERS))
    index = replace(index, crc=np.arange(15, dtype=np.uint32).reshape(3, 5), columns={"width": np.array([7, 8, 9])})
    part = index.select(np.array([False, True, True]))
    assert part.keys.tolist() == ["b", "d/c"]
    assert part.crc is not None
    assert part.crc.tolist() == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert part.columns["width"].tolist() == [8, 9]
    assert contents(part) == {key: data for key, data in contents(index).items() if key[0] != "a"}
    assert (len(part), part.tar, part.tar_bytes) == (2, index.tar, index.tar_bytes)


def test_checksums_are_kept_with_an_index_and_by_a_copy(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", MEMBERS)
    index = scan_shard(tar)
    write_index(replace(index, crc=np.arange(15, dtype=np.uint32).reshape(3, 5)))
    os.utime(tar, ns=(1, 1))
    read = load_index(tar)
    assert read.crc is not None
    assert read.crc.dtype == np.uint32
    assert read.crc.tolist() == np.arange(15).reshape(3, 5).tolist()


def test_an_index_kept_elsewhere_is_compared_with_its_shard(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "0.tar", {"a.jpg": b"A", "b.jpg": b"B"})
    index = scan_shard(tar)
    check_fresh(index)
    os.utime(tar, ns=(1, 1))
    check_fresh(index)  # a copy
    check_fresh(index.select(np.array([1])))
    make_tar(tar, {"a.jpg": b"A", "z.jpg": b"Z"})
    os.utime(tar, ns=(2, 2))
    with pytest.raises(UserError, match="has changed since it was indexed"):
        check_fresh(index)
    tar.unlink()
    with pytest.raises(UserError, match="no such shard"):
        check_fresh(index)
