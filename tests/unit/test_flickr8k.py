"""Flickr8k to shards: the three layouts, every defect known from copies in the wild, and runs that must be safe."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from clipdist.data.catalog import Catalog
from clipdist.data.index import index_path, load_index, scan_shard
from clipdist.datasets.files import SourceFile
from clipdist.datasets.flickr8k import Defects, csv_rows, decode_text, random_splits, read_source, token_rows
from clipdist.datasets.images import LFS_POINTER, SourceImage, check_image, shrink
from clipdist.datasets.shard_writer import Sample, sample_key, shard_sizes, write_shard
from clipdist.errors import UserError

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "shard_flickr8k.py"
REAL = REPOSITORY.parent / "shared" / "data"
SPLIT = {"train": range(7), "dev": range(7, 9), "test": range(9, 11)}  # picture 11 is in no list


def jpeg(number: int, size: tuple[int, int] = (24, 18), format: str = "JPEG") -> bytes:
    colour = (number * 37 % 256, number * 101 % 256, number * 7 % 256)
    image = Image.new("RGB", size, colour)
    image.paste(colour[::-1], (0, 0, size[0] // 2, size[1] // 2))
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def name(number: int) -> str:
    return f"{number:010d}_ab{number}.jpg"


def captions(number: int) -> list[str]:
    return [f"Picture {number} , sentence {i} ." for i in range(5)]


PICTURES = {name(number): jpeg(number) for number in range(12)}
TOKENS = "".join(f"{name(n)}#{i}\t{text}\n" for n in range(12) for i, text in enumerate(captions(n)))
LISTS = {
    f"Flickr_8k.{word}Images.txt": "".join(f"{name(n)}\n" for n in numbers).encode() for word, numbers in SPLIT.items()
}
ORIGINAL = {f"Flicker8k_Dataset/{file}": data for file, data in PICTURES.items()}
TEXTS = {"Flickr8k.token.txt": TOKENS.encode(), **LISTS}
KAGGLE = {f"Images/{file}": data for file, data in PICTURES.items()} | {
    "captions.txt": ("image,caption\n" + "".join(f'{name(n)},"{t}"\n' for n in range(12) for t in captions(n))).encode()
}
KARPATHY = {
    "images": [
        {"filename": name(n), "split": "val" if word == "dev" else word, "sentences": [{"raw": t} for t in captions(n)]}
        for word, numbers in SPLIT.items()
        for n in numbers
    ],
    "dataset": "flickr8k",
}


def make_folder(folder: Path, files: dict[str, bytes]) -> Path:
    for file, data in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
    return path


class Tool:
    """The program, run in this process: its statistics out; bad input is a UserError."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        spec = importlib.util.spec_from_file_location("shard_flickr8k", TOOL)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.printed = ""

    def __call__(self, *arguments: object, processes: int = 1) -> dict:
        words = [str(word) for word in arguments]
        self.monkeypatch.setattr(sys, "argv", ["shard_flickr8k.py", *words, "--processes", str(processes), "--json"])
        self.capsys.readouterr()
        assert self.module.main() == 0
        self.printed = self.capsys.readouterr().out
        return json.loads(self.printed.splitlines()[-1])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


def read_out(out: Path) -> dict[str, list[dict]]:
    """{split: samples as {"jpg": bytes, "txt": str, **json}}, read by webdataset."""
    found = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        shards = [str(path) for path in sorted(folder.glob("*.tar"))]
        found[folder.name] = [
            {"jpg": sample["jpg"], "txt": sample["txt"].decode(), **json.loads(sample["json"])}
            for sample in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        ]
    return found


def files_of(out: Path) -> dict[str, bytes]:
    """All files but the indices, which carry the shard's mtime."""
    paths = (path for path in out.rglob("*") if path.is_file() and path.suffix != ".npz")
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def report(out: Path) -> dict[str, dict]:
    return json.loads((out / "report.json").read_text())


def pictures_by_split(out: Path) -> dict[str, list[str]]:
    return {split: [sample["filename"] for sample in samples] for split, samples in read_out(out).items()}


