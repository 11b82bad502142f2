"""Define an objective: it computes a term of the loss from the model's outputs, and says what it needs for that.

The loss of a run is the weighted sum of its objectives. An objective need not know of micro-batches, and holds no
tensors: heads are part of the model, and a queue or a centre is state that the engine keeps and saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipdist.data.augment import View
from clipdist.data.batch import Batch
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.losses.global_batch import global_statistics
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.spec import ModelSpec

TEACHER = "teacher/"  # of the names of a teacher's outputs
COUNTS = "/counts"  # behind the name of what a row has several entries of, or none: how many, int64 [b], on the CPU


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


class Moment(NamedTuple):
    """A data step, from 0, of a run of so many steps: what schedules are functions of."""

    step: int
    steps: int

    def cosine(self, first: float, last: float) -> float:
        """Return half a cosine from `first` at the start of the run to `last` at its end."""
        return last + (first - last) * (1 + math.cos(math.pi * min(1.0, self.step / max(1, self.steps)))) / 2

    def ramp(self, ends: Sequence[float], steps: int) -> float:
        """Return a line between two ends over so many steps, then the last."""
        first, last = ends
        return last if self.step >= steps else first + (last - first) * self.step / steps


@dataclass(frozen=True)
class Given:
    """What is constant within a step, by name.

    Attributes:
        rows: go with the rows of a batch, [b, ...].
        shared: go with all.
        ragged: of which each row has a number of entries: those of row 0 first, [n, ...], and the numbers, int64 [b],
            on the CPU.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    ragged: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def split(self, rows: int, total: int) -> list[dict[str, Tensor]]:
        """Return what goes with each so many rows of a total, by name; numbers of entries by the name and COUNTS."""
        parts = {name: values.split(rows) for name, values in self.rows.items()}
        for name, (values, counts) in self.ragged.items():
            parts[name + COUNTS] = counts.split(rows)
            parts[name] = values.split([int(own.sum()) for own in parts[name + COUNTS]])
        places = range(-(-total // rows))
        return [{**self.shared, **{name: part[place] for name, part in parts.items()}} for place in places]


@dataclass(frozen=True)
class TeacherSpec:
    """How a moving average of the weights is an objective's teacher: see clipdist.engine.moving_teacher.

    Attributes:
        views: that it sees.
        momentum: m of a step; the teacher becomes m teacher + (1 - m) weights.
        training: BatchNorm normalises by the batch and has running statistics of its own; False: it normalises by
            running statistics, which are averaged as the weights are. All else is in evaluation mode.
        shuffled: with model.batchnorm_group a row's group is another than the model's; see
            clipdist.models.grouped_norms.interleaved.
    """

    views: tuple[str, ...]
    momentum: Callable[[Moment], float]
    training: bool = False
    shuffled: bool = False


class Objective:
    """A training objective.

    Attributes:
        name: of its section in the configuration, of its head, and of its term in the metrics.
        modalities: which a valid row must have: see clipdist.data.batch.MODALITIES.
        features: names of the outputs of the model, [b, ...], that couple the rows of the batch: with micro-batches
            they are computed for all rows before `loss` is called once for all.
        additive: whether the term is a sum over rows instead: `loss` is then called for each micro-batch by itself.
        upper_bounds: the maximum of a parameter by its name.
        views: of an image, beside clipdist.data.batch.IMAGE, which CLIP reads. The model runs each through the image
            tower and this objective's head: that is the output of the view's name.
        taught_alone: names of the views that the teacher sees and the model does not.
        reads_image_tokens: whether its head is a decoder of captions, which reads the image tower's tokens for CLIP's
            view: see clipdist.models.caption_decoder.
        teacher: of the objective, if it follows the weights.
        held: by parameter name, how many optimiser steps leave it as it is; see clipdist.engine.zero.Zero.
    """

    name: str
    modalities: tuple[str, ...] = ("image",)
    features: tuple[str, ...] = ()
    additive: bool = False
    upper_bounds: Mapping[str, float] = {}
    views: tuple[View, ...] = ()
    taught_alone: tuple[str, ...] = ()
    reads_image_tokens: bool = False
    teacher: TeacherSpec | None = None
    held: Mapping[str, int] = {}

    def fit(self, spec: ModelSpec) -> None:
        """Learn the description of the model, once, before `head` is called."""

    def head(self, width: int) -> nn.Module | None:
        """Return the head, with random weights, or None. It is trained beside the towers and dropped on export.

        Its forward pass takes features [b, width] of the image tower before its projection, and `teaching`, whether it
        is the teacher's. With `reads_image_tokens` width is that of the tokens.
        """
        return None

    def adapt(self, model: DualEncoder) -> None:
        """Let a model give what the objective needs, in place, before its heads are made.

        Raises:
            UserError: it cannot.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the initial tensors, by name, that the engine keeps between steps: the same on all ranks."""
        return {}

    def noise(self, batch: Batch, at: Moment) -> Mapping[str, Tensor]:
        """Return what the head takes beside features, on the CPU, by view, or NAME/ARGUMENT of a decoder of captions.

        For the head, [b, ...]; or the patches to mask, bool [b, n]: see DualEncoder.forward. Random numbers are a
        function of the step and of each row's sample alone.

        Args:
            batch: rows of this rank, or of a micro-batch.
        """
        return {}

    def given(self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor], at: Moment) -> Given:
        """Return what is constant within a step, before the student's pass, without gradients. Collective.

        Here: what the teacher gives for its views, the state as NAME/..., and for an additive objective NAME/count, the
        number of valid rows of the global batch, fp32 [].

        Args:
            taught: the teacher's outputs for all rows of this rank, by TEACHER and the name; of masked patches also
                their number in each row, by that and COUNTS.
            batch: this rank's rows.
            state: the objective's own.
            at: this step.
        """
        rows = {TEACHER + view: taught[TEACHER + view] for view in (self.teacher.views if self.teacher else ())}
        shared = {f"{self.name}/{name}": tensor for name, tensor in state.items()}
        if self.additive:
            shared[f"{self.name}/count"] = global_count(batch.valid_in(self.modalities))
        return Given(rows, shared)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the term over all rows of this rank, or over those of a micro-batch if `additive`.

        Collective, unless `additive`.

        Args:
            outputs: of the model, by name: those of the views and the scalars [1], with gradients; and what `given`
                returned, its rows being those of `batch`.
            batch: the rows.

        Raises:
            NonFiniteFeatures: features contain inf or nan; on every rank.
        """
        raise NotImplementedError

    def after_update(
        self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the state of the next step. Called where the optimiser has stepped, and only there. Collective."""
        return state

    def metrics(self, outputs: Mapping[str, Tensor], batch: Batch, term: Term) -> dict[str, float]:
        """Return the metrics of a logged step by their names in metrics.jsonl. Collective.

        Args:
            outputs: features and scalars, without gradients.
            term: of the whole batch; of an additive one, statistics are sums over the micro-batches.
        """
        return global_statistics({**term.statistics})


def global_count(valid: Tensor) -> Tensor:
    """Return the number of valid rows of the global batch, at least 1, fp32 []. Collective.

    Args:
        valid: bool [b], those of this rank.
    """
    return all_reduce_sum(valid.sum(dtype=torch.float32)).clamp_(min=1)
