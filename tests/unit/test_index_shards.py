"""tools/index_shards.py: what it writes, finds, keeps and drops, and how it ends."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist.data.bad_sample import REASONS
from clipdist.data.catalog import Catalog
from clipdist.data.consolidated import Consolidated
from clipdist.data.index import load_index, scan_shard, stored_index
from clipdist.data.reader import Reader
from clipdist.datasets.examine import DEFECTS
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import EXIT_FAULT, Fault, UserError

_spec = importlib.util.spec_from_file_location("index_shards", Path(__file__).parents[2] / "tools" / "index_shards.py")
assert _spec is not None
assert _spec.loader is not None
tool = importlib.util.module_from_spec(_spec)
sys.modules["index_shards"] = tool  # dataclasses look their module up
_spec.loader.exec_module(tool)


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def sample(key: str, width: int, height: int, caption: bytes = b"a dog", /, **fields: object) -> Sample:
    return Sample(key, {"jpg": picture(width, height), "txt": caption, "json": json.dumps(fields).encode()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, without indices: 3 good samples of several sizes; 1 good one, and 6 with a defect each."""
    folder = tmp_path / "set"
    folder.mkdir()
    good = [
        sample("a", 40, 20, similarity=0.3, nsfw=False, note="text"),
        sample("b", 30, 30, "zwölf".encode(), similarity=0.1),
        sample("c", 90, 20, captions=["one", "second"], width=1),
    ]
    members = dict(sample("x", 40, 40).members)
    bad = [
        sample("d", 40, 40, similarity=0.9),
        Sample("cut", {**members, "jpg": members["jpg"][:-200]}),
        Sample("none", {"txt": b"t"}),
        Sample("text", {**members, "jpg": b"no picture"}),
        Sample("mute", {**members, "txt": b"  "}),
        Sample("latin", {**members, "txt": b"\xff"}),
        Sample("list", {**members, "json": b"[1]"}),
    ]
    write_shard(folder / "0.tar", good)
    write_shard(folder / "1.tar", bad)
    for path in folder.glob("*.npz"):
        path.unlink()
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, dict, str]:
    """Exit code, the JSON object, and what went to stderr."""
    monkeypatch.setattr(sys, "argv", ["index_shards.py", *map(str, arguments), "--json", "--processes", "1"])
    code = tool.main()
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


DEFECTIVE = {
    "truncated image": 1,
    "missing image": 1,
    "not an image": 1,
    "missing caption": 1,
    "caption not UTF-8": 1,
    "not JSON": 1,
}


def test_headers_only(folder: Path, monkeypatch, capsys) -> None:
    code, result, _ = run(monkeypatch, capsys, folder)
    assert (code, result["shards_indexed_now"], result["samples"], result["kept"]) == (0, 2, 10, 10)
    index = stored_index(folder / "0.tar")
    assert index is not None
    assert (index.keys.tolist(), index.columns, index.crc) == (["a", "b", "c"], {}, None)
    assert run(monkeypatch, capsys, folder)[1]["shards_indexed_now"] == 0
    assert run(monkeypatch, capsys, folder, "--force")[1]["shards_indexed_now"] == 2


def test_verify_finds_defects_and_fills_columns(folder: Path, monkeypatch, capsys) -> None:
    code, result, said = run(monkeypatch, capsys, folder, "--verify")
    assert code == 0  # defective samples are training's to count; the shards are whole
    assert result["dropped"] == DEFECTIVE
    assert (result["samples"], result["kept"]) == (10, 4)
    assert f"{folder}/1.tar: 'cut': truncated image" in said
    index = load_index(folder / "0.tar")
    assert index.columns["width"].tolist() == [40, 30, 90]  # the picture's, whatever the .json says
    assert index.columns["height"].tolist() == [20, 30, 20]
    assert index.columns["caption_length"].tolist() == [5, 5, 3]
    assert index.columns["defect"].tolist() == [0, 0, 0]
    assert index.columns["width"].dtype == np.int64
    np.testing.assert_array_equal(index.columns["similarity"], [0.3, 0.1, np.nan])
    np.testing.assert_array_equal(index.columns["nsfw"], [0, np.nan, np.nan])
    assert "note" not in index.columns
    reader = Reader(Catalog.open([str(folder)]))
    assert reader.sample(0).image() == picture(40, 20)  # compared with the checksum
    reader.close()
    damaged = load_index(folder / "1.tar")
    assert len(damaged) == 7
    assert [DEFECTS[code] for code in damaged.columns["defect"].tolist()][:2] == ["", "truncated image"]


