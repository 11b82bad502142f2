"""Find one perturbation that changes a fixed classifier's answer to most images, and measure how often it does.

Moosavi-Dezfooli et al., "Universal adversarial perturbations", arXiv:1610.08401, algorithm 1, over DeepFool (Moosavi-
Dezfooli et al., arXiv:1511.04599, algorithm 2). Pixels are on the scale 0 to 255, and v is added to them before the
model's normalisation. x + v is neither clipped nor rounded while v is sought, nor in the fooling rate: so it is in the
paper; `predict` can also do both, which is what a file of 8-bit pixels would do.
An image is fooled when the answer to x + v differs from the answer to x, whatever its label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.evals.probe import fit_probe

# fp32 pixels [b, 3, S, S] on the scale 0 to 255 -> logits [b, c]; differentiable, rows independent of one another
Classify = Callable[[Tensor], Tensor]
Tell = Callable[[int], object]
Norm = Literal["2", "inf"]
Method = Literal["deepfool", "gradient"]

XI_2_AT_224, XI_INF = 2000.0, 10.0  # the paper's bounds, for 224 x 224 images of 8 bits
CANDIDATES = 10  # classes, the likeliest ones, whose boundaries DeepFool looks at
OVERSHOOT = 0.02  # how far beyond the boundary DeepFool goes, as a share of the way
DEEPFOOL_STEPS = 50
NOISE_SEEDS = 5
GRADIENT_STEP = 0.1  # length of a step of gradient ascent, as a share of xi


@dataclass(frozen=True)
class UniversalPerturbation:
    """A perturbation and how the search for it went."""

    v: Tensor  # fp32 [3, S, S], on the CPU
    rates: tuple[float, ...]  # fooling rate on the training images after each pass, percent


def default_xi(norm: Norm, size: int) -> float:
    """Return the paper's bound. An L2 norm grows with the side of the square, the largest change does not."""
    return XI_INF if norm == "inf" else XI_2_AT_224 * size / 224


