"""The catalog: what names which shards, which sample is where, and what the fingerprint sees."""

from __future__ import annotations

import gzip
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipdist.data import catalog as catalog_module
from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import make_part, write_parts
from clipdist.data.index import load_index
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import UserError

SHARD_PAIRS = r"make shards of it: python tools/shard_pairs\.py .*"


def make_shards(folder: Path, counts: list[int], text: bytes = b"t") -> Path:
    folder.mkdir(parents=True)
    for shard, count in enumerate(counts):
        samples = (Sample(f"{shard}-{row}", {"jpg": b"j" * row, "txt": text}) for row in range(count))
        write_shard(folder / f"{shard:05d}.tar", samples)
    return folder


def names(catalog: Catalog) -> list[str]:
    return ["/".join(Path(shard.tar).parts[-2:]) for shard in catalog.shards]


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
        ("", r"folders a, odd do: name one of them"),
        ("a/0000?.dat", "no shards match"),
        ("pairs.csv", f"data.val: .*pairs.csv: a CSV file, not shards; {SHARD_PAIRS}pairs.csv --out DIR"),
        ("*.parquet", f"b.parquet: a Parquet file, not shards; {SHARD_PAIRS}b.parquet --out DIR"),
        ("zip.zip", r"a zip archive, not shards; of Flickr8k's, make them: .*shard_flickr8k\.py .*/zip.zip --out DIR"),
        ("c.tar.gz", "c.tar.gz: compressed; shards are plain tars.*: unpack it first"),
        ("odd/renamed.tar", "renamed.tar: compressed; shards are plain tars"),
        ("captions.txt", f"a list of images and captions, .*{SHARD_PAIRS}captions.txt --images-root FOLDER --out DIR"),
        ("token.txt", "token.txt: a list of images and captions, not of shards"),
        ("pairs", rf"pairs: the folder holds no \*.tar; it holds images, not shards; {SHARD_PAIRS}pairs --out DIR"),
        ("pairs", r"; without captions: python tools/shard_images.py .*pairs --out DIR$"),
        (
            "cifar",
            r"it holds CIFAR's batches, not shards; make shards of it: python tools/shard_images.py .*/cifar --out",
        ),
        ("tables", f"it holds b.parquet, a Parquet file, not shards; {SHARD_PAIRS}tables/b.parquet"),
        ("https://host/a.csv", "https://host/a.csv: a CSV file, not shards"),
    ],
)
def test_what_matches_nothing_is_told(tmp_path: Path, source: str, text: str) -> None:
    make_shards(tmp_path / "a", [1, 1])
    for folder in ("empty", "pairs/more", "tables", "odd", "cifar"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (
        "pairs.csv",
        "b.parquet",
        "tables/b.parquet",
        "zip.zip",
        "c.tar.gz",
        "pairs/more/a.jpg",
        "cifar/data_batch_1",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "odd" / "renamed.tar").write_bytes(gzip.compress(b"of a tar"))
    (tmp_path / "captions.txt").write_text("image,caption\n1000268201_693b08cb0e.jpg,A child\n")
    (tmp_path / "token.txt").write_text("1000268201_693b08cb0e.jpg#0\tA child\n")
    source = source if source.startswith("https") else str(tmp_path / source)
    with pytest.raises(UserError, match=text):
        Catalog.open([source], "data.val")


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


def test_lists_and_consolidated_files_among_other_sources(tmp_path: Path) -> None:
    a, b = make_shards(tmp_path / "a", [1, 2]), make_shards(tmp_path / "b", [3, 4])
    write_parts(tmp_path / "b.index.zip", map(make_part, [load_index(b / "00001.tar"), load_index(b / "00000.tar")]))
    lines = ["# shards", "", "a/{00001,00000}.tar  # a remark", "b.index.zip"]
    for encoding in ("utf-16", "utf-8-sig", "utf-8"):  # as Windows writes text
        (tmp_path / "list.txt").write_text("\n".join(lines[2:] if encoding != "utf-8" else lines), encoding)
        catalog = Catalog.open([str(tmp_path / "list.txt")])
        assert names(catalog) == ["a/00001.tar", "a/00000.tar", "b/00001.tar", "b/00000.tar"]
    assert catalog.starts.tolist() == [0, 2, 3, 7, 10]
    assert catalog.sources == [(0, 4)]
    catalog = Catalog.open([str(b), str(a / "00001.tar")])
    assert catalog.sources == [(0, 2), (2, 3)]
    assert not catalog.is_remote()


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ("", "the list names no shards"),
        ("# nothing\n\n", "the list names no shards"),
        ("a/00000.tar\nb.txt", "a list within a list"),
        ("a/00007.tar", "no shards match"),
        ("a/00000.tar\n./a/00000.tar", "named twice"),
        ("\udcff", "cannot be read as a list"),
    ],
)
def test_bad_lists_are_told(tmp_path: Path, lines: str, text: str) -> None:
    make_shards(tmp_path / "a", [1])
    (tmp_path / "list.txt").write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=text):
        Catalog.open([str(tmp_path / "list.txt")])
    with pytest.raises(UserError, match="no such list of shards"):
        Catalog.open([str(tmp_path / "other.txt")])


