"""Expand the words of a sweep, such as optim.lr=1e-4,3e-4 data.seed=1,2, into every combination of their values."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from clipdist.errors import UserError

FIXED = ("run.", "launch.", "device")  # one array job: these are the same for all of its runs


@dataclass(frozen=True)
class SweepPoint:
    """One combination of a sweep's values."""

    words: tuple[str, ...]  # key=value, one per swept key
    suffix: str  # of the run's name, "" without a sweep


def points(sweep: list[str]) -> list[SweepPoint]:
    """Return the product of all values, the last key varying fastest; without words one point without values.

    A key with a single value is a plain setting and stays out of the names.

    Raises:
        UserError: a word that is none, a key or a value given twice, values that would share a run folder, or a key
            that cannot differ within one sweep.
    """
    axes = [_axis(word) for word in sweep]
    keys = [key for key, _ in axes]
    for key, values in axes:
        if keys.count(key) > 1:
            raise UserError(f"--sweep {key}: given twice; name all of its values in one word")
        if key.startswith(FIXED):
            raise UserError(f"--sweep {key}: the run, launch and device settings are those of the whole sweep")
        short = [_plain(value) for value in values]
        if len(set(short)) < len(short):
            raise UserError(f"--sweep {key}={','.join(values)}: two of the values would share a run folder")
    labels = _labels([key for key, values in axes if len(values) > 1])
    return [
        SweepPoint(
            tuple(f"{key}={value}" for key, value in zip(keys, combination)),
            "".join(f"-{labels[key]}{_plain(value)}" for key, value in zip(keys, combination) if key in labels),
        )
        for combination in itertools.product(*(values for _, values in axes))
    ]


def _axis(word: str) -> tuple[str, list[str]]:
    key, equals, text = word.partition("=")
    values = _split(text)
    if not key or not equals or not all(values):
        raise UserError(f"--sweep {word}: expected section.key=value,value, such as optim.lr=1e-4,3e-4")
    return key, values


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and quotes, so that a value may be a list."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote or letter in "'\"":
            quote = "" if letter == quote else quote or letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _labels(keys: list[str]) -> dict[str, str]:
    """Return the last part of each key where no other key ends the same, else the whole key."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: end if last.count(end) == 1 else _plain(key) for key, end in zip(keys, last)}


def _plain(value: str) -> str:
    """Return the value as part of a folder's name: 3e-4 stays, a/b c becomes a_b_c."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", value).strip("_") or "_"
