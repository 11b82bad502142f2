"""Any list of pictures and captions to shards: every form of list, defects, bad input, and runs that are cut off."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from clipdist.data.index import load_index
from clipdist.datasets import pair_shards
from clipdist.datasets.pair_lists import Pair, Skip, open_list, survey
from clipdist.errors import Fault, UserError

TOOL = Path(__file__).parents[2] / "tools" / "shard_pairs.py"
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def picture(number: int, kind: str = "jpg", size: tuple[int, int] = (24, 18)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number * 37 % 256, number * 101 % 256, 9)).save(file, FORMATS[kind])
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """0.jpg .. 7.jpg, of which 1 is a PNG, 2 is cut off, 3 is text, and 7 is not there."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(picture(number))
    (folder / "1.jpg").write_bytes(picture(1, "png"))
    (folder / "2.jpg").write_bytes(picture(2, size=(400, 300))[:-300])
    (folder / "3.jpg").write_text("<html>not found</html>")
    return folder


def write_csv(folder: Path, rows: str, name: str = "list.csv") -> Path:
    path = folder / name
    path.write_bytes(rows.encode("utf-8", "surrogateescape"))
    return path


EIGHT = "filepath,caption\n" + "".join(f"{n}.jpg,picture {n}\n" for n in range(8))


class Tool:
    """The program, run in this process: its JSON out; bad input is a UserError."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        spec = importlib.util.spec_from_file_location("shard_pairs", TOOL)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.monkeypatch, self.capsys, self.printed = monkeypatch, capsys, ""

    def __call__(self, *arguments: object, processes: int = 1) -> dict:
        words = [*map(str, arguments), "--processes", str(processes), "--json"]
        self.monkeypatch.setattr(sys, "argv", ["shard_pairs.py", *words])
        self.capsys.readouterr()
        assert self.module.main() == 0
        self.printed = self.capsys.readouterr().out
        return json.loads(self.printed.splitlines()[-1])


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return Tool(monkeypatch, capsys)


def samples(out: Path) -> list[dict[str, bytes]]:
    """{kind: bytes} of every sample, kinds in their order, with its "key"."""
    found: dict[str, dict] = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return [{**members, "key": key.encode()} for key, members in found.items()]


def records(out: Path) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples(out)]


def skipped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def files_of(out: Path) -> dict[str, bytes]:
    """All files but the indices, which carry the shard's mtime."""
    return {file.name: file.read_bytes() for file in out.glob("*") if file.suffix != ".npz"}


# --- forms of lists ---

ROWS = [
    {"image": "0.jpg", "text": 'a "red", wet dog', "score": 0.5, "id": "007", "n": 3},
    {"image": "0.jpg", "text": "naïve ☃", "score": 0.25, "id": "008", "n": 4},
    {"image": "4.jpg", "text": "12", "score": None, "id": "x", "n": -1},
]


def as_csv(folder: Path, delimiter: str = ",", start: str = "", end: str = "\n") -> bytes:
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return (start + text.getvalue()).encode()


