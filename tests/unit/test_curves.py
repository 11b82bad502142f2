"""Charts: no peak is lost, gaps stay gaps, axes that can be read, for any numbers that a run can record."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.report.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Series, chart, means, thin, tick_text


def strokes(drawing: str, colour: int = 0) -> list[list[tuple[float, float]]]:
    """The last curve of a colour, as one list of (x, y) for each stretch without a gap."""
    root = ElementTree.fromstring(drawing)
    curves = [p for p in root.iterfind(".//{*}g/{*}path") if f"stroke: var(--series-{colour})" in p.get("style", "")]
    stretches = (curves[-1].get("d") or "").split("M")[1:]
    found = [[(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", stretch)] for stretch in stretches]
    return [stretch for stretch in found if len(stretch) > 1]


def dots(drawing: str) -> list[tuple[float, float]]:
    uses = ElementTree.fromstring(drawing).iterfind(".//{*}use")
    return [(float(use.get("x", "")), float(use.get("y", ""))) for use in uses if "series" in use.get("style", "")]


def words(drawing: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(drawing).iterfind(".//{*}text")]


def test_a_line_goes_from_corner_to_corner() -> None:
    drawing = chart("loss", [Series("loss", [(0, 0.0), (50, 6.0), (100, 10.0)], 0)], "step", zero=True)
    (((x0, y0), (x1, y1), (x2, y2)),) = strokes(drawing)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert y0 == HEIGHT - BOTTOM
    assert TOP < y2 < TOP + 15  # a margin of 5 %
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, y0 + 0.6 * (y2 - y0)), abs=0.2)
    assert len(dots(drawing)) == 3


def test_values_that_are_missing_are_gaps_and_a_lone_point_is_seen() -> None:
    points = [(float(x), 1.0 + x % 2) for x in range(60)]
    points[20:40] = [(float(x), 3.0 if x == 30 else None) for x in range(20, 40)]  # type: ignore[list-item]
    drawing = chart("loss", [Series("loss", points, 0)], "step")
    assert [len(stretch) for stretch in strokes(drawing)] == [20, 20]
    ((x, _),) = dots(drawing)
    assert x == pytest.approx(LEFT + 30 / 59 * (WIDTH - LEFT - RIGHT), abs=0.1)


def test_thinning_keeps_every_peak_and_every_long_gap() -> None:
    x = np.arange(100_000.0)
    y = np.where((x >= 40_000) & (x < 50_000), np.nan, np.sin(x / 1000))
    y[12_345], y[77_777] = 9.0, -9.0
    xs, ys = thin(x, y, columns=300)
    assert len(xs) <= 4 * 300
    assert {(12_345, 9.0), (77_777, -9.0), (0, y[0]), (99_999, y[-1])} <= set(zip(xs, ys))
    assert (np.diff(xs) > 0).all()
    missing = xs[np.isnan(ys)]
    assert 40_000 <= min(missing) < 41_000
    assert 49_000 < max(missing) < 50_000


def test_means_of_columns() -> None:
    x, y = means(np.arange(6.0), np.array([1.0, 3.0, np.nan, np.nan, 5.0, np.nan]), columns=3)
    assert x.tolist() == [0.5, 2.5, 4.5]
    assert y[[0, 2]].tolist() == [2.0, 5.0]
    assert np.isnan(y[1])


def test_a_long_series_is_a_bounded_drawing() -> None:
    sizes = [len(chart("loss", [Series("loss", [(x, x % 7) for x in range(n)], 0)], "step")) for n in (10**4, 10**5)]
    assert sizes[1] < 1.1 * sizes[0] < 60_000


def test_a_drawing_is_the_same_every_time() -> None:
    series = [Series("loss", [(0, 1.0), (1, None), (2, 3.0)], 0, marks=[1])]
    assert chart("loss", series, "step") == chart("loss", series, "step")


def test_a_logarithmic_axis_only_where_values_spread() -> None:
    wide = chart("norm", [Series("a", [(0, 0.01), (1, 1.0), (2, 100.0)], 0)], "step", log=True)
    (((_, low), (_, middle), (_, high)),) = strokes(wide)
    assert middle == pytest.approx((low + high) / 2, abs=0.2)
    narrow = chart("norm", [Series("a", [(0, 1.0), (1, 2.0), (2, 4.0)], 0)], "step", log=True)
    (((_, low), (_, middle), (_, high)),) = strokes(narrow)
    assert middle - high == pytest.approx(2 * (low - middle), abs=0.4)


def test_zero_on_a_logarithmic_axis_is_a_gap() -> None:
    series = [Series("a", [(0, 0.01), (1, 0.0), (2, 100.0)], 0), Series("locked", [(0, 0.0), (2, 0.0)], 1)]
    assert len(dots(chart("norm", series, "step", log=True))) == 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, ["0", "20", "40", "60", "80", "100"]),
        (0, 0.0012, ["0", "0.0005", "0.001"]),
        (2.65, 2.79, ["2.65", "2.7", "2.75"]),
        (0, 60_000, ["0", "20k", "40k", "60k"]),
        (-3e-6, 3e-6, ["-2e-6", "0", "2e-6"]),
        (0, 15e6, ["0", "5M", "10M", "15M"]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[str]) -> None:
    assert words(chart("any", [Series("any", [(low, 0.0), (high, 1.0)], 0)], "x"))[: len(expected) + 1] == [
        *expected,
        "x",
    ]


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten() -> None:
    drawing = chart("norm", [Series("norm", [(0, 0.03), (1, 2000.0)], 0)], "x", log=True)
    assert words(drawing)[-5:] == ["0.1", "1", "10", "100", "1000"]


@pytest.mark.parametrize(("value", "text"), [(1e-5, "1e-5"), (-2e10, "-20G"), (1e20, "1e20"), (0.1 + 0.2, "0.3")])
def test_numbers_on_an_axis_are_short(value: float, text: str) -> None:
    assert tick_text(value) == text


def test_nothing_to_draw() -> None:
    assert chart("loss", [], "step") == ""
    assert chart("loss", [Series("loss", [(1, None)], 0)], "step") == ""


def test_names_are_escaped() -> None:
    drawing = chart('<b>"&', [Series("</svg><script>$x_", [(0, 1.0)], 0, marks=[0])], "<i>$")
    root = ElementTree.fromstring(drawing)
    assert root.get("aria-label", "").startswith('<b>"&: </svg><script>')
    titles = [title.text for title in root.iterfind(".//{*}title")]
    assert titles == ["</svg><script>$x_: went on after 0", "</svg><script>$x_: last 1, lowest 1, highest 1"]
    assert "<i>$" in words(drawing)


finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 10**9), st.none() | finite), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
def test_any_numbers_are_drawn_inside_the_frame(points: list, log: bool, zero: bool) -> None:
    points.sort(key=lambda point: point[0])
    drawing = chart("any", [Series("any", points, 3, marks=[points[0][0]])], "step", log, zero)
    if drawing:
        for x, y in dots(drawing):
            assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
            assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
        assert len(words(drawing)) < 30
        assert all(math.isfinite(float(number)) for number in re.findall(r' [xy]="([^"]*)"', drawing))
