"""Compute exact ranks, R@K, mAP@10 and their intervals in both directions from features, in tiles.

A query's rank is 1 + the number of candidates that score at least as high as its right answer: a tie counts against.
On untied scores that is the usual rank; a collapsed model, which scores everything alike, gets R@K of 0 and not of 100.
Scores that differ by less than fp32 can tell (TIE) are tied, so that the rule holds whatever order a matrix product
adds its terms in.

Nothing is sorted: a rank is a count of rivals, and one product of a tile serves both directions. Legend of shape
suffixes: n images, m captions, p images that have a caption, K right answers of an image that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipdist.distributed.collectives import rank_and_world, sum_over_ranks
from clipdist.errors import UserError
from clipdist.evals.embed import Embeddings, gather_embeddings

CUTOFFS = (1, 5, 10)
TOP = 10  # mAP@10 looks at the first ten
TIE = 1e-6  # twice the rounding of a cosine of unit vectors in fp32, measured at 64 to 4096 dimensions
TILE = 1024  # captions x images scored at a time: 4 MiB, which caches hold; 2048 costs twice the time
RESAMPLES_AT_ONCE = 1 << 24  # draws of images in memory


@dataclass(frozen=True)
class Ranks:
    """How every query of both directions fared; ranks count from 1. All on the CPU."""

    text: Tensor  # int64 [m], rank of each caption's image among all images
    text_image: Tensor  # int64 [m], the row of each caption's image
    image: Tensor  # int64 [p], rank of an image's best placed own caption among the captions of other images
    image_ap: Tensor  # float64 [p], average precision of an image's own captions within the first ten
    captioned: Tensor  # bool [n], which images have captions: p of them
    candidates: int  # n


def retrieval_metrics(image_features: Tensor, text_features: Tensor, text_image: Tensor) -> dict[str, float]:
    """Return the metrics of `summarise` for features fp32 [n, D] and [m, D]; arguments as retrieval_ranks."""
    return summarise(retrieval_ranks(image_features, text_features, text_image))


def distributed_retrieval(
    own: Embeddings,
    process_group: dist.ProcessGroup | None = None,
    device: str | torch.device = "cpu",
    widths: Sequence[int] = (),
) -> tuple[dict[str, float], Embeddings]:
    """Return metrics and all embeddings on every rank, from each rank's own slice. Collective: every rank must call it.

    The features are gathered; each rank then scores its share of the captions, on `device`.

    Args:
        widths: R@K of the first d features, each normalised anew, is measured too: width_64/t2i_r1 ...
    """
    whole = gather_embeddings(own, process_group)
    image, text, rows = whole.image.to(device), whole.text.to(device), whole.text_image.to(device)
    metrics = summarise(retrieval_ranks(image, text, rows, together=True, process_group=process_group))
    for width in widths:
        ranks = retrieval_ranks(image[:, :width], text[:, :width], rows, together=True, process_group=process_group)
        found = summarise(ranks)
        metrics |= {f"width_{width}/{way}_r{k}": found[f"{way}_r{k}"] for way in ("t2i", "i2t") for k in CUTOFFS}
    return metrics, whole


def retrieval_ranks(
    image_features: Tensor,
    text_features: Tensor,
    text_image: Tensor,
    together: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Ranks:
    """Return exact ranks in both directions, for any number of captions per image.

    Text to image ranks a caption's image among all images; image to text takes the best placed of an image's own
    captions among the captions of all other images. Images without a caption are candidates, not queries. Memory
    beyond the normalised copies of the features is two tiles, and TOP scores an image.

    Args:
        image_features: [n, D]; normalised here, in fp32.
        text_features: [m, D], on the same device.
        text_image: int64 [m], the row of each caption's image.
        together: collective: all ranks of the group hold the same features, each scores its share of the captions,
            and all return the same.

    Raises:
        UserError: no images or captions, or features that are not finite.
    """
    if not len(image_features) or not len(text_features):
        raise UserError(f"retrieval needs captioned pictures: got {len(image_features)}, {len(text_features)} captions")
    image, text = _unit(image_features, "image"), _unit(text_features, "text")
    own = torch.cat([(text[s] * image[text_image[s]]).sum(1) for s in _slices(0, len(text))])  # [m]
    best = _best_own(own, text_image, len(image))  # [K, n]
    rank, world = rank_and_world(process_group) if together else (0, 1)
    begin, end = len(text) * rank // world, len(text) * (rank + 1) // world
    counted = _count_rivals(image, text, text_image, own - TIE, best - TIE, begin, end)
    text_ahead, image_ahead = (sum_over_ranks(ahead, process_group) if together else ahead for ahead in counted)
    counts = torch.bincount(text_image, minlength=len(image))
    captioned = counts > 0
    return Ranks(
        text=text_ahead.cpu() + 1,
        text_image=text_image.cpu(),
        image=image_ahead[0, captioned].cpu() + 1,
        image_ap=_average_precision(image_ahead[:, captioned], counts[captioned]).cpu(),
        captioned=captioned.cpu(),
        candidates=len(image),
    )


def summarise(ranks: Ranks) -> dict[str, float]:
    """Return the table of both directions.

    The median of an even number of ranks is rounded down, as open_clip does. mAP@10 divides a query's precisions by
    the number of its right answers, ten at most; of text to image, with its one right answer, it is the mean of 1/rank
    within the first ten.

    Returns:
        t2i_r1, t2i_r5, t2i_r10, t2i_map10 (percentages), t2i_median_rank, t2i_mean_rank, the same with i2t; rsum (of
        the six R@K); candidates (n), captions (m), and chance (text-to-image R@1 of a guess, percent).
    """
    metrics: dict[str, float] = {}
    for direction, found in (("t2i", ranks.text), ("i2t", ranks.image)):
        scores = _scores(ranks, direction)
        metrics |= {f"{direction}_{name}": float(score.mean()) for name, score in scores.items()}
        metrics[f"{direction}_median_rank"] = float(np.floor(np.median(found.numpy())))
    return metrics | {
        "rsum": _rsum(metrics),
        "candidates": float(ranks.candidates),
        "captions": float(len(ranks.text)),
        "chance": 100.0 / ranks.candidates,
    }


def mean_metrics(folds: Sequence[Ranks]) -> dict[str, float]:
    """Return the mean over folds of everything in `summarise`: of one fold, itself."""
    tables = [summarise(ranks) for ranks in folds]
    return {name: float(np.mean([table[name] for table in tables])) for name in tables[0]}


def bootstrap_intervals(
    folds: Sequence[Ranks], resamples: int = 1000, seed: int = 0, level: float = 95.0
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of `mean_metrics`, by name; the medians have none.

    The images with captions are drawn with replacement, each with its captions, within every fold; the candidates
    stay as they are. (Captions of one image fail and succeed together: to draw them singly gives intervals that are
    too narrow.)

    Args:
        level: the share of resamples inside, percent.
    """
    random = np.random.default_rng(seed)
    drawn = [_resampled(ranks, resamples, random) for ranks in folds]
    ends = ((100 - level) / 2, (100 + level) / 2)
    intervals = {}
    for name in drawn[0]:
        low, high = np.percentile(np.mean([part[name] for part in drawn], axis=0), ends)
        intervals[name] = (float(low), float(high))
    return intervals


