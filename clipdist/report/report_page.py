"""Runs in, one self-contained HTML page out: what they were told to do, what they did, and what came of it.

What a run does not tell is said to be missing, never left out.
"""

from __future__ import annotations

import html
import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clipdist.config import flat, load_config, to_yaml
from clipdist.report import curves
from clipdist.report.curves import Series
from clipdist.report.history import RunHistory, number
from clipdist.report.layout import heading, note, page, paragraph, picture, table, tiles

DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
RECALLS = tuple(f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5, 10))
RECORD_KEYS = ("type", "step", "samples", "time")  # of every record
MOST_ROWS = 24  # of validations; the curves have them all
MOST_EVENTS = 40
MOST_NAMED = 20  # samples that could not be used
MOST_PICTURES = 12  # of a folder
MOST_CLASSES = 50  # rows of a table in a tool's result; of more, the lowest and the highest
MISSING = "-"

LABELS = {
    **{f"{way}_r{k}": f"{words} R@{k}, %" for way, words in DIRECTIONS.items() for k in (1, 5, 10)},
    **{f"{way}_map10": f"{words} mAP@10, %" for way, words in DIRECTIONS.items()},
    **{f"{way}_median_rank": f"{words}, median rank" for way, words in DIRECTIONS.items()},
    **{f"{way}_mean_rank": f"{words}, mean rank" for way, words in DIRECTIONS.items()},
    **{f"batch_{way}_r1": f"{words} R@1 within the batch, %" for way, words in DIRECTIONS.items()},
    "rsum": "sum of the six R@K",
    "candidates": "pictures",
    "chance": "chance, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class": "mean of the classes, %",
    "ece": "calibration error, %",
    "accuracy": "accuracy, %",
    "baseline_pixels": "raw pixels, %",
    "fooling_rate": "fooling rate, %",
    "per_class": "per class, %",
}
TOOLS = {  # the tool's name -> its heading; those that are looked for come first
    "zero_shot": "Zero-shot classification",
    "probe_cifar10": "The frozen probe",
    "eval_retrieval": "Retrieval by the tool",
    "universal_perturbation": "Universal perturbation",
}
EXPECTED = ("zero_shot", "probe_cifar10")  # said to be missing where they are


@dataclass(frozen=True)
class Wanted:
    """A chart of the page: names that end in / stand for all that begin so."""

    title: str
    names: tuple[str, ...]
    kind: str = "train"
    factor: float = 1.0
    log: bool = False
    zero: bool = False


TRAINING = (
    Wanted("Loss", ("loss",)),
    Wanted("Log scale t of the logits", ("logit_scale",)),
    Wanted("Bias of the logits", ("logit_bias",)),
    Wanted("Learning rate", ("lr",), zero=True),
    Wanted("Gradient norm", ("grad_norm/",), log=True),
    Wanted("R@1 within the batch, %", ("batch_t2i_r1", "batch_i2t_r1"), zero=True),
)
THROUGHPUT = (
    Wanted("Samples per second", ("samples_per_s",), zero=True),
    Wanted("Time spent waiting for data, %", ("wait_share",), factor=100.0, zero=True),
    Wanted("Peak memory, GB", ("memory_gb",), zero=True),
)
RETRIEVAL = tuple(
    Wanted(f"{words.capitalize()}, R@K in %", tuple(f"{way}_r{k}" for k in (1, 5, 10)), "val", zero=True)
    for way, words in DIRECTIONS.items()
)
ONLY_SOMETIMES = ("logit_bias", "batch_t2i_r1", "batch_i2t_r1")  # nothing is missing where these are not recorded


