"""Select the samples whose numeric columns meet comparisons such as "width >= 200"; nothing is run as code."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clipdist.errors import UserError

COLUMN_NAME = re.compile(r"[^\W\d][\w.-]{0,63}")  # what may be a column: also what a file can hold by that name
_CONDITION = re.compile(rf"\s*({COLUMN_NAME.pattern})\s*(<=|>=|==|!=|<|>)\s*(\S+)\s*")
_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_SIDES = ("width", "height")
DERIVED = ("short", "long", "aspect")  # shorter and longer side in pixels, and long / short


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a number."""

    name: str
    comparison: str
    value: float

    def __str__(self) -> str:
        return f"{self.name} {self.comparison} {repr(self.value).removesuffix('.0')}"

    @property
    def columns(self) -> tuple[str, ...]:
        """The stored columns that it needs."""
        return _SIDES if self.name in DERIVED else (self.name,)

    def passes(self, columns: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """Return bool [n], False where a value is NaN; None where a column is missing.

        Args:
            columns: numeric arrays [n].
        """
        if any(name not in columns for name in self.columns):
            return None
        values = _derive(self.name, columns).astype(np.float64)
        return _COMPARE[self.comparison](values, self.value) & ~np.isnan(values)


def parse_condition(text: str) -> Condition:
    """Parse a comparison such as "aspect <= 3".

    Raises:
        UserError: not a name, a comparison and a number.
    """
    match = _CONDITION.fullmatch(text)
    try:
        value = float(match[3]) if match else math.nan
    except ValueError:
        value = math.nan
    if match is None or math.isnan(value):
        raise UserError(
            f"--where {text!r}: expected a column, one of {' '.join(_COMPARE)} and a number, such as 'short >= 200'"
        )
    return Condition(match[1], match[2], value)


def rule_of(conditions: Sequence[Condition]) -> str:
    """Return the conditions in words, as a consolidated index keeps them."""
    return " and ".join(map(str, conditions))


def _derive(name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in DERIVED:
        return columns[name]
    width, height = (columns[side].astype(np.float64) for side in _SIDES)
    short, long = np.minimum(width, height), np.maximum(width, height)
    if name == "aspect":
        return long / np.where(short > 0, short, np.nan)
    return short if name == "short" else long
