"""Probe frozen features by one linear layer: multinomial logistic regression, or SGD.

The regression follows Radford et al. 2021 (CLIP), appendix A.3: full-batch L-BFGS, at most 1000 iterations; the L2
penalty that gives the best accuracy on a part held out of the training set, searched from 1e6 to 1e-6 down to 8 steps
per decade; then a fit on all of it; the test set is looked at once. Features are not standardised. The paper's are the
image tower's output before its projection; the output after it, scaled to unit length, is what retrieval compares.
The variant by SGD has no penalty: its learning rate is the one with the lowest loss on the held-out part. Its features
are standardised with the training set's mean and deviation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from clipdist.data.transform import EvalTransform
from clipdist.datasets.labelled import LabelledSet
from clipdist.distributed.collectives import gather_json
from clipdist.errors import Fault, UserError
from clipdist.evals.embed import ALONE, Encode, WorkShare
from clipdist.evals.features import Features, embed_set
from clipdist.evals.zero_shot import class_accuracy
from clipdist.models.weights import weights_checksum

Solver = Literal["lbfgs", "sgd"]
L2_DECADES, L2_STEPS = 6, 8  # the search of the penalty: from 1e6 to 1e-6, at last 8 steps per decade
L2_COARSE = 2 * L2_STEPS  # its first steps, halved until they are 1
L2_FITS = 15
LR_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # of SGD, cautious to bold
RISE = 1.02  # over the lowest held-out loss, and less accurate: weaker penalties, the slowest, are then not tried
HELD_OUT = 0.2  # share of the training set that chooses the penalty
MAX_ITERATIONS = 1000
GRADIENT, CHANGE = 1e-5, 1e-8  # L-BFGS ends where no gradient, or no step's change of the mean loss, is larger
EPOCHS = 50  # of SGD
SGD_BATCH, MOMENTUM = 256, 0.9
BEAT_S = 1.0  # between two signs of life to the ranks that wait for the fit


@dataclass(frozen=True)
class _Prepared:
    """Features as a solver takes them: x -> (x - mean) @ basis, or (x - mean) / scale."""

    features: Tensor  # fp32 [n, D], or [n, n] where D is larger
    labels: Tensor  # int64 [n]
    deviation: Tensor  # of every column of the features; 1 where that is 0
    transform: Callable[[Tensor], Tensor]  # of other features


Fit = Callable[[_Prepared, float, nn.Linear], nn.Linear]  # (data, penalty or learning rate, where to start) -> a layer


@dataclass(frozen=True)
class Probe:
    """A fitted layer's answers to the test set."""

    scores: Tensor  # fp32 [n_test, c], the logits
    labels: Tensor  # int64 [n_test]
    classes: tuple[str, ...]
    l2: float | None = None  # of the objective: sum of cross-entropies + l2 / 2 * |W|^2; None: no penalty
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
    transform: EvalTransform,
    share: WorkShare = ALONE,
    progress: Callable[[], None] = lambda: None,
    unit: bool = True,
    device: str | torch.device = "cpu",
    cache: Path | None = None,
) -> dict[str, float]:
    """Run the probe where ranks go on with other work after it: {"accuracy", "top5", "l2"}. Collective.

    Every rank computes a slice of the features, always share.batch images a call and equally often; rank 0 fits the
    layer, which may take long. The others wait for it in short collectives, not in a long one that would run into its
    time limit, and get {}.

    Args:
        progress: called while the layer is fitted, on every rank, at least once per BEAT_S or pass over the images.
        unit: scale the features to unit length, as projected ones are compared; those of a tower are taken as they are.
        device: where rank 0 fits.
        cache: as embed_set takes it.

    Raises:
        UserError: as embed_set and fit_probe.
    """
    features = embed_set(encode, data, transform, share, cache)
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

    parts = [part.image.to(device) for part in (features.train, features.test)]
    train, test = (F.normalize(part, dim=1) for part in parts) if unit else parts
    labels = features.train.labels.to(device)
    probe = fit_probe(train, labels, test, features.test.labels, data.classes, tick=tick)
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
    sgd = solver == "sgd"
    fit: Fit = partial(partial(_fit_sgd, seed=seed, epochs=epochs) if sgd else _fit_lbfgs, tick=tick)
    prepare = _standardised if sgd else _rotated
    with tqdm(total=(len(LR_GRID) if sgd else L2_FITS) + 1, desc=title, disable=None if title else True) as bar:
        score = _Score(fit, prepare, train, train_labels, len(classes), seed, bar)
        chosen = min(LR_GRID, key=lambda lr: score(lr)[1]) if sgd else _search_l2(score)
        whole = prepare(train, train_labels)
        layer = fit(whole, chosen, _zero_layer(whole.features, len(classes)))
        bar.update()
    scores = _scores(layer, whole.transform(test))
    return Probe(scores, test_labels.cpu(), tuple(classes), **{"lr" if sgd else "l2": chosen})


