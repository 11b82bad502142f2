"""tools/finetune.py as users call it: the recipe, an edited one, the comparison, a second call, bad input."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pairs import draw_pair, write_pairs
from wds_sets import write_run

from clipdist.checkpoint.format import newest_checkpoint, read_manifest
from clipdist.data.catalog import Catalog
from clipdist.errors import UserError

TOOL = Path(__file__).parents[2] / "tools/finetune.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs/ (captioned shards), colours/CLASS/*.png, and the run `start`."""
    folder = tmp_path_factory.mktemp("finetune")
    write_pairs(folder / "pairs", 80)
    for number in range(80):
        picture, captions = draw_pair(number)
        path = folder / "colours" / captions[0].split()[1] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    write_run(folder / "start", 0)
    return folder


@pytest.fixture
def finetune(made: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Call the tool in this process; return its table and its record."""
    main = runpy.run_path(str(TOOL))["main"]

    def call(data: str, *words: object) -> tuple[str, dict[str, Any]]:
        code = main([str(made / data), "--from", str(made / "start"), *map(str, words), "--device", "cpu", "--json"])
        *lines, record = capsys.readouterr().out.splitlines()
        assert code == 0
        return "\n".join(lines), json.loads(record)

    return call


def test_an_edited_recipe_trains_and_both_sets_are_compared(made: Path, finetune) -> None:
    out = made / "tuned"
    table, record = finetune("pairs", "--out", out, "--dry-run")
    recipe = out / "recipe.yaml"
    assert record == {"recipe": str(recipe)}
    assert "held out, by image" in table
    assert not list((out / "checkpoints").glob("*"))
    recipe.write_text(recipe.read_text().replace("epochs: 20", "epochs: 1"))

    words = ["--out", out, "--keep", made / "colours", "--templates", "a {} square"]
    table, record = finetune("pairs", *words)
    assert [row["set"] for row in record["rows"]] == ["held out"] * 6 + ["kept (colours)"]
    for row in record["rows"]:
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["difference"] == pytest.approx(row["after"] - row["before"])
    assert "got better: " in table
    assert "got worse: " in table
    checkpoint = newest_checkpoint(out)
    assert checkpoint is not None
    manifest = read_manifest(checkpoint)
    assert manifest.step == manifest.config["train"]["epochs"] * (72 // manifest.config["train"]["global_batch"])
    assert manifest.order["fingerprint"] == Catalog.open([str(out / "train.index.zip")]).fingerprint()
    assert json.loads((out / "results/finetune.json").read_text())["rows"] == record["rows"]
    assert "Finetune" in (out / "report.html").read_text()

    before = checkpoint.stat().st_mtime_ns
    again, same = finetune("pairs", *words)  # neither trains nor measures again
    assert same == record
    assert "processes on this machine" not in again
    assert checkpoint.stat().st_mtime_ns == before


def test_a_folder_of_classes_is_measured_by_their_names(made: Path, finetune) -> None:
    table, record = finetune("colours", "--out", made / "by-class", "--dry-run", "--train", "projections")
    recipe = Path(record["recipe"]).read_text()
    assert "80 images, 4 classes" in table
    assert f'labelled: "{made}/by-class/held_out.index.zip"' in recipe
    assert "cache_features: true" in recipe


@pytest.mark.parametrize(
    ("data", "words", "told"),
    [
        ("nothing", [], "nothing: no such file or folder"),
        ("alone", [], "alone/dog: a class with one picture"),
        ("few", [], "usable images: too few to hold some out"),
        ("pairs", ["--keep", "pairs"], "--keep: .*has no label"),
        ("pairs", ["--templates", "cifar10"], "belong to --keep"),
        ("pairs", ["--out", "start"], "holds something else; name a new folder"),
        ("colours", ["--out", "other"], "holds a run with data .*pairs, not .*colours"),
        ("pairs", ["--out", "other", "--train", "full"], "recipe.yaml is there; edit it"),
    ],
)
def test_bad_input_is_told_in_one_line(
    made: Path, data: str, words: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = made / "alone"
    for folder in ("cat", "dog"):
        (alone / folder).mkdir(parents=True, exist_ok=True)
    (alone / "dog/1.png").write_bytes(draw_pair(1)[0])
    for number in (2, 3):
        (alone / f"cat/{number}.png").write_bytes(draw_pair(number)[0])
    write_pairs(made / "few", 3)
    main = runpy.run_path(str(TOOL))["main"]
    monkeypatch.chdir(made)
    if "other" in words and not Path("other").exists():
        main([str(made / "pairs"), "--from", "start", "--out", "other", "--dry-run", "--device", "cpu"])
    words = words if "--out" in words else [*words, "--out", f"bad-{data}"]
    with pytest.raises(UserError, match=told):
        main([str(made / data), "--from", "start", *words, "--device", "cpu"])
