"""Probe frozen features by one linear layer: multinomial logistic regression, or SGD.

The protocol follows Radford et al. 2021 (CLIP), appendix A.3: full-batch L-BFGS, the L2 penalty chosen on a part held
out of the training set (here by its loss), then a fit on all of it; the test set is looked at once. Features are the
image tower's output after its projection, scaled to unit length (what retrieval compares), or as it is before its
projection (the paper's); then standardised with the training set's mean and deviation. Standardising is affine, so the
whole is still one linear layer; it makes the penalty mean the same for every model, and the pixels of the baseline go
through it as well. The variant by SGD has no penalty: its learning rate is chosen in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipdist.datasets.labelled import LabelledSet
from clipdist.distributed.collectives import gather_json
from clipdist.errors import Fault, UserError
from clipdist.evals.embed import ALONE, Encode, WorkShare
from clipdist.evals.features import Features, embed_set
from clipdist.evals.zero_shot import class_accuracy
from clipdist.models.weights import weights_checksum

Solver = Literal["lbfgs", "sgd"]
# fit(features [n, D], labels [n], penalty or learning rate, the layer of the fit before) -> a layer
Fit = Callable[[Tensor, Tensor, float, nn.Linear], nn.Linear]

L2_GRID = tuple(10.0 ** (-half / 2) for half in range(-4, 11))  # 100 to 1e-5, two a decade, strong to weak
LR_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of SGD, cautious to bold
RISE = 1.02  # over the lowest held-out loss: weaker penalties, which cost most iterations, are then not tried
HELD_OUT = 0.2  # share of the training set that chooses the penalty
MAX_ITERATIONS = 500
EPOCHS = 50  # of SGD
SGD_BATCH, MOMENTUM = 256, 0.9
BEAT_S = 1.0  # between two signs of life to the ranks that wait for the fit


@dataclass(frozen=True)
class Probe:
    """A fitted layer's answers to the test set."""

    scores: Tensor  # fp32 [n_test, c], the logits
    labels: Tensor  # int64 [n_test]
    classes: tuple[str, ...]
    l2: float | None = None  # of the objective: mean cross-entropy + l2 / 2 * |W|^2; None: no penalty
    lr: float | None = None  # of SGD

    @property
    def predictions(self) -> Tensor:
        """int64 [n_test]."""
        return self.scores.argmax(1)

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100.0 * (self.predictions == self.labels).double().mean().item()

    @property
    def top5(self) -> float:
        """Percent whose class is among the five likeliest; 100 below six classes."""
        best = self.scores.topk(min(5, len(self.classes))).indices
        return 100.0 * (best == self.labels[:, None]).any(1).double().mean().item()

    @property
    def per_class(self) -> dict[str, float]:
        """Class name -> percent of its test images that were recognised; classes without any are left out."""
        found = class_accuracy(self.predictions, self.labels, len(self.classes))
        return {self.classes[label]: accuracy for label, accuracy in found.items()}


def require_unchanged(module: nn.Module, before: str) -> None:
    """Raise Fault where a weight or buffer is not what it was when its checksum was `before`."""
    if weights_checksum(module) != before:
        raise Fault("the frozen towers' weights changed while the last layer was fitted: the result is not a probe")