def as_parquet(folder: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet lists need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist([{**row, "thumbnail": b"bytes"} for row in ROWS])
    parquet.write_table(table, file, row_group_size=1)
    return file.getvalue()


FORMS = {
    "csv": as_csv,
    "tsv": lambda folder: as_csv(folder, "\t"),
    "csv with BOM and CRLF": lambda folder: as_csv(folder, start="\ufeff", end="\r\n"),
    "csv with ;": lambda folder: as_csv(folder, ";"),
    "csv with tabs": lambda folder: as_csv(folder, "\t"),
    "tsv with ,": as_csv,
    "jsonl": lambda folder: "\n\n".join(json.dumps(row) for row in ROWS).encode(),
    "parquet": as_parquet,
}


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_of_lists_say_the_same(tmp_path: Path, images: Path, tool: Tool, form: str) -> None:
    source = images / f"list.{form.split()[0]}"
    source.write_bytes(FORMS[form](images))
    result = tool(source, "--out", tmp_path / "out")
    assert (result["image_column"], result["caption_column"]) == ("image", "text")
    assert (result["samples"], result["captions"], result["skipped"]) == (2, 3, {})
    assert f"{source}: pictures: files of column 'image' in {images}; captions: column 'text'" in tool.printed
    assert ("; parted by " in tool.printed) == ("with ;" in form or "with ," in form or "with tabs" in form)
    first, second = samples(tmp_path / "out")
    assert list(first) == ["jpg", "txt", "json", "key"]
    assert first["jpg"] == picture(0)
    assert first["txt"].decode() == 'a "red", wet dog'
    assert json.loads(first["json"]) == {
        "key": "000000000",
        "filename": "0.jpg",
        "caption": 'a "red", wet dog',
        "captions": ['a "red", wet dog', "naïve ☃"],
        "width": 24,
        "height": 18,
        "sha256": hashlib.sha256(picture(0)).hexdigest(),
        "score": 0.5,
        "id": "007",
        "n": 3,
    }
    record = json.loads(second["json"])
    assert (record["captions"], record["n"], "score" in record) == (["12"], -1, False)
    index = load_index(tmp_path / "out" / "00000.tar")
    assert {name: values.tolist() for name, values in index.columns.items()} == {
        "width": [24, 24],
        "height": [18, 18],
        "captions": [2, 1],
    }
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 2}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet lists need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize(
    ("column", "cell", "name"),
    [
        ("image", lambda data: data, "row 4"),
        ("image", lambda data: {"bytes": data, "path": "https://x.org/y.jpg"}, "https://x.org/y.jpg"),  # Hugging Face's
        ("image", lambda data: {"bytes": data, "path": None}, "row 4"),
        ("scan", lambda data: data, "row 4"),
    ],
)
def test_parquet_that_holds_the_pictures(tmp_path: Path, tool: Tool, column: str, cell, name: str) -> None:
    """Four files, the pictures in them, five captions in columns; one picture twice, and a row without a picture."""
    for number in range(4):
        texts = {f"caption_{i}": f"picture {number}, {i}" for i in range(5)}
        row = {column: cell(picture(number)), **texts, "score": number / 4}
        rows = [row, {**row, "caption_0": "again"}, {**row, column: None}] if number == 3 else [row]
        write_parquet(tmp_path / f"in/data/train-0000{number}.parquet", rows)
    options = ["--image-column", "scan"] if column == "scan" else []
    result = tool(tmp_path / "in", *options, "--out", tmp_path / "out", "--per-shard", 2, processes=2)
    captions = ", ".join(f"'caption_{i}'" for i in range(5))
    assert f"4 files; pictures: the bytes of column '{column}'; captions: column {captions}" in tool.printed
    assert (result["samples"], result["captions"], result["repeated"]) == (4, 25, 0)
    assert skipped(tmp_path / "out") == [{"row": 6, "file": "", "reason": "no picture named"}]
    assert [sample["jpg"] for sample in samples(tmp_path / "out")] == [picture(number) for number in range(4)]
    last = records(tmp_path / "out")[3]
    assert last["captions"] == [f"picture 3, {i}" for i in range(5)] + ["again"] + [
        f"picture 3, {i}" for i in range(1, 5)
    ]
    assert (last["score"], "caption_1" in last) == (0.75, False)
    assert last["filename"] == name
    assert tool(tmp_path / "in", *options, "--out", tmp_path / "out", "--per-shard", 2)["shards_written_now"] == 0


def test_parquet_of_several_splits_is_not_mixed(tmp_path: Path, images: Path, tool: Tool) -> None:
    for split in ("train", "test"):
        row = {"image": {"bytes": None, "path": str(images / "0.jpg")}, "caption": split}
        write_parquet(tmp_path / f"in/{split}-00000-of-00001.parquet", [row, {"image": {"bytes": b"", "path": ""}}])
    with pytest.raises(UserError, match=r"of several splits \(test, train\): name one, .*'.*/in/train\*\.parquet'"):
        tool(tmp_path / "in", "--out", tmp_path / "out")
    assert tool(tmp_path / "in/train*.parquet", "--out", tmp_path / "out")["samples"] == 1  # a path instead of bytes
    assert records(tmp_path / "out")[0]["caption"] == "train"
    write_parquet(tmp_path / "in/train-2.parquet", [{"image": b"", "text": "x"}])
    with pytest.raises(UserError, match=r"train-2\.parquet: has no column caption, which .*train-00000-of-00001"):
        tool(tmp_path / "in/train*.parquet", "--out", tmp_path / "more")
    write_parquet(tmp_path / "lists.parquet", [{"image": [{"bytes": b""}], "caption": "a"}])
    with pytest.raises(UserError, match=r"column 'image' is list<.*>: expected names, bytes, or a struct of bytes and"):
        tool(tmp_path / "lists.parquet", "--out", tmp_path / "more")
    for pattern, says in (("none*.parquet", "no such file"), ("*", "a pattern is of Parquet files")):
        (tmp_path / "in/readme.md").touch()
        with pytest.raises(UserError, match=says):
            tool(tmp_path / "in" / pattern, "--out", tmp_path / "more")