OFFICIAL = {
    "train": [name(n) for n in range(7)],
    "val": [name(7), name(8)],
    "test": [name(9), name(10)],
    "extra": [name(11)],
}

# --- layouts ---


@pytest.mark.parametrize("form", ["folder", "two zips", "folder of zips", "nested folders"])
def test_original_layout(tmp_path: Path, tool: Tool, form: str) -> None:
    if form == "folder":
        sources = [make_folder(tmp_path / "in", ORIGINAL | TEXTS)]
    elif form == "nested folders":
        files = {f"a/b/{file}": data for file, data in ORIGINAL.items()} | {f"c/{f}": d for f, d in TEXTS.items()}
        sources = [make_folder(tmp_path / "in", files)]
    else:
        (tmp_path / "in").mkdir()
        sources = [
            make_zip(tmp_path / "in" / "Flickr8k_Dataset.zip", ORIGINAL),
            make_zip(tmp_path / "in" / "Flickr8k_text.zip", TEXTS),
        ]
        if form == "folder of zips":
            sources = [tmp_path / "in"]
    stats = tool(*sources, "--out", tmp_path / "out")
    assert stats["layout"] == "original"
    assert stats["split_source"] == "lists"
    assert stats["note"] == ""
    assert stats["skipped"] == {}
    assert stats["noted"] == {"picture in no list": 1}
    assert {split: count["pictures"] for split, count in stats["splits"].items()} == {
        "train": 7,
        "val": 2,
        "test": 2,
        "extra": 1,
    }
    assert stats == json.loads((tmp_path / "out" / "stats.json").read_text()) | {"out": str(tmp_path / "out")}
    assert pictures_by_split(tmp_path / "out") == OFFICIAL
    for samples in read_out(tmp_path / "out").values():
        for sample in samples:
            number = int(sample["filename"][:10])
            assert sample["jpg"] == PICTURES[sample["filename"]]
            assert sample["captions"] == captions(number)
            assert sample["txt"] == captions(number)[0]
            assert (sample["width"], sample["height"]) == (24, 18)
            assert sample["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_kaggle_layout_needs_splits(tmp_path: Path, tool: Tool, form: str) -> None:
    source = make_folder(tmp_path / "in", KAGGLE) if form == "folder" else make_zip(tmp_path / "archive.zip", KAGGLE)
    for words in ([], ["--splits", "official"]):
        with pytest.raises(UserError, match=r"no split lists .* --lists DIR.* --splits random:0"):
            tool(source, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
    stats = tool(source, "--out", tmp_path / "out", "--splits", "random:3")
    assert stats["layout"] == "kaggle"
    assert stats["split_source"] == "random:3"
    assert stats["note"] == "not comparable with published numbers"
    assert "not comparable with published numbers" in tool.printed.splitlines()[0]
    found = pictures_by_split(tmp_path / "out")
    assert {split: len(names) for split, names in found.items()} == {"train": 10, "val": 1, "test": 1}
    assert sorted(file for files in found.values() for file in files) == sorted(PICTURES)
    lists = make_folder(tmp_path / "lists", LISTS)
    for words in ([], ["--splits", "official"]):
        tool(source, "--out", tmp_path / "out", "--lists", lists, "--overwrite", *words)
        assert pictures_by_split(tmp_path / "out") == OFFICIAL


def test_karpathy_layout(tmp_path: Path, tool: Tool) -> None:
    json_file = tmp_path / "splits.json"
    json_file.write_text(json.dumps(KARPATHY))
    images = make_zip(tmp_path / "images.zip", ORIGINAL)
    stats = tool(json_file, "--images", images, "--out", tmp_path / "out")
    assert stats["layout"] == "karpathy"
    assert stats["split_source"] == "json"
    assert stats["skipped"] == {"picture without captions": 1}  # number 11 is not in the JSON
    assert pictures_by_split(tmp_path / "out") == {s: names for s, names in OFFICIAL.items() if s != "extra"}


def test_json_beside_kaggles_archive_wins(tmp_path: Path, tool: Tool) -> None:
    archive = make_zip(tmp_path / "archive.zip", KAGGLE)
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(KARPATHY))
    (tmp_path / "dataset_coco.json").write_text("{}")
    stats = tool(tmp_path, "--out", tmp_path / "out")
    assert stats["layout"] == "karpathy"
    assert stats["noted"]["other captions not used"] == 1
    tool(archive, tmp_path / "dataset_flickr8k.json", "--splits", "random:0", "--out", tmp_path / "out", "--overwrite")
    assert len(pictures_by_split(tmp_path / "out")["train"]) == 9


def test_layouts_give_the_same_shards(tmp_path: Path, tool: Tool) -> None:
    tool(make_folder(tmp_path / "a", ORIGINAL | TEXTS), "--out", tmp_path / "original")
    tool(make_zip(tmp_path / "b.zip", KAGGLE | LISTS), "--out", tmp_path / "kaggle")
    shards = [
        {f: d for f, d in files_of(tmp_path / out).items() if f.endswith(".tar")} for out in ("original", "kaggle")
    ]
    assert len(shards[0]) == 4
    assert shards[0] == shards[1]


# --- defects ---


def defective() -> dict[str, bytes]:
    """The original layout with one of every defect."""
    folder = "flickr/Flicker8k_Dataset/"
    files = {f"{folder}{file}": data for file, data in PICTURES.items()}
    files[folder + name(1)] = LFS_POINTER + b"\noid sha256:00\nsize 1\n"
    files[folder + name(2)] = jpeg(2, (256, 256))[:-150]
    files[folder + name(3)] = b"<html>not found</html>"
    files[folder + name(4)] = b""
    files[folder + name(5)] = PICTURES[name(7)]  # a picture of val under another name
    files[folder + name(20)] = jpeg(20)  # no captions
    files[folder + name(21)] = jpeg(21)  # no usable caption
    files["other/" + name(0)] = jpeg(0)
    files["__MACOSX/Flicker8k_Dataset/._" + name(0)] = b"\0\5\x16\7"
    files[folder + "._" + name(6)] = b"\0\5\x16\7"
    lines = TOKENS.replace("Picture 0 , sentence 1 .", "Picture 0 , sentence 0 .")  # repeats a caption
    lines = lines.replace("Picture 9 , sentence 4 .", "Picture 8 , sentence 4 .").replace(
        "Picture 9 , sentence 3 .", " "
    )
    lines = "image,caption\n" + lines + "no tab here\n"
    lines += "2258277193_586949ec62.jpg.1#0\tpeople waiting for the subway\n"
    token = lines.encode() + name(21).encode() + b"#0\tcaf\xe9\n" + name(21).encode() + b"#1\n"
    files["text/Flickr8k.token.txt"] = token.replace(b"\n", b"\r\n")
    for file, data in LISTS.items():
        files["text/" + file] = data.replace(b"\n", b"\r\n")
    files["text/Flickr_8k.trainImages.txt"] += f"{name(10)}\n{name(0)}\n{name(99)}\nfilename\n".encode()
    return files


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_every_defect_is_skipped_counted_and_named(tmp_path: Path, tool: Tool, form: str) -> None:
    files = defective()
    source = make_folder(tmp_path / "in", files) if form == "folder" else make_zip(tmp_path / "in.zip", files)
    stats = tool(source, "--out", tmp_path / "out")
    assert stats["skipped"] == {
        "captions without picture": 1,
        "listed picture missing": 1,
        "picture without captions": 2,
        "empty caption": 2,
        "caption not UTF-8": 1,
        "stray line": 3,
        "repeated list line": 1,
        "listed in two splits": 1,
        "same bytes as a test or val picture": 1,
        "junk file": 2,
        "git-LFS pointer": 1,
        "truncated picture": 1,
        "not a picture": 2,
    }
    assert stats["noted"] == {
        "picture in no list": 1,
        "repeated caption": 1,
        "caption on several pictures": 1,
        "picture found twice": 1,
    }
    named = {reason: entry["names"] for reason, entry in report(tmp_path / "out")["skipped"].items()}
    assert named["captions without picture"] == ["2258277193_586949ec62.jpg.1"]
    assert named["listed picture missing"] == [name(99)]
    assert named["picture without captions"] == [name(20), name(21)]
    assert named["git-LFS pointer"] == [name(1)]
    assert named["truncated picture"] == [name(2)]
    assert named["not a picture"] == [name(3), name(4)]
    assert named["same bytes as a test or val picture"] == [f"{name(5)}: {name(7)}"]
    assert named["listed in two splits"] == [f"{name(10)}: train, kept in test"]
    assert named["caption not UTF-8"] == [f"{name(21)}: caf\\udce9"]
    for reason, count in stats["skipped"].items():
        assert len(named[reason]) == count
        assert f"{count:>10}  {reason}" in tool.printed
    found = read_out(tmp_path / "out")
    assert {split: [sample["filename"] for sample in samples] for split, samples in found.items()} == OFFICIAL | {
        "train": [name(0), name(6)]
    }
    assert found["test"][0]["captions"] == [*captions(9)[:3], "Picture 8 , sentence 4 ."]
    assert found["train"][0]["captions"][:2] == [captions(0)[0]] * 2
    assert found["train"][0]["jpg"] == PICTURES[name(0)]


def test_a_picture_of_two_json_splits_is_not_trained_on(tmp_path: Path, tool: Tool) -> None:
    images = [*KARPATHY["images"], {"filename": name(9), "split": "train", "sentences": [{"raw": "again"}]}]
    images.append({"filename": name(11), "split": "restval", "sentences": [{"raw": "a word that is no split"}]})
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    stats = tool(tmp_path, "--images", make_folder(tmp_path / "in", ORIGINAL), "--out", tmp_path / "out")
    assert stats["skipped"] == {"listed in two splits": 1}
    assert pictures_by_split(tmp_path / "out") == OFFICIAL


def test_missing_lists(tmp_path: Path, tool: Tool) -> None:
    files = ORIGINAL | {file: data for file, data in TEXTS.items() if "test" not in file}
    stats = tool(make_folder(tmp_path / "in", files), "--out", tmp_path / "out")
    assert stats["noted"] == {"picture in no list": 3, "no list for this split": 1}
    assert pictures_by_split(tmp_path / "out")["extra"] == [name(9), name(10), name(11)]
    assert not (tmp_path / "out" / "test").exists()


def test_a_damaged_member_of_a_zip(tmp_path: Path, tool: Tool) -> None:
    path = make_zip(tmp_path / "in.zip", ORIGINAL | TEXTS)
    data = bytearray(path.read_bytes())
    data[data.index(PICTURES[name(3)]) + 50] ^= 0xFF
    path.write_bytes(data)
    assert tool(path, "--out", tmp_path / "out")["skipped"] == {"unreadable file": 1}
    assert report(tmp_path / "out")["skipped"]["unreadable file"]["names"] == [name(3)]


def test_csv_with_commas_quotes_and_damage() -> None:
    text = (
        b"\xef\xbb\xbfimage,caption\r\n"
        b'1.jpg,"A dog , a ball , and ""fun"" ."\r\n'
        b"2.jpg,A plain one .\r\n"
        b"2.jpg,no quotes, but commas .\r\n"
        b'3.jpg,"one that\r\nruns on"\r\n'
        b'4.jpg,"never closed\r\n'
        b"5.jpg,after it\r\n"
        b"6.jpg\r\n"
        b"image,caption\r\n"
        b"\r\n"
        b'7.jpg,A "quoted" word\r\n'
    )
    defects = Defects()
    assert list(csv_rows(decode_text(text), defects)) == [
        ("1.jpg", 'A dog , a ball , and "fun" .'),
        ("2.jpg", "A plain one ."),
        ("2.jpg", "no quotes, but commas ."),
        ("3.jpg", "one that\nruns on"),
        ("5.jpg", "after it"),
        ("7.jpg", 'A "quoted" word'),
    ]
    assert [line[:20] for line in defects.names["stray line"]] == [
        "captions.txt line 7:",
        "captions.txt line 9:",
        "captions.txt line 10",
    ]


@pytest.mark.parametrize(
    ("start", "row"),
    [
        ("image,caption\n", '{},"{}"\n'),
        (",image,caption\n", '7,{},"{}"\n'),  # as pandas writes it
        ("id,Image,Caption,words\n", '7,{},"{}",4\n'),
    ],
)
def test_kaggles_captions_as_csv(tmp_path: Path, tool: Tool, start: str, row: str) -> None:
    text = start + "".join(row.format(name(n), text) for n in range(12) for text in captions(n)) + "stray\n"
    files = {file: data for file, data in KAGGLE.items() if file != "captions.txt"}
    stats = tool(
        make_folder(tmp_path / "in", files | {"captions.csv": text.encode()} | LISTS), "--out", tmp_path / "out"
    )
    assert stats["layout"] == "kaggle"
    assert {split: count["captions"] for split, count in stats["splits"].items()} == {
        "train": 35,
        "val": 10,
        "test": 10,
        "extra": 5,
    }
    first = read_out(tmp_path / "out")["train"][0]
    assert (first["filename"], first["captions"]) == (name(0), captions(0))
    assert report(tmp_path / "out")["skipped"]["stray line"]["names"] == ["captions.csv line 62: stray"]


def test_token_lines() -> None:
    defects = Defects()
    rows = list(
        token_rows("a.jpg#0\tHe is #1 .\na.jpg#1\na.jpg#2 spaces , no tab\nWe are #1 here\n\nb.jpg\tx\n", defects)
    )
    assert rows == [("a.jpg", "He is #1 ."), ("a.jpg", ""), ("a.jpg", "spaces , no tab")]
    assert len(defects.names["stray line"]) == 2


def test_any_cut_of_a_picture_is_noticed(tmp_path: Path) -> None:
    for progressive in (False, True):
        file = io.BytesIO()
        Image.effect_noise((48, 40), 80).convert("RGB").save(file, "JPEG", progressive=progressive)
        data = file.getvalue()
        path = tmp_path / "x.jpg"
        picture = SourceImage("x.jpg", SourceFile(str(path), "", 0, 0), ("x",))
        path.write_bytes(data)
        assert not isinstance(check_image(picture), str)
        for length in range(4, len(data) - 32, len(data) // 40):
            path.write_bytes(data[:length])
            assert check_image(picture) == "truncated picture", length


def test_png_under_a_jpg_name_stays(tmp_path: Path, tool: Tool) -> None:
    files = ORIGINAL | TEXTS | {f"Flicker8k_Dataset/{name(0)}": jpeg(0, format="PNG")}
    assert tool(make_folder(tmp_path / "in", files), "--out", tmp_path / "out")["skipped"] == {}


def test_no_verify_still_sees_what_has_no_header(tmp_path: Path, tool: Tool) -> None:
    stats = tool(make_folder(tmp_path / "in", defective()), "--out", tmp_path / "out", "--no-verify")
    assert "truncated picture" not in stats["skipped"]
    assert stats["skipped"]["not a picture"] == 2
    assert not stats["verified"]


# --- what is written ---


def test_shards_are_plain_and_described(tmp_path: Path, tool: Tool) -> None:
    tool(make_folder(tmp_path / "in", ORIGINAL | TEXTS), "--out", tmp_path / "out", "--per-shard", 3)
    folder = tmp_path / "out" / "train"
    tars = sorted(folder.glob("*.tar"))
    assert json.loads((folder / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 2, "00002.tar": 2}
    wids = json.loads((folder / "index.json").read_text())
    assert (wids["__kind__"], wids["wids_version"], wids["name"]) == ("wids-shard-index-v1", 1, "flickr8k-train")
    assert wids["shardlist"] == [
        {
            "url": tar.name,
            "nsamples": size,
            "md5sum": hashlib.md5(tar.read_bytes()).hexdigest(),
            "filesize": tar.stat().st_size,
        }
        for tar, size in zip(tars, (3, 2, 2), strict=True)
    ]
    for shard, tar in enumerate(tars):
        index, scan = load_index(tar), scan_shard(tar)
        assert json.loads((folder / f"0000{shard}_stats.json").read_text())["successes"] == len(index)
        assert index.keys.tolist() == [f"0000{shard}000{row}" for row in range(len(index))] == scan.keys.tolist()
        assert index.kinds == ("jpg", "txt", "json") == scan.kinds
        assert index.offset.tolist() == scan.offset.tolist()
        assert index.size.tolist() == scan.size.tolist()
        assert index.columns["width"].tolist() == [24] * len(index)
        assert index.columns["captions"].tolist() == [5] * len(index)
        with tarfile.open(tar) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
        assert tar.read_bytes()[257:265] == b"ustar\x0000"
    assert len(Catalog.open([str(folder)])) == 7


def test_the_bytes_do_not_depend_on_the_processes(tmp_path: Path, tool: Tool) -> None:
    source = make_zip(tmp_path / "in.zip", defective())
    options = ["--per-shard", 2, "--shrink", 10]
    one = tool(source, "--out", tmp_path / "one", *options, processes=1)
    two = tool(source, "--out", tmp_path / "two", *options, processes=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert one["splits"] == two["splits"]
    assert one["splits"]["val"]["pictures"] == 2


def test_resize_shrinks_to_the_shorter_side(tmp_path: Path, tool: Tool) -> None:
    files = ORIGINAL | TEXTS | {f"Flicker8k_Dataset/{name(0)}": jpeg(0, (40, 81))}
    tool(make_folder(tmp_path / "in", files), "--out", tmp_path / "out", "--shrink", 20)
    first, second = read_out(tmp_path / "out")["train"][:2]
    assert Image.open(io.BytesIO(first["jpg"])).size == (first["width"], first["height"]) == (20, 40)
    assert (first["original_width"], first["original_height"]) == (40, 81)
    assert first["sha256"] == hashlib.sha256(first["jpg"]).hexdigest()
    assert second["jpg"] == PICTURES[name(1)]  # 24x18 is small enough: untouched
    assert load_index(tmp_path / "out" / "train" / "00000.tar").columns["height"].tolist()[:2] == [40, 18]


def test_shrink_takes_any_mode() -> None:
    for mode in ("L", "CMYK", "RGB"):
        file = io.BytesIO()
        Image.new(mode, (30, 60)).save(file, "JPEG")
        data, width, height = shrink(file.getvalue(), 10)
        assert (width, height) == (10, 20)
        assert Image.open(io.BytesIO(data)).mode == "RGB"


def test_shard_sizes_are_equal() -> None:
    assert shard_sizes(0, 5) == []
    assert shard_sizes(10, 5) == [5, 5]
    assert shard_sizes(11, 5) == [4, 4, 3]
    assert shard_sizes(1, 10_000) == [1]
    for n in range(1, 60):
        sizes = shard_sizes(n, 7)
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-n // 7)
    for wrong in (0, -1, 10_001):
        with pytest.raises(UserError, match="shard size"):
            shard_sizes(5, wrong)


def test_write_shard_refuses_keys_that_readers_would_confuse(tmp_path: Path) -> None:
    assert sample_key(12, 34) == "000120034"
    for keys in (["a.b"], ["a/b"], [""], ["a", "a"], ["x" * 300]):
        with pytest.raises(UserError, match=r"0\.tar"):
            write_shard(tmp_path / "0.tar", [Sample(key, {"txt": b"x"}) for key in keys])
        assert list(tmp_path.iterdir()) == []


def test_random_splits_depend_on_seed_and_names_alone() -> None:
    names = [name(n) for n in range(9000)]
    split = random_splits(names, 1)
    assert split == random_splits(reversed(names), 1)
    assert split != random_splits(names, 2)
    counts = [list(split.values()).count(word) for word in ("train", "val", "test")]
    assert counts == [7000, 1000, 1000]
    assert list(random_splits(names[:80], 0).values()).count("val") == 10


# --- runs again, and runs that are cut off ---


def test_a_second_run_is_fast_or_refused(tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = make_folder(tmp_path / "in", ORIGINAL | TEXTS), tmp_path / "out"
    first = tool(source, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(tool.module, "build", None)  # must not be called
        assert tool(source, "--out", out) == first
        assert "nothing to do" in tool.printed
        with pytest.raises(UserError, match=r"stats\.json is there already.* --overwrite"):
            tool(source, "--out", out, "--per-shard", 2)
    tool(source, "--out", out, "--per-shard", 2, "--overwrite")
    assert len(list((out / "train").glob("*.tar"))) == 4
    before = files_of(out)
    (out / "train" / "00003.tar").unlink()
    with pytest.raises(UserError, match="incomplete"):
        tool(source, "--out", out, "--per-shard", 2)
    tool(source, "--out", out, "--per-shard", 2, "--overwrite")
    assert files_of(out) == before


def test_overwrite_leaves_no_older_split(tmp_path: Path, tool: Tool) -> None:
    out = tmp_path / "out"
    tool(make_folder(tmp_path / "in", ORIGINAL | TEXTS), "--out", out, "--per-shard", 2)
    tool(make_folder(tmp_path / "k", KAGGLE), "--out", out, "--splits", "random:0", "--overwrite")
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "stats.json", "test", "train", "val"]
    assert len(list((out / "train").glob("*.tar"))) == 1


def test_foreign_files_are_never_deleted(tmp_path: Path, tool: Tool) -> None:
    source, out = make_folder(tmp_path / "in", ORIGINAL | TEXTS), tmp_path / "out"
    make_folder(out, {"notes.txt": b"mine"})
    tool(source, "--out", out)
    tool(source, "--out", out, "--overwrite")
    for path in (out / "train" / "00007.tar", out / "val" / "notes.txt", out / "test" / "a" / "b"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
        before = files_of(out)
        with pytest.raises(UserError, match="was not written by this tool"):
            tool(source, "--out", out, "--overwrite")
        assert files_of(out) == before
        shutil.rmtree(path.parent) if path.parent.name == "a" else path.unlink()
    for file in ("stats.json", "report.json"):
        kept = (out / file).read_bytes()
        (out / file).write_text('{"loss": 1}')
        with pytest.raises(UserError, match=f"{file}: was not written by this tool"):
            tool(source, "--out", out, "--overwrite")
        (out / file).write_bytes(kept)
    tool(source, "--out", out, "--overwrite")
    assert (out / "notes.txt").read_bytes() == b"mine"


def test_a_run_that_is_cut_off_leaves_the_older_result(
    tmp_path: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = make_folder(tmp_path / "in", ORIGINAL | TEXTS), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tool.module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tool(source, "--out", out)
    assert list(out.iterdir()) == []
    make_folder(out / ".partial" / "train", {"00000.tar": b"what a killed run leaves"})
    tool(source, "--out", out)
    assert not (out / ".partial").exists()
    assert pictures_by_split(out) == OFFICIAL


def test_two_runs_do_not_write_at_once(tmp_path: Path, tool: Tool) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is writing"):
        tool(make_folder(tmp_path / "in", ORIGINAL | TEXTS), "--out", out)
    os.close(descriptor)


def test_sources_stay_as_they_are(tmp_path: Path, tool: Tool) -> None:
    source = make_folder(tmp_path / "in", ORIGINAL | TEXTS)
    before = files_of(source)
    for path in (*source.rglob("*"), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        tool(source, "--out", tmp_path / "out")
        assert files_of(source) == before
    finally:
        for path in (source, *source.iterdir()):
            path.chmod(0o755)


# --- bad input ---


@pytest.mark.parametrize(
    ("files", "text"),
    [
        (None, "no such file or folder"),
        ({}, "no pictures"),
        (TEXTS, "no pictures"),
        (ORIGINAL, r"no captions there: expected Flickr8k\.token\.txt"),
        (ORIGINAL | TEXTS | {"Flickr8k.token.txt": LFS_POINTER}, "git-LFS pointer, not the file"),
        (ORIGINAL | TEXTS | {"Flickr8k.token.txt": b""}, "no captions in it"),
        (ORIGINAL | TEXTS | {"copy/Flickr8k.token.txt": b"other"}, "differ: name the source"),
        (ORIGINAL | {"dataset_flickr8k.json": b"{"}, "not Karpathy's JSON"),
        (ORIGINAL | {"dataset_flickr8k.json": b'{"images": [{"filename": "a"}]}'}, "not Karpathy's JSON"),
        (ORIGINAL | TEXTS | {"Flickr8k_Dataset.zip": b"PK\x03\x04 half"}, "not a zip, or not wholly downloaded"),
        (dict.fromkeys(ORIGINAL, b"") | TEXTS, "no usable picture .* 12 x not a picture"),
        ({"archive.zip": b"zip"}, "not a zip"),
    ],
)
def test_bad_sources(tmp_path: Path, tool: Tool, files: dict[str, bytes] | None, text: str) -> None:
    source = tmp_path / "in"
    if files is not None:
        source.mkdir()
        make_folder(source, files)
    with pytest.raises(UserError, match=text):
        tool(source, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == {}


def test_lists_that_cannot_be_used(tmp_path: Path, tool: Tool) -> None:
    kaggle, lists = make_folder(tmp_path / "k", KAGGLE), make_folder(tmp_path / "l", LISTS)
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(KARPATHY))
    with pytest.raises(UserError, match=r"--lists .*: no Flickr_8k\.trainImages\.txt"):
        tool(kaggle, "--lists", kaggle, "--out", tmp_path / "out")
    with pytest.raises(UserError, match="has its own splits"):
        tool(tmp_path / "dataset_flickr8k.json", "--images", kaggle, "--lists", lists, "--out", tmp_path / "out")


def test_an_archive_in_an_archive_is_told(tmp_path: Path, tool: Tool) -> None:
    outer = make_zip(tmp_path / "outer.zip", {"Flickr8k_Dataset.zip": b"x", **TEXTS})
    with pytest.raises(UserError, match=r"holds the archive Flickr8k_Dataset\.zip: unpack"):
        tool(outer, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "words",
    [
        ["--splits", "random"],
        ["--splits", "random:x"],
        ["--per-shard", "0"],
        ["--per-shard", "10001"],
        ["--shrink", "-1"],
        ["--shrink", "64", "--no-verify"],
        ["--splits", "random:1", "--lists", "."],
    ],
)
def test_bad_options(tmp_path: Path, tool: Tool, words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        tool(tmp_path, "--out", tmp_path / "out", *words)
    assert exit.value.code == 2


@pytest.mark.parametrize(
    ("old", "new"), [("--workers", "--processes"), ("--shard-size", "--per-shard"), ("--resize", "--shrink")]
)
def test_former_names_of_options(tmp_path: Path, tool: Tool, old: str, new: str) -> None:
    with pytest.raises(SystemExit):
        tool(tmp_path, "--out", tmp_path / "out", old, 2)
    assert tool.capsys.readouterr().err.endswith(f"error: {old} is {new} now; write that\n")


def test_the_command(tmp_path: Path) -> None:
    """As people type it: exit codes, one line on stderr, JSON on the last line of stdout."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(TOOL), *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    bad = run(tmp_path / "nowhere", "--out", tmp_path / "out")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert len(bad.stderr.splitlines()) == 1
    assert "Traceback" not in bad.stderr
    make_zip(tmp_path / "in.zip", ORIGINAL | TEXTS)
    good = run("in.zip", "--out", "out", "--processes", "2", "--json")
    assert good.returncode == 0, good.stderr
    assert good.stderr == ""
    assert json.loads(good.stdout.splitlines()[-1])["splits"]["train"]["pictures"] == 7
    assert index_path(tmp_path / "out" / "train" / "00000.tar").exists()
    assert "examples:" in run("--help").stdout


@pytest.mark.skipif(not (REAL / "Flickr8k_text.zip").exists(), reason="needs Flickr8k itself")
def test_the_real_data_set() -> None:
    defects = Defects()
    source = read_source([REAL / "Flickr8k_Dataset.zip", REAL / "Flickr8k_text.zip"], defects)
    assert source.split is not None
    assert Counter(source.split[picture] for picture in source.images) == {"train": 5997, "val": 1000}
    assert {len(picture.captions) for picture in source.images.values()} == {5}
    assert {reason: entry["count"] for reason, entry in defects.report()["skipped"].items()} == {
        "captions without picture": 1,
        "listed picture missing": 1,
        "picture without captions": 2,
    }