class _Score:
    """Fits to a part of the training set, and measures on the rest."""

    def __init__(
        self,
        fit: Fit,
        prepare: Callable[[Tensor, Tensor], _Prepared],
        features: Tensor,
        labels: Tensor,
        classes: int,
        seed: int,
        bar: tqdm,
    ) -> None:
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
        held, kept = order.split([count := max(1, round(HELD_OUT * len(order))), len(order) - count])
        self._fit, self._bar = fit, bar
        self._kept = prepare(features[kept], labels[kept])
        self._held, self._held_labels = self._kept.transform(features[held]), labels[held]
        self._layers = {math.inf: _zero_layer(self._kept.features, classes)}

    def __call__(self, setting: float) -> tuple[float, float]:
        """Return accuracy (0 to 1) and cross-entropy (inf: it has diverged) on the part that is held out.

        Fits with decreasing penalties are fast: each begins at the layer of the next stronger one.
        """
        stronger = min(other for other in self._layers if other > setting)
        layer = self._layers[setting] = self._fit(self._kept, setting, self._layers[stronger])
        self._bar.update()
        with torch.no_grad():
            logits = layer(self._held)
            loss = F.cross_entropy(logits, self._held_labels).item()
        accuracy = (logits.argmax(1) == self._held_labels).double().mean().item()
        return accuracy, loss if math.isfinite(loss) else math.inf


def _search_l2(score: Callable[[float], tuple[float, float]]) -> float:
    """Return the penalty with the best accuracy, of equal ones that with the lowest loss.

    The interval around the best so far is halved from step to step.
    """

    def best_of(found: dict[int, tuple[float, float]]) -> int:
        return max(found, key=lambda place: (found[place][0], -found[place][1]))

    found: dict[int, tuple[float, float]] = {}
    strongest = L2_DECADES * L2_STEPS
    step = L2_COARSE
    for place in range(strongest, -strongest - 1, -step):
        found[place] = score(_penalty(place))
        accuracies, losses = zip(*found.values())
        if accuracies[-1] < max(accuracies) and losses[-1] > RISE * min(losses):
            break
    while step := step // 2:
        best = best_of(found)
        for place in (best + step, best - step):
            if abs(place) <= strongest:
                found[place] = score(_penalty(place))
    return _penalty(best_of(found))


def _penalty(place: int) -> float:
    return 10.0 ** (place / L2_STEPS)


def _standardised(features: Tensor, labels: Tensor) -> _Prepared:
    mean, deviation = statistics(features)
    return _Prepared((features - mean) / deviation, labels, deviation, lambda x: (x - mean) / deviation)


def _rotated(features: Tensor, labels: Tensor) -> _Prepared:
    """Turn features to their principal axes, around their mean: that changes no optimum, and L-BFGS is there sooner."""
    mean = features.mean(0)
    centred = features - mean
    basis = torch.eye(features.shape[1], device=features.device)
    if len(features) < features.shape[1]:  # the optimum lies in the space of the rows
        basis = torch.linalg.qr(centred.T).Q
        centred = centred @ basis
    basis = basis @ torch.linalg.eigh(centred.T @ centred).eigenvectors
    turned = (features - mean) @ basis
    return _Prepared(turned, labels, statistics(turned)[1], lambda x: (x - mean) @ basis)


def _zero_layer(features: Tensor, classes: int) -> nn.Linear:
    layer = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def _scores(layer: nn.Linear, features: Tensor) -> Tensor:
    return layer(features).cpu()


def _fit_lbfgs(data: _Prepared, l2: float, layer: nn.Linear, tick: Callable[[], None] = lambda: None) -> nn.Linear:
    """Minimise the sum of cross-entropies + l2 / 2 * |W|^2, which is convex: `layer` is only where it starts.

    The variables are W over a step per column that makes the curvature about the same in all of them: a column's is
    about p (1 - p) of its variance, where p = 1 / classes, and the penalty's.
    """
    penalty, share = l2 / len(data.labels), 1 / layer.out_features
    step = (data.deviation.square() + penalty / (share * (1 - share) or 1)).rsqrt()
    variables, bias = (layer.weight.detach() / step).requires_grad_(), layer.bias.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [variables, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=CHANGE,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        weight = variables * step
        loss = F.cross_entropy(F.linear(data.features, weight, bias), data.labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        tick()
        return loss

    optimiser.step(closure)
    fitted = _zero_layer(data.features, layer.out_features)
    with torch.no_grad():
        fitted.weight.copy_(variables * step)
        fitted.bias.copy_(bias)
    return fitted


def _fit_sgd(
    data: _Prepared, lr: float, layer: nn.Linear, seed: int, epochs: int, tick: Callable[[], None]
) -> nn.Linear:
    """Train a layer like this one, from 0, in random order; the learning rate falls from `lr` to 0 along a cosine."""
    features, labels = data.features, data.labels
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