def test_coco_captions(tmp_path: Path, images: Path, tool: Tool) -> None:
    listed = [{"id": 7 * n, "file_name": f"{n}.jpg", "height": 9, "license": 3} for n in (0, 4, 5)]
    said = [{"image_id": 28, "id": 1, "caption": "four"}, {"image_id": 0, "id": 2, "caption": "a"}]
    said.append({"image_id": 0, "id": 3, "caption": "b\n"})
    source = tmp_path / "captions_val2017.json"
    source.write_text(json.dumps({"info": {}, "images": listed, "annotations": said, "licenses": []}))
    result = tool(source, "--images-root", images, "--out", tmp_path / "out")
    assert (result["samples"], result["captions"], result["skipped"]) == (2, 3, {"empty caption": 1})
    first, second = records(tmp_path / "out")
    assert (first["filename"], first["captions"], second["captions"]) == ("0.jpg", ["a", "b"], ["four"])
    assert (first["id"], first["license"], first["height"]) == (0, 3, 18)
    assert skipped(tmp_path / "out") == [{"row": 3, "file": "5.jpg", "reason": "empty caption"}]


def test_windows_paths(tmp_path: Path, images: Path, tool: Tool) -> None:
    (images / "a\\b.jpg").write_bytes(picture(5))
    rows = "image,caption\nimages\\0.jpg,a\n.\\images\\4.jpg,b\nimages/a\\b.jpg,c\nC:\\images\\6.jpg,d\n"
    result = tool(write_csv(tmp_path, rows), "--out", tmp_path / "out")
    assert [sample["jpg"] for sample in samples(tmp_path / "out")] == [picture(0), picture(4), picture(5)]
    assert (result["backslashes"], result["skipped"]) == (4, {"path on a Windows drive": 1})
    assert "         4  names with backslashes, which are read as / where no file has the name" in tool.printed


def test_folder_of_pairs(tmp_path: Path, tool: Tool) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, (name, kind) in enumerate(
        {"a.jpg": "jpg", "sub/b.PNG": "png", "c.webp": "webp", "d.gif": "gif"}.items()
    ):
        (folder / name).write_bytes(picture(number, kind))
    (folder / "a.txt").write_text("one\n\n two \n")
    (folder / "sub" / "b.json").write_text('{"captions": ["three", " "], "similarity": 0.3, "width": 9999}')
    (folder / "c.json").write_text('{"caption": "four"}')
    (folder / "d.txt").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "e.jpg").write_bytes(picture(5))
    (folder / "f.jpg").write_bytes(picture(6))
    (folder / "f.json").write_text("{")
    (folder / "sub" / "back").symlink_to(folder)
    for name in ("g.tif", "g.txt", "h.txt", "noise", ".hidden"):
        (folder / name).write_text("five")
    result = tool(folder, "--out", tmp_path / "out")
    first, second, third = records(tmp_path / "out")
    assert [first["captions"], second["captions"], third["captions"]] == [["one", "two"], ["four"], ["three"]]
    assert (third["filename"], third["similarity"], third["width"]) == ("sub/b.PNG", 0.3, 24)
    assert [next(iter(sample)) for sample in samples(tmp_path / "out")] == ["jpg", "webp", "png"]
    assert {entry["file"]: entry["reason"] for entry in skipped(tmp_path / "out")} == {
        "d.gif": "caption is not UTF-8",
        "e.jpg": "no caption beside it",
        "f.jpg": "caption file cannot be read",
        "g.tif": "suffix .tif is not of a picture",
        "h.txt": "caption without picture",
        "noise": "suffix none is not of a picture",
    }
    assert "         1  suffix .tif is not of a picture" in tool.printed
    assert result["samples"] == 3


