"""Draw curves with matplotlib as inline SVG whose colours are CSS variables.

The page that holds a chart defines --quiet, --line and --series-0 to --series-7, for light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 420, 230  # of the drawing, in points; about one pixel each where three stand side by side
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # margins: numbers stand to the left and below
COLOURS = 8  # after which dashes tell series apart
DASHES = ("none", "7 3", "2 3", "9 3 2 3")  # as in SVG's stroke-dasharray
LIMIT = 1e100  # values beyond, of either sign, are drawn here: limits and margins of the axis stay floats
LOG_FROM = 30  # a logarithmic axis is used where the largest value is so many times the smallest
COLUMNS = 360  # thinning keeps four points in each; as fine as a screen shows
MEANS = 90  # columns of the mean
DENSE = 360  # a series of more points is drawn pale, with its mean over it
DOTS = 40  # a series of at most so many points has each of them marked
MOST_MARKS = 40  # vertical lines of a series

Point = tuple[float, float | None]

# matplotlib draws in the colours on the left; in the SVG they are replaced.
_SERIES = [f"#0001{number:02x}" for number in range(COLOURS)]
_QUIET, _LINE = "#0002fe", "#0002ff"
_VARIABLES = {_QUIET: "var(--quiet)", _LINE: "var(--line)"}
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES)}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "clipdist",  # the same ids every time
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": _QUIET,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.linewidth": 1,
    "axes.labelcolor": _QUIET,
    "axes.labelpad": 1,
    "grid.color": _LINE,
    "grid.linewidth": 1,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "ytick.major.size": 0,
    "lines.scale_dashes": False,
    "lines.solid_joinstyle": "round",
    "lines.solid_capstyle": "round",
    "lines.dash_capstyle": "round",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
}
_NAMESPACES = {"": "http://www.w3.org/2000/svg", "xlink": "http://www.w3.org/1999/xlink"}


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y) with x ascending; None is a value that is missing or not finite, and a gap."""

    name: str
    points: Sequence[Point]
    colour: int  # its number, from 0
    marks: Sequence[float] = ()  # x of vertical lines, such as restarts

    @property
    def values(self) -> list[float]:
        """The finite values."""
        return [y for _, y in self.points if y is not None]


def chart(title: str, series: Sequence[Series], x_title: str, log: bool = False, zero: bool = False) -> Markup:
    """Return the chart as an <svg> element, without title and legend; empty where no series has a value.

    Args:
        title: for those who cannot see the chart.
        log: use a logarithmic y axis where the values above 0 spread widely; values of 0 and below are then gaps.
        zero: let a linear y axis begin at 0.
    """
    values = np.clip([value for line in series for value in line.values], -LIMIT, LIMIT)
    if not values.size:
        return Markup()
    above = values[values > 1 / LIMIT]
    log = log and above.size > 0 and above.max() > LOG_FROM * above.min()
    low, high = (above.min(), above.max()) if log else _widened(values.min(), values.max())
    margin = (high / low) ** 0.04 if log else 0.05 * (high - low)
    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        figure.subplots_adjust(LEFT / WIDTH, BOTTOM / HEIGHT, 1 - RIGHT / WIDTH, 1 - TOP / HEIGHT)
        axes = figure.add_subplot()
        if log:
            axes.set_yscale("log")
            axes.set_ylim(low / margin, high * margin)
        else:
            axes.set_ylim(0 if zero and low >= 0 else low - margin, high + margin)
        xs = [x for line in series for x, _ in line.points]
        axes.set_xlim(*_widened(min(xs), max(xs)))
        axes.set_xlabel(x_title)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(LogLocator(numticks=6) if log else MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
        titles: dict[str, str] = {}
        for number, line in enumerate(series):
            titles |= _draw(axes, f"series-{number}", line, log)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), f"{title}: {'; '.join(map(_in_words, series))}", titles)


