"""Named lists of numbers in, one chart as inline SVG out: colours by CSS variables, as many points as can be seen.

The page that holds a chart defines --quiet, --line and --series-0 to --series-7, and so decides on light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH, HEIGHT = 420, 230  # of the drawing, in units of its own; about one pixel each where three stand side by side
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # margins: numbers stand to the left and below
COLOURS = 8  # after which dashes tell series apart
MOST = 1e300  # a value beyond, of either sign, is drawn here: the axis and its margins stay floats
DASHES = ("none", "7 3", "2 3", "9 3 2 3")
COLUMNS = 2 * (WIDTH - LEFT - RIGHT)  # thinning keeps four points in each; finer than a screen shows
LOG_FROM = 30  # a logarithmic axis is worth it where the largest value is so many times the smallest
DENSE = COLUMNS // 2  # a series of more points is drawn pale, and its mean over it
MEANS = COLUMNS // 4  # columns of the mean
DOTS = 40  # a series of at most so many points has each of them marked
MOST_MARKS = 40  # vertical lines of a series

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y) with x ascending; None is a value that is missing or not finite, and a gap."""

    name: str
    points: Sequence[Point]
    colour: int  # its number, from 0
    marks: Sequence[float] = ()  # places on x with a vertical line, such as restarts


@dataclass(frozen=True)
class Axis:
    """A stretch of numbers on a stretch of the drawing."""

    low: float
    high: float
    begin: float  # where `low` and `high` are drawn
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def chart(title: str, series: Sequence[Series], x_title: str, log: bool = False, zero: bool = False) -> str:
    """The chart as an <svg> element, without title and legend: those are the page's own text.

    Args:
        title: said to those who cannot see it.
        log: draw y on a logarithmic axis where the values are above 0 and spread widely; values of 0 and below are
            then gaps.
        zero: let a linear y axis begin at 0.

    Returns:
        "" where no series has a single value.
    """
    series = [replace(line, points=[(x, _clamped(y)) for x, y in line.points]) for line in series]
    values = [y for line in series for _, y in line.points if y is not None]
    if not values:
        return ""
    xs = [x for line in series for x, _ in line.points]
    x_axis = Axis(*_widened(min(xs), max(xs)), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis(values, log, zero)
    parts = [_grid(x_axis, y_axis, x_title)]
    parts += [_marks(line, x_axis) for line in series]
    parts += [_line(line, x_axis, y_axis) for line in series]
    label = html.escape(f"{title}: {'; '.join(_in_words(line) for line in series)}")
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n{body}</svg>\n'


def key(line: Series) -> str:
    """A short stroke in the look of a series, for the legend: an <svg> element."""
    stroke = f'<path class="curve" d="M0 5h26" {_look(line.colour)}/>'
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{stroke}</svg>'


def thin(points: Sequence[Point], low: float, high: float, columns: int = COLUMNS) -> list[Point]:
    """What is seen of the points where x from low to high is drawn on so many columns.

    Of each column the first, the lowest, the highest and the last stay, so that no peak is lost; a gap stays where its
    column holds nothing else.
    """
    if len(points) <= 4 * columns:
        return list(points)
    kept: list[Point] = []
    for column in _by_column(points, low, high, columns):
        values = [(number, y) for number, (_, y) in enumerate(column) if y is not None]
        if not values:
            kept.append(column[0])
            continue
        least, most = min(values, key=lambda pair: pair[1]), max(values, key=lambda pair: pair[1])
        kept += [column[number] for number in sorted({values[0][0], least[0], most[0], values[-1][0]})]
    return kept


def ticks(axis: Axis) -> list[float]:
    """Round numbers on the axis: 1, 2 or 5 times a power of ten apart; on a logarithmic one, powers of ten."""
    if axis.log:
        first, last = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
        every = max(1, (last - first + 1) // 5)
        return [10.0**power for power in range(first, last + 1, every)]
    rough = (axis.high - axis.low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Short: 0.5, 150, 12k, 3M, 1e-05."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if unit <= size < 1e12:
            return f"{value / (1e3 if name == 'k' else unit):g}{name}"
    return (
        f"{value:.6g}" if 1e-4 <= size < 1e12 or not size else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def _y_axis(values: Sequence[float], log: bool, zero: bool) -> Axis:
    above = [value for value in values if value > 0]
    if log and above and max(above) / LOG_FROM > min(above):
        low, high = min(above), max(above)
        margin = math.exp(0.04 * (math.log(high) - math.log(low)))
        return Axis(max(low / margin, 5e-324), min(high * margin, 1e308), HEIGHT - BOTTOM, TOP, log=True)
    low, high = _widened(min(values), max(values))
    margin = 0.05 * (high - low)
    if zero and low >= 0:
        return Axis(0.0, high + margin, HEIGHT - BOTTOM, TOP)
    return Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)


def _clamped(value: float | None) -> float | None:
    return None if value is None else max(-MOST, min(MOST, value))


def _widened(low: float, high: float) -> tuple[float, float]:
    """A stretch that can be drawn and labelled, also where the values are one, or differ in the last bits alone."""
    least = 1e-6 * max(abs(low), abs(high)) or 1.0
    if high - low >= least and high > low:
        return low, high
    half = 0.05 * max(abs(low), abs(high)) or 0.5
    return low - half, high + half


def _grid(x_axis: Axis, y_axis: Axis, x_title: str) -> str:
    parts = []
    for value in ticks(y_axis):
        y = y_axis.place(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick_text(value)}</text>\n')
    base = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    for value in ticks(x_axis):
        x = x_axis.place(value)
        anchor = "end" if x > WIDTH - RIGHT - 8 else "middle"
        parts.append(f'<path class="axis" d="M{x:.1f} {base}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{tick_text(value)}</text>\n')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x_title)}</text>\n')
    return "".join(parts)


def _marks(line: Series, x_axis: Axis) -> str:
    places = {f"{x_axis.place(x):.0f}": x for x in line.marks if x_axis.low <= x <= x_axis.high}
    return "".join(
        f'<path class="mark" d="M{place} {TOP}V{HEIGHT - BOTTOM}" {_look(line.colour)}>'
        f"<title>{html.escape(line.name)}: went on after {x:g}</title></path>\n"
        for place, x in list(places.items())[-MOST_MARKS:]
    )


def means(points: Sequence[Point], low: float, high: float, columns: int = MEANS) -> list[Point]:
    """The mean of each column, at its mean x; None where it holds no value."""
    kept: list[Point] = []
    for column in _by_column(points, low, high, columns):
        values = [y for _, y in column if y is not None]
        x = sum(x for x, _ in column) / len(column)
        kept.append((x, sum(y / len(values) for y in values) if values else None))
    return kept


def _line(line: Series, x_axis: Axis, y_axis: Axis) -> str:
    title = f"<title>{html.escape(_in_words(line))}</title>"
    points, pale = thin(line.points, x_axis.low, x_axis.high), ""
    if len(line.points) > DENSE:
        pale = f'<path class="curve pale" d="{_path(points, x_axis, y_axis)}" {_look(line.colour)}>{title}</path>\n'
        points = means(line.points, x_axis.low, x_axis.high)
    drawn = f'{pale}<path class="curve" d="{_path(points, x_axis, y_axis)}" {_look(line.colour)}>{title}</path>\n'
    if len(line.points) > DOTS:
        return drawn
    return drawn + "".join(_dot(line, x, y, x_axis, y_axis) for x, y in points if y is not None)


def _path(points: Sequence[Point], x_axis: Axis, y_axis: Axis) -> str:
    """A point between two gaps is a line of no length, which round ends make a dot."""
    words, drawing = [], False
    for x, y in points:
        if y is None or (y_axis.log and y <= 0):
            drawing = False
            continue
        place = f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}"
        words.append(f"L{place}" if drawing else f"M{place}h0")
        drawing = True
    return "".join(words)


def _dot(line: Series, x: float, y: float, x_axis: Axis, y_axis: Axis) -> str:
    if y_axis.log and y <= 0:
        return ""
    title = f"<title>{html.escape(line.name)}: {y:.4g} at {x:g}</title>"
    centre = f'cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}"'
    return f'<circle {centre} r="2.4" fill="var(--series-{line.colour % COLOURS})">{title}</circle>\n'


def _look(colour: int) -> str:
    """Dashes go with the colour: a print in grey can be told apart as well."""
    return f'stroke="var(--series-{colour % COLOURS})" stroke-dasharray="{DASHES[_dash(colour)]}"'


def _dash(colour: int) -> int:
    return (colour + colour // COLOURS) % len(DASHES)


def _in_words(line: Series) -> str:
    values = [y for _, y in line.points if y is not None]
    if not values:
        return f"{line.name}: no value"
    return f"{line.name}: last {values[-1]:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"


def _by_column(points: Sequence[Point], low: float, high: float, columns: int) -> list[list[Point]]:
    parts: list[list[Point]] = []
    before = None
    for point in points:
        column = int((point[0] - low) / (high - low) * columns)
        if column != before:
            parts.append([])
        parts[-1].append(point)
        before = column
    return parts
