"""Make the page of an evaluation suite: models side by side on every set."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup

from clipdist.evals.suite import headlines
from clipdist.report.page import parts, render
from clipdist.report.words import label_of, labelled_text

NOT_FIGURES = ("set", "task", "data", "cached")


def suite_page(
    title: str,
    labels: Sequence[str],
    results: Sequence[Sequence[dict[str, Any]]],
    remarks: Sequence[str],
    made: datetime,
) -> str:
    """Return the page: one table of what counts, the best of a row in bold, then a section per set with all figures.

    Args:
        labels: of the models.
        results: of each model, what measure_all returned for the same sets.
        remarks: lines under the title.
        made: when, in UTC.
    """
    rows = [
        [name, task_words(task), label_of(figure), *_marked(values)]
        for name, task, figure, values in headlines(results)
    ]
    summary = [parts.table(rows, ["set", "task", "figure", *labels])]
    sections: list[tuple[str, str, list[Markup]]] = [("summary", "All sets", summary)]
    for number, found in enumerate(zip(*results)):
        names = [name for name in found[0] if name not in NOT_FIGURES]
        body = [[label_of(name), *(labelled_text(label_of(name), each[name]) for each in found)] for name in names]
        heading = f"{found[0]['set']}: {task_words(found[0]['task'])}"
        sections.append((f"set-{number}", heading, [parts.table(body, ["", *labels])]))
    return render("suite.html", title=title, remarks=[*remarks, f"{made:%Y-%m-%d %H:%M} UTC"], sections=sections)


def task_words(task: str) -> str:
    return task.replace("_", "-")


def _marked(values: Sequence[float]) -> list[str | Markup]:
    texts = [f"{value:.2f}" for value in values]
    best = f"{max(values):.2f}"
    return [Markup("<b>%s</b>") % text if len(values) > 1 and text == best else text for text in texts]