def feature_classifier(model: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Classify:
    """Return a linear layer on the unit-length projected image features of a DualEncoder, which is frozen.

    Args:
        weight: [c, D], already on the model's device.
        bias: [c], there as well; None for none.
    """
    model.eval().requires_grad_(False)

    def classify(pixels: Tensor) -> Tensor:
        features = model.encode_pixels(pixels)  # type: ignore[operator]
        return F.linear(F.normalize(features.float(), dim=1), weight, bias)

    return classify


def probe_classifier(
    model: nn.Module,
    features: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    device: str | torch.device,
    title: str = "",
) -> Classify:
    """Return the layer that evals.probe fits to projected features, behind the tower.

    Args:
        features: of the training images, fp32 [n, D]; normalised here.
        labels: int64 [n].
        title: of a progress bar, as fit_probe.

    Raises:
        UserError: as fit_probe.
    """
    # Standardising and the layer are one affine map: its answers to the origin and to the unit vectors define it.
    asked = torch.cat([torch.zeros(1, features.shape[1]), torch.eye(features.shape[1])])
    unasked = torch.zeros(len(asked), dtype=torch.int64)
    scores = fit_probe(F.normalize(features, dim=1), labels, asked, unasked, classes, title=title).scores
    return feature_classifier(model, (scores[1:] - scores[0]).T.contiguous().to(device), scores[0].to(device))


def universal_perturbation(
    classify: Classify,
    images: Tensor,
    xi: float,
    norm: Norm = "inf",
    method: Method = "deepfool",
    delta: float = 0.2,
    passes: int = 10,
    batch: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_images: Tell | None = None,
) -> UniversalPerturbation:
    """Find v by passes over the images, shuffled anew each time, while the fooling rate is at most 1 - delta.

    Args:
        images: uint8 [n, 3, S, S]; batches of it are moved to `device`.
        xi: bound of the norm of v, grey levels.
        method: "deepfool" as published: for one image after the other that v does not fool, the smallest step that
            makes it do so, projected onto the ball. "gradient": ascent on the mean cross-entropy against the answers
            to the unperturbed images, a batch at a time, by steps of a tenth of xi (along the gradient for L2, along
            its signs for infinity), projected likewise.
        passes: at most so many.
        on_images: told how many images have been gone through since the last time.

    Raises:
        UserError: no images, or logits that are not finite.
    """
    if not len(images):
        raise UserError("a universal perturbation needs at least one picture")
    generator = torch.Generator().manual_seed(seed)
    v = torch.zeros(images.shape[1:], device=device)
    clean = predict(classify, images, v, batch)
    tell = on_images or (lambda count: None)
    rates: list[float] = []
    while len(rates) < passes and (rates[-1] if rates else 0.0) <= 100.0 * (1.0 - delta):
        order = torch.randperm(len(images), generator=generator)
        one_pass = _deepfool_pass if method == "deepfool" else _gradient_pass
        v = one_pass(classify, images[order], clean[order], v, xi, norm, batch, tell)
        rates.append(fooling_rate(clean, predict(classify, images, v, batch)))
    return UniversalPerturbation(v.cpu(), tuple(rates))


def deepfool(
    classify: Classify,
    image: Tensor,
    candidates: int = CANDIDATES,
    overshoot: float = OVERSHOOT,
    steps: int = DEEPFOOL_STEPS,
) -> Tensor | None:
    """Return about the smallest r, in L2, that changes the answer to `picture` + r; exact for an affine classifier.

    Each step goes to the nearest boundary of the classifier as linearised where the last one ended. The sum of the
    steps is stretched by 1 + overshoot, lest rounding leave it on this side.

    Args:
        image: fp32 [3, S, S].
        candidates: how many of the likeliest classes are looked at, the present one included.

    Returns:
        fp32 [3, S, S]; None where `steps` steps do not change the answer, or no gradient says where to go.
    """
    logits = _logits(classify, image)
    rivals = logits.topk(min(candidates, len(logits))).indices
    total = torch.zeros_like(image)
    for _ in range(steps if len(rivals) > 1 else 0):
        gradients = _gradients(classify, image + (1 + overshoot) * total, rivals)
        slopes = gradients[1:] - gradients[0]
        lengths = slopes.flatten(1).norm(dim=1)
        gaps = logits[rivals[0]] - logits[rivals[1:]]
        distances = torch.where(lengths > 0, gaps / lengths, torch.inf)
        nearest = int(distances.argmin())
        if not torch.isfinite(distances[nearest]):
            break
        total = total + distances[nearest] / lengths[nearest] * slopes[nearest]
        logits = _logits(classify, image + (1 + overshoot) * total)
        if logits.argmax() != rivals[0]:
            return (1 + overshoot) * total
    return None


def project(v: Tensor, xi: float, norm: Norm) -> Tensor:
    """Return the point nearest to v in the ball of radius xi around 0; v itself where it lies inside."""
    if norm == "inf":
        return v.clamp(-xi, xi)
    length = v.norm()
    return v * (xi / length) if length > xi else v


def noise_like(v: Tensor, norm: Norm, seed: int) -> Tensor:
    """Draw noise of the same norm as v: of uniform direction for L2; for infinity, each value is +|v| or -|v|.

    For infinity no noise of that norm is longer in L2, so the comparison favours the noise.
    """
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed)).to(v.device)
    if norm == "inf":
        return noise.sign() * v.abs().max()
    return noise * (v.norm() / noise.norm())


@torch.no_grad()
def predict(classify: Classify, images: Tensor, v: Tensor, batch: int = 64, eight_bit: bool = False) -> Tensor:
    """Return the classifier's answers to images + v, int64 [n], on the CPU.

    Args:
        images: uint8 [n, 3, S, S].
        v: fp32 [3, S, S], on the classifier's device.
        eight_bit: round and clip the sums to 0, 1 .. 255 first.

    Raises:
        UserError: logits that are not finite.
    """
    answers = []
    for part in images.split(batch):
        pixels = part.to(v.device, torch.float32) + v
        logits = classify(pixels.round().clamp(0, 255) if eight_bit else pixels)
        if not torch.isfinite(logits).all():
            raise UserError("the classifier's logits are not finite: the weights have diverged")
        answers.append(logits.argmax(1).cpu())
    return torch.cat(answers)


def fooling_rate(before: Tensor, after: Tensor) -> float:
    """Return the percentage of the answers, int64 [n] each, that have changed."""
    return 100.0 * (before != after).double().mean().item()


def perturbation_image(v: Tensor, side: int = 224) -> Image.Image:
    """Draw v with grey for 0 and its largest value as black or white; whole pixels, enlarged to `side` at least."""
    largest = v.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    pixels = (127.5 + 127.5 * v / largest).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    factor = max(1, -(-side // pixels.shape[0]))
    return Image.fromarray(np.ascontiguousarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1)))