def test_what_verify_found_stays(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    run(monkeypatch, capsys, folder, "--verify")
    assert run(monkeypatch, capsys, folder)[1]["shards_indexed_now"] == 0
    assert run(monkeypatch, capsys, folder, "--verify")[1]["shards_indexed_now"] == 0
    index = stored_index(folder / "0.tar")
    assert index is not None
    assert index.crc is not None
    _, result, _ = run(monkeypatch, capsys, folder, "--out", tmp_path / "all.index.zip")
    assert (result["dropped"], result["shards_indexed_now"]) == (DEFECTIVE, 0)
    assert run(monkeypatch, capsys, folder, "--verify", "--force")[1]["shards_indexed_now"] == 2


def test_a_flipped_bit_is_found_by_the_checksum(folder: Path, monkeypatch, capsys) -> None:
    run(monkeypatch, capsys, folder, "--verify")
    index = load_index(folder / "0.tar")
    data = bytearray((folder / "0.tar").read_bytes())
    data[index.offset[1, 1]] ^= 1  # the caption of b
    (folder / "0.tar").write_bytes(data)
    _, result, said = run(monkeypatch, capsys, folder / "0.tar", "--verify")
    assert result["dropped"] == {"wrong checksum": 1}
    assert f"{folder}/0.tar: 'b': wrong checksum" in said


@pytest.mark.parametrize(
    ("where", "keys", "passed"),
    [
        (["width >= 40"], ["a", "c"], [2]),
        (["aspect <= 2"], ["a", "b"], [2]),
        (["short >= 20", "similarity > 0.2"], ["a"], [3, 1]),
        (["caption_length < 5"], ["c"], [1]),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_where_keeps_what_meets_all(
    folder: Path,
    monkeypatch,
    capsys,
    tmp_path: Path,
    where: list[str],
    keys: list[str],
    passed: list[int],
    verify: bool,
) -> None:
    out = tmp_path / "some.index.zip"
    options = [option for text in where for option in ("--where", text)] + ["--verify"] * verify
    code, result, _ = run(monkeypatch, capsys, folder / "0.tar", "--out", out, *options)
    assert code == 0
    assert result["conditions"] == {text: {"passed": n, "dropped": 3 - n} for text, n in zip(where, passed)}
    book = Consolidated(out)
    assert book.rule == " and ".join(where)
    assert book.load(0).keys.tolist() == keys
    assert result["kept"] == len(Catalog.open([str(out)])) == len(keys)
    assert list(folder.glob("*.npz")) == []  # nothing is written beside the shards


def test_a_consolidated_file_can_be_filtered_again(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    first, second = tmp_path / "first.index.zip", tmp_path / "second.index.zip"
    run(monkeypatch, capsys, folder, "--verify", "--out", first)
    assert [len(Consolidated(first).load(i)) for i in range(2)] == [3, 1]
    code, result, _ = run(monkeypatch, capsys, first, "--where", "similarity >= 0.3", "--out", second)
    assert (code, result["kept"], result["shards_indexed_now"]) == (0, 2, 0)
    assert [Consolidated(second).load(i).keys.tolist() for i in range(2)] == [["a"], ["d"]]


def test_addresses_are_fetched_and_indexed_into_one_file(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    cache, out = tmp_path / "cache", tmp_path / "all.index.zip"
    cache.mkdir()
    address = f"{folder.as_uri()}/{{0,1}}.tar"
    code, result, _ = run(monkeypatch, capsys, address, "--verify", "--out", out, "--cache", cache)
    assert (code, result["kept"], result["dropped"]) == (0, 4, DEFECTIVE)
    assert list(cache.iterdir()) == []
    book, local = Consolidated(out), scan_shard(folder / "0.tar")
    assert book.tars[0] == f"{folder.as_uri()}/0.tar"
    assert np.array_equal(book.load(0).offset, local.offset)
    assert book.load(0).tar_bytes == (folder / "0.tar").stat().st_size
    code, result, said = run(monkeypatch, capsys, f"{folder.as_uri()}/{{0,7}}.tar", "--out", out)
    assert code == EXIT_FAULT
    assert list(result["damaged"]) == [f"{folder.as_uri()}/7.tar"]
    assert "damaged: " in said


def test_damaged_shards(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    cut = folder / "0.tar"
    cut.write_bytes(cut.read_bytes()[: int(scan_shard(cut).offset[2, 0]) + 100])
    out = tmp_path / "all.index.zip"
    code, result, said = run(monkeypatch, capsys, folder, "--out", out)
    assert code == EXIT_FAULT
    assert list(result["damaged"]) == [str(cut)]
    assert f"damaged: {cut}: not a tar file, or cut off" in said
    assert Consolidated(out).tars == [str(folder / "1.tar")]
    code, result, _ = run(monkeypatch, capsys, folder, "--out", out, "--salvage")
    assert (code, list(result["damaged"])) == (0, [str(cut)])
    assert Consolidated(out).load(0).keys.tolist() == ["a"]  # of b nobody knows whether it had more members
    assert run(monkeypatch, capsys, folder)[0] == EXIT_FAULT
    assert not (folder / "0.tar.idx.npz").exists()
    assert run(monkeypatch, capsys, folder, "--salvage")[0] == 0
    assert load_index(cut).keys.tolist() == ["a"]
    with tarfile.open(cut, "w") as archive:  # as plain `tar cf` of a folder may write it
        for name in ("a.jpg", "b.jpg", "a.txt", "b.txt"):
            archive.addfile(tarfile.TarInfo(name))
    code, result, said = run(monkeypatch, capsys, folder, "--out", out, "--salvage")
    assert (code, Consolidated(out).tars) == (EXIT_FAULT, [str(folder / "1.tar")])  # no half of a sample
    assert "the members of 2 samples ('a' is the first) do not stand together" in said
    assert "tar --sort=name -cf" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "SHARDS: no shards match nowhere"),
        (["text.tar"], "text.tar: not a tar file"),
        (["empty.tar"], "no samples in 1 shards"),
        (["blind.tar"], "no pictures in 1 shards: their members are json, txt"),
        (["set", "--out", "absent/x.index.zip"], "absent: no such folder"),
        (["set", "--where", "width", "--out", "x.index.zip"], "expected a column"),
        (["set", "--where", "widht > 3", "--out", "x.index.zip"], "no such column; there are: aspect, caption_length"),
        (["set", "--where", "width > 1e9", "--out", "x.index.zip"], "none of 10 samples meets width > 1000000000"),
        (["set", "--cache", "absent"], "absent: no such folder"),
        (["https://host/0.tar"], "needs --out"),
        (["pipe:cat 0.tar", "--out", "x.index.zip"], "shell command is refused"),
    ],
)
def test_bad_input_is_told(folder: Path, monkeypatch, tmp_path: Path, arguments: list[str], text: str, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.tar").write_text("no tar at all\n" * 100)
    write_shard("empty.tar", [])
    write_shard("blind.tar", [Sample("a", {"txt": b"t", "json": b"{}"})])
    monkeypatch.setattr(sys, "argv", ["index_shards.py", *arguments, "--processes", "1"])
    with pytest.raises(UserError, match=text):
        tool.main()
    assert not Path("x.index.zip").exists()
    assert "damaged" not in capsys.readouterr().err  # one line says it all


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--where", "width > 3"], "--where needs --out"),
        (["--out", "x.zip"], "must end in .index.zip"),
        (["--processes", "-1"], "must lie in"),
    ],
)
def test_options_that_do_not_go_together(folder: Path, monkeypatch, capsys, arguments: list[str], text: str) -> None:
    monkeypatch.setattr(sys, "argv", ["index_shards.py", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.parse_arguments()
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_where_nothing_is_left_it_is_a_fault(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    cut = folder / "0.tar"
    cut.write_bytes(cut.read_bytes()[: int(scan_shard(cut).offset[2, 0]) + 100])
    with pytest.raises(Fault, match="none of 1 samples can be used: in a damaged shard; --salvage keeps"):
        run(monkeypatch, capsys, cut, "--out", tmp_path / "x.index.zip")
    assert not (tmp_path / "x.index.zip").exists()
    write_shard(tmp_path / "cap.tar", [Sample("a", {"jpg": picture(40, 20), "cap": b"a dog"})])
    out = ("--verify", "--out", tmp_path / "x.index.zip")
    with pytest.raises(Fault, match=r"missing caption; their members are cap, jpg; see --caption-members"):
        run(monkeypatch, capsys, tmp_path / "cap.tar", *out)
    assert run(monkeypatch, capsys, tmp_path / "cap.tar", *out, "--caption-members", "cap")[1]["kept"] == 1


def test_images_alone_are_kept_where_no_captions_are_needed(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    assert run(monkeypatch, capsys, folder, "--verify")[1]["dropped"] == DEFECTIVE
    for words in (["--verify"], []):  # of indices that an earlier run made, the latter
        out = tmp_path / f"{len(words)}.index.zip"
        _, result, _ = run(monkeypatch, capsys, folder, *words, "--images-only", "--out", out)
        assert result["dropped"] == {name: 1 for name in DEFECTIVE if name != "missing caption"}
        assert "mute" in Catalog.open([str(out)]).table(1).keys


def test_every_reason_of_training_has_its_place() -> None:
    assert set(REASONS) <= set(DEFECTS)
    assert (DEFECTS.index("missing image"), DEFECTS.index("shard cut off")) == (1, 10)  # as in indices that exist


def test_processes_make_no_difference(folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    shutil.copytree(folder, tmp_path / "more")
    outs = []
    for processes in ("1", "2"):
        outs.append(tmp_path / f"{processes}.index.zip")
        arguments = ["x", str(folder), str(tmp_path / "more"), "--out", str(outs[-1]), "--processes", processes]
        monkeypatch.setattr(sys, "argv", arguments)
        assert tool.main() == 0
    one, two = (Consolidated(out) for out in outs)
    assert (
        one.tars
        == two.tars
        == [str(tmp_path / name) for name in ("set/0.tar", "set/1.tar", "more/0.tar", "more/1.tar")]
    )
    assert np.array_equal(one.digests, two.digests)
    assert Catalog.open([str(outs[0])]).fingerprint() == Catalog.open([str(outs[1])]).fingerprint()
