"""Make the page about runs: what they were told to do, what they did, and what came of it.

What a run does not tell is said to be missing, never left out.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clipdist.checkpoint.format import EMA
from clipdist.config import flat, load_config, to_yaml
from clipdist.report import curves
from clipdist.report.history import RECALLS, RunHistory, number, run_figures
from clipdist.report.page import image_figure, parts, render
from clipdist.report.run_charts import RETRIEVAL, THROUGHPUT, TRAINING, ChartSpec, chart_grid, recorded_names
from clipdist.report.words import (
    DIRECTIONS,
    LABELS,
    MISSING,
    duration_text,
    label_of,
    labelled_text,
    number_text,
    setting_text,
    shards_text,
    spread_text,
    time_text,
    value_text,
)

RECORD_KEYS = ("type", "step", "samples", "time")  # of every record
MOST_ROWS = 24  # of validations; the curves have them all
MOST_EVENTS = 40
MOST_NAMED = 20  # samples that could not be used
MOST_IMAGES = 12  # of a folder
MOST_CLASSES = 50  # rows of a table in a tool's result; of more, the lowest and the highest

SUMMARY = {
    "objectives": "objectives",
    "step": "step",
    "samples": "samples seen",
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
TOOLS = {  # the tool's name -> its heading; those that are looked for come first
    "zero_shot": "Zero-shot classification",
    "probe_cifar10": "The frozen probe",
    "eval_knn": "Nearest neighbours",
    "eval_retrieval": "Retrieval by the tool",
    "universal_perturbation": "Universal perturbation",
}
EXPECTED = ("zero_shot", "probe_cifar10")  # said to be missing where they are

Runs = Sequence[RunHistory]


def report_page(runs: Runs, made: datetime) -> str:
    """Return the page. One run: its own story; several: curves over one another, tables with a column for each.

    Args:
        runs: at least one, with labels that differ.
        made: when, in UTC; it stands on the page.
    """
    sections = [
        ("summary", "Summary", _summary(runs)),
        ("training", "Training", [*chart_grid(runs, TRAINING), *_how_to_read(runs), *_objectives(runs)]),
        ("throughput", "Throughput and waiting", _throughput(runs)),
        ("validation", "Validation during training", _validation(runs)),
        ("pictures", "Query pictures", _images(runs)),
        ("results", "Results of the tools", _results(runs)),
        ("data", "Data", _data(runs)),
        ("events", "Events", _events(runs)),
        ("configuration", "Configuration", _configuration(runs)),
        ("environment", "Environment", _environment(runs)),
    ]
    title = f"Run{'s' if len(runs) > 1 else ''} {', '.join(run.label for run in runs)}"
    return render("report.html", title=title, made=f"{made:%Y-%m-%d %H:%M}", runs=runs, sections=sections)


def _by_run(runs: Runs, rows: Sequence[tuple[str, Sequence[str]]]) -> Markup:
    """Return a table with a row for each fact and a column for each run."""
    head = ["", *(run.label for run in runs)] if len(runs) > 1 else []
    return parts.table([[name, *row] for name, row in rows], head)


def _own_heading(runs: Runs, run: RunHistory) -> list[Markup]:
    """Name the run where there are several."""
    return [parts.heading(run.label)] if len(runs) > 1 else []


def _summary(runs: Runs) -> list[Markup]:
    figures = [run_figures(run) for run in runs]
    rows = [
        (words, [_figure_text(name, words, own[name]) for own in figures])
        for name, words in SUMMARY.items()
        if name not in RECALLS or any(run.reads_text for run in runs)
    ]
    return [_by_run(runs, rows) if len(runs) > 1 else parts.tiles([(words, row[0]) for words, row in rows])]


def _figure_text(name: str, words: str, value: Any) -> str:
    if name == "seconds":
        return duration_text(value)
    return ", ".join(value) or MISSING if name == "objectives" else labelled_text(words, value)


def _how_to_read(runs: Runs) -> list[Markup]:
    lines = []
    if max(len(run.of_type("train")) for run in runs) > curves.DENSE:
        lines.append("Pale: the recorded values; over them their mean, of about a hundredth of the run at a time.")
    if len(runs) == 1 and runs[0].events("restart"):
        lines.append("Vertical lines: the run was started again.")
    return [parts.paragraph(" ".join(lines))] if lines else []


def _objectives(runs: Runs) -> list[Markup]:
    """List what a run said of its objectives at its last start; of CLIP alone, and before it said so, nothing."""
    contents: list[Markup] = []
    for run in runs:
        told = [record.get("objectives") for name in ("start", "restart") for record in run.events(name)]
        lines = [[value_text(line)] for line in told[-1]] if told and isinstance(told[-1], list) else []
        if run.objectives != ["clip"] and lines:
            contents += [
                *_own_heading(runs, run),
                parts.table(lines, ["objectives, with the views and teachers of each"]),
            ]
    return contents


def _throughput(runs: Runs) -> list[Markup]:
    rows = []
    for words, name, factor in (
        ("samples/s", "samples_per_s", 1.0),
        ("waiting for data, %", "wait_share", 100.0),
        ("peak memory, GB", "memory_gb", 1.0),
    ):
        columns = [[y * factor for _, y in run.points("train", name) if y is not None] for run in runs]
        rows.append([words, *(spread_text(words, values) for values in columns)])
    rows.append(["attempts", *(str(len(run.attempts())) for run in runs)])
    names = [run.label for run in runs] if len(runs) > 1 else ["median (lowest to highest)"]
    remark = [parts.paragraph("Median (lowest to highest) of the recorded steps.")] if len(runs) > 1 else []
    return [*chart_grid(runs, THROUGHPUT), parts.table(rows, ["", *names]), *remark]


def _validation(runs: Runs) -> list[Markup]:
    if not any(run.of_type("val") for run in runs):
        return [parts.missing("No validation is recorded: data.val was empty, or none has been due yet.")]
    names = [name for name in recorded_names(runs, "val") if name not in RECORD_KEYS]
    widths = tuple(name for name in names if name.startswith("width_"))
    shares = [name for name in names if label_of(name).endswith("%") and name not in RECALLS]
    evaluators = [name for name in shares if name.rpartition("/")[2] != "chance"]
    averaged = [name for name in evaluators if name.startswith(EMA)]  # in a chart with those of the weights themselves
    alone = [name for name in evaluators if name not in (*widths, *averaged)]
    charts: list[tuple[str, tuple[str, ...]]] = [(label_of(name), (name, EMA + name)) for name in alone]
    charts += [(label_of(n), (n, EMA + n)) for n in ("t2i_r1", "i2t_r1") if EMA + n in averaged]
    if widths:
        charts.append(("text to image R@1 by width, %", tuple(name for name in widths if name.endswith("/t2i_r1"))))
    charts += [(label_of(name), (name, EMA + name)) for name in ("effective_rank",) if name in names]
    specs = [*RETRIEVAL, *(ChartSpec(label, shown, "val", zero=True) for label, shown in charts)]
    rows = [(label_of(name), [labelled_text(label_of(name), run.last("val", name)) for run in runs]) for name in names]
    contents = [*chart_grid(runs, specs), parts.heading("Last validation"), _by_run(runs, rows)]
    for run in runs:
        if run.of_type("val"):
            contents += _validation_history(run, f"History of {run.label}" if len(runs) > 1 else "History")
        else:
            contents.append(parts.missing(f"{run.label}: no validation is recorded."))
    return contents


def _validation_history(run: RunHistory, title: str) -> list[Markup]:
    """List validations evenly spread, the best and the last."""
    records = run.of_type("val")
    sums = [sum(number(record.get(name)) or 0.0 for name in RECALLS) for record in records]
    best = max(range(len(records)), key=sums.__getitem__)
    stride = max(1, -(-len(records) // MOST_ROWS))
    shown = sorted({*range(0, len(records), stride), best, len(records) - 1})
    columns = [(way, name) for way in DIRECTIONS for name in ("r1", "r5", "r10", "median_rank")]
    words = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "median_rank": "median"}
    head = ["step", *(f"{way.replace('2', '→').upper()} {words[name]}" for way, name in columns)]
    names = [f"{way}_{name}" for way, name in columns]
    rows = [
        [f"{records[place]['step']:,}", *(labelled_text(label_of(name), records[place].get(name)) for name in names)]
        for place in shown
    ]
    remark = "T→I: text to image, I→T: image to text; R@K in percent; in bold the highest sum of the six R@K."
    if len(shown) < len(records):
        remark += f" {len(shown)} of {len(records)} validations; the curves have them all."
    return [
        parts.heading(title),
        parts.table(rows, head, numbers=True, marked={shown.index(best)}),
        parts.paragraph(remark),
    ]


def _images(runs: Runs) -> list[Markup]:
    contents: list[Markup] = []
    for run in runs:
        contents += _own_heading(runs, run)
        sheet = run.folder / "validation.png"
        if sheet.is_file():
            contents.append(image_figure(sheet, "the last validation: captions and the pictures they find"))
        else:
            contents.append(parts.missing("No validation sheet is stored (validation.png)."))
        searches = sorted((run.folder / "search").glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
        contents += [image_figure(path, path.stem.replace("-", " ")) for path in searches[:MOST_IMAGES]]
        if not searches:
            contents.append(parts.missing("No search has left a sheet (search/*.png)."))
        elif len(searches) > MOST_IMAGES:
            contents.append(parts.missing(f"The newest {MOST_IMAGES} of {len(searches)} searches."))
    return contents


def _results(runs: Runs) -> list[Markup]:
    found = list(dict.fromkeys(tool for run in runs for tool in run.results))
    order = list(TOOLS)
    found.sort(key=lambda tool: (order.index(_base(tool)) if _base(tool) in order else len(order), tool))
    contents: list[Markup] = []
    for tool in found:
        contents += [parts.heading(_tool_heading(tool)), *_result(runs, tool)]
        for run in runs:
            images = sorted((run.folder / "results").glob("*.png"))
            contents += [
                image_figure(path, f"{run.label}: {path.stem}") for path in images if _owner(path, found) == tool
            ]
    absent = [TOOLS[tool] for tool in EXPECTED if tool not in map(_base, found)]
    return [*contents, *([parts.missing(f"Not measured: {'; '.join(absent)}.")] if absent else [])]


def _base(tool: str) -> str:
    return tool.partition("-")[0]


def _tool_heading(tool: str) -> str:
    base, _, variant = tool.partition("-")
    heading = TOOLS.get(base, base.replace("_", " ").capitalize())
    return f"{heading}: {variant}" if variant else heading


def _owner(path: Path, tools: Sequence[str]) -> str | None:
    """Return the tool whose name the image's begins with, the longest of several."""
    return max((tool for tool in tools if path.stem.startswith(tool)), key=len, default=None)


