"""Contact sheets: pictures where they belong, text inside its column; the search tool end to end on a tiny model."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from clipdist import config
from clipdist.data.catalog import Catalog
from clipdist.evals import sheet
from clipdist.evals.embed import Embeddings
from clipdist.evals.sheet import CORRECT, GAP, MARGIN, MAT, PAPER, SheetRow, contact_sheet, retrieval_sheet

REPOSITORY = Path(__file__).resolve().parents[2]
COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))


def colour_at(image: Image.Image, x: float, y: float) -> tuple[int, ...]:
    return tuple(np.asarray(image)[int(y), int(x)].tolist())


def column_of(image: Image.Image, colour: tuple[int, ...]) -> set[int]:
    """Which tiles (of 100 pixels) hold a colour."""
    _, xs = np.where((np.asarray(image) == colour).all(2))
    return set(((xs - MARGIN) // (100 + GAP)).tolist())


def test_pictures_of_every_kind_stand_in_order() -> None:
    pillow = Image.new("RGB", (50, 50), COLOURS[0])
    array = np.full((30, 30, 3), COLOURS[1], dtype=np.uint8)
    tensor = torch.tensor(COLOURS[2], dtype=torch.uint8)[:, None, None].expand(3, 70, 70)
    result = contact_sheet([SheetRow("query", [pillow, array, tensor], ["a", "b", "c"])], tile=100)
    assert result.width == 2 * MARGIN + 3 * 100 + 2 * GAP
    assert [column_of(result, colour) for colour in COLOURS] == [{0}, {1}, {2}]


def test_aspect_is_kept() -> None:
    wide = Image.new("RGB", (200, 100), COLOURS[0])
    result = contact_sheet([SheetRow("", [wide], [""])], tile=100)
    ys, xs = np.where((np.asarray(result) == COLOURS[0]).all(2))
    assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == (100, 50)
    assert colour_at(result, MARGIN + 50, ys.min() - 5) == MAT


def test_the_right_answer_has_a_frame_also_on_a_second_line() -> None:
    pictures = [Image.new("RGB", (10, 10), COLOURS[0])] * 11
    framed = contact_sheet([SheetRow("q", pictures, [""] * 11, correct=9)], tile=100)
    assert column_of(framed, CORRECT) == {1}
    assert framed.width == 2 * MARGIN + 8 * 100 + 7 * GAP
    ys, _ = np.where((np.asarray(framed) == CORRECT).all(2))
    assert ys.min() > 100
    assert not column_of(contact_sheet([SheetRow("q", pictures, [""] * 11)], tile=100), CORRECT)


def test_text_stays_inside_its_column() -> None:
    label = "1.  0.3\n" + "w" * 60 + " many words that go on and on " * 4
    result = contact_sheet([SheetRow("word " * 300, [Image.new("RGB", (9, 9))] * 2, [label, ""])], tile=100)
    ink = (np.asarray(result) != PAPER).any(2)
    assert not ink[:, :MARGIN].any()
    assert not ink[:, result.width - MARGIN :].any()
    gap = ink[:, MARGIN + 101 : MARGIN + 100 + GAP]
    assert not gap[-100:].any()  # under the pictures, nothing between the columns
    assert ink[-100:].any()


@pytest.mark.parametrize("text", ["", "one", "a b " * 200, "x" * 500, "first\nsecond " + "y" * 90])
def test_wrapping(text: str) -> None:
    font = ImageFont.load_default(size=14)
    lines = sheet._wrap(text, font, 120, 4)
    assert len(lines) <= 4
    assert all(font.getlength(line) <= 120 for line in lines)
    whole = "".join(sheet._wrap(text, font, 120, 10**6)).replace(" ", "")
    assert whole == "".join(text.split())  # nothing is lost unless it is cut
    assert ("...".join(lines[-1:]).endswith("...")) == (len(sheet._wrap(text, font, 120, 10**6)) > 4)


def test_refuses_rows_without_labels() -> None:
    with pytest.raises(ValueError, match="as many labels"):
        contact_sheet([SheetRow("q", [Image.new("RGB", (9, 9))], [])])
    with pytest.raises(ValueError, match="needs rows"):
        contact_sheet([])


def write_shard(path: Path, count: int, hue: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (48, 32), (hue, 25 * row, 100)).save(buffer, "PNG" if row == 1 else "JPEG")
            record = {"captions": [f"picture {row}", "another"], "filename": f"file{row}.jpg"}
            for kind, data in (("jpg", buffer.getvalue()), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{hue:04d}{row:05d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_retrieval_sheet_frames_the_captions_own_picture(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", 4, 200)
    catalog = Catalog.open([str(tmp_path)])
    embeddings = Embeddings(
        image=torch.eye(3),
        text=torch.eye(3)[[1, 2]],
        text_image=torch.tensor([1, 0]),  # the second caption's own picture comes last
        captions=["finds its own", "finds another"],
        keys=["a", "b", "c"],
        sample_ids=torch.tensor([0, 2, 3]),  # sample 1 was bad
        bad={},
    )
    only_best = retrieval_sheet(embeddings, catalog, queries=8, hits=1)
    ys, _ = np.where((np.asarray(only_best) == CORRECT).all(2))
    assert len(ys)
    assert ys.max() < only_best.height / 2  # in the first of the two rows alone
    assert retrieval_sheet(embeddings, catalog, queries=1, hits=3).width > only_best.width


def run_search(monkeypatch: pytest.MonkeyPatch, run_dir: Path, *arguments: str) -> None:
    """The tool's main, in this process, on a tiny model with random weights as if it came from a run."""
    from clipdist.data.tokens import make_tokenizer
    from clipdist.models import load
    from clipdist.models.build import build_model

    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json")))
    loaded = load.LoadedModel(model.eval(), make_tokenizer(model.spec), "tiny", run_dir=run_dir, step=3)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(sys, "argv", ["search_images.py", str(run_dir), *arguments])
    runpy.run_path(str(REPOSITORY / "tools/search_images.py"))["main"]()


