"""The report: what a run recorded stands on the page and in --json, what is missing is said, bad input is one line."""

from __future__ import annotations

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipdist.config import load_config, to_yaml
from clipdist.errors import EXIT_BAD_INPUT, exit_code
from clipdist.evals.results import keep_result, read_results
from clipdist.report.history import read_runs
from clipdist.report.report_page import report_page

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH = 16


def train(step: int, **values: Any) -> dict[str, Any]:
    numbers = {"loss": 3 / step, "logit_scale": 2.66, "lr": 1e-3, "samples_per_s": 100.0, "wait_share": 0.25}
    norms = {"grad_norm/image": 1.5, "grad_norm/text": 2.5, "memory_gb": 1.0, "epoch": step / 4}
    return record("train", step, **(numbers | norms | values))


def record(kind: str, step: int, **values: Any) -> dict[str, Any]:
    return {"type": kind, "step": step, "samples": step * BATCH, "time": 1.8e9 + step, **values}


def validation(step: int, r1: float) -> dict[str, Any]:
    recalls = {f"{way}_r{k}": r1 + k for way in ("t2i", "i2t") for k in (1, 5, 10)}
    return record("val", step, **recalls, t2i_median_rank=3.0, i2t_median_rank=2.0, candidates=20.0, chance=5.0)


def make_run(folder: Path, records: list[dict[str, Any]], *overrides: str, tail: str = "") -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(entry) + "\n" for entry in records)
    (folder / "metrics.jsonl").write_text(text + tail)
    words = ["data.train=shards/train", "train.epochs=2", f"train.global_batch={BATCH}", *overrides]
    (folder / "config.yaml").write_text(to_yaml(load_config(None, words)))
    facts = {"command": ["clipdist/train.py", "a b"], "commit": "abc1234", "packages": {"torch": "2.99.0"}}
    (folder / "environment.json").write_text(json.dumps(facts))
    return folder


