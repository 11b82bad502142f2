"""Averages of weights: exact ends, every kind of tensor, the run folder that is written, the choice, bad input."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wds_sets import write_run, write_sets

from clipdist.config import load_config
from clipdist.data.catalog import Catalog
from clipdist.errors import UserError
from clipdist.models.load import load_model
from clipdist.report.history import read_runs
from clipdist.run_plan import make_plan

TOOL = Path(__file__).parents[2] / "tools/interpolate.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a, b and c of one architecture (BatchNorm included), `other` of another, and the sets."""
    folder = tmp_path_factory.mktemp("interpolate")
    write_sets(folder)
    for seed, name in enumerate("abc"):
        write_run(folder / name, seed, "tiny_rn", 1 + seed / 2)
    write_run(folder / "other", 0, "tiny_vit")
    return folder


def interpolate(*words: object) -> None:
    arguments, sys.argv = sys.argv, ["interpolate", *map(str, words), "--device", "cpu", "--json"]
    try:
        runpy.run_path(str(TOOL))["main"]()
    finally:
        sys.argv = arguments


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(str(folder)).model.state_dict()


def last(capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    *lines, record = capsys.readouterr().out.splitlines()
    return "\n".join(lines), json.loads(record)


def test_a_curve_has_exact_ends_and_its_best_is_a_run(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, shards = made / "wise", made / "pairs/test"
    words = ["--target", shards, "--keep", made / "colours", "--may-lose", 100, "--out", out]
    interpolate(made / "a", made / "b", "--alpha", "0:0.5:0.25", *words)
    table, record = last(capsys)
    curve = {row["name"]: row for row in record["curve"]}
    assert list(curve) == ["0", "0.25", "0.5", "1"]  # both ends, whatever was asked for
    assert curve["0.25"]["weights"] == [0.75, 0.25]
    for name, run in (("0", made / "a"), ("1", made / "b")):
        tool = TOOL.with_name("eval_retrieval.py")
        sys.argv = [str(tool), str(run), str(shards), "--resamples", "0", "--json", "--device", "cpu"]
        runpy.run_path(str(tool))["main"]()
        single = last(capsys)[1]
        assert {key: single[key] for key in single if key[4:] in ("r1", "r5", "r10")} == {
            key: value for key, value in curve[name].items() if key[4:] in ("r1", "r5", "r10")
        }
        assert curve[name]["mean_recall"] == pytest.approx(single["rsum"] / 6)
    asked = [row for row in record["curve"] if row["name"] != "1"]
    best = max(asked, key=lambda row: row["mean_recall"])
    assert record["taken"] == best["name"]
    assert f"taken: {best['name']}; the highest mean of the six R@K among those that keep" in table
    share = best["weights"][1]
    own, a, b = weights(out), weights(made / "a"), weights(made / "b")
    assert own.keys() == a.keys()
    assert {"logit_scale", "visual.bn1.running_mean", "visual.bn1.num_batches_tracked"} <= own.keys()
    for name, value in own.items():
        expected = (1 - share) * a[name].double() + share * b[name].double() if a[name].is_floating_point() else a[name]
        assert torch.allclose(value.double(), expected.double(), rtol=1e-6, atol=1e-7), name
    assert (out / "results/interpolate.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "results/interpolate.json").read_text())["taken"] == record["taken"]


def test_a_soup_is_the_mean_and_needs_no_data(made: Path) -> None:
    interpolate(made / "a", made / "b", made / "c", "--soup", "--out", made / "soup")
    parts = [weights(made / name) for name in "abc"]
    with pytest.raises(
        UserError, match=r"soup: holds weights alone, .* tools/eval_suite\.py; its figures are in .*results"
    ):
        read_runs([made / "soup"])
    for name, value in weights(made / "soup").items():
        if value.is_floating_point():
            assert torch.allclose(value, sum(part[name] for part in parts) / 3, rtol=1e-5, atol=1e-6), name


def test_a_greedy_soup_takes_what_does_not_lower_the_recall(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = made / "pairs/test"
    (tmp_path / "x").mkdir()
    shutil.copytree(made / "b", tmp_path / "x/b")  # the best twice: the soup stays as good, so both are taken
    models = [made / "a", made / "b", made / "c", tmp_path / "x/b"]
    interpolate(*models, "--greedy", "--target", shards, "--out", tmp_path / "soup")
    table, record = last(capsys)
    labels = [row["name"] for row in record["curve"][:4]]
    assert labels == ["a, step 0", f"b, step 0 ({made / 'b'})", "c, step 0", f"b, step 0 ({tmp_path / 'x/b'})"]
    recall = {row["name"]: row["mean_recall"] for row in record["curve"]}
    order = sorted(labels, key=lambda label: -recall[label])
    soup = [order[0]]
    best = recall[order[0]]
    for label in order[1:]:  # recipe 1
        row = next(row for row in record["curve"] if row["name"] == f"+ {label}")
        shares = [1 / (len(soup) + 1) if name in (*soup, label) else 0 for name in labels]
        assert row["weights"] == pytest.approx(shares)
        if row["mean_recall"] >= best:
            soup, best = [*soup, label], row["mean_recall"]
    assert 1 < len(soup) < 4  # the data has both cases
    assert record["taken"] == " + ".join(soup)
    assert f"taken: {record['taken']}; {len(soup)} of 4 models" in table
    assert all(label in record["rule"] for label in labels if label not in soup)
    assert record["weights"] == pytest.approx([(label in soup) / len(soup) for label in labels])
    parts = [weights(path) for path in models]
    for name, value in weights(tmp_path / "soup").items():
        if value.is_floating_point():
            mean = sum(share * part[name] for share, part in zip(record["weights"], parts))
            assert torch.allclose(value, mean, rtol=1e-5, atol=1e-6), name


def test_one_alpha_of_1_is_the_second_model_to_the_bit(made: Path) -> None:
    interpolate(made / "a", made / "b", "--alpha", 1, "--out", made / "second")
    b = weights(made / "b")
    for name, value in weights(made / "second").items():
        assert torch.equal(value, b[name]) or not value.is_floating_point()


def test_averaged_weights_are_not_resumed_from(made: Path, shards: Path) -> None:
    from clipdist.checkpoint.reader import CheckpointReader

    train = Catalog.open([str(shards / "train")])
    config = load_config(None, [f"data.train={shards / 'train'}", "data.val="])
    with pytest.raises(UserError, match=r"weights alone, not the state of a run .* tools/export.py"):
        make_plan(config, 1, (train, None), CheckpointReader(made / "a/checkpoints/step-00000000"))


def rows(*figures: tuple[float, float]) -> list[dict[str, Any]]:
    names = [f"{number / (len(figures) - 1):g}" for number in range(len(figures))]
    return [{"name": name, "mean_recall": target, "kept": kept} for name, (target, kept) in zip(names, figures)]


@pytest.mark.parametrize(
    ("curve", "wanted", "best", "says"),
    [
        (rows((10, 80), (20, 79.5), (30, 70)), ["0", "0.5", "1"], 1, "keep 79.00 "),
        (rows((10, 80), (20, 79.5), (30, 79)), ["0", "0.5", "1"], 2, "keep 79.00 "),
        (rows((10, 80), (20, 60), (30, 50)), ["0.5", "1"], 1, "none keeps 79.00; this one keeps most"),
        (rows((10, 80), (20, 60), (30, 50)), ["1"], 2, "the only one"),
    ],
)
def test_the_best_gains_most_of_those_that_keep(
    curve: list[dict[str, Any]], wanted: list[str], best: int, says: str
) -> None:
    found, rule = runpy.run_path(str(TOOL))["choose"](curve, wanted, 1.0)
    assert found == best
    assert says in rule


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("a b --alpha 0:1.2:0.1", "--alpha 0:1.2:0.1: 1.1 is outside of 0 .. 1"),
        ("a b --alpha -0.5", "-0.5 is outside of 0 .. 1"),
        ("a b --alpha 0:1", "write FIRST:LAST:STEP"),
        ("a b --alpha nan", "nan is outside"),
        ("a b --alpha 0:1:1e-9", "101 values at most"),
        ("a --soup", "one model; name at least two"),
        ("a b", "--alpha, --soup and --greedy: give one of them"),
        ("a b --soup --greedy --target pairs/test", "--alpha, --soup and --greedy: give one of them"),
        ("a b --greedy", "--greedy: needs --target SHARDS"),
        ("a b c --alpha 0.5", "lies between two models; of 3 take --soup or --greedy"),
        ("a b --alpha 0:1:0.5", "several values need --target"),
        ("a b --alpha 0.5 --probe", "belong to --keep"),
        (
            "a other --alpha 0.5",
            "a and .*other: different architectures, whose weights cannot be averaged: .* is .* and ",
        ),
        ("a b --alpha 0.5 --out a", "exists already"),
        ("a b --alpha 0.5 --target nothing", "--target: shards: no shards match nothing"),
    ],
)
def test_bad_input_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch, words: str, says: str) -> None:
    monkeypatch.chdir(made)
    with pytest.raises(UserError, match=says) as ended:
        interpolate(*(["--out", "new"] if "--out" not in words else []), *words.split())
    assert "\n" not in str(ended.value)
