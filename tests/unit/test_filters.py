"""Filters: what is a condition, and which rows it lets through."""

from __future__ import annotations

import numpy as np
import pytest

from clipdist.data.filters import Condition, parse_condition, rule_of
from clipdist.errors import UserError

COLUMNS = {
    "width": np.array([100, 300, 200, 0], dtype=np.int64),
    "height": np.array([400, 100, 200, 0], dtype=np.int64),
    "score": np.array([0.5, np.nan, -1.0, np.inf]),
    "flag": np.array([True, False, True, False]),
}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("width >= 200", [0, 1, 1, 0]),
        ("width>200", [0, 1, 0, 0]),
        ("width < 200", [1, 0, 0, 1]),
        (" width <=200 ", [1, 0, 1, 1]),
        ("width == 2e2", [0, 0, 1, 0]),
        ("width != 200", [1, 1, 0, 1]),
        ("short >= 150", [0, 0, 1, 0]),
        ("long > 200", [1, 1, 0, 0]),
        ("aspect <= 3", [0, 1, 1, 0]),  # a side of 0 pixels has no aspect
        ("aspect >= 0", [1, 1, 1, 0]),
        ("score != 7", [1, 0, 1, 1]),  # NaN never passes
        ("score < .6", [1, 0, 1, 0]),
        ("flag == 1", [1, 0, 1, 0]),
    ],
)
def test_rows_that_pass(text: str, want: list[int]) -> None:
    passes = parse_condition(text).passes(COLUMNS)
    assert passes is not None
    assert passes.dtype == bool
    assert passes.astype(int).tolist() == want


def test_a_column_that_is_not_there() -> None:
    assert parse_condition("similarity > 0.3").passes(COLUMNS) is None
    assert parse_condition("aspect < 3").passes({"width": COLUMNS["width"]}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "width",
        "width >=",
        ">= 200",
        "width = 200",
        "width >= 200px",
        "width >= nan",
        "width >= 200 and height >= 200",
        "200 <= width",
        "200 <= width <= 300",
        "__import__('os').system('true') > 0",
        "a b > 1",
        "width => 3",
        "width >= height",
        "x" * 65 + " > 1",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--where .*expected a column"):
        parse_condition(text)


def test_conditions_in_words_are_conditions_again() -> None:
    conditions = [parse_condition("clip-score.v2>0.28"), parse_condition("short >= 200")]
    assert rule_of(conditions) == "clip-score.v2 > 0.28 and short >= 200"
    assert [parse_condition(part) for part in rule_of(conditions).split(" and ")] == conditions
    assert conditions[0] == Condition("clip-score.v2", ">", 0.28)