def paired_intervals(
    before: Ranks, after: Ranks, resamples: int = 1000, seed: int = 0, level: float = 95.0
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of the differences of two models' metrics, after - before, by name.

    Both must have ranked the same captions and images: each resample draws the same images for both.

    Raises:
        ValueError: they have not.
    """
    same = before.text_image.equal(after.text_image) and before.captioned.equal(after.captioned)
    if not same:
        raise ValueError("ranks of other captions or images")
    one, other = (_resampled(ranks, resamples, np.random.default_rng(seed)) for ranks in (before, after))
    ends = ((100 - level) / 2, (100 + level) / 2)
    return {
        name: (float(low), float(high)) for name in one for low, high in [np.percentile(other[name] - one[name], ends)]
    }


def _best_own(own: Tensor, text_image: Tensor, images: int) -> Tensor:
    """Return the scores of every image's TOP best own captions, best first: fp32 [K, n], +inf where it has fewer.

    (Nothing reaches +inf: where there is no answer, no rival is counted.)
    """
    order = own.argsort(descending=True)
    order = order[text_image[order].argsort(stable=True)]  # by image, and within an image by score
    counts = torch.bincount(text_image, minlength=images)
    place = torch.arange(len(own), device=own.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    kept = place < TOP
    best = torch.full((min(TOP, int(counts.max())), images), torch.inf, device=own.device)
    best[place[kept], text_image[order][kept]] = own[order][kept]
    return best


def _count_rivals(
    image: Tensor, text: Tensor, text_image: Tensor, text_bar: Tensor, image_bar: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor]:
    """Count the rivals that reach each bar, among captions begin .. end-1: int64 [m] and [K, n].

    Comparing into floats and adding those up costs a third of what booleans do, and next to nothing beside the product.
    """
    text_ahead = torch.zeros(len(text), dtype=torch.int64, device=text.device)
    image_ahead = torch.zeros(image_bar.shape, dtype=torch.int64, device=text.device)
    scores_buffer, reached_buffer = torch.empty(2, TILE * TILE, device=text.device)
    for rows in _slices(begin, end):
        for columns in _slices(0, len(image)):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            scores, reached = (b[: shape[0] * shape[1]].view(shape) for b in (scores_buffer, reached_buffer))
            torch.mm(text[rows], image[columns].T, out=scores)
            owner = text_image[rows] - columns.start
            inside = ((owner >= 0) & (owner < shape[1])).nonzero().squeeze(1)
            scores[inside, owner[inside]] = -torch.inf  # a right answer is not its own rival, in either direction
            text_ahead[rows] += torch.ge(scores, text_bar[rows, None], out=reached).sum(1).long()
            for bar, ahead in zip(image_bar, image_ahead):
                ahead[columns] += torch.ge(scores, bar[columns], out=reached).sum(0).long()
    return text_ahead, image_ahead


def _average_precision(ahead: Tensor, counts: Tensor) -> Tensor:
    """Return float64 [p]; `ahead`: rivals [K, p] of each own caption, best first; `counts`: own captions [p]."""
    number = torch.arange(1, len(ahead) + 1, device=ahead.device)[:, None]
    place = number + ahead  # of the caption in the whole list, its better placed fellows included
    found = (place <= TOP) & (number <= counts)
    return torch.where(found, number.double() / place, 0).sum(0) / counts.clamp(max=TOP)


def _scores(ranks: Ranks, direction: str) -> dict[str, np.ndarray]:
    """Return what the metrics are means of, a value per query: float64 [m] or [p]."""
    found = (ranks.text if direction == "t2i" else ranks.image).numpy()
    scores = {f"r{k}": 100.0 * (found <= k) for k in CUTOFFS}
    precision = np.where(found <= TOP, 1 / found, 0) if direction == "t2i" else ranks.image_ap.numpy()
    return scores | {"map10": 100.0 * precision, "mean_rank": found.astype(np.float64)}


def _rsum(metrics: dict) -> float:
    return sum(metrics[f"{direction}_r{k}"] for direction in ("t2i", "i2t") for k in CUTOFFS)


def _resampled(ranks: Ranks, resamples: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the metrics of each resample: float64 [resamples] by name."""
    captioned = ranks.captioned.numpy()
    images = int(captioned.sum())
    row_of_image = np.cumsum(captioned) - 1
    query_image = {"t2i": row_of_image[ranks.text_image.numpy()], "i2t": np.arange(images)}
    names, sums, sizes = [], [], []
    for direction, owner in query_image.items():
        for name, score in _scores(ranks, direction).items():
            names.append(f"{direction}_{name}")
            sums.append(np.bincount(owner, score, images))
            sizes.append(np.bincount(owner, minlength=images))
    totals, queries = np.stack(sums, 1), np.stack(sizes, 1).astype(np.float64)  # [p, names]
    parts = []
    at_once = max(1, RESAMPLES_AT_ONCE // images)
    for begin in range(0, resamples, at_once):
        count = min(at_once, resamples - begin)
        draws = random.integers(images, size=(count, images)) + images * np.arange(count)[:, None]
        weights = np.bincount(draws.ravel(), minlength=count * images).reshape(count, images).astype(np.float64)
        parts.append((weights @ totals) / (weights @ queries))
    means = dict(zip(names, np.concatenate(parts).T))
    return means | {"rsum": _rsum(means)}


def _unit(features: Tensor, tower: str) -> Tensor:
    features = features.detach().float()
    if not torch.isfinite(features).all():
        rows = int((~torch.isfinite(features).all(1)).sum())
        raise UserError(f"{rows} of {len(features)} {tower} features are not finite: the weights have diverged")
    return F.normalize(features, dim=1)


def _slices(begin: int, end: int) -> list[slice]:
    return [slice(first, min(first + TILE, end)) for first in range(begin, end, TILE)]