def test_search_in_several_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "one/00000.tar", 3, 10)
    write_shard(tmp_path / "two/00000.tar", 4, 240)
    folders = [str(tmp_path / "one"), str(tmp_path / "two")]
    run_search(monkeypatch, tmp_path / "run", *folders, "--top-k", "20", "--device", "cpu", "--json", "This is a DOG!")
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["query"] == "This is a DOG!"
    assert [hit["rank"] for hit in record["hits"]] == list(range(1, 8))  # all seven, though 20 were asked for
    scores = [hit["score"] for hit in record["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert {Path(hit["shard"]).parent.name for hit in record["hits"]} == {"one", "two"}
    best = record["hits"][0]
    assert best["caption"] == f"picture {int(best['key'][-5:])}"
    assert best["filename"] == f"file{int(best['key'][-5:])}.jpg"
    assert record["sheet"] == str(tmp_path / "run/search/this-is-a-dog.png")
    assert Image.open(record["sheet"]).width == 2 * MARGIN + 7 * sheet.TILE + 6 * GAP
    assert best["key"] in "\n".join(lines[:-1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "shards", "  "], "the sentence is empty"),
        (["run", "only one word"], "a sentence at the end"),
        (["run", "shards", "more.tar"], "more.tar are shards"),
        (["run", "shards", "a dog", "--out", "dog.txt"], "must end in .png"),
        (["run", "shards", "a dog", "--top-k", "0"], "at least 1"),
        (["run", "no/such/shards", "a dog"], "no shards match no/such/shards"),
    ],
)
def test_bad_input(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "no/such/shards" in arguments:  # one of them as people run it
        command = [sys.executable, str(REPOSITORY / "tools/search_images.py"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert says in result.stderr
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["search_images.py", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "tools/search_images.py"))["main"]()
    assert end.value.code == 2
    assert says in capsys.readouterr().err
