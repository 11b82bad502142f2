"""What an objective is: outputs of the model become a named term of the loss.

A run is a weighted sum of objectives. The engine passes the features that an objective names, of all rows of this rank,
so that whole batches and micro-batches look alike to it. Objectives hold no tensors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from clipdist.data.batch import Batch


@dataclass(frozen=True)
class Term:
    """A part of the loss. Its value over the global batch is the sum over ranks of `sum`, divided by `count`.

    Attributes:
        sum: scalar with a gradient, this rank's. A loss that couples the batch has divided by its own number of rows
            already: its count is the number of ranks.
        count: the same on all ranks, known before the backward pass.
        weight: in the sum of all terms.
        statistics: fp32 scalars of this rank, for `Objective.metrics`.
    """

    sum: Tensor
    count: float
    weight: float
    statistics: Mapping[str, Tensor]


class Objective(Protocol):
    """
    Attributes:
        name: of its section in the configuration, and of its line in the metrics.
        modalities: what a row must have to count: see clipdist.data.batch.MODALITIES.
        features: outputs of the model, [b, D], that couple the rows of the batch. They are computed for all
            micro-batches before `loss` is called.
        upper_bounds: parameter -> the value that it never exceeds.
    """

    name: str
    modalities: tuple[str, ...]
    features: tuple[str, ...]
    upper_bounds: Mapping[str, float]

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """The term over all rows of this rank. Collective.

        Args:
            outputs: the features, and the model's scalars.

        Raises:
            NonFiniteFeatures: on every rank.
        """

    def metrics(self, outputs: Mapping[str, Tensor], batch: Batch, term: Term) -> dict[str, float]:
        """Numbers of a logged step, by their names in metrics.jsonl. Collective."""
