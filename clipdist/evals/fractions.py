"""Probe and fine-tune on shares of the labels, several seeds each: means and 95 % intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from clipdist.datasets.labelled import LabelledSet, Split
from clipdist.errors import UserError
from clipdist.evals.features import Features, Kind
from clipdist.evals.finetune import finetune, simclr_schedule
from clipdist.evals.probe import EPOCHS, Probe, Solver, fit_features
from clipdist.models.dual_encoder import DualEncoder

# The 97.5 % quantile of Student's t for 1, 2, ... degrees of freedom: half the width of a 95 % interval.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T) + 1


@dataclass(frozen=True)
class Interval:
    """The mean over seeds and its 95 % interval by Student's t; the interval is None of a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int


def interval(values: Sequence[float]) -> Interval:
    """Return the interval of 1 to MOST_SEEDS results of equal standing."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    half = _T[len(values) - 2] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half, len(values))


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


def probe_fractions(
    features: Features,
    classes: tuple[str, ...],
    fractions: Sequence[float],
    seeds: int,
    whole: Probe,
    device: str,
    solver: Solver = "lbfgs",
    epochs: int = EPOCHS,
) -> list[dict[str, Any]]:
    """Fit the layer on each share with every seed; `whole` is the result of seed 0 on all labels.

    Returns:
        one row a share: percent, pictures, mean, low, high, seeds, top5.
    """
    rows = []
    for percent in fractions:
        probes = []
        for seed in range(seeds):
            chosen = label_fraction(features.train.labels, percent, seed, classes)
            if percent == 100 and seed == 0:
                probes.append(whole)
            else:
                title = f"{percent:g} %, seed {seed}"
                probes.append(fit_features(features, classes, title, device, solver, seed, epochs, chosen))
        rows.append(_row(percent, len(chosen), probes))
    return rows


def finetune_fractions(
    model: DualEncoder,
    data: LabelledSet,
    features: Features,
    fractions: Sequence[float],
    seeds: int,
    kind: Kind,
    device: str,
    batch: int,
    threads: int,
    epochs: int | None = None,
) -> list[dict[str, Any]]:
    """Train the tower on each share with every seed; returns as probe_fractions."""
    assert data.train is not None  # features of its images are given
    rows = []
    for percent in fractions:
        schedule = simclr_schedule(percent, batch, epochs)
        probes = []
        for seed in range(seeds):
            chosen = label_fraction(data.train.labels, percent, seed, data.classes)
            frozen = features.train.image
            probes.append(finetune(model, data, chosen, frozen, schedule, kind, seed, device, threads))
        rows.append(_row(percent, len(chosen), probes))
    return rows


def _row(percent: float, images: int, probes: Sequence[Probe]) -> dict[str, Any]:
    top5 = interval([probe.top5 for probe in probes]).mean
    accuracy = interval([probe.accuracy for probe in probes])
    return {"percent": percent, "pictures": images, **asdict(accuracy), "top5": top5}
