"""An evaluation suite: its figures are those of the single tools and of CLIP_benchmark; kept figures; bad suites."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from wds_sets import CLASSES, SUITE, write_run, write_sets

from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.suite import HEADLINES, headlines, measure_all, read_suite
from clipdist.models.load import load_model

TOOLS = Path(__file__).parents[2] / "tools"
ALONE = DistEnv(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a and b, the sets, and suite.yaml."""
    folder = tmp_path_factory.mktemp("suite")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        write_run(folder / name, seed)
    return folder


def run(tool: str, *words: object) -> None:
    arguments, sys.argv = sys.argv, [tool, *map(str, words), "--device", "cpu", "--json"]
    try:
        runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]()
    finally:
        sys.argv = arguments


def last(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    *lines, record = capsys.readouterr().out.splitlines()
    return lines, json.loads(record)


class Cells(HTMLParser):
    """The rows of all tables of a page; `loaded`: what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "href") and not str(value).startswith("#")
        ]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_figures_are_those_of_the_single_tools_and_are_kept_by_checkpoint(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = made / "pages" / "both.html"
    run("eval_suite", made / "a", made / "b", "--suite", made / "suite.yaml", "--out", page)
    lines, record = last(capsys)
    a, b = (dict(zip(("zero_shot", "probe", "pairs"), model["results"])) for model in record["models"])
    assert a["zero_shot"] != b["zero_shot"]
    run("zero_shot", made / "a", "--data", made / "colours")  # takes the set's own names and templates
    single = last(capsys)[1]
    assert single["templates"] == 2
    assert set(single["per_class"]) == set(CLASSES[:-1])
    assert {name: a["zero_shot"][name] for name in ("top1", "top5", "mean_per_class", "ece")} == pytest.approx(
        {name: single[name] for name in ("top1", "top5", "mean_per_class", "ece")}
    )
    run("eval_retrieval", made / "a", made / "pairs/test", "--resamples", 0)
    single = last(capsys)[1]
    assert {name: a["pairs"][name] for name in HEADLINES["retrieval"]} == {n: single[n] for n in HEADLINES["retrieval"]}
    run("probe_cifar10", made / "a", "--data", made / "colours")
    assert a["probe"]["accuracy"] == last(capsys)[1]["accuracy"]
    assert "6 measured, 0 taken" in lines[-2]
    assert json.loads((made / "a/results/eval_suite.json").read_text())["results"] == record["models"][0]["results"]
    cells = Cells(page.read_text())
    assert not cells.loaded
    assert cells.rows[0] == ["set", "task", "figure", "a, step 0", "b, step 0"]
    assert cells.rows[1][:3] == ["colours", "zero-shot", "top-1, %"]
    assert cells.rows[1][3:] == [f"{model['zero_shot']['top1']:.2f}" for model in (a, b)]
    assert "<b>" in page.read_text()
    shutil.copytree(made / "a", made / "x/a")  # figures are kept in it
    run("eval_suite", made / "a", made / "x/a", "--suite", made / "suite.yaml", "--out", page)
    lines, record = last(capsys)
    assert "0 measured, 6 taken" in lines[-2]
    apart = [f"a, step 0 ({made / 'a'})", f"a, step 0 ({made / 'x/a'})"]
    assert [model["model"] for model in record["models"]] == apart == Cells(page.read_text()).rows[0][3:]

    def measured() -> list[bool]:
        return [not each["cached"] for each in measure_all(sets, load_model(str(made / "a")), ALONE, share)]

    from clipdist.evals.embed import WorkShare

    share, sets = WorkShare(progress=False), read_suite(made / "suite.yaml")
    assert measured() == [False] * 3
    (made / "colours/zeroshot_classification_templates.txt").write_text("{c}\n")
    sets = read_suite(made / "suite.yaml")  # other prompts: another figure; the probe has none
    assert measured() == [True, False, False]
    shutil.rmtree(made / "a/checkpoints")
    write_run(made / "a", 5)  # other weights
    assert measured() == [True] * 3


def test_means_over_sets_are_the_last_rows() -> None:
    results = [
        [{"set": name, "task": "zero_shot", "top1": top1 + model} for name, top1 in (("x", 10.0), ("y", 30.0))]
        for model in range(2)
    ]
    assert headlines(results) == [
        ("x", "zero_shot", "top1", [10, 11]),
        ("y", "zero_shot", "top1", [30, 31]),
        ("mean of 2 sets", "zero_shot", "top1", [20, 21]),
    ]


@pytest.mark.skipif(importlib.util.find_spec("clip_benchmark") is None, reason="CLIP_benchmark is installed aside")
def test_figures_are_those_of_clip_benchmark(tmp_path: Path) -> None:
    """PYTHONPATH=DIR; tools/bench/peers/suite.py says what goes into DIR."""
    from tools.bench.suite import compare

    suite = write_sets(tmp_path)
    write_run(tmp_path / "a", 0)
    colours, pairs = compare(str(tmp_path / "a"), suite)
    assert set(colours["figures"]) == {"top1", "top5", "mean_per_class"}
    assert set(pairs["figures"]) == set(HEADLINES["retrieval"])
    for ours, theirs in (*colours["figures"].values(), *pairs["figures"].values()):
        assert ours == pytest.approx(theirs, abs=0.01)  # percent


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold lines such as"),
        ("colours: [1]", "colours: must be a path"),
        ("colours: {data: colours, tsk: probe}", "colours: unknown key tsk; did you mean task?"),
        ("colours: {data: colours, task: prob}", "colours: task prob: must be one of zero_shot, probe, retrieval"),
        ("other: nothing", "other: .*nothing: no such file or folder"),
        ("pairs: {data: pairs, task: zero_shot}", "pairs: .* has no label"),
        ("pairs: {data: pairs, templates: cifar10}", "templates and classes are for zero_shot, not for retrieval"),
        ("colours: {data: colours/test, task: probe}", "the probe needs training pictures"),
        ("a: b: c", "not YAML"),
        ("many: many", "says multilabel: only classification and retrieval are measured"),
        ("part: part", "part/test: holds 1 shards, but its nshards.txt says 3; fetch the others"),
    ],
)
def test_a_bad_suite_is_one_line(made: Path, tmp_path: Path, text: str, says: str) -> None:
    for name in ("colours", "pairs"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "many").mkdir()
    (tmp_path / "many/dataset_type.txt").write_text("multilabel\n")
    shutil.copytree(made / "colours/test", tmp_path / "part/test")
    for shard in (1, 2):
        (tmp_path / f"part/test/{shard}.tar").unlink()
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError, match=says):
        read_suite(tmp_path / "suite.yaml")


def test_suites_are_read_in_order_and_relative_to_their_file(made: Path) -> None:
    found = read_suite(made / "suite.yaml")
    assert [(each.name, each.task) for each in found] == [
        ("colours", "zero_shot"),
        ("colours", "probe"),
        ("pairs", "retrieval"),
    ]
    assert SUITE in (made / "suite.yaml").read_text()