def test_shards_in_the_folder_of_pairs_are_no_part_of_it(tmp_path: Path, tool: Tool) -> None:
    for name, data in (("0.jpg", picture(0)), ("0.txt", b"a"), ("1.tif", b"b")):
        (tmp_path / name).write_bytes(data)
    for out, skips in ((tmp_path / "shards", {"suffix .tif is not of a picture": 1}), (tmp_path, {})):
        first, again = (tool(tmp_path, "--out", out) for _ in range(2))
        assert (first["samples"], first["skipped"], first["shards_written_now"]) == (1, skips, 1)
        assert (again["skipped"], again["shards_written_now"]) == (skips, 0)


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path, tool: Tool) -> None:
    (tmp_path / "0.tif").touch()
    (tmp_path / "0.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"no picture with a caption in it: '0\.tif': suffix \.tif is not of a picture$"
    ):
        tool(tmp_path, "--out", tmp_path / "out")


def test_only_neighbouring_rows_are_one_sample(tmp_path: Path, images: Path, tool: Tool) -> None:
    rows = "image,caption\n0.jpg,a\n0.jpg,\n0.jpg,b\n4.jpg,c\n0.jpg,d\n"
    result = tool(write_csv(images, rows), "--out", tmp_path / "out")
    assert [record["captions"] for record in records(tmp_path / "out")] == [["a", "b"], ["c"], ["d"]]
    assert skipped(tmp_path / "out") == [{"row": 2, "file": "0.jpg", "reason": "empty caption"}]
    assert result["repeated"] == 1
    assert "repeated elsewhere" in tool.printed


def test_defects_are_left_out_and_named(tmp_path: Path, images: Path, tool: Tool) -> None:
    os.mkfifo(images / "pipe.jpg")  # must not be waited for
    (images / "link.jpg").symlink_to(images / "0.jpg")
    more = "pipe.jpg,a pipe\n.,a folder\nlink.jpg,a link\n,none\n0.jpg\n5.jpg,   \n6.jpg,bad \udcff\n"
    more += f"{images / '5.jpg'},absolute\n../images/6.jpg,beside\n"
    tool(write_csv(tmp_path, EIGHT + more), "--images-root", images, "--out", tmp_path / "out", "--per-shard", "3")
    reasons = {(entry["row"], entry["reason"]) for entry in skipped(tmp_path / "out")}
    assert reasons == {
        (3, "truncated picture"),
        (4, "not a picture"),
        (8, "missing file"),
        (9, "not a file"),
        (10, "not a file"),
        (12, "no picture named"),
        (13, "wrong number of columns"),
        (14, "empty caption"),
        (15, "caption is not UTF-8"),
    }
    kept = {record["filename"] for record in records(tmp_path / "out")}
    assert kept == {f"{n}.jpg" for n in (0, 1, 4, 5, 6)} | {"link.jpg", str(images / "5.jpg"), "../images/6.jpg"}


def test_shrink_and_what_is_stored_for_it(tmp_path: Path, images: Path, tool: Tool) -> None:
    (images / "0.jpg").write_bytes(picture(0, "png", (40, 81)))
    source = write_csv(images, "image,caption\n0.jpg,large\n1.jpg,small\n")
    tool(source, "--out", tmp_path / "out", "--shrink", 20)
    large, small = samples(tmp_path / "out")
    record = json.loads(large["json"])
    assert Image.open(io.BytesIO(large["jpg"])).size == (record["width"], record["height"]) == (20, 40)
    assert (record["original_width"], record["original_height"]) == (40, 81)
    assert record["sha256"] == hashlib.sha256(large["jpg"]).hexdigest()
    assert small["png"] == picture(1, "png")


def test_no_verify_reads_headers_alone(tmp_path: Path, images: Path, tool: Tool) -> None:
    result = tool(write_csv(images, EIGHT), "--out", tmp_path / "out", "--no-verify")
    assert result["skipped"] == {"missing file": 1, "not a picture": 1}


