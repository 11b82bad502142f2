"""Features of pictures and captions in, ranks and R@K in both directions out, without an n x m matrix.

A query's rank is 1 + the number of candidates that score at least as high as its right answer: a tie counts against.
On untied scores that is the usual rank; a collapsed model, which scores everything alike, gets R@K of 0 and not of 100.
Scores that differ by less than fp32 can tell (TIE) are tied, so that the rule holds whatever order a matrix product
adds its terms in.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.errors import UserError

CUTOFFS = (1, 5, 10)
TIE = 1e-6  # twice the rounding of a cosine of unit vectors in fp32, measured at 64 to 4096 dimensions
TILE = 2048  # captions x pictures scored at a time: 16 MiB of scores


def retrieval_metrics(image_features: Tensor, text_features: Tensor, text_image: Tensor) -> dict[str, float]:
    """R@1, R@5, R@10 (percentages), median and mean rank (from 1) of both directions.

    Any number of captions per picture. Text to image ranks a caption's picture among all pictures; image to text takes
    the best placed of a picture's own captions among the captions of all other pictures. Pictures without a caption
    are candidates, not queries. The median of an even number of ranks is rounded down, as open_clip does.

    Args:
        image_features: [n, D]; normalised here, in fp32.
        text_features: [m, D].
        text_image: int64 [m], the row of each caption's picture.

    Returns:
        t2i_r1, t2i_r5, t2i_r10, t2i_median_rank, t2i_mean_rank, the same with i2t, candidates (n), captions (m), and
        chance (text-to-image R@1 of a guess, percent).

    Raises:
        UserError: no pictures or captions, or features that are not finite.
    """
    text_ranks, image_ranks = retrieval_ranks(image_features, text_features, text_image)
    n, m = len(image_features), len(text_features)
    sizes = {"candidates": float(n), "captions": float(m), "chance": 100.0 / n}
    return _summary("t2i", text_ranks) | _summary("i2t", image_ranks) | sizes


def retrieval_ranks(image_features: Tensor, text_features: Tensor, text_image: Tensor) -> tuple[Tensor, Tensor]:
    """Exact ranks from 1: of each caption's picture, int64 [m]; of each captioned picture's best caption, int64 [p].

    Memory beyond the normalised copies of the features is one tile. See `retrieval_metrics` for the arguments.
    """
    if not len(image_features) or not len(text_features):
        raise UserError(f"retrieval needs captioned pictures: got {len(image_features)}, {len(text_features)} captions")
    image, text = _unit(image_features, "image"), _unit(text_features, "text")
    own = torch.cat([(text[s] * image[text_image[s]]).sum(1) for s in _slices(len(text))])  # [m]
    best = torch.full((len(image),), -torch.inf, device=image.device)
    best.scatter_reduce_(0, text_image, own, "amax")  # [n], the picture's best own caption
    text_ahead = torch.zeros(len(text), dtype=torch.int64, device=image.device)
    image_ahead = torch.zeros(len(image), dtype=torch.int64, device=image.device)
    for rows in _slices(len(text)):
        for columns in _slices(len(image)):
            scores = text[rows] @ image[columns].T
            picture = text_image[rows] - columns.start
            inside = ((picture >= 0) & (picture < scores.shape[1])).nonzero().squeeze(1)
            scores[inside, picture[inside]] = -torch.inf  # a right answer is not its own rival, in either direction
            text_ahead[rows] += (scores >= (own[rows] - TIE)[:, None]).sum(1)
            image_ahead[columns] += (scores >= best[columns] - TIE).sum(0)
    captioned = best > -torch.inf
    return text_ahead + 1, image_ahead[captioned] + 1


def _unit(features: Tensor, tower: str) -> Tensor:
    features = features.detach().float()
    if not torch.isfinite(features).all():
        rows = int((~torch.isfinite(features).all(1)).sum())
        raise UserError(f"{rows} of {len(features)} {tower} features are not finite: the weights have diverged")
    return F.normalize(features, dim=1)


def _slices(count: int) -> list[slice]:
    return [slice(begin, min(begin + TILE, count)) for begin in range(0, count, TILE)]


def _summary(direction: str, ranks: Tensor) -> dict[str, float]:
    recalls = {f"{direction}_r{k}": 100.0 * (ranks <= k).double().mean().item() for k in CUTOFFS}
    median = float(np.floor(np.median(ranks.cpu().numpy())))  # torch's takes the lower of two, its quantile 2^24 rows
    return recalls | {f"{direction}_median_rank": median, f"{direction}_mean_rank": ranks.double().mean().item()}