def commonest_answer(answers: Tensor, classes: Sequence[str]) -> tuple[str, float]:
    """Return the class that stands most often among the answers, and its share in percent: v tends to favour a few."""
    counts = torch.bincount(answers, minlength=len(classes))
    return classes[int(counts.argmax())], 100.0 * counts.max().item() / len(answers)


def measure_perturbation(
    classify: Classify, v: Tensor, images: Tensor, labels: Tensor, classes: Sequence[str], norm: Norm, batch: int
) -> dict[str, Any]:
    """Measure on held-out images what v does, beside noise of the same norm; rates and accuracies in percent.

    Args:
        v: fp32 [3, S, S], on the classifier's device.
        images: uint8 [n, 3, S, S].
        labels: int64 [n].
    """

    def accuracy(predictions: Tensor) -> float:
        return 100.0 * (predictions == labels).double().mean().item()

    before, after = predict(classify, images, torch.zeros_like(v), batch), predict(classify, images, v, batch)
    noisy = [predict(classify, images, noise_like(v, norm, seed), batch) for seed in range(NOISE_SEEDS)]
    noise_rates = [fooling_rate(before, noise) for noise in noisy]
    name, share = commonest_answer(after, classes)
    return {
        "fooling_rate": fooling_rate(before, after),
        "fooling_rate_noise": sum(noise_rates) / NOISE_SEEDS,
        "fooling_rate_noise_max": max(noise_rates),
        "fooling_rate_8bit": fooling_rate(before, predict(classify, images, v, batch, eight_bit=True)),
        "accuracy": accuracy(before),
        "accuracy_perturbed": accuracy(after),
        "accuracy_noise": sum(map(accuracy, noisy)) / NOISE_SEEDS,
        "norm_2": v.norm().item(),
        "norm_inf": v.abs().max().item(),
        "commonest_answer": name,
        "commonest_answer_share": share,
    }


@torch.no_grad()
def _logits(classify: Classify, image: Tensor) -> Tensor:
    """Return the logits [c] of one image."""
    return classify(image[None])[0]


def _gradients(classify: Classify, image: Tensor, classes: Tensor) -> Tensor:
    """Return the gradients of these classes' logits with respect to one image: [k, 3, S, S].

    The image is repeated once per class, so that one backward pass gives them all.
    """
    rows = image.repeat(len(classes), 1, 1, 1).requires_grad_()
    (gradients,) = torch.autograd.grad(classify(rows).gather(1, classes[:, None]).sum(), rows)
    return gradients


def _deepfool_pass(
    classify: Classify, images: Tensor, clean: Tensor, v: Tensor, xi: float, norm: Norm, batch: int, tell: Tell
) -> Tensor:
    """Go through the images one by one, as published: each sees the v that its predecessors have left.

    v stays as it is as long as images are fooled. So several are asked about at once, and what was asked beyond the
    first that is not fooled is asked again: the result is that of asking one by one.
    """
    place, ahead = 0, 1
    while place < len(images):
        asked = slice(place, min(place + ahead, len(images)))
        unfooled = (predict(classify, images[asked], v, batch) == clean[asked]).nonzero().flatten().tolist()
        if not unfooled:
            ahead = min(2 * ahead, batch)
            tell(asked.stop - place)
            place = asked.stop
            continue
        ahead = unfooled[0] + 1  # the next run of fooled images may well be as long as this one
        tell(ahead)
        place += ahead
        step = deepfool(classify, images[place - 1].to(v.device, torch.float32) + v)
        if step is not None:
            v = project(v + step, xi, norm)
    return v


def _gradient_pass(
    classify: Classify, images: Tensor, clean: Tensor, v: Tensor, xi: float, norm: Norm, batch: int, tell: Tell
) -> Tensor:
    for part, answers in zip(images.split(batch), clean.split(batch)):
        v = v.detach().requires_grad_()
        loss = F.cross_entropy(classify(part.to(v.device, torch.float32) + v), answers.to(v.device))
        (gradient,) = torch.autograd.grad(loss, v)
        # A gradient of 0 (a softmax that is sure beyond fp32) has no direction: v stays.
        direction = gradient.sign() if norm == "inf" else F.normalize(gradient.flatten(), dim=0).view_as(v)
        v = project(v.detach() + GRADIENT_STEP * xi * direction, xi, norm)
        tell(len(part))
    return v