def test_quotes_as_plain_characters(tmp_path: Path, images: Path, tool: Tool) -> None:
    source = write_csv(images, 'image\tcaption\n0.jpg\t"Sit" said the man\n4.jpg\t6" nails\n', "list.tsv")
    with pytest.raises(UserError, match=r"line 2: .* say --no-quotes"):
        tool(source, "--out", tmp_path / "out")
    tool(source, "--out", tmp_path / "out", "--no-quotes")
    assert [record["caption"] for record in records(tmp_path / "out")] == ['"Sit" said the man', '6" nails']


def test_tokens_are_those_of_the_captions(tmp_path: Path, images: Path, tool: Tool) -> None:
    from clipdist import config
    from clipdist.data.tokens import make_tokenizer, token_kind, unpack_tokens
    from clipdist.models.spec import resolve_spec

    model = "configs/models/tiny_vit.json"
    tokenizer = make_tokenizer(resolve_spec(config.Model(name=model)))
    source = write_csv(images, "image,caption\n2.jpg,left out\n0.jpg,a dog\n0.jpg,two cats\n4.jpg,a ☃\n")
    tool(source, "--out", tmp_path / "out", "--tokens", model)
    kind = token_kind(tokenizer)
    length = tokenizer.context_length
    for sample, captions in zip(samples(tmp_path / "out"), (["a dog", "two cats"], ["a ☃"]), strict=True):
        assert list(sample) == ["jpg", "txt", "json", kind, "key"]
        ids = unpack_tokens(sample[kind], len(captions), length)
        assert ids is not None
        assert ids.tolist() == tokenizer(captions).tolist()
        assert ids.dtype == tokenizer(captions).dtype
        assert unpack_tokens(sample[kind], len(captions) + 1, length) is None
        assert unpack_tokens(sample[kind][:-1], len(captions), length) is None


# --- runs again, and runs that are cut off ---