def _result(runs: Runs, tool: str) -> list[Markup]:
    """Show plain values in one table, and each value that holds several below it."""
    records = [run.results.get(tool, {}) for run in runs]
    names = list(dict.fromkeys(name for record in records for name in record))
    nested = [name for name in names if any(isinstance(record.get(name), (dict, list)) for record in records)]
    plain = [
        (label_of(name), [labelled_text(label_of(name), record.get(name)) for record in records])
        for name in names
        if name not in nested
    ]
    contents: list[Markup] = [_by_run(runs, plain)] if plain else []
    for name in nested:
        inside = _nested(runs, label_of(name), [record.get(name) for record in records])
        contents += [parts.heading(label_of(name), level=4), *inside] if inside else []
    return contents


def _nested(runs: Runs, label: str, values: Sequence[Any]) -> list[Markup]:
    """Show {name: value} as rows with a column for each run, lists of objects as a table for each run, else JSON."""
    maps = [value if isinstance(value, dict) else {} for value in values]
    if any(maps):
        names = list(dict.fromkeys(name for entry in maps for name in entry))
        rows = [(label_of(name), [labelled_text(label, entry.get(name)) for entry in maps]) for name in names]
        return [_by_run(runs, _extremes(rows, maps, names))]
    contents: list[Markup] = []
    for run, value in zip(runs, values):
        if not value:
            continue
        contents += [parts.paragraph(run.label)] if len(runs) > 1 else []
        if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
            head = list(dict.fromkeys(name for entry in value for name in entry))
            body = [[labelled_text(label_of(name), entry.get(name)) for name in head] for entry in value[:MOST_CLASSES]]
            contents.append(parts.table(body, [label_of(name) for name in head]))
            if len(value) > MOST_CLASSES:
                contents.append(parts.missing(f"The first {MOST_CLASSES} of {len(value)} rows."))
        else:
            contents.append(parts.paragraph(value_text(value)))
    return contents