def probe_of(
    encode: Encode,
    data: LabelledSet,
    image_size: int,
    share: WorkShare = ALONE,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Run the probe as an evaluator during training, on projected features: {"accuracy", "top5", "l2"}. Collective.

    Every rank computes a slice of the features, always share.batch images a call and equally often; rank 0 fits the
    layer on the CPU, which may take long. The others wait for it in short collectives, not in a long one that would
    run into its time limit, and get {}.

    Args:
        progress: called while the layer is fitted, on every rank, at least once per BEAT_S or pass over the images.

    Raises:
        UserError: as embed_set and fit_probe.
    """
    features = embed_set(encode, data, image_size, share)
    if share.rank:
        while gather_json(None)[0]:
            progress()
        return {}
    told = time.monotonic()

    def tick() -> None:
        nonlocal told
        progress()
        if time.monotonic() >= told + BEAT_S:
            gather_json(True)
            told = time.monotonic()

    train, test = (F.normalize(part.image, dim=1) for part in (features.train, features.test))
    probe = fit_probe(train, features.train.labels, test, features.test.labels, data.classes, tick=tick)
    gather_json(False)
    assert probe.l2 is not None  # L-BFGS has chosen one
    return {"accuracy": probe.accuracy, "top5": probe.top5, "l2": probe.l2}


def fit_features(
    features: Features,
    classes: tuple[str, ...],
    title: str,
    device: str | torch.device = "cpu",
    solver: Solver = "lbfgs",
    seed: int = 0,
    epochs: int = EPOCHS,
    rows: np.ndarray | slice = slice(None),
) -> Probe:
    """Fit the layer to a set's features, or to some rows of its training images; see fit_probe."""
    train, labels = features.train.image[rows].to(device), features.train.labels[rows].to(device)
    test = features.test.image.to(device)
    return fit_probe(train, labels, test, features.test.labels, classes, solver, seed, epochs, title)


def fit_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: Sequence[str],
    solver: Solver = "lbfgs",
    seed: int = 0,
    epochs: int = EPOCHS,
    title: str = "",
    tick: Callable[[], None] = lambda: None,
) -> Probe:
    """Train the layer on features fp32 [n, D] and labels int64 [n], and classify the test set.

    Args:
        solver: "lbfgs": the penalised optimum; "sgd": `epochs` of momentum SGD with a cosine schedule, unpenalised.
        seed: of the held-out part, and of SGD's order.
        title: of a progress bar; "": none is shown.
        tick: called after every pass over the features by L-BFGS, or batch by SGD.

    Raises:
        UserError: features that are not finite, or fewer than two training images.
    """
    if not torch.isfinite(train).all() or not torch.isfinite(test).all():
        raise UserError("the image features are not finite: the weights have diverged")
    if len(train) < 2:
        raise UserError(f"the probe needs at least 2 training pictures; got {len(train)}")
    grid, fit, rise = L2_GRID, partial(_fit_lbfgs, tick=tick), RISE
    if solver == "sgd":
        grid, fit, rise = LR_GRID, partial(_fit_sgd, seed=seed, epochs=epochs, tick=tick), float("inf")
    with tqdm(total=len(grid) + 1, desc=title, disable=None if title else True) as bar:
        chosen = _choose(grid, fit, rise, train, train_labels, len(classes), seed, bar)
        mean, scale = statistics(train)
        layer = fit((train - mean) / scale, train_labels, chosen, _zero_layer(train, len(classes)))
        bar.update()
    scores = _scores(layer, (test - mean) / scale)
    return Probe(scores, test_labels.cpu(), tuple(classes), **{"l2" if solver == "lbfgs" else "lr": chosen})


def _choose(
    grid: Sequence[float],
    fit: Fit,
    rise: float,
    features: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    bar: tqdm,
) -> float:
    """Return the setting with the lowest cross-entropy on the held-out part, too small for exact accuracies.

    Args:
        rise: over the lowest loss so far, beyond which no further settings are tried.
    """
    kept, kept_labels, held, held_labels = _hold_out(features, labels, seed)
    layer, losses = _zero_layer(features, classes), list[float]()
    for setting in grid:
        layer = fit(kept, kept_labels, setting, layer)  # begins where the stronger penalty ended
        loss = _loss(layer, held, held_labels)
        losses.append(loss if np.isfinite(loss) else float("inf"))  # a learning rate too bold: diverged
        bar.update()
        if losses[-1] > rise * min(losses):
            break
    return grid[losses.index(min(losses))]


def _hold_out(features: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return standardised features and labels of the kept part, then of the held-out part."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(HELD_OUT * len(order)))
    held, kept = order[:count].to(features.device), order[count:].to(features.device)
    mean, scale = statistics(features[kept])
    return (features[kept] - mean) / scale, labels[kept], (features[held] - mean) / scale, labels[held]


def _zero_layer(features: Tensor, classes: int) -> nn.Linear:
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def _scores(layer: nn.Linear, features: Tensor) -> Tensor:
    return layer(features).cpu()


@torch.no_grad()
def _loss(layer: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(layer(features), labels).item()


def _fit_lbfgs(
    features: Tensor, labels: Tensor, l2: float, layer: nn.Linear, tick: Callable[[], None] = lambda: None
) -> nn.Linear:
    """Minimise mean cross-entropy + l2 / 2 * |W|^2, which is convex: where `layer` starts decides only how long."""
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
        tick()
        return loss

    optimiser.step(closure)
    return layer


def _fit_sgd(
    features: Tensor, labels: Tensor, lr: float, layer: nn.Linear, seed: int, epochs: int, tick: Callable[[], None]
) -> nn.Linear:
    """Train a layer like this one, from 0, in random order; the learning rate falls from `lr` to 0 along a cosine."""
    layer = _zero_layer(features, layer.out_features)
    steps = epochs * -(-len(features) // SGD_BATCH)
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).to(features.device).split(SGD_BATCH):
            optimiser.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimiser.step()
            schedule.step()
            tick()
    return layer


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per column; a constant column gets 1, so that it becomes 0."""
    scale, mean = torch.std_mean(features, dim=0, correction=0)
    return mean, torch.where(scale > 1e-7, scale, torch.ones_like(scale))