class Text(HTMLParser):
    """The words of a page, its tags, and whether the tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[Text, list]:
    """The page, and the runs of the JSON object."""
    runpy.run_path(str(REPOSITORY / "tools/report.py"))["main"]([*map(str, words), "--json"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert len(page.encode()) == summary["bytes"]
    return Text(page), summary["runs"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *words: report(monkeypatch, capsys, *words)


def test_one_run(call, tmp_path: Path) -> None:
    bad = {"event": "bad_sample", "shard": "00001.tar", "key": "000010012", "reason": "not an image"}
    records = [
        *(train(step) for step in range(1, 5)),
        validation(4, 40.0),
        record("event", 4, **bad),
        record("event", 4, event="bad_samples", new=2, total=2, counts={"not an image": 2}),
        *(train(step) for step in range(5, 9)),
        validation(8, 30.0) | {"zero_shot/top1": 12.5, "probe/l2": 0.1},
    ]
    run = make_run(tmp_path / "first", records, "optim.lr=0.002")
    keep_result(run, "zero_shot", {"top1": 61.25, "per_class": {"cat": 50.5, "dog": math.nan}, "data": "CIFAR-10"})
    Image.new("RGB", (50, 40), (200, 0, 0)).save(run / "results/zero_shot.png")
    (run / "search").mkdir()
    Image.new("RGB", (2000, 40)).save(run / "search/a-red-circle.png")
    (run / "search/broken.png").write_bytes(b"junk")
    (run / "checkpoints").mkdir()
    page, (figures,) = call(run / "checkpoints")
    assert "zero shot: top-1, % 12.50" in page.text
    assert any((attrs.get("aria-label") or "").startswith("zero shot: top-1, %:") for _, attrs in page.tags)
    assert (figures["state"], figures["step"], figures["samples"], figures["seconds"]) == ("finished", 8, 128, 7.0)
    assert (figures["loss"], figures["t2i_r1"], figures["wait_percent"]) == (3 / 8, 31.0, 25.0)
    assert figures["bad_counts"] == {"not an image": 2}
    assert figures["results"]["zero_shot"]["top1"] == 61.25
    for words in (
        "Run first",
        "not an image 2",
        "00001.tar 000010012 not an image",
        "optim.lr 0.0005 0.002",
        "top-1, % 61.25",
        "cat 50.50 dog -",
        "torch 2.99.0",
        "clipdist/train.py 'a b'",
        "broken.png: cannot be read as a picture.",
        "No validation sheet is stored",
        "Not measured: The frozen probe.",
    ):
        assert words in page.text
    best = page.text.index("4 41.00 45.00 50.00 3 41.00 45.00 50.00 2")  # step 4, though step 8 came later
    assert best < page.text.index("8 31.00 35.00 40.00")
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [attrs["alt"] for attrs in pictures] == ["a red circle", "first: zero_shot"]
    assert pictures[0]["width"] == "1600"
    assert all((attrs["src"] or "").startswith("data:image/webp;base64,") for attrs in pictures)


def test_the_page_loads_nothing_and_runs_nothing(call, tmp_path: Path) -> None:
    evil = '<script>alert("1")</script><img src=http://x.y/z>'
    event = record("event", 2, event=evil, reason=[evil], **{evil: {evil: evil}})
    records = [train(1), train(2, **{f"grad_norm/{evil}": 1.0}), validation(2, 1.0) | {evil: 1.0}, event]
    records.append(record("event", 2, event="bad_sample", shard=evil, key={evil: evil}, reason=None))
    run = make_run(tmp_path / "<b>bold", records, f"model.name='{evil}'")
    (run / "environment.json").write_text(json.dumps({evil: evil, "command": [evil], "packages": {evil: 1}}))
    keep_result(run, "probe_cifar10", {evil: evil, "per_class": {evil: 1.0}, "rows": [{evil: evil}], "odd": [evil]})
    for runs in ([run], [run, make_run(tmp_path / "<i>other", [train(1)])]):
        page, _ = call(*runs)
        assert {"script", "link", "iframe", "b", "i"} & {tag for tag, _ in page.tags} <= {"b"}  # <b> of the run's name
        assert not [tag for tag, attrs in page.tags if "src" in attrs]
        assert all((attrs.get("href") or "#").startswith("#") for _, attrs in page.tags)
        assert page.text.count(evil) > 8


def test_training_loads_neither_the_report_nor_what_draws_it() -> None:
    code = "import sys, clipdist.trainer, clipdist.train; print({'clipdist.report', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_page_is_the_same_every_time(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "run", [*(train(step) for step in range(1, 9)), validation(8, 1.0)])])
    made = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert report_page(runs, made) == report_page(runs, made)


def test_several_runs_stand_side_by_side(call, tmp_path: Path) -> None:
    one = make_run(tmp_path / "a/run", [train(step) for step in range(1, 9)], "optim.lr=0.002")
    two = make_run(tmp_path / "b/run", [train(2), validation(2, 10.0)], "optim.lr=0.003", "train.global_batch=32")
    page, figures = call(one, two, "--out", tmp_path / "both.html")
    assert [entry["run"] for entry in figures] == [str(one), str(two)]  # two runs of one name go by their paths
    assert "optim.lr 0.0005 0.002 0.003" in page.text
    bold = [number for number, (tag, attrs) in enumerate(page.tags) if (tag, attrs.get("class")) == ("tr", "marked")]
    assert len(bold) >= 2
    charts = [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs]
    (loss,) = [label for label in charts if label.startswith("Loss")]
    assert f"{one}: last 0.375" in loss
    assert f"{two}: last 1.5" in loss
    assert "samples seen" in page.text  # the x axis: a step is not the same in both
    assert f"{one}: no validation is recorded." in page.text


@pytest.mark.parametrize(
    ("records", "state"),
    [
        ([train(1), train(2)], "at step 2 of 8: still going, or ended without a word"),
        ([train(1), record("event", 1, event="interrupted")], "interrupted at step 1 of 8"),
        (
            [train(1), record("event", 1, event="interrupted"), record("event", 1, event="restart"), train(2)],
            "at step 2 of 8: still going, or ended without a word",
        ),
        ([], "at step 0: still going, or ended without a word"),
    ],
)
def test_how_a_run_stands(call, tmp_path: Path, records: list, state: str) -> None:
    page, (figures,) = call(make_run(tmp_path / "run", records))
    assert figures["state"] == state
    assert state in page.text


def test_attempts_add_up(call, tmp_path: Path) -> None:
    def told(step: int, total: int) -> dict[str, Any]:
        return record("event", step, event="bad_samples", new=1, total=total, counts={"not an image": total})

    restart = record("event", 4, event="restart") | {"time": 1.9e9}
    later = [train(step) | {"time": 1.9e9 + step} for step in (5, 6)]
    records = [train(1), told(2, 1), told(4, 3), record("event", 4, event="interrupted"), restart, told(5, 1), *later]
    page, (figures,) = call(make_run(tmp_path / "run", records))
    assert figures["bad_samples"] == 4  # 3 of the first attempt, whose last count holds, and 1 of the second
    assert figures["restarts"] == 1
    assert "attempts 2" in page.text
    gap = make_run(tmp_path / "gap", [train(1), train(4), restart | {"time": 1.9e9}, *later])
    _, (figures,) = call(gap)
    assert figures["seconds"] == 3 + 6  # what lies between the attempts is not training


def test_values_that_are_not_finite_and_a_cut_line(call, tmp_path: Path) -> None:
    records = [train(1, loss=None), train(2, loss=math.nan, **{"grad_norm/image": math.inf}), train(3, loss="high")]
    run = make_run(tmp_path / "run", [*records, train(4)], tail='{"type": "train", "st')
    page, (figures,) = call(run)
    assert figures["loss"] == 0.75
    assert "last 0.75, 3 not finite" in page.text
    assert figures["notes"] == ["the last line of metrics.jsonl is not whole, and left out"]


def test_parts_that_are_missing_are_named(call, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [train(1)])
    (run / "config.yaml").write_text("optim: {lrr: 1}\n")
    (run / "environment.json").write_text("{")
    page, (figures,) = call(run)
    assert "config.yaml cannot be read by this version" in page.text
    assert "Did you mean: 'lr'?" in page.text
    assert "environment.json cannot be read" in page.text
    assert "No validation is recorded" in page.text
    assert figures["state"].startswith("at step 1:")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record("event", 1, event="fault", error="rank 1 ended: no memory")) + "\n")
    assert call(run)[1][0]["state"].endswith(": rank 1 ended: no memory")
    (run / "config.yaml").unlink()
    (run / "environment.json").unlink()
    (run / "metrics.jsonl").write_text("")
    page, _ = call(run)
    assert "no config.yaml" in page.text
    assert "no environment.json" in page.text
    assert "Not recorded: Loss; Log scale t of the logits; Learning rate; Gradient norm." in page.text


def test_a_long_run_is_a_small_page(call, tmp_path: Path) -> None:
    records = [
        entry for step in range(1, 20_001) for entry in ([train(step)] + [validation(step, 9.0)] * (step % 200 == 0))
    ]
    page, (figures,) = call(make_run(tmp_path / "run", records, "train.steps=20000"))
    assert figures["state"] == "finished"
    assert (tmp_path / "run/report.html").stat().st_size < 500_000
    assert "21 of 100 validations" in page.text
    assert "20,000 10" in page.text


def test_results_are_kept_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_result(tmp_path, "zero_shot", {"top1": math.inf, "per_class": {"a": [1.0, math.nan]}})
    keep_result(tmp_path, "zero_shot", {"top1": 2.0, "pair": (1, 2)})
    assert read_results(tmp_path) == {"zero_shot": {"top1": 2.0, "pair": [1, 2]}}
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["zero_shot.json"]
    keep_result(None, "zero_shot", {})
    with pytest.raises(ValueError, match="no plain name"):
        keep_result(tmp_path, "../zero_shot", {})
    (tmp_path / "file").write_text("")
    keep_result(tmp_path / "file", "zero_shot", {})  # a run that cannot be written costs a line
    assert "not kept for the report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "words", "says"),
    [
        (None, ["nowhere"], "nowhere: no such run folder; . holds run"),
        (None, ["."], ".: is no run folder, but holds some: name run in it"),
        (None, ["run/results"], "is no run folder (no metrics.jsonl); the run is"),
        (lambda run: (run / "metrics.jsonl").unlink(), ["run"], "run: has no metrics.jsonl"),
        (None, ["run", "./run"], "run: is named twice"),
        (None, ["run", "--out", "no/such/page.html"], "there is no folder no/such"),
        (None, ["run", "--out", "page.txt"], "must end in .html"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"type": "train"}\n'),
            ["run"],
            "metrics.jsonl, line 1: is no record",
        ),
        (
            lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\x00\n{}"),
            ["run"],
            "metrics.jsonl, line 1: is no record",
        ),
        (lambda run: (run / "metrics.jsonl").write_text("[" * 10**5 + "\n"), ["run"], "line 1: is no record"),
        (lambda run: keep_result(run, "x", {}) or (run / "results/x.json").write_text("[]"), ["run"], "run x again"),
    ],
)
def test_bad_input_is_one_line(
    prepare, words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = make_run(tmp_path / "run", [train(1)])
    (run / "results").mkdir()
    if prepare:
        prepare(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", *words])
    try:
        code = exit_code(runpy.run_path(str(REPOSITORY / "tools/report.py"))["main"])
    except SystemExit as left:  # argparse's
        code = left.code
    assert code == EXIT_BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert says in lines[-1]
    assert not list(tmp_path.rglob("*.html"))


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [500, 1280])  # Chromium makes no narrower window
def test_a_browser_finds_the_page_no_wider_than_its_window_and_prints_it(call, tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    records = [*(train(step) for step in range(1, 40)), *(validation(step, step) for step in range(1, 40))]
    run = make_run(tmp_path / ("a-long-name-" * 8), records, f"data.val={'x' * 150}")
    Image.new("RGB", (1500, 200), (200, 0, 0)).save(run / "validation.png")
    call(run, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    measured = re.sub(r"<meta http-equiv[^>]*>", "", page).replace(
        "</body>", "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    )
    (tmp_path / "measured.html").write_text(measured, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(*words: str) -> str:
        command = [BROWSER, *options, f"--window-size={width},900", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    title = re.search(r"<title>(\d+) of (\d+)</title>", browse("--dump-dom", f"file://{tmp_path}/measured.html"))
    assert title is not None
    assert int(title[1]) <= int(title[2])
    browse(f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", f"file://{tmp_path}/page.html")
    pages = (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n")
    assert 2 <= pages <= 8
