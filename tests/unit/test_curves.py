"""Charts: no peak is lost, gaps stay gaps, axes that can be read, for any numbers that a run can record."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipdist.report.curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    chart,
    means,
    thin,
    tick_text,
    ticks,
)


def curve(drawing: str) -> list[str]:
    """The strokes of the first curve, one for each stretch without a gap."""
    root = ElementTree.fromstring(drawing)
    path = next(p for p in root.iter("path") if p.get("class") == "curve")
    return (path.get("d") or "").split("M")[1:]


def places(stroke: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", stroke)]


def test_a_line_goes_from_corner_to_corner() -> None:
    (stroke,) = curve(chart("loss", [Series("loss", [(0, 0.0), (50, 5.0), (100, 10.0)], 0)], "step", zero=True))
    (x0, y0), (x1, y1), (x2, y2) = places(stroke)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert y0 == HEIGHT - BOTTOM
    assert TOP < y2 < TOP + 15  # a margin of 5 %
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.1)


def test_values_that_are_missing_are_gaps_and_a_lone_point_is_seen() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 3.0), (4, None), (5, 1.0), (6, 2.0)]
    strokes = curve(chart("loss", [Series("loss", points, 0)], "step"))
    assert [len(places(stroke)) for stroke in strokes] == [2, 1, 2]
    assert strokes[1].endswith("h0")


def test_thinning_keeps_every_peak_and_every_long_gap() -> None:
    points = [(x, None if 40_000 <= x < 50_000 else math.sin(x / 1000)) for x in range(100_000)]
    points[12_345], points[77_777] = (12_345, 9.0), (77_777, -9.0)
    kept = thin(points, 0, 100_000, columns=300)
    assert len(kept) <= 4 * 300
    assert {(12_345, 9.0), (77_777, -9.0), points[0], points[-1]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    missing = [x for x, y in kept if y is None]
    assert 40_000 <= min(missing) < 41_000
    assert 49_000 < max(missing) < 50_000


def test_means_of_columns() -> None:
    assert means([(0, 1.0), (1, 3.0), (2, None), (3, None), (4, 5.0), (5, None)], 0, 6, columns=3) == [
        (0.5, 2.0),
        (2.5, None),
        (4.5, 5.0),
    ]


def test_a_long_series_is_a_bounded_drawing() -> None:
    sizes = [len(chart("loss", [Series("loss", [(x, x % 7) for x in range(n)], 0)], "step")) for n in (10**4, 10**5)]
    assert sizes[1] < 1.1 * sizes[0] < 60_000


def test_a_logarithmic_axis_only_where_values_spread() -> None:
    wide = chart("norm", [Series("a", [(0, 0.01), (1, 1.0), (2, 100.0)], 0)], "step", log=True)
    (_, low), (_, middle), (_, high) = places(curve(wide)[0])
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    narrow = chart("norm", [Series("a", [(0, 1.0), (1, 2.0), (2, 4.0)], 0)], "step", log=True)
    (_, low), (_, middle), (_, high) = places(curve(narrow)[0])
    assert middle - high == pytest.approx(2 * (low - middle), abs=0.3)


def test_zero_on_a_logarithmic_axis_is_a_gap() -> None:
    series = [Series("a", [(0, 0.01), (1, 0.0), (2, 100.0)], 0), Series("locked", [(0, 0.0), (2, 0.0)], 1)]
    assert len(curve(chart("norm", series, "step", log=True))) == 2


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
    assert [tick_text(value) for value in ticks(Axis(low, high, 0, 100))] == expected


def test_ticks_of_a_logarithmic_axis_are_powers_of_ten() -> None:
    assert [tick_text(value) for value in ticks(Axis(0.03, 2000, 0, 1, log=True))] == ["0.1", "1", "10", "100", "1000"]


def test_nothing_to_draw() -> None:
    assert chart("loss", [], "step") == ""
    assert chart("loss", [Series("loss", [(1, None)], 0)], "step") == ""


def test_names_are_escaped() -> None:
    drawing = chart('<b>"&', [Series("</svg><script>", [(0, 1.0)], 0, marks=[0])], "<i>")
    assert ElementTree.fromstring(drawing).get("aria-label", "").startswith('<b>"&: </svg><script>')


finite = st.floats(allow_nan=False, allow_infinity=False)


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
        for stroke in curve(drawing):
            for x, y in places(stroke):
                assert LEFT <= x <= WIDTH - RIGHT
                assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
        assert len(ElementTree.fromstring(drawing).findall("text")) < 30
