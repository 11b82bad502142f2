"""tools/inspect_shards.py: its numbers against data whose facts are known, damage, and bad input."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdist.data.consolidated import make_part, write_parts
from clipdist.data.index import load_index, write_index
from clipdist.datasets.shard_writer import Sample, write_shard
from clipdist.errors import EXIT_FAULT, UserError

_spec = importlib.util.spec_from_file_location(
    "inspect_shards", Path(__file__).parents[2] / "tools" / "inspect_shards.py"
)
assert _spec is not None
assert _spec.loader is not None
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


def picture(width: int, height: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), width, dtype=np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 4 and 2 samples: sides 10 to 50, one picture twice, one caption twice, one without a caption."""
    folder = tmp_path / "set"
    folder.mkdir()
    texts = [["A dog.", "Two dogs run"], ["a  dog"], ["It's a cat"], []]
    samples = []
    for row, captions in enumerate(texts):
        members = {"jpg": picture(10 * (row + 1), 20, "JPEG"), "json": json.dumps({"captions": captions}).encode()}
        samples.append(Sample(f"s{row}", members))
    write_shard(folder / "0.tar", samples)
    twice = {"jpg": samples[0].members["jpg"], "txt": b"grey"}
    ids = {"png": picture(50, 20, "PNG"), "txt": b"white", "0123456789abcdef.ids": b"\0" * 8}
    write_shard(folder / "1.tar", [Sample("s4", twice), Sample("s5", ids)])
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, dict, str]:
    """Exit code, the JSON object, and what went to stderr."""
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", *map(str, arguments), "--json", "--processes", "1"])
    code = tool.main()
    said = capsys.readouterr()
    return code, json.loads(said.out.splitlines()[-1]), said.err


def test_numbers(folder: Path, monkeypatch, capsys) -> None:
    code, result, _ = run(monkeypatch, capsys, folder)
    assert code == 0
    assert (result["shards"], result["samples"], result["looked_at"]) == (2, 6, 6)
    assert result["bytes"] == sum(tar.stat().st_size for tar in folder.glob("*.tar"))
    assert result["samples_per_shard"] == {"0": 2, "50": 3, "100": 4}
    assert result["kinds"]["jpg"] == pytest.approx(100 * 5 / 6)
    assert (result["indexed"], result["shards_with_checksums"]) == (2, 2)
    assert result["token_ids"] == ["0123456789abcdef.ids"]
    pictures, captions = result["pictures"], result["captions"]
    assert pictures["formats"] == {"jpg": 5, "png": 1}
    assert (pictures["width"]["0"], pictures["width"]["50"], pictures["width"]["100"]) == (10, 25, 50)
    assert (pictures["aspect"]["0"], pictures["aspect"]["100"]) == (1, 2.5)
    assert pictures["repeated"] == 1
    assert captions["count"] == 6
    assert captions["sources"] == {"json:captions": 3, ".txt": 2}
    assert captions["repeated"] == 1  # "A dog." and "a  dog"
    assert captions["vocabulary"] == len({"a", "dog", "two", "dogs", "run", "it's", "cat", "grey", "white"})
    assert captions["most_frequent"]["a"] == 3
    assert captions["characters"]["100"] == len("Two dogs run")
    assert result["unusable"] == {"missing caption": 1}


def test_images_alone_are_whole_where_no_captions_are_needed(tmp_path: Path, monkeypatch, capsys) -> None:
    samples = [Sample(f"s{row}", {"jpg": picture(10 + row, 20, "JPEG"), "cls": b"1"}) for row in range(3)]
    write_shard(tmp_path / "0.tar", samples)
    code, result, said = run(monkeypatch, capsys, tmp_path, "--verify")
    assert (code, result["verified"], result["unusable"]) == (EXIT_FAULT, *[{"missing caption": 3}] * 2)
    assert "of 3 samples looked at none has a caption" in said
    code, result, said = run(monkeypatch, capsys, tmp_path, "--verify", "--images-only")
    assert (code, result["verified"], result["unusable"], said) == (0, {}, {}, "")
    assert (result["captions"]["count"], result["pictures"]["formats"]) == (0, {"jpg": 3})
    assert "  no captions" in tool.table(result)
    write_shard(tmp_path / "1.tar", [Sample("s9", {"jpg": b"no picture", "cls": b"1"})])
    code, result, _ = run(monkeypatch, capsys, tmp_path, "--verify", "--images-only")
    assert (code, result["verified"]) == (EXIT_FAULT, {"not an image": 1})