def dash(colour: int) -> str:
    """Return the dashes that go with a colour: series can be told apart in a grey print as well."""
    return DASHES[(colour + colour // COLOURS) % len(DASHES)]


def thin(x: np.ndarray, y: np.ndarray, columns: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce points to what can be seen where they are drawn on so many columns.

    The first, lowest, highest and last value of each column stay, so that no peak is lost; a column without a value
    stays as a gap.
    """
    if len(x) <= 4 * columns:
        return x, y
    kept: set[int] = set()
    for column in np.array_split(np.arange(len(x)), columns):
        seen = column[np.isfinite(y[column])]
        kept |= {seen[0], seen[y[seen].argmin()], seen[y[seen].argmax()], seen[-1]} if len(seen) else {column[0]}
    rows = sorted(kept)
    return x[rows], y[rows]


def means(x: np.ndarray, y: np.ndarray, columns: int = MEANS) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean x and the mean finite y of each column; nan where it has none."""
    parts = np.array_split(np.arange(len(x)), columns)
    finite = [y[part][np.isfinite(y[part])] for part in parts]
    return np.array([x[part].mean() for part in parts]), np.array([v.mean() if len(v) else np.nan for v in finite])


def tick_text(value: float) -> str:
    """Return a short number: 0.5, 150, 12k, 3M, 1e-5."""
    size = abs(value)
    for least, unit, name in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if least <= size < 1e12:
            return f"{value / unit:g}{name}"
    if 1e-4 <= size < 1e12 or not size:
        return f"{value:.6g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _widened(low: float, high: float) -> tuple[float, float]:
    """Return limits that can be drawn and labelled, also where the values are equal or differ in the last bits only."""
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    if high - low >= least:
        return low, high
    half = 0.05 * max(abs(low), abs(high)) or 0.5
    return low - half, high + half


def _draw(axes: Axes, gid: str, line: Series, log: bool) -> dict[str, str]:
    """Draw a series and its marks. Return the title of each group of the SVG, by id."""
    x = np.array([x for x, _ in line.points], dtype=float)
    y = np.clip(np.array([np.nan if y is None else y for _, y in line.points], dtype=float), -LIMIT, LIMIT)
    if log:
        y[~(y > 1 / LIMIT)] = np.nan
    colour, strokes = _SERIES[line.colour % COLOURS], dash(line.colour)
    titles = {gid: _in_words(line)}
    for number, place in enumerate(line.marks[-MOST_MARKS:]):
        titles[f"{gid}-mark-{number}"] = f"{line.name}: went on after {place:g}"
        axes.axvline(place, color=colour, linewidth=1, alpha=0.4, gid=f"{gid}-mark-{number}")
    if len(x) > DENSE:
        axes.plot(*thin(x, y), color=colour, linewidth=1, alpha=0.3)
        x, y = means(x, y)
    finite = np.pad(np.isfinite(y), 1)
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    dots = np.flatnonzero(finite[1:-1] if len(line.points) <= DOTS else alone).tolist()
    style = "solid" if strokes == "none" else (0, tuple(map(float, strokes.split())))
    look = {"color": colour, "linestyle": style, "linewidth": 1.8, "marker": "o", "markersize": 4, "markevery": dots}
    axes.plot(x, y, **look, clip_on=False, gid=gid)
    return titles


def _in_words(line: Series) -> str:
    values = line.values
    if not values:
        return f"{line.name}: no value"
    return f"{line.name}: last {values[-1]:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"


def _inline(svg: str, label: str, titles: dict[str, str]) -> Markup:
    """Make matplotlib's SVG a part of a page: colours as variables, titles to hover over, no needless ids."""
    root = ElementTree.fromstring(svg)
    for prefix, name in _NAMESPACES.items():
        ElementTree.register_namespace(prefix, name)
    for unwanted in ("metadata", "defs"):  # these defs hold a style sheet, which would apply to the whole page
        root.remove(root.find(unwanted, _NAMESPACES))  # type: ignore[arg-type]
    for element in root.iter():
        if "style" in element.attrib:
            style = re.sub(r"font-family:[^;]*;?", "", element.attrib["style"])
            element.set("style", re.sub(r"#0+[12]\w\w", lambda found: _VARIABLES[found[0]], style))
        if "d" in element.attrib:
            element.set("d", re.sub(r"\s+", " ", re.sub(r"(\.\d)\d+", r"\1", element.attrib["d"])).strip())
        if element.tag.endswith("}g") and (title := titles.get(element.attrib.pop("id", ""))):
            words = ElementTree.Element(f"{{{_NAMESPACES['']}}}title")
            words.text = title
            element.insert(0, words)
        element.text, element.tail = (text and text.strip() for text in (element.text, element.tail))
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