def test_the_bytes_do_not_depend_on_processes_or_interruptions(
    tmp_path: Path, images: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = write_csv(images, EIGHT), ["--per-shard", 2]
    whole = tool(source, "--out", tmp_path / "one", *options)
    tool(source, "--out", tmp_path / "two", *options, processes=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert (whole["samples"], whole["shards"], whole["shards_written_now"]) == (5, 3, 4)
    assert whole["skipped"] == {"missing file": 1, "not a picture": 1, "truncated picture": 1}
    real, written = pair_shards.write_shard, []

    def fails_at_the_third(path, samples):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return real(path, samples)

    out = tmp_path / "three"
    with monkeypatch.context() as patch:
        patch.setattr(pair_shards, "write_shard", fails_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            tool(source, "--out", out, *options)
    assert "the same command goes on" in tool.capsys.readouterr().err
    assert written == ["00000.tar", "00001.tar"]
    with open(out / "shards.jsonl", "ab") as journal:
        journal.write(b'{"shard": 2, "capt')  # what a kill may leave
    (out / "00002.tar.tmp").write_bytes(b"half a shard")
    before = (out / "00000.tar").stat().st_mtime_ns
    again = tool(source, "--out", out, *options)
    assert again["shards_written_now"] == 2
    assert {**again, "out": "", "seconds": 0, "shards_written_now": 4} == {**whole, "out": "", "seconds": 0}
    assert files_of(out) == files_of(tmp_path / "one")
    assert (out / "00000.tar").stat().st_mtime_ns == before


def test_a_shard_that_went_is_written_again(tmp_path: Path, images: Path, tool: Tool) -> None:
    source, out = write_csv(images, EIGHT), tmp_path / "out"
    first = tool(source, "--out", out, "--per-shard", 3)
    before = {name: data for name, data in files_of(out).items() if name != "shards.jsonl"}
    (out / "00000.tar").unlink()
    (out / "00001.tar.idx.npz").unlink()
    (out / "00002.tar").write_bytes(b"cut off")
    again = tool(source, "--out", out, "--per-shard", 3)
    assert again["shards_written_now"] == 3
    assert again["skipped"] == first["skipped"]
    assert {name: data for name, data in files_of(out).items() if name != "shards.jsonl"} == before
    assert tool(source, "--out", out, "--per-shard", 3)["shards_written_now"] == 0
    assert "nothing to do" in tool.printed


def test_a_range_without_usable_pictures_has_no_shard(tmp_path: Path, images: Path, tool: Tool) -> None:
    source = write_csv(images, "image,caption\n0.jpg,a\n2.jpg,b\n3.jpg,c\n4.jpg,d\n")
    assert tool(source, "--out", tmp_path / "out", "--per-shard", 1)["shards"] == 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == [
        *("00000.tar", "00000.tar.idx.npz", "00003.tar", "00003.tar.idx.npz")
    ]
    assert tool(source, "--out", tmp_path / "out", "--per-shard", 1)["shards_written_now"] == 0


def test_another_plan_is_refused(tmp_path: Path, images: Path, tool: Tool) -> None:
    source, out = write_csv(images, EIGHT), tmp_path / "out"
    tool(source, "--out", out)
    with pytest.raises(UserError, match=r"per_shard was 1000, now 2; choose another --out, or remove"):
        tool(source, "--out", out, "--per-shard", 2)
    with pytest.raises(UserError, match="verified was True, now False"):
        tool(source, "--out", out, "--no-verify")
    write_csv(images, EIGHT.replace("picture 5", "picture five"))
    with pytest.raises(UserError, match=r"list was '\w+', now"):
        tool(source, "--out", out)
    write_csv(images, EIGHT)
    os.utime(source)  # the content counts, not the time
    assert tool(source, "--out", out)["shards_written_now"] == 0


def test_folders_of_others_are_left_alone(tmp_path: Path, images: Path, tool: Tool) -> None:
    source, out = write_csv(images, EIGHT), tmp_path / "out"
    out.mkdir()
    for name, text in (("00000.tar", "mine"), ("plan.json", '{"tool": "other"}'), ("plan.json", "[")):
        (out / name).write_text(text)
        with pytest.raises(UserError, match=f"{name}: was not written by this tool"):
            tool(source, "--out", out)
        (out / name).unlink()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run is writing"):
        tool(source, "--out", out)
    os.close(descriptor)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tool(source, "--out", tmp_path / "file")


def test_nothing_usable_leaves_nothing_behind(tmp_path: Path, images: Path, tool: Tool) -> None:
    source, out = write_csv(tmp_path, EIGHT), tmp_path / "out"
    with pytest.raises(UserError, match=r"8 x missing file; relative names start at .* \(--images-root\)"):
        tool(source, "--out", out)
    assert list(out.iterdir()) == []
    assert tool(source, "--images-root", images, "--out", out)["samples"] == 5


def test_a_full_disk_is_a_fault(tmp_path: Path, images: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_csv(images, EIGHT), tmp_path / "out"

    def full(path, samples):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pair_shards, "write_shard", full)
        with pytest.raises(Fault, match=r"00000\.tar: cannot be written \(No space left"):
            tool(source, "--out", out)
    assert tool(source, "--out", out)["samples"] == 5


# --- bad input ---


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", None, "no such file"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b" \n\n", "is empty"),
        ("a.csv", b"image,caption\n", "no picture with a caption in it"),
        ("a.csv", b"image,caption\n0.jpg,\n", "row 1 '0.jpg': empty caption"),
        ("a.csv", b"image,words\n0.jpg,a\n", "--caption-column of tools/shard_pairs.py; the columns are: image, words"),
        ("a.csv", b"a dog\thttp://x/y.jpg\n", "name it with --image-column of tools/shard_pairs.py"),
        ("a.csv", b"image,image,caption\n", "two columns have the name 'image'"),
        ("a.csv", b"\x89PNG\0\0\0", "not a text in UTF-8"),
        ("a.csv", b'image,caption\n0.jpg,"open\n', "line 2: unexpected end of data"),
        ("a.csv", b"url,caption\nhttps://x.org/y.jpg,a\n", r"row 1: https://x.org/y.jpg is an address.*img2dataset"),
        ("a.csv.gz", b"\x1f\x8b", "is packed"),
        ("a.parquet", b"PAR1 and no more", "not a Parquet file|pip install pyarrow"),
        ("a.jsonl", b'{"image": "0.jpg", "caption": "a"}\n\n{"image"\n', "line 3: not JSON"),
        ("a.jsonl", b"1\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"image": "\\u0000.jpg", "caption": "a"}\n', "1 x missing file"),
        ("a.json", b'[{"image": "0.jpg"}]', "is one JSON array"),
        ("a.json", b'{"images": [{"sentences": []}]}', "is Karpathy's JSON, of several splits.*jq -c"),
        (
            "a.json",
            b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}',
            "not COCO's captions .*'caption'",
        ),
        ("a.json", b'{"images": [{"id": 1}], "annotations": [{"image_id', "not COCO's captions .*Unterminated"),
    ],
)
def test_bad_lists(tmp_path: Path, images: Path, tool: Tool, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (images / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        tool(images / name, "--out", tmp_path / "out")
    assert files_of(tmp_path / "out") == {}


def test_parquet_that_is_cut_off_or_cannot_be_read(
    tmp_path: Path, images: Path, tool: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        (images / "list.parquet").write_bytes(b"PAR1")
        with pytest.raises(UserError, match="pip install pyarrow"):
            tool(images / "list.parquet", "--out", tmp_path / "out")
    data = as_parquet(images)
    (images / "list.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a Parquet file, or cut off"):
        tool(images / "list.parquet", "--out", tmp_path / "out")
    (images / "list.parquet").write_bytes(data[:4] + bytes(100) + data[104:])
    with pytest.raises(UserError, match="damaged after row"):
        tool(images / "list.parquet", "--out", tmp_path / "out")


def test_columns_that_are_named(tmp_path: Path, images: Path) -> None:
    source = write_csv(images, "image,caption,title,shot\n0.jpg,a,b,4.jpg\n")
    both = open_list(source, None, ["title", "caption"])
    assert list(both) == [Pair(1, "0.jpg", ("b", "a"), {"shot": "4.jpg"})]
    assert list(open_list(source, "shot", ["title"])) == [Pair(1, "4.jpg", ("b",), {"image": "0.jpg", "caption": "a"})]
    with pytest.raises(UserError, match=r"--image-column no: .* its columns are: image, caption, title, shot"):
        open_list(source, image_column="no")
    with pytest.raises(UserError, match="cannot hold both"):
        open_list(source, "image", ["image"])
    with pytest.raises(UserError, match="has no columns"):
        open_list(images, "image")


def test_fingerprint_changes_with_every_cell(images: Path) -> None:
    texts = ["image,caption,n\n0.jpg,a,1\n0.jpg,b,1\n", "image,caption,n\n0.jpg,a,2\n0.jpg,b,1\n"]
    texts += ["image,caption,n\n0.jpg,b,1\n0.jpg,a,1\n", "image,caption,n\n0.jpg,a,1\n1.jpg,b,1\n"]
    texts += ["image,caption,n\n0.jpg,a,1\n0.jpg,b,1\n0.jpg,,1\n"]
    assert len({survey(open_list(write_csv(images, text))).fingerprint for text in texts}) == len(texts)
    assert Skip(3, "0.jpg", "empty caption") in open_list(images / "list.csv")


@pytest.mark.parametrize(
    "words", [["--per-shard", "0"], ["--per-shard", "10001"], ["--shrink", "-1"], ["--shrink", "9", "--no-verify"]]
)
def test_bad_options(tmp_path: Path, tool: Tool, words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        tool(tmp_path, "--out", tmp_path / "out", *words)
    assert exit.value.code == 2


def test_the_command(tmp_path: Path, images: Path) -> None:
    """As people type it, on two processes: exit codes, one line on stderr, JSON on the last line; no torch."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", str(TOOL), *(str(word) for word in words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    def said(run: subprocess.CompletedProcess[str]) -> list[str]:
        return [line for line in run.stderr.splitlines() if not line.startswith("import time:")]

    write_csv(images, EIGHT)
    shutil.copytree(images, tmp_path / "in")
    bad = run("nowhere.csv", "--out", "out")
    assert (bad.returncode, bad.stdout, said(bad)) == (2, "", ["error: nowhere.csv: no such file or folder"])
    good = run("in/list.csv", "--out", "out", "--per-shard", "3", "--processes", "2", "--json")
    assert (good.returncode, said(good)) == (0, [])
    assert json.loads(good.stdout.splitlines()[-1])["samples"] == 5
    assert "| torch" not in good.stderr
    assert "examples:" in run("--help").stdout
