"""Classify images by their nearest neighbours among labelled ones, with nothing trained.

The weighted vote of Wu et al., "Unsupervised feature learning via non-parametric instance discrimination",
arXiv:1805.01978, section 3.4, as DINO (arXiv:2104.14294) and lightly measure it: the k training images of the highest
cosine s vote for their classes with exp(s / t). The features are those before the projection.

Ties: of training images with equal cosines the first in the set is the nearer; of classes with equal votes the first
wins. Where k is above the number of training images, all of them vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.transform import EvalTransform
from clipdist.datasets.labelled import LabelledSet
from clipdist.distributed.collectives import sum_over_ranks
from clipdist.errors import UserError
from clipdist.evals.embed import ALONE, Encode, WorkShare
from clipdist.evals.features import embed_set
from clipdist.evals.search import nearest

NEIGHBOURS, TEMPERATURES = (20, 200), (0.07, 0.1)  # k and t of DINO, and of lightly
CHUNK = 1024  # test images whose neighbours and votes are held at a time

Setting = tuple[int, float]  # k, t


def knn_of(
    encode: Encode,
    data: LabelledSet,
    transform: EvalTransform,
    share: WorkShare = ALONE,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Return the accuracy in percent, {"knn_20", "knn_200"}, the same on every rank. Collective.

    Every rank computes a slice of the features, always share.batch images a call and equally often, and then the
    neighbours of a slice of the test images.

    Args:
        encode: gives an image's features [b, w], of any length.
        device: where the cosines are computed.

    Raises:
        UserError: as embed_set; features that are not finite.
    """
    features = embed_set(encode, data, transform, share)
    train, test = features.train, features.test
    _check_finite(train.image, test.image)  # of all test images: every rank raises, or none
    mine, _ = share.of(len(test.labels))
    own = slice(mine.start, mine.stop)
    settings = list(zip(NEIGHBOURS, TEMPERATURES))
    found = knn_classify(train.image, train.labels, test.image[own], len(data.classes), settings, device)
    right = sum_over_ranks(torch.stack([(found[each] == test.labels[own]).sum() for each in settings]))
    return {f"knn_{k}": 100.0 * count / len(test.labels) for (k, _), count in zip(settings, right.tolist())}


@torch.no_grad()
def knn_classify(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    classes: int,
    settings: Sequence[Setting],
    device: str | torch.device = "cpu",
) -> dict[Setting, Tensor]:
    """Return the classes that the neighbours vote for, int64 [m] on the CPU, by setting (k, t).

    No [n, m] matrix exists: cosines are computed tile by tile, in fp32, and votes summed in float64 for 1024 test
    images at a time.

    Args:
        train, test: features [n, w] and [m, w] on the CPU; scaled to unit length here.
        labels: int64 [n], in [0, classes), of `train`.

    Raises:
        UserError: features that are not finite.
    """
    _check_finite(train, test)
    unit = F.normalize(train.float(), dim=1)
    found: dict[Setting, list[Tensor]] = {setting: [torch.zeros(0, dtype=torch.int64)] for setting in settings}
    for queries in test.split(CHUNK) if len(test) else ():
        rows, cosines = nearest(unit, F.normalize(queries.float(), dim=1), max(k for k, _ in settings), device)
        of_neighbours, behind = labels[rows], cosines.double() - cosines[:, :1].double()
        for k, temperature in settings:
            # A factor that all votes have in common is left out, exp(highest cosine / t): nothing overflows.
            votes = (behind[:, :k] / temperature).exp()
            sums = torch.zeros(len(queries), classes, dtype=torch.float64)
            found[k, temperature].append(sums.scatter_add_(1, of_neighbours[:, :k], votes).argmax(1))
    return {setting: torch.cat(parts) for setting, parts in found.items()}


def _check_finite(*features: Tensor) -> None:
    if not all(torch.isfinite(part).all() for part in features):
        raise UserError("the image features are not finite: the weights have diverged")