def test_a_shard_in_a_consolidated_file_is_not_named_twice(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "a", [1])
    write_parts(tmp_path / "a.index.zip", map(make_part, [load_index(folder / "00000.tar")]))
    (tmp_path / "link").symlink_to(folder)
    for other in (str(folder), f"{tmp_path}/link/00000.tar", str(tmp_path / "a.index.zip")):
        with pytest.raises(UserError, match="named twice"):
            Catalog.open([str(tmp_path / "a.index.zip"), other])


def test_tables_that_are_not_used_leave_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "a", [5, 5, 5, 5])
    catalog = Catalog.open([str(tmp_path / "a")])
    one = catalog.table(0).bytes_in_memory()
    monkeypatch.setattr(catalog_module, "INDEX_MEMORY_BYTES", 2 * one)
    catalog = Catalog.open([str(tmp_path / "a")])
    tables = [catalog.table(shard) for shard in range(4)]
    assert [table.keys[0] for table in tables] == ["0-0", "1-0", "2-0", "3-0"]
    assert catalog.table(3) is tables[3]
    assert catalog.table(2) is tables[2]
    assert catalog.table(0) is not tables[0]
    assert catalog.table(2) is tables[2]  # used more recently than 3
    assert catalog.table(3) is not tables[3]


def test_addresses_without_an_index_are_told(tmp_path: Path) -> None:
    tar = (make_shards(tmp_path / "a", [2]) / "00000.tar").as_uri()
    assert len(Catalog.open([tar])) == 2  # file:// is an address too, and its index lies beside it
    (tmp_path / "a" / "00000.tar.idx.npz").write_bytes(b"garbage")
    with pytest.raises(UserError, match="a damaged index beside it; index remote shards ahead"):
        Catalog.open([tar])
    (tmp_path / "a" / "00000.tar.idx.npz").unlink()
    with pytest.raises(UserError, match="no index beside it"):
        Catalog.open([tar])
    with pytest.raises(UserError, match="addresses cannot be searched"):
        Catalog.open([tar.replace("00000", "*")])


def test_shell_commands_are_refused_wherever_they_are_named(tmp_path: Path) -> None:
    index = load_index(make_shards(tmp_path / "a", [2]) / "00000.tar")
    command = f"pipe:touch {tmp_path}/ran"
    (tmp_path / "list.txt").write_text(command)
    head = {"names": np.array([command]), "counts": np.array([2]), "digests": np.zeros((1, 16), dtype=np.uint8)}
    with zipfile.ZipFile(tmp_path / "old.index.zip", "w") as file, file.open("head.npz", "w") as part:
        np.savez(part, version=np.int64(1), rule=np.str_(""), **head)
    for source in (command, f"{command}.index.zip", str(tmp_path / "list.txt"), str(tmp_path / "old.index.zip")):
        with pytest.raises(UserError, match="a shell command is refused"):
            Catalog.open([source])
    with pytest.raises(UserError, match="a shell command is refused"):
        write_parts(tmp_path / "new.index.zip", map(make_part, [replace(index, tar=command)]))
    assert not (tmp_path / "ran").exists()
