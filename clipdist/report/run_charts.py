"""Choose and draw the charts of a report from the records of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from clipdist.report import curves
from clipdist.report.curves import Series
from clipdist.report.history import RunHistory, number
from clipdist.report.page import parts
from clipdist.report.words import DIRECTIONS, LABELS, label_of


@dataclass(frozen=True)
class ChartSpec:
    """What a chart shows: a name that ends in / stands for all that begin so."""

    title: str
    names: tuple[str, ...]
    kind: str = "train"
    factor: float = 1.0
    log: bool = False
    zero: bool = False
    optional: bool = False  # nothing is missing where it is not recorded
    text: bool = False  # nor is it where no run reads captions


TRAINING = (
    ChartSpec("Loss", ("loss",)),
    ChartSpec("Terms of the loss", ("loss/",), optional=True),
    ChartSpec("Log scale t of the logits", ("logit_scale",), text=True),
    ChartSpec("Bias of the logits", ("logit_bias",), optional=True),
    ChartSpec("Learning rate", ("lr",), zero=True),
    ChartSpec("Gradient norm", ("grad_norm/",), log=True),
    ChartSpec("Momentum of the teacher", ("teacher_momentum",), optional=True),
    ChartSpec("R@1 within the batch, %", ("batch_t2i_r1", "batch_i2t_r1"), zero=True, optional=True),
    ChartSpec(LABELS["batch_views_r1"], ("batch_views_r1",), zero=True, optional=True),
    ChartSpec(LABELS["batch_keys_r1"], ("batch_keys_r1",), zero=True, optional=True),
)
THROUGHPUT = (
    ChartSpec("Samples per second", ("samples_per_s",), zero=True),
    ChartSpec("Time spent waiting for data, %", ("wait_share",), factor=100.0, zero=True),
    ChartSpec("Peak memory, GB", ("memory_gb",), zero=True),
)
RETRIEVAL = tuple(
    ChartSpec(f"{words.capitalize()}, R@K in %", tuple(f"{way}_r{k}" for k in (1, 5, 10)), "val", zero=True, text=True)
    for way, words in DIRECTIONS.items()
)


def chart_grid(runs: Sequence[RunHistory], specs: Sequence[ChartSpec]) -> list[Markup]:
    """Draw the charts, and name those that nothing is recorded for."""
    drawn = [(spec, _charts(runs, spec)) for spec in specs]
    text = any(run.reads_text for run in runs)
    missing = [spec.title for spec, charts in drawn if not charts and not spec.optional and (text or not spec.text)]
    grid = parts.chart_grid([chart for _, charts in drawn for chart in charts])
    return [grid, parts.missing(f"Not recorded: {'; '.join(missing)}.")] if missing else [grid]


def recorded_names(runs: Sequence[RunHistory], kind: str) -> list[str]:
    """Return the names with a number in them, in the order in which they first come."""
    records = (record for run in runs for record in run.of_type(kind))
    return list(
        dict.fromkeys(name for record in records for name, value in record.items() if number(value) is not None)
    )


def _charts(runs: Sequence[RunHistory], spec: ChartSpec) -> list[Markup]:
    """Draw, of one run, one chart with a colour per name; of several, a chart per name with a colour per run."""
    recorded = dict.fromkeys(name for run in runs for record in run.of_type(spec.kind) for name in record)
    names = [
        name
        for wanted in spec.names
        for name in recorded
        if (name.startswith(wanted) if wanted.endswith("/") else name == wanted)
    ]
    # A step may be another number of pairs in each run.
    batches = {run.config.train.global_batch for run in runs if run.config}
    x = "step" if len(batches) <= 1 else "samples"
    if len(runs) == 1:
        restarts = [record["step"] for record in runs[0].events("restart")] if spec.kind == "train" else []
        lines = [
            _series(runs[0], spec, name, x, label_of(name), place, restarts if place == 0 else [])
            for place, name in enumerate(names)
        ]
        return _chart(spec.title, lines, x, spec)
    charts = []
    for name in names:
        title = LABELS.get(name) or (spec.title if len(names) == 1 else f"{spec.title}: {label_of(name)}")
        lines = [_series(run, spec, name, x, run.label, place) for place, run in enumerate(runs)]
        charts += _chart(title, [line for line in lines if line.points], x, spec)
    return charts


def _series(
    run: RunHistory, spec: ChartSpec, name: str, x: str, label: str, colour: int, marks: Sequence[float] = ()
) -> Series:
    points = [(place, None if y is None else y * spec.factor) for place, y in run.points(spec.kind, name, x)]
    return Series(label, sorted(points, key=lambda point: point[0]), colour, marks)


def _chart(title: str, lines: Sequence[Series], x: str, spec: ChartSpec) -> list[Markup]:
    svg = curves.chart(title, lines, "step" if x == "step" else "samples seen", spec.log, spec.zero)
    return [parts.chart(title, svg, [_legend(line, len(lines) > 1) for line in lines])] if svg else []


def _legend(line: Series, several: bool) -> tuple[str, str, int]:
    values = line.values
    if not values:
        return line.name, "not recorded", line.colour
    words = f"last {values[-1]:.4g}" if several else f"{min(values):.4g} to {max(values):.4g}, last {values[-1]:.4g}"
    gaps = len(line.points) - len(values)
    return line.name if several else "", words + (f", {gaps} not finite" if gaps else ""), line.colour
