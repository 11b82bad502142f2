"""Classify images by sentences: the zero-shot classifier, its accuracy and calibration.

Radford et al. 2021 (CLIP), sections 3.1.2 and 3.1.4: a class is the mean of the unit-length features of its prompts,
brought to unit length again; an image's logits are exp(t) times its cosine with each class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.transform import EvalTransform
from clipdist.datasets.labelled import LabelledSet
from clipdist.distributed.collectives import sum_over_ranks
from clipdist.errors import UserError
from clipdist.evals.embed import ALONE, Encode, WorkShare, encode_texts
from clipdist.evals.features import embed_split
from clipdist.evals.prompts import write_prompts

TOP = 5
BINS = 15  # of the expected calibration error
ROWS = 8192  # images whose logits are held at a time


@dataclass(frozen=True)
class Answers:
    """What a classifier says of n images; k is TOP, or the number of classes where that is less."""

    best: Tensor  # int64 [n, k], the likeliest classes, likeliest first
    confidence: Tensor  # fp32 [n], the probability of the likeliest

    @property
    def predictions(self) -> Tensor:
        """int64 [n]."""
        return self.best[:, 0]


def zero_shot_of(
    encode: Encode,
    tokenizer: Callable[[list[str]], Tensor],
    data: LabelledSet,
    templates: Sequence[str],
    transform: EvalTransform,
    logit_scale: Tensor | float,
    share: WorkShare = ALONE,
) -> dict[str, float]:
    """Return zero_shot_metrics of the set's test images under its own class names, on every rank. Collective.

    `encode` is called equally often on every rank, always with share.batch rows, first for sentences, then for images.
    """
    classifier = zero_shot_classifier(encode, tokenizer, data.words, templates, share)
    test = embed_split(encode, data.test, transform, share)
    return zero_shot_metrics(test.image, test.labels, classifier, logit_scale)


def zero_shot_classifier(
    encode: Encode,
    tokenizer: Callable[[list[str]], Tensor],
    classes: Sequence[str],
    templates: Sequence[str],
    share: WorkShare = ALONE,
) -> Tensor:
    """Return one unit-length row per class, fp32 [c, D], on the CPU and on every rank. Collective.

    The ranks share the c * len(templates) prompts, of which only sums by class are kept.

    Args:
        classes: as they shall stand in the prompts.
        templates: with "{}" where the class goes.

    Raises:
        UserError: no classes, no templates, or features that are not finite.
    """
    prompts = write_prompts(classes, templates)
    mine, calls = share.of(len(prompts))
    encoded = encode_texts(encode, tokenizer, prompts[mine.start : mine.stop], share.batch, calls)
    sums, row = torch.zeros(0), mine.start
    for features in share.bar(encoded, "prompts", calls):
        if not len(sums):
            sums = torch.zeros(len(classes), features.shape[1])
        sums.index_add_(0, torch.arange(row, row + len(features)) // len(templates), F.normalize(features, dim=1))
        row += len(features)
    classifier = F.normalize(sum_over_ranks(sums), dim=1)
    if not torch.isfinite(classifier).all():
        raise UserError("the text features are not finite: the weights have diverged")
    return classifier


def zero_shot_metrics(
    features: Tensor, labels: Tensor, classifier: Tensor, logit_scale: Tensor | float
) -> dict[str, float]:
    """Return accuracy and calibration, in percent.

    Args:
        features: [n, D]; normalised here, in fp32.
        labels: int64 [n].
        classifier: fp32 [c, D], of unit length.
        logit_scale: t, the log scale that the model has learned.

    Returns:
        top1; top5 (100 below six classes); mean_per_class, the mean of the classes' accuracies; ece, the expected
        calibration error; chance; pictures (n) and classes (c).

    Raises:
        UserError: no images, a label that is no class, or features that are not finite.
    """
    answers = classify(features, classifier, logit_scale)
    strangers = labels[(labels < 0) | (labels >= len(classifier))]
    if len(strangers):
        raise UserError(f"label {int(strangers[0])} is unknown: the classes are 0 to {len(classifier) - 1}")
    per_class = class_accuracy(answers.predictions, labels, len(classifier)).values()
    right = answers.best == labels[:, None]
    return {
        "top1": 100.0 * right[:, 0].double().mean().item(),
        "top5": 100.0 * right.any(1).double().mean().item(),
        "mean_per_class": sum(per_class) / len(per_class),
        "ece": 100.0 * calibration_error(answers.confidence, right[:, 0]),
        "chance": 100.0 / len(classifier),
        "pictures": float(len(labels)),
        "classes": float(len(classifier)),
    }


def classify(features: Tensor, classifier: Tensor, logit_scale: Tensor | float) -> Answers:
    """Return the likeliest classes and their probability, softmax over exp(t) * cosine. Arguments as zero_shot_metrics.

    Raises:
        UserError: no images, or features that are not finite.
    """
    if not len(features):
        raise UserError("zero-shot needs at least one picture")
    if not torch.isfinite(features).all():
        raise UserError("the image features are not finite: the weights have diverged")
    scale = torch.as_tensor(logit_scale).detach().double().exp().item()
    best, confidence = [], []
    for part in features.detach().float().split(ROWS):
        probabilities = (scale * F.normalize(part, dim=1) @ classifier.T).softmax(1)
        values, indices = probabilities.topk(min(TOP, len(classifier)))
        best.append(indices)
        confidence.append(values[:, 0])
    return Answers(torch.cat(best), torch.cat(confidence))


def class_accuracy(predictions: Tensor, labels: Tensor, classes: int) -> dict[int, float]:
    """Return, by label, the percentage of a class' images that were recognised; without classes that have no image."""
    count = torch.bincount(labels, minlength=classes).tolist()
    right = torch.bincount(labels[predictions == labels], minlength=classes).tolist()
    return {label: 100.0 * right[label] / count[label] for label in range(classes) if count[label]}


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error in [0, 1] (Guo et al. 2017, equation 3); bins are open on the left.

    Args:
        confidence: [n], of the predicted class, in [0, 1].
        right: bool [n], whether it is the true one.
    """
    which = (confidence.double() * bins).ceil().clamp(1, bins).long() - 1
    gap = confidence.double() - right.double()
    # |accuracy - confidence| of a bin times its share of all images is |sum of gaps in it| / n.
    return torch.zeros(bins, dtype=torch.float64).index_add_(0, which, gap).abs().sum().item() / len(confidence)