def report_page(runs: Sequence[RunHistory], made: datetime) -> str:
    """The page. One run: its own story; several: curves over one another, tables with a column for each.

    Args:
        runs: at least one, with labels that differ.
        made: when, in UTC; it stands on the page.
    """
    sections = [
        ("summary", "Summary", _summary(runs)),
        ("training", "Training", _charts(runs, TRAINING) + _how_to_read(runs)),
        ("throughput", "Throughput and waiting", _charts(runs, THROUGHPUT) + _throughput_table(runs)),
        ("validation", "Validation during training", _validation(runs)),
        ("pictures", "Query pictures", _pictures(runs)),
        ("results", "Results of the tools", _results(runs)),
        ("data", "Data", _data(runs)),
        ("events", "Events", _events(runs)),
        ("configuration", "Configuration", _configuration(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    names = ", ".join(run.label for run in runs)
    title = f"Run {names}" if len(runs) == 1 else f"Runs {names}"
    links = "".join(f'<a href="#{name}">{words}</a> ' for name, words, _ in sections)
    body = "".join(f'<section id="{name}">\n{heading(2, words)}{text}</section>\n' for name, words, text in sections)
    head = f"{paragraph(f'Report of {made:%Y-%m-%d %H:%M} UTC')}{_run_keys(runs)}{_notes(runs)}<nav>{links}</nav>\n"
    return page(title, head, body)


def run_figures(run: RunHistory) -> dict[str, Any]:
    """The numbers of the summary under plain names, None where a run does not tell; rates in percent."""
    wait_share = run.median("wait_share")
    return {
        "state": run.state(),
        "step": run.step,
        "samples": max((int(number(record.get("samples")) or 0) for record in run.records), default=0),
        "seconds": round(run.seconds(), 1),
        "loss": run.last("train", "loss"),
        "logit_scale": run.last("train", "logit_scale"),
        "samples_per_s": run.median("samples_per_s"),
        "wait_percent": None if wait_share is None else 100 * wait_share,
        **{name: run.last("val", name) for name in RECALLS},
        "bad_samples": sum(run.bad_counts().values()),
        "bad_counts": run.bad_counts(),
        "restarts": len(run.events("restart")),
        "skipped_steps": len(run.events("skip")),
    }


# The parts of the page


def _run_keys(runs: Sequence[RunHistory]) -> str:
    """Which colour is whose, and where each run lies and stands."""
    keys = [curves.key(Series("", [], place)) if len(runs) > 1 else "" for place in range(len(runs))]
    lines = "".join(
        f"<li>{key}<b>{html.escape(run.label)}</b> {html.escape(run.state())} <small>{html.escape(str(run.folder))}"
        "</small></li>\n"
        for key, run in zip(keys, runs)
    )
    return f'<ul class="runs">\n{lines}</ul>\n'


def _notes(runs: Sequence[RunHistory]) -> str:
    return "".join(note(f"{run.label}: {line}" if len(runs) > 1 else line) for run in runs for line in run.notes)


def _summary(runs: Sequence[RunHistory]) -> str:
    figures = [run_figures(run) for run in runs]
    shown = {
        "step": "step",
        "samples": "pairs seen",
        "seconds": "time",
        "loss": "loss, last",
        "t2i_r1": LABELS["t2i_r1"],
        "i2t_r1": LABELS["i2t_r1"],
        "samples_per_s": "samples/s, median",
        "wait_percent": "waiting for data, %",
        "bad_samples": "unusable samples",
        "restarts": "restarts",
        "skipped_steps": "steps left out",
    }
    rows = [
        (words, [_duration(f[name]) if name == "seconds" else _shown(words, f[name]) for f in figures])
        for name, words in shown.items()
    ]
    return _by_run(runs, rows) if len(runs) > 1 else tiles([(words, row[0]) for words, row in rows])


def _charts(runs: Sequence[RunHistory], wanted: Sequence[Wanted]) -> str:
    figures, missing = [], []
    for want in wanted:
        drawn = _figures(runs, want)
        figures += drawn
        if not drawn and not set(want.names) & set(ONLY_SOMETIMES):
            missing.append(want.title)
    grid = f'<div class="charts">\n{"".join(figures)}</div>\n' if figures else ""
    return grid + (note(f"Not recorded: {'; '.join(missing)}.") if missing else "")


def _how_to_read(runs: Sequence[RunHistory]) -> str:
    lines = []
    if max(len(run.of_type("train")) for run in runs) > curves.DENSE:
        lines.append("Pale: the recorded values; over them their mean, of about a hundredth of the run at a time.")
    if len(runs) == 1 and runs[0].events("restart"):
        lines.append("Vertical lines: the run was started again.")
    return paragraph(" ".join(lines)) if lines else ""


def _figures(runs: Sequence[RunHistory], want: Wanted) -> list[str]:
    """One run: one chart, a colour for every name. Several: a chart for every name, a colour for every run."""
    names = _names(runs, want)
    x, x_title = _x_of(runs)
    if len(runs) == 1:
        lines = [_series(runs[0], want, name, x, _label(name), place) for place, name in enumerate(names)]
        if lines and want.kind == "train":
            lines[0] = replace(lines[0], marks=[record["step"] for record in runs[0].events("restart")])
        return _figure(want.title, lines, x_title, want) if lines else []
    figures = []
    for name in names:
        title = LABELS.get(name) or (want.title if len(names) == 1 else f"{want.title}: {_label(name)}")
        lines = [_series(run, want, name, x, run.label, place) for place, run in enumerate(runs)]
        figures += _figure(title, [line for line in lines if line.points], x_title, want)
    return figures


def _names(runs: Sequence[RunHistory], want: Wanted) -> list[str]:
    recorded = dict.fromkeys(name for run in runs for record in run.of_type(want.kind) for name in record)
    return [
        name
        for wish in want.names
        for name in recorded
        if (name.startswith(wish) if wish.endswith("/") else name == wish)
    ]


def _x_of(runs: Sequence[RunHistory]) -> tuple[str, str]:
    """Steps, unless a step is not the same number of pairs in all runs."""
    batches = {run.config.train.global_batch for run in runs if run.config}
    return ("step", "step") if len(batches) <= 1 else ("samples", "pairs seen")


def _series(run: RunHistory, want: Wanted, name: str, x: str, label: str, colour: int) -> Series:
    points = [(place, None if y is None else y * want.factor) for place, y in run.points(want.kind, name, x)]
    return Series(label, sorted(points, key=lambda point: point[0]), colour)


def _figure(title: str, lines: Sequence[Series], x_title: str, want: Wanted) -> list[str]:
    drawn = curves.chart(title, lines, x_title, want.log, want.zero)
    if not drawn:
        return []
    legend = "".join(_legend(line, len(lines) > 1) for line in lines)
    return [
        f'<figure>\n<figcaption>{html.escape(title)}</figcaption>\n{drawn}<ul class="legend">{legend}</ul></figure>\n'
    ]


def _legend(line: Series, several: bool) -> str:
    values = [y for _, y in line.points if y is not None]
    if not values:
        return f"<li>{html.escape(line.name)}: not recorded</li>\n"
    words = f"last {values[-1]:.4g}" if several else f"{min(values):.4g} to {max(values):.4g}, last {values[-1]:.4g}"
    gaps = len(line.points) - len(values)
    words += f", {gaps} not finite" if gaps else ""
    name = f"{curves.key(line)}{html.escape(line.name)}: " if several else ""
    return f"<li>{name}{words}</li>\n"


def _throughput_table(runs: Sequence[RunHistory]) -> str:
    rows = []
    for words, name, factor in (
        ("samples/s", "samples_per_s", 1.0),
        ("waiting for data, %", "wait_share", 100.0),
        ("peak memory, GB", "memory_gb", 1.0),
    ):
        columns = [[y * factor for _, y in run.points("train", name) if y is not None] for run in runs]
        rows.append([words, *(_spread(words, values) for values in columns)])
    rows.append(["attempts", *(str(len(run.attempts())) for run in runs)])
    names = [run.label for run in runs] if len(runs) > 1 else ["median (lowest to highest)"]
    remark = paragraph("Median (lowest to highest) of the recorded steps.") if len(runs) > 1 else ""
    return table(["", *names], rows) + remark


def _spread(words: str, values: Sequence[float]) -> str:
    if not values:
        return MISSING
    low, middle, high = (_shown(words, of(values)) for of in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def _validation(runs: Sequence[RunHistory]) -> str:
    if not any(run.of_type("val") for run in runs):
        return note("No validation is recorded: data.val was empty, or none has been due yet.")
    parts = [_charts(runs, RETRIEVAL)]
    others = [
        name
        for name in _recorded(runs, "val")
        if "/" in name and _label(name).endswith("%") and not name.endswith("/chance")
    ]
    parts.append(_charts(runs, [Wanted(_label(name), (name,), "val", zero=True) for name in others]))
    names = [name for name in _recorded(runs, "val") if name not in RECORD_KEYS]
    rows = [(_label(name), [_shown(_label(name), run.last("val", name)) for run in runs]) for name in names]
    parts.append(heading(3, "Last validation") + _by_run(runs, rows))
    for run in runs:
        if not run.of_type("val"):
            parts.append(note(f"{run.label}: no validation is recorded."))
        else:
            parts.append(_history(run, f"History of {run.label}" if len(runs) > 1 else "History"))
    return "".join(parts)


def _recorded(runs: Sequence[RunHistory], kind: str) -> list[str]:
    """Names with a number in them, in the order in which they first come."""
    records = (record for run in runs for record in run.of_type(kind))
    return list(
        dict.fromkeys(name for record in records for name, value in record.items() if number(value) is not None)
    )


def _history(run: RunHistory, title: str) -> str:
    records = run.of_type("val")
    sums = [sum(number(record.get(name)) or 0.0 for name in RECALLS) for record in records]
    best = max(range(len(records)), key=sums.__getitem__)
    stride = max(1, -(-len(records) // MOST_ROWS))
    shown = sorted({*range(0, len(records), stride), best, len(records) - 1})
    names = [f"{way}_{what}" for way in DIRECTIONS for what in ("r1", "r5", "r10", "median_rank")]
    head = [
        "step",
        *(f"{way.replace('2', '→').upper()} {what}" for way in DIRECTIONS for what in ("R@1", "R@5", "R@10", "median")),
    ]
    rows = [[f"{records[n]['step']:,}", *(_shown(_label(name), records[n].get(name)) for name in names)] for n in shown]
    remark = "T→I: text to image, I→T: image to text; R@K in percent; in bold the highest sum of the six R@K."
    if len(shown) < len(records):
        remark += f" {len(shown)} of {len(records)} validations; the curves have them all."
    return heading(3, title) + table(head, rows, numbers=True, marked={shown.index(best)}) + paragraph(remark)


def _pictures(runs: Sequence[RunHistory]) -> str:
    parts = []
    for run in runs:
        if len(runs) > 1:
            parts.append(heading(3, run.label))
        sheet = run.folder / "validation.png"
        if sheet.is_file():
            parts.append(picture(sheet, "the last validation: captions and the pictures they find"))
        else:
            parts.append(note("No validation sheet is stored (validation.png)."))
        searches = sorted((run.folder / "search").glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
        parts += [picture(path, path.stem.replace("-", " ")) for path in searches[:MOST_PICTURES]]
        if not searches:
            parts.append(note("No search has left a sheet (search/*.png)."))
        elif len(searches) > MOST_PICTURES:
            parts.append(note(f"The newest {MOST_PICTURES} of {len(searches)} searches."))
    return "".join(parts)


def _results(runs: Sequence[RunHistory]) -> str:
    found = list(dict.fromkeys(tool for run in runs for tool in run.results))
    order = list(TOOLS)
    found.sort(key=lambda tool: (order.index(_base(tool)) if _base(tool) in order else len(order), tool))
    parts = []
    for tool in found:
        parts.append(heading(3, _tool_heading(tool)) + _result(runs, tool))
        for run in runs:
            pictures = sorted((run.folder / "results").glob("*.png"))
            parts += [picture(path, f"{run.label}: {path.stem}") for path in pictures if _owner(path, found) == tool]
    missing = [TOOLS[tool] for tool in EXPECTED if tool not in map(_base, found)]
    return "".join(parts) + (note(f"Not measured: {'; '.join(missing)}.") if missing else "")


def _base(tool: str) -> str:
    return tool.partition("-")[0]


def _tool_heading(tool: str) -> str:
    base, _, variant = tool.partition("-")
    heading = TOOLS.get(base, base.replace("_", " ").capitalize())
    return f"{heading}: {variant}" if variant else heading


def _owner(path: Path, tools: Sequence[str]) -> str | None:
    """The tool whose name the picture's begins with, the longest of several."""
    return max((tool for tool in tools if path.stem.startswith(tool)), key=len, default=None)


def _result(runs: Sequence[RunHistory], tool: str) -> str:
    """Plain values in one table, and a table for everything that holds more than one."""
    records = [run.results.get(tool, {}) for run in runs]
    names = list(dict.fromkeys(name for record in records for name in record))
    inner = [name for name in names if any(isinstance(record.get(name), (dict, list)) for record in records)]
    plain = [
        (_label(name), [_shown(_label(name), record.get(name)) for record in records])
        for name in names
        if name not in inner
    ]
    parts = [_by_run(runs, plain)] if plain else []
    for name in inner:
        inside = _nested(runs, _label(name), [record.get(name) for record in records])
        parts.append(heading(4, _label(name)) + inside if inside else "")
    return "".join(parts)


def _nested(runs: Sequence[RunHistory], words: str, values: Sequence[Any]) -> str:
    """{name: value} as rows with a column for each run; lists of objects as a table for each run; else as JSON."""
    maps = [value if isinstance(value, dict) else {} for value in values]
    if any(maps):
        names = list(dict.fromkeys(name for entry in maps for name in entry))
        rows = [(_label(name), [_shown(words, entry.get(name)) for entry in maps]) for name in names]
        return _by_run(runs, _extremes(rows, maps, names))
    parts = []
    for run, value in zip(runs, values):
        if not value:
            continue
        parts.append(paragraph(run.label) if len(runs) > 1 else "")
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            head = list(dict.fromkeys(name for entry in value for name in entry))
            body = [[_shown(_label(name), entry.get(name)) for name in head] for entry in value[:MOST_CLASSES]]
            parts.append(table([_label(name) for name in head], body))
            if len(value) > MOST_CLASSES:
                parts.append(note(f"The first {MOST_CLASSES} of {len(value)} rows."))
        else:
            parts.append(paragraph(_value(value)))
    return "".join(parts)


def _extremes(rows: list[tuple[str, list[str]]], maps: Sequence[dict], names: Sequence[str]) -> list:
    """All rows where there is room; else those with the lowest and the highest value of the first run that has any."""
    if len(rows) <= MOST_CLASSES:
        return rows
    first = next(entry for entry in maps if entry)
    order = sorted(range(len(names)), key=lambda row: number(first.get(names[row])) or 0.0)
    half = MOST_CLASSES // 2
    left_out = (f"({len(rows) - 2 * half} between)", [""] * len(maps))
    return [*(rows[row] for row in order[:half]), left_out, *(rows[row] for row in order[-half:])]


def _data(runs: Sequence[RunHistory]) -> str:
    figures = [run_figures(run) for run in runs]
    sources = [[_listed(run.config.data.train) if run.config else MISSING for run in runs]]
    sources.append([_listed(run.config.data.val) if run.config else MISSING for run in runs])
    rows = [("training shards", sources[0]), ("validation shards", sources[1])]
    rows.append(("pairs seen", [_number(figure["samples"]) for figure in figures]))
    rows.append(("epochs", [_number(run.last("train", "epoch")) for run in runs]))
    rows.append(("steps of an epoch", [_number(run.steps_per_epoch()) for run in runs]))
    rows.append(("validation pictures", [_number(run.last("val", "candidates")) for run in runs]))
    rows.append(("validation captions", [_number(run.last("val", "captions")) for run in runs]))
    rows.append(("unusable samples", [_number(figure["bad_samples"]) for figure in figures]))
    for reason in dict.fromkeys(reason for figure in figures for reason in figure["bad_counts"]):
        rows.append((f"unusable: {reason}", [_number(figure["bad_counts"].get(reason, 0)) for figure in figures]))
    return _by_run(runs, rows) + "".join(_named(run, len(runs) > 1) for run in runs)


def _named(run: RunHistory, several: bool) -> str:
    named = (
        tuple(_value(record.get(name)) for name in ("shard", "key", "reason")) for record in run.events("bad_sample")
    )
    rows = list(dict.fromkeys(named))  # an epoch later it is found again
    title = f"Unusable samples of {run.label}" if several else "Unusable samples"
    if not rows:
        return paragraph(f"{title}: none is named.")
    more = f"The first {MOST_NAMED} of {len(rows)}; metrics.jsonl names them." if len(rows) > MOST_NAMED else ""
    shown = table(["shard", "key", "reason"], rows[:MOST_NAMED])
    return heading(3, title) + shown + (paragraph(more) if more else "")


def _events(runs: Sequence[RunHistory]) -> str:
    counts = [Counter(str(record.get("event")) for record in run.of_type("event")) for run in runs]
    kinds = list(dict.fromkeys(kind for count in counts for kind in count))
    if not kinds:
        return paragraph("None: no restart, no interruption, no step left out, no unusable sample.")
    parts = [_by_run(runs, [(kind, [_number(count[kind]) for count in counts]) for kind in kinds])]
    for run in runs:
        parts.append(_event_list(run, len(runs) > 1))
    return "".join(parts)


def _event_list(run: RunHistory, several: bool) -> str:
    """All but the single samples, which stand under Data; what comes again at once is one row."""
    rows: list[list[str]] = []
    for record in run.of_type("event"):
        kind, step = str(record.get("event")), f"{record['step']:,}"
        details = "; ".join(f"{k} {_value(value)}" for k, value in record.items() if k not in (*RECORD_KEYS, "event"))
        if kind == "bad_sample":
            continue
        if rows and rows[-1][2:] == [kind, details]:
            rows[-1][1] = f"{rows[-1][1].partition(' ')[0]} to {step}"
        else:
            rows.append([_clock(record.get("time")), step, kind, details])
    if not rows:
        return ""
    more = f"The last {MOST_EVENTS} of {len(rows)}." if len(rows) > MOST_EVENTS else ""
    shown = table(["time (UTC)", "step", "event", ""], rows[-MOST_EVENTS:])
    return (heading(3, run.label) if several else "") + shown + (paragraph(more) if more else "")


def _configuration(runs: Sequence[RunHistory]) -> str:
    settings = [flat(run.config) if run.config else {} for run in runs]
    if not any(settings):
        return note("Not known: see above.")
    rows, marked = _differences(settings)
    remark = "Settings that differ from the defaults"
    remark += "; in bold those in which the runs differ." if len(runs) > 1 else "; all others are the defaults."
    shown = table(["setting", "default", *(run.label for run in runs)], rows, marked=marked)
    return paragraph(remark) + shown + "".join(_whole(run, len(runs) > 1) for run in runs)


def _differences(settings: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[int]]:
    """Rows of setting, default, each run's; and which rows differ between runs. {} is a run that is not known."""
    defaults = flat(load_config())
    rows: list[list[str]] = []
    marked = []
    for name in dict.fromkeys([*defaults, *(name for chosen in settings for name in chosen)]):
        default, *own = (_setting(chosen[name]) if name in chosen else MISSING for chosen in (defaults, *settings))
        known = [value for value, chosen in zip(own, settings) if chosen]
        if any(value != default for value in known):
            if len(set(known)) > 1:
                marked.append(len(rows))
            rows.append([name, default, *own])
    return rows, marked


def _whole(run: RunHistory, several: bool) -> str:
    if run.config is None:
        return ""
    words = f"The whole configuration of {run.label}" if several else "The whole configuration"
    text = html.escape(to_yaml(run.config))
    return f"<details><summary>{html.escape(words)}</summary><pre>{text}</pre></details>\n"


def _environment(runs: Sequence[RunHistory]) -> str:
    flattened = [dict(_facts(run.environment)) for run in runs]
    names = list(dict.fromkeys(name for facts in flattened for name in facts))
    if not names:
        return note("Not known: environment.json is missing or cannot be read.")
    return _by_run(runs, [(name, [facts.get(name, MISSING) for facts in flattened]) for name in names])


def _facts(environment: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in environment.items():
        if isinstance(value, dict):
            yield from ((str(inner), _value(entry)) for inner, entry in value.items())
        elif name == "command" and isinstance(value, list):
            yield name, shlex.join(map(str, value))
        else:
            yield name, _value(value)


# Words, numbers and tables


def _label(name: str) -> str:
    """In words; zero_shot/top1, which an evaluator found during training, is "zero shot: top-1, %"."""
    group, slash, rest = name.removeprefix("grad_norm/").rpartition("/")
    words = LABELS.get(rest, rest.replace("_", " "))
    return f"{group.replace('_', ' ')}: {words}" if slash else words


def _number(value: Any) -> str:
    """12,800; 48.40; 0.0123; 1.2e-05."""
    value = number(value)
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if 1 <= abs(value) < 1e6:
        return f"{value:,.{2 if abs(value) < 1000 else 0}f}"
    return f"{value:.3g}"


def _shown(words: str, value: Any) -> str:
    """Percentages under one another have as many digits; `words` is the label, which says that they are."""
    if words.endswith("%") and (percent := number(value)) is not None:
        return f"{percent:.2f}" if percent >= 0.01 or not percent else f"{percent:.1g}"
    return _value(value)


def _value(value: Any) -> str:
    """Anything that a record may hold, on one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is not None:
        return _number(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "..."


def _setting(value: Any) -> str:
    """As one writes it into a recipe."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _listed(shards: Sequence[str]) -> str:
    return ", ".join(shards[:5]) + (f", and {len(shards) - 5} more" if len(shards) > 5 else "") or "none"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _clock(time: Any) -> str:
    seconds = number(time)
    try:
        return MISSING if seconds is None else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return MISSING


def _by_run(runs: Sequence[RunHistory], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A row for each fact, a column for each run."""
    return table(["", *(run.label for run in runs)] if len(runs) > 1 else [], [[name, *row] for name, row in rows])
