"""Define the interface of objectives, which compute the terms of the loss from the model's outputs.

The loss of a run is the weighted sum of its objectives. The engine passes the features of all rows of this rank, so an
objective need not know about micro-batches. Objectives hold no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from clipdist.data.batch import Batch


@dataclass(frozen=True)
class Term:
    """A term of the loss. Its value over the global batch is the sum over ranks of `sum`, divided by `count`.

    Attributes:
        sum: this rank's scalar, differentiable. A loss that couples the batch is already divided by the number of its
            rows: its count is the number of ranks.
        count: the same on all ranks, a number or a scalar on the device; known before the backward pass.
        weight: of this term in the loss.
        statistics: fp32 scalars of this rank, for `Objective.metrics`.
    """

    sum: Tensor
    count: float | Tensor
    weight: float
    statistics: Mapping[str, Tensor]


class Objective(Protocol):
    """A training objective.

    Attributes:
        name: of its section in the configuration and of its term in the metrics.
        modalities: which a valid row must have: see clipdist.data.batch.MODALITIES.
        features: names of the outputs of the model, [b, D], that couple the rows of the batch. They are computed for
            all micro-batches before `loss` is called.
        upper_bounds: the maximum of a parameter by its name.
    """

    name: str
    modalities: tuple[str, ...]
    features: tuple[str, ...]
    upper_bounds: Mapping[str, float]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the term over all rows of this rank. Collective.

        Args:
            outputs: the features [b, D] and the model's scalars [1], by name; those of the teacher, if the run has one,
                by its names (see clipdist.objectives.teacher.Teacher), without gradients.
            batch: this rank's rows.

        Raises:
            NonFiniteFeatures: features contain inf or nan; on every rank.
        """

    def metrics(self, outputs: Mapping[str, Tensor], batch: Batch, term: Term) -> dict[str, float]:
        """Return the metrics of a logged step by their names in metrics.jsonl. Collective."""