def test_five_lines_are_five_captions_unless_told_otherwise(tmp_path: Path, monkeypatch, capsys) -> None:
    members = {"img": picture(10, 20, "JPEG"), "txt": b"\n".join(b"caption %d" % row for row in range(5))}
    write_shard(tmp_path / "0.tar", [Sample(f"s{row}", members) for row in range(24)])
    _, result, said = run(monkeypatch, capsys, tmp_path)
    assert result["unusable"] == {"missing image": 24}
    assert "of 16 samples looked at none has an image" in said
    assert "name them: --image-members img" in said
    for words, count in (((), 120), (("--caption-lines", "whole"), 24)):
        code, result, said = run(monkeypatch, capsys, tmp_path, "--image-members", ".IMG", "--verify", *words)
        assert (code, result["captions"]["count"], result["unusable"], said) == (0, count, {}, "")
        assert list(result["captions"]["sources"].values()) == [24]


def test_a_terminal_of_another_encoding_is_no_fault(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [Sample("s0", {"jpg": picture(9, 9, "JPEG"), "txt": "naïve ☃".encode()})])
    command, env = [sys.executable, str(tool.__file__), str(tmp_path)], os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run(command, capture_output=True, env=env, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"na\\xefve 1" in ended.stdout


def test_a_sample_is_the_same_every_time(folder: Path, monkeypatch, capsys) -> None:
    first, second = (run(monkeypatch, capsys, folder, "--samples", "3")[1] for _ in range(2))
    assert first["looked_at"] == 3
    assert first == second


def test_nothing_is_written_but_the_sheet(folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    for path in folder.glob("*.npz"):
        path.unlink()
    code, result, _ = run(monkeypatch, capsys, folder, "--sheet", tmp_path / "sheet.png", "--verify")
    assert (code, result["verified"]) == (EXIT_FAULT, {"missing caption": 1})
    assert (result["indexed"], result["shards_with_checksums"]) == (0, 0)
    assert sorted(path.name for path in folder.iterdir()) == ["0.tar", "1.tar"]
    assert Image.open(tmp_path / "sheet.png").width > 400


def test_verify_names_what_is_damaged(folder: Path, monkeypatch, capsys) -> None:
    index = load_index(folder / "1.tar")
    data = bytearray((folder / "1.tar").read_bytes())
    data[index.offset[0, 0] + index.size[0, 0] // 2] ^= 0xFF
    (folder / "1.tar").write_bytes(data)
    (folder / "2.tar").write_bytes(data[:700])
    code, result, said = run(monkeypatch, capsys, folder, "--verify")
    assert code == EXIT_FAULT
    assert len(result["damaged"]) == 1
    assert f"damaged: {folder}/2.tar: not a tar file, or cut off" in said
    assert run(monkeypatch, capsys, folder / "0.tar")[0] == 0


def test_verify_trusts_no_earlier_verification(folder: Path, monkeypatch, capsys) -> None:
    write_parts(folder / "one.index.zip", map(make_part, [load_index(folder / "1.tar")]))
    stat = (folder / "1.tar").stat()
    index = load_index(folder / "1.tar")
    with open(folder / "1.tar", "r+b") as file:
        file.seek(int(index.offset[0, 1]))
        file.write(b"G")
    os.utime(folder / "1.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for name in ("1.tar", "one.index.zip"):
        code, result, said = run(monkeypatch, capsys, folder / name, "--verify")
        assert (code, result["verified"]) == (EXIT_FAULT, {"wrong checksum": 1})
        assert "1.tar: 's4': wrong checksum" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "no shards match nowhere"),
        (["text.tar"], "text.tar: not a tar file"),
        (["empty.tar"], "no samples in empty.tar"),
        (["set", "--sheet", "absent/x.png"], "no such folder"),
        (["https://127.0.0.1:1/{0..1}*.tar"], "addresses cannot be searched"),
    ],
)
def test_bad_input_is_told(folder: Path, monkeypatch, tmp_path: Path, arguments: list[str], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.tar").write_text("no tar at all\n" * 100)
    write_shard("empty.tar", [])
    monkeypatch.setattr(sys, "argv", ["inspect_shards.py", *arguments])
    with pytest.raises(UserError, match=text):
        tool.main()


# --interop


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 10 + number
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def test_webdataset_reads_the_same(folder: Path, monkeypatch, capsys) -> None:
    code, result, said = run(monkeypatch, capsys, folder, "--interop")
    expected = {"shards": 2, "samples": 6, "samples_webdataset": 6, "differences": 0, "differing": {}}
    assert (code, result) == (0, expected)
    assert "differs" not in said


@pytest.mark.parametrize(
    ("names", "samples", "lines"),
    [
        (["a.v2.jpg", "a.v2.txt", "b.jpg", "d.1/c.JPG"], (3, 3), []),  # a dot in a key begins the kind, for both
        (
            ["a.jpg", "b.jpg", "b.txt", "a.txt"],
            (1, 3),
            [
                "clipdist refuses the shard: {tar}: the members of 1 samples ('a' is the first) do not stand together",
                "'a': a sample of webdataset alone, with jpg",
                "'a': webdataset has a further sample of this key, with txt",
            ],
        ),
        (
            ["a.jpg", "b.jpg", "b.JPG", "c.jpg"],
            (2, 1),
            [
                "clipdist refuses the shard: {tar}: the key 'b' occurs twice",
                "webdataset reads no further: ValueError",
                "'c': a sample of clipdist alone",
            ],
        ),
        (["d/.a.jpg", "b.jpg"], (1, 2), ["'d/': a sample of webdataset alone, with a.jpg"]),
    ],
)
def test_where_webdataset_reads_otherwise(
    tmp_path: Path, monkeypatch, capsys, names: list[str], samples: tuple[int, int], lines: list[str]
) -> None:
    tar = write_tar(tmp_path / "0.tar", names)
    code, result, said = run(monkeypatch, capsys, tar, "--interop")
    assert code == (EXIT_FAULT if lines else 0)
    assert (result["samples"], result["samples_webdataset"]) == samples
    told = result["differing"].get(str(tar), [])
    lines = [line.format(tar=tar) for line in lines]
    assert [line[: len(start)] for line, start in zip(told, lines, strict=True)] == lines
    assert all(f"differs: {tar}: {line}" in said for line in told)


def test_an_index_that_misleads_is_noticed(folder: Path, monkeypatch, capsys) -> None:
    index = load_index(folder / "0.tar")
    index.offset[1, 0] += 3
    index.size[2, 1] -= 1
    write_index(index)
    code, result, _ = run(monkeypatch, capsys, folder, "--interop")
    assert (code, result["differences"]) == (EXIT_FAULT, 2)
    first, second = result["differing"][str(folder / "0.tar")]
    assert first.startswith("'s1': jpg: differs from byte 0 on (")
    size = index.size[2, 1]
    assert second == f"'s2': json: differs from byte {size} on ({size} bytes of clipdist, {size + 1} of webdataset)"


def test_webdataset_runs_no_command(tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(UserError, match="a shell command is refused"):
        run(monkeypatch, capsys, f"pipe:touch {tmp_path}/ran", "--interop")
    assert not (tmp_path / "ran").exists()
