"""Frozen features and labels in, the accuracy of one linear layer out: multinomial logistic regression by L-BFGS.

The protocol follows Radford et al. 2021 (CLIP), appendix A.3: full-batch L-BFGS, the L2 penalty chosen on a part held
out of the training set (here by its loss), then a fit on all of it; the test set is looked at once. Features are the
image tower's projected output, scaled to unit length (what retrieval compares), then standardised with the training
set's mean and deviation. Standardising is affine, so the whole is still one linear layer; it makes the penalty mean the
same for every model, and the pixels of the baseline go through it as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipdist.errors import UserError
from clipdist.evals.embed import encode_images, model_encoder

L2_GRID = tuple(10.0 ** (-half / 2) for half in range(-4, 11))  # 100 to 1e-5, two a decade, strong to weak
RISE = 1.02  # over the lowest held-out loss: weaker penalties, which cost most iterations, are then not tried
HELD_OUT = 0.2  # share of the training set that chooses the penalty
MAX_ITERATIONS = 500
SPLIT_SEED = 0


@dataclass(frozen=True)
class Probe:
    """A fitted layer's answers to the test set."""

    predictions: Tensor  # int64 [n_test]
    labels: Tensor  # int64 [n_test]
    classes: tuple[str, ...]
    l2: float  # of the objective: mean cross-entropy + l2 / 2 * |W|^2

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100.0 * (self.predictions == self.labels).double().mean().item()

    @property
    def per_class(self) -> dict[str, float]:
        """Class name -> percent of its test pictures that were recognised; classes without any are left out."""
        right = self.predictions == self.labels
        return {
            name: 100.0 * right[self.labels == label].double().mean().item()
            for label, name in enumerate(self.classes)
            if (self.labels == label).any()
        }


def extract_features(model: nn.Module, images: np.ndarray, size: int, device: str, batch: int = 64) -> Tensor:
    """Unit-length projected features of pictures uint8 [n, 3, h, w], resized to `size`: fp32 [n, D] on the CPU.

    `model` is a DualEncoder; none of its weights can change here, which is checked.

    Raises:
        RuntimeError: a weight or buffer changed all the same.
    """
    model.requires_grad_(False)
    before = weights_checksum(model)
    resized = _resized(images, size, batch)
    progress = tqdm(resized, "features", -(-len(images) // batch), disable=None)
    features = encode_images(model_encoder(model, device), progress)
    if weights_checksum(model) != before:
        raise RuntimeError("the frozen tower's weights changed while features were extracted")
    return F.normalize(features, dim=1)


def pixel_features(images: np.ndarray) -> Tensor:
    """The baseline's features: the pixels themselves, fp32 [n, 3 * h * w] in [0, 1]."""
    return torch.from_numpy(images.reshape(len(images), -1)).float() / 255


def fit_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: Sequence[str],
    on_fit: Callable[[], object] | None = None,
) -> Probe:
    """Trains the layer on features fp32 [n, D] and labels int64 [n], and asks it about the test set.

    Args:
        on_fit: called after each fit, of which there are at most len(L2_GRID) + 1.

    Raises:
        UserError: features that are not finite, or fewer than two training pictures.
    """
    if not torch.isfinite(train).all() or not torch.isfinite(test).all():
        raise UserError("the image features are not finite: the weights have diverged")
    if len(train) < 2:
        raise UserError(f"the probe needs at least 2 training pictures; got {len(train)}")
    l2 = _choose_l2(train, train_labels, len(classes), on_fit)
    mean, scale = _statistics(train)
    layer = _fit((train - mean) / scale, train_labels, l2, _zero_layer(train, len(classes)))
    if on_fit:
        on_fit()
    return Probe(_predict(layer, (test - mean) / scale), test_labels.cpu(), tuple(classes), l2)


def weights_checksum(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _choose_l2(features: Tensor, labels: Tensor, classes: int, on_fit: Callable[[], object] | None) -> float:
    """The penalty with the lowest cross-entropy on the held-out part, whose size makes accuracies coarse and noisy."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(SPLIT_SEED))
    count = max(1, round(HELD_OUT * len(order)))
    held, kept = order[:count].to(features.device), order[count:].to(features.device)
    mean, scale = _statistics(features[kept])
    kept_features, held_features = (features[kept] - mean) / scale, (features[held] - mean) / scale
    layer = _zero_layer(features, classes)
    losses: list[float] = []
    for l2 in L2_GRID:
        layer = _fit(kept_features, labels[kept], l2, layer)  # begins where the stronger penalty ended
        with torch.no_grad():
            losses.append(F.cross_entropy(layer(held_features), labels[held]).item())
        if on_fit:
            on_fit()
        if losses[-1] > RISE * min(losses):
            break
    return L2_GRID[losses.index(min(losses))]


def _zero_layer(features: Tensor, classes: int) -> nn.Linear:
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def _predict(layer: nn.Linear, features: Tensor) -> Tensor:
    return layer(features).argmax(1).cpu()


def _fit(features: Tensor, labels: Tensor, l2: float, layer: nn.Linear) -> nn.Linear:
    """Minimises mean cross-entropy + l2 / 2 * |W|^2, which is convex: where `layer` starts decides only how long."""
    optimiser = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(layer(features), labels) + l2 / 2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return layer


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per column; a constant column gets 1, so that it becomes 0."""
    scale, mean = torch.std_mean(features, dim=0, correction=0)
    return mean, torch.where(scale > 1e-7, scale, torch.ones_like(scale))


def _resized(images: np.ndarray, size: int, batch: int) -> Iterator[Tensor]:
    for begin in range(0, len(images), batch):
        pixels = torch.from_numpy(images[begin : begin + batch])
        if pixels.shape[2:] != (size, size):
            pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        yield pixels
