"""Put names and values into words, as they stand on a report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from clipdist.report.history import number

DIRECTIONS = {"t2i": "text to image", "i2t": "image to text"}
MISSING = "-"
LABELS = {
    **{f"{way}_r{k}": f"{words} R@{k}, %" for way, words in DIRECTIONS.items() for k in (1, 5, 10)},
    **{f"{way}_map10": f"{words} mAP@10, %" for way, words in DIRECTIONS.items()},
    **{f"{way}_median_rank": f"{words}, median rank" for way, words in DIRECTIONS.items()},
    **{f"{way}_mean_rank": f"{words}, mean rank" for way, words in DIRECTIONS.items()},
    **{f"batch_{way}_r1": f"{words} R@1 within the batch, %" for way, words in DIRECTIONS.items()},
    "batch_views_r1": "other view nearest of the batch's, %",
    "batch_keys_r1": "own key nearest of all, %",
    "rsum": "sum of the six R@K",
    "mean_recall": "mean of the six R@K, %",
    "kept": "kept, %",
    "candidates": "pictures",
    "chance": "chance, %",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "mean_per_class": "mean of the classes, %",
    "ece": "calibration error, %",
    "accuracy": "accuracy, %",
    "knn_20": "20 nearest neighbours, %",
    "knn_200": "200 nearest neighbours, %",
    "baseline_pixels": "raw pixels, %",
    "fooling_rate": "fooling rate, %",
    "per_class": "per class, %",
}


def label_of(name: str) -> str:
    """Return a name in words; zero_shot/top1, of an evaluator during training, is "zero shot: top-1, %"."""
    group, slash, rest = name.removeprefix("grad_norm/").rpartition("/")
    words = LABELS.get(rest, rest.replace("_", " "))
    return f"{group.replace('_', ' ')}: {words}" if slash else words


def number_text(value: Any) -> str:
    """Return 12,800; 48.40; 0.0123; 1.2e-05."""
    value = number(value)
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if 1 <= abs(value) < 1e6:
        return f"{value:,.{2 if abs(value) < 1000 else 0}f}"
    return f"{value:.3g}"


def labelled_text(label: str, value: Any) -> str:
    """Return a value as text; where its label says that it is a percentage, with as many digits as other ones."""
    if label.endswith("%") and (percent := number(value)) is not None:
        return f"{percent:.2f}" if percent >= 0.01 or not percent else f"{percent:.1g}"
    return value_text(value)


def value_text(value: Any) -> str:
    """Return anything that a record may hold on one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if number(value) is not None:
        return number_text(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "..."


def setting_text(value: Any) -> str:
    """Return a value as one writes it into a recipe."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def spread_text(label: str, values: Sequence[float]) -> str:
    """Return the median (lowest to highest)."""
    if not values:
        return MISSING
    low, middle, high = (labelled_text(label, of(values)) for of in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def shards_text(shards: Sequence[str]) -> str:
    return ", ".join(shards[:5]) + (f", and {len(shards) - 5} more" if len(shards) > 5 else "") or "none"


def duration_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def time_text(time: Any) -> str:
    """Return seconds since 1970 as date and time, UTC."""
    seconds = number(time)
    try:
        return MISSING if seconds is None else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return MISSING
