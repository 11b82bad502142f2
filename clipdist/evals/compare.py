"""Measure two models on one set, and say with intervals what got better and what got worse.

Both models answer the same questions, so that images are drawn once for both (a paired bootstrap): the interval of the
difference is narrower than those of the two figures would suggest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from clipdist.data.catalog import Catalog
from clipdist.evals.embed import WorkShare, embed_catalog, gather_embeddings, model_encoder
from clipdist.evals.features import embed_split
from clipdist.evals.retrieval import Ranks, paired_intervals, retrieval_ranks, summarise
from clipdist.evals.suite import HEADLINES, EvalSet
from clipdist.evals.zero_shot import classify, zero_shot_classifier

if TYPE_CHECKING:
    from clipdist.models.load import LoadedModel

RESAMPLES, LEVEL = 1000, 95.0


@dataclass(frozen=True)
class Compared:
    """One figure of two models, percent.

    Attributes:
        low, high: of `after - before`, the 95 % interval.
    """

    set: str
    figure: str
    before: float
    after: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether the interval lies above or below 0: better, worse, or "" where it does not tell."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else ""

    def record(self) -> dict[str, Any]:
        return {**vars(self), "difference": self.after - self.before, "verdict": self.verdict}


def answers(sets: Sequence[EvalSet], loaded: LoadedModel, share: WorkShare, device: str) -> list[Ranks | Tensor]:
    """Return how a model fares on sets, query by query: retrieval's ranks, or bool [n], which images it names right."""
    encode, transform = model_encoder(loaded.model.to(device), device), loaded.model.spec.transform
    found: list[Ranks | Tensor] = []
    for each in sets:
        if isinstance(each.data, Catalog):
            own = embed_catalog(encode, each.data, loaded.tokenizer, transform, share)
            whole = gather_embeddings(own)
            image, text, rows = whole.image.to(device), whole.text.to(device), whole.text_image.to(device)
            found.append(retrieval_ranks(image, text, rows))
        else:
            classifier = zero_shot_classifier(encode, loaded.tokenizer, each.data.words, each.templates, share)
            test = embed_split(encode, each.data.test, transform, share)
            assert loaded.model.logit_scale is not None
            predictions = classify(test.image, classifier, loaded.model.logit_scale).predictions
            found.append(predictions == test.labels)
    return found


def compare(each: EvalSet, before: Ranks | Tensor, after: Ranks | Tensor, seed: int = 0) -> list[Compared]:
    """Return the figures of a set, of retrieval the six R@K, of zero-shot classification the accuracy."""
    names = HEADLINES[each.task]
    if isinstance(before, Ranks) and isinstance(after, Ranks):
        one, other = summarise(before), summarise(after)
        ends = paired_intervals(before, after, RESAMPLES, seed, LEVEL)
        return [Compared(each.name, name, one[name], other[name], *ends[name]) for name in names]
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    was, now = before.numpy().astype(np.int64), after.numpy().astype(np.int64)
    ends_of_mean = interval_of_mean(now - was, RESAMPLES, seed, LEVEL)
    return [Compared(each.name, names[0], 100.0 * was.mean(), 100.0 * now.mean(), *ends_of_mean)]


def interval_of_mean(change: np.ndarray, resamples: int, seed: int, level: float) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean, in percent.

    Args:
        change: int64 [n], each -1, 0 or 1. To draw n of them with replacement is to draw their three counts.
    """
    values = np.array([-1, 0, 1])
    shares = np.array([(change == value).mean() for value in values])
    counts = np.random.default_rng(seed).multinomial(len(change), shares, size=resamples)
    low, high = np.percentile(100.0 * (counts @ values) / len(change), ((100 - level) / 2, (100 + level) / 2))
    return float(low), float(high)
