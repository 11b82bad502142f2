"""Probe and fine-tune on shares of the labels, several seeds each: means and 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from clipdist.datasets.labelled import Split
from clipdist.errors import UserError
from clipdist.evals.probe import Probe

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom: half the width of a 95 % interval.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T) + 1


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Return mean, low and high (the 95 % interval by Student's t; None of one value) and seeds (their number).

    Args:
        values: 1 to MOST_SEEDS results of equal standing.
    """
    mean, low, high = float(np.mean(values)), None, None
    if len(values) > 1:
        half = _T[len(values) - 2] * float(np.std(values, ddof=1)) / len(values) ** 0.5
        low, high = mean - half, mean + half
    return {"mean": mean, "low": low, "high": high, "seeds": len(values)}


def label_fraction(labels: np.ndarray | Tensor, percent: float, seed: int, classes: Sequence[str]) -> np.ndarray:
    """Return the rows of a stratified share of a set, int64, ascending: `percent` of every class' images, rounded.

    Raises:
        UserError: a share outside (0, 100], or one that leaves a class without images.
    """
    if not 0 < percent <= 100:
        raise UserError(f"--fractions {percent:g}: give percent above 0, at most 100")
    numbers = np.asarray(labels)
    random = np.random.default_rng(seed)
    chosen = []
    for label, name in enumerate(classes):
        rows = np.flatnonzero(numbers == label)
        count = int(len(rows) * percent / 100 + 0.5)
        if len(rows) and not count:
            raise UserError(
                f"--fractions {percent:g}: leaves class {name} without pictures (it has {len(rows)});"
                f" give at least {100 / len(rows) / 2:.3g}"
            )
        chosen.append(random.permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def require_classes(split: Split, classes: Sequence[str]) -> None:
    """Raise UserError where a class has no training images: it could only be guessed wrong."""
    counts = np.bincount(split.labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts) if not count]
    if empty:
        more = f" ({len(empty)} such)" if len(empty) > 1 else ""
        raise UserError(f"class {empty[0]} has no training pictures{more}; leave it out, or add some")


def over_fractions(
    fit: Callable[[float, int, np.ndarray], Probe],
    labels: np.ndarray | Tensor,
    classes: Sequence[str],
    fractions: Sequence[float],
    seeds: int,
) -> list[dict[str, Any]]:
    """Fit on each share of the labels with every seed.

    Args:
        fit: (percent, seed, rows of the training images) to the result.

    Returns:
        one row a share: percent, pictures, mean, low, high, seeds, top5.
    """
    table = []
    for percent in fractions:
        shares = [label_fraction(labels, percent, seed, classes) for seed in range(seeds)]
        probes = [fit(percent, seed, rows) for seed, rows in enumerate(shares)]
        accuracy = interval([probe.accuracy for probe in probes])
        top5 = float(np.mean([probe.top5 for probe in probes]))
        table.append({"percent": percent, "pictures": len(shares[-1]), **accuracy, "top5": top5})
    return table