def _extremes(rows: list[tuple[str, list[str]]], maps: Sequence[dict], names: Sequence[str]) -> list:
    """Return all rows where there is room; else the lowest and the highest values of the first run that has any."""
    if len(rows) <= MOST_CLASSES:
        return rows
    first = next(entry for entry in maps if entry)
    order = sorted(range(len(names)), key=lambda row: number(first.get(names[row])) or 0.0)
    half = MOST_CLASSES // 2
    left_out = (f"({len(rows) - 2 * half} between)", [""] * len(maps))
    return [*(rows[row] for row in order[:half]), left_out, *(rows[row] for row in order[-half:])]


def _data(runs: Runs) -> list[Markup]:
    figures = [run_figures(run) for run in runs]
    rows = [
        ("training shards", [shards_text(run.config.data.train) if run.config else MISSING for run in runs]),
        ("validation shards", [shards_text(run.config.data.val) if run.config else MISSING for run in runs]),
        ("samples seen", [number_text(figure["samples"]) for figure in figures]),
        ("epochs", [number_text(run.last("train", "epoch")) for run in runs]),
        ("steps of an epoch", [number_text(run.steps_per_epoch()) for run in runs]),
        ("validation pictures", [number_text(run.last("val", "candidates")) for run in runs]),
        ("validation captions", [number_text(run.last("val", "captions")) for run in runs]),
        ("unusable samples", [number_text(figure["bad_samples"]) for figure in figures]),
    ]
    for reason in dict.fromkeys(reason for figure in figures for reason in figure["bad_counts"]):
        rows.append((f"unusable: {reason}", [number_text(figure["bad_counts"].get(reason, 0)) for figure in figures]))
    return [_by_run(runs, rows), *(part for run in runs for part in _bad_samples(runs, run))]


def _bad_samples(runs: Runs, run: RunHistory) -> list[Markup]:
    """List the unusable samples that are named, each once: an epoch later it is found again."""
    columns = ("shard", "key", "reason")
    named = [tuple(value_text(record.get(name)) for name in columns) for record in run.events("bad_sample")]
    rows = list(dict.fromkeys(named))
    title = f"Unusable samples of {run.label}" if len(runs) > 1 else "Unusable samples"
    if not rows:
        return [parts.paragraph(f"{title}: none is named.")]
    more = f"The first {MOST_NAMED} of {len(rows)}; metrics.jsonl names them."
    remark = [parts.paragraph(more)] if len(rows) > MOST_NAMED else []
    return [parts.heading(title), parts.table(rows[:MOST_NAMED], columns), *remark]


def _events(runs: Runs) -> list[Markup]:
    counts = [Counter(str(record.get("event")) for record in run.of_type("event")) for run in runs]
    kinds = list(dict.fromkeys(kind for count in counts for kind in count))
    if not kinds:
        return [parts.paragraph("None: no restart, no interruption, no step left out, no unusable sample.")]
    table = _by_run(runs, [(kind, [number_text(count[kind]) for count in counts]) for kind in kinds])
    return [table, *(part for run in runs for part in _event_list(runs, run))]


def _event_list(runs: Runs, run: RunHistory) -> list[Markup]:
    """List all but the single samples, which stand under Data; an event that is repeated at once is one row."""
    rows: list[list[str]] = []
    for record in run.of_type("event"):
        kind, step = str(record.get("event")), f"{record['step']:,}"
        if kind == "bad_sample":
            continue
        shown = {name: value for name, value in record.items() if name not in (*RECORD_KEYS, "event")}
        details = "; ".join(f"{name} {value_text(value)}" for name, value in shown.items())
        if rows and rows[-1][2:] == [kind, details]:
            rows[-1][1] = f"{rows[-1][1].partition(' ')[0]} to {step}"
        else:
            rows.append([time_text(record.get("time")), step, kind, details])
    if not rows:
        return []
    table = parts.table(rows[-MOST_EVENTS:], ["time (UTC)", "step", "event", ""])
    remark = [parts.paragraph(f"The last {MOST_EVENTS} of {len(rows)}.")] if len(rows) > MOST_EVENTS else []
    return [*_own_heading(runs, run), table, *remark]


def _configuration(runs: Runs) -> list[Markup]:
    settings = [flat(run.config) if run.config else {} for run in runs]
    if not any(settings):
        return [parts.missing("Not known: see above.")]
    rows, marked = _differences(settings)
    remark = "Settings that differ from the defaults"
    remark += "; in bold those in which the runs differ." if len(runs) > 1 else "; all others are the defaults."
    contents = [
        parts.paragraph(remark),
        parts.table(rows, ["setting", "default", *(run.label for run in runs)], marked=marked),
    ]
    for run in runs:
        if run.config is not None:
            of = f" of {run.label}" if len(runs) > 1 else ""
            contents.append(parts.details(f"The whole configuration{of}", to_yaml(run.config)))
    return contents


def _differences(settings: Sequence[dict[str, Any]]) -> tuple[list[list[str]], list[int]]:
    """Return rows of setting, default, each run's; and which rows differ between runs. {}: a run that is not known."""
    defaults = flat(load_config())
    rows: list[list[str]] = []
    marked = []
    for name in dict.fromkeys([*defaults, *(name for chosen in settings for name in chosen)]):
        default, *own = (setting_text(chosen[name]) if name in chosen else MISSING for chosen in (defaults, *settings))
        known = [value for value, chosen in zip(own, settings) if chosen]
        if any(value != default for value in known):
            if len(set(known)) > 1:
                marked.append(len(rows))
            rows.append([name, default, *own])
    return rows, marked


def _environment(runs: Runs) -> list[Markup]:
    facts = [dict(_flat_facts(run.environment)) for run in runs]
    names = list(dict.fromkeys(name for known in facts for name in known))
    if not names:
        return [parts.missing("Not known: environment.json is missing or cannot be read.")]
    return [_by_run(runs, [(name, [known.get(name, MISSING) for known in facts]) for name in names])]


def _flat_facts(environment: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in environment.items():
        if isinstance(value, dict):
            yield from ((str(inner), value_text(entry)) for inner, entry in value.items())
        elif name == "command" and isinstance(value, list):
            yield name, shlex.join(map(str, value))
        else:
            yield name, value_text(value)
