"""One training step: forward over all rows of this rank or in micro-batches, the objectives' loss, backward, update.

Gradients are averaged over ranks, and every term of the loss is exact under that mean. A step either changes weights,
moments and running statistics together, or leaves all of them as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.distributed.rank import DistEnv
from clipdist.engine.gradients import GradientStatistics, gradient_statistics
from clipdist.engine.zero import Zero
from clipdist.errors import Fault
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.models.norms import RunningStatistics, statistics_once, statistics_still
from clipdist.objectives.objective import Objective, Term


class StepGuard(Protocol):
    """Says which steps to leave out; the same on all ranks. See clipdist.fault_tolerance.guard."""

    @property
    def wants_sizes(self) -> bool: ...

    def judge_loss(self, loss: float) -> str: ...

    def judge_updates(self, sizes: dict[str, float]) -> str: ...

    def accepted(self, step: int, loss: float, sizes: dict[str, float]) -> None: ...

    def left_out(self, step: int, reason: str) -> None: ...

    def overflowed(self, step: int, reason: str, scale_is_lowest: bool) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """What one step tells.

    Attributes:
        value: this rank's loss; its mean over ranks is the global loss. nan where features were not finite.
        terms: the objectives' parts of it, by name, detached.
        outputs: the features [b, D] that the objectives read, and the model's scalars, detached.
        grad_norms: by part of the model, before clipping; empty unless asked for or measured for a guard.
        applied: False where the optimiser took no step: weights, moments and running statistics are as before.
        skipped: why not, the same on all ranks; empty where only DeepSpeed knows (fp16 without a guard).
        loss: the global loss; nan without a guard.
        update_sizes: by tower, as clipdist.engine.gradients has them; empty without a guard that looks at them.
    """

    value: Tensor
    terms: dict[str, Term]
    outputs: dict[str, Tensor]
    grad_norms: dict[str, float]
    applied: bool
    skipped: str = ""
    loss: float = math.nan
    update_sizes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Forward:
    """What the forward pass gave, and the backward pass that is still to come."""

    value: Tensor
    terms: dict[str, Term]
    outputs: dict[str, Tensor]
    backward: Callable[[], None]

    def result(self, applied: bool, skipped: str, loss: float, gradients: GradientStatistics | None) -> StepResult:
        terms = {name: Term(t.sum.detach(), t.count, t.weight, t.statistics) for name, t in self.terms.items()}
        outputs = {name: output.detach() for name, output in self.outputs.items()}
        norms, sizes = (gradients.norms, gradients.sizes) if gradients else ({}, {})
        return StepResult(self.value.detach(), terms, outputs, norms, applied, skipped, loss, sizes)


class Engine:
    """Trains one model by its objectives on all ranks.

    Args:
        model: called by the names of the batch's inputs, it gives a dict of outputs; it tells its `scalars` and the
            `part_of` a parameter. See clipdist.models.dual_encoder.DualEncoder.

    Attributes:
        zero: the weights, their optimiser, and how they are sharded.
        before_update: called in every step that changes weights, right before: who copies them in the background must
            be done when it returns. (Running statistics of BatchNorm change earlier, in the forward pass.)
        scalars: the fp32 masters of the model's scalars, [1], on every rank.
    """

    def __init__(self, model: nn.Module, objectives: Sequence[Objective], config: Config, dist_env: DistEnv) -> None:
        self.dist_env, self.objectives = dist_env, objectives
        self.seed = config.train.seed
        self.before_update: Callable[[], None] | None = None
        self.skip_nonfinite = config.guard.nonfinite == "skip"
        self.grad_clip = config.optim.grad_clip
        self.micro_batch = config.train.micro_batch or config.train.global_batch // dist_env.world_size
        self.zero = Zero(model, config, dist_env)
        self.scalars: dict[str, Tensor] = {}
        self.refresh_scalars()
        self._features = tuple(dict.fromkeys(name for objective in objectives for name in objective.features))
        self._statistics = RunningStatistics(self.zero.module)

    def train_step(
        self, batch: Batch, *, step: int, lr: float, want_norms: bool = False, guard: StepGuard | None = None
    ) -> StepResult:
        """One optimiser step on this rank's rows of global batch `step`.

        Args:
            batch: on this rank's device.
            lr: the learning rate of this step.
            want_norms: also measure the gradients' norms (one pass over them and a small collective).
            guard: judges the global loss before backward and the gradients after it, and is told what came of the
                step; all ranks give one of the same state. Without one only the features are looked at.

        Raises:
            Fault: features, or with a guard the loss or gradients, that are not finite, unless the configuration wants
                such steps skipped.
        """
        self.zero.train()
        self.zero.set_lr(lr)
        self._statistics.keep()
        forward = self._whole if self.micro_batch >= len(batch) else self._cached
        try:
            done = forward(batch, step)
        except NonFiniteFeatures as error:
            nothing = _Forward(torch.full((), torch.nan, device=self.dist_env.device), {}, {}, lambda: None)
            return self._left_out(nothing, step, guard, str(error), finite=False)
        if guard is None:
            done.backward()
            norms = gradient_statistics(self.zero, self.grad_clip, want_sizes=False) if want_norms else None
            return self._update(done, step, None, math.nan, norms)
        loss = float(all_reduce_sum(done.value.double())) / self.dist_env.world_size
        if reason := guard.judge_loss(loss):
            return self._left_out(done, step, guard, reason, loss, finite=math.isfinite(loss))
        done.backward()
        gradients = gradient_statistics(self.zero, self.grad_clip, guard.wants_sizes)
        if gradients.not_finite and not self.zero.fp16:
            self.zero.drop_gradients()
            return self._left_out(done, step, guard, _not_finite(gradients.not_finite), loss, finite=False)
        if not gradients.not_finite and (reason := guard.judge_updates(gradients.sizes)):
            self.zero.drop_gradients()
            return self._left_out(done, step, guard, reason, loss, gradients)
        return self._update(done, step, guard, loss, gradients)

    # Forward and backward

    def _whole(self, batch: Batch, step: int) -> _Forward:
        """Forward over all rows of this rank at once."""
        seed_step(self.seed, step, self.dist_env.rank)
        outputs = self._forward(batch)
        value, terms = self._loss(outputs, batch)
        return _Forward(value, terms, outputs, partial(self.zero.backward, value))

    def _cached(self, batch: Batch, step: int) -> _Forward:
        """The same in micro-batches, exactly: features of all without gradients, the loss' gradient towards them, then
        each micro-batch once more, its random state replayed, against its share (Gao et al., arXiv:2101.06983, 3).

        Memory grows with the features, b x D, and one micro-batch's activations.
        """
        pieces = batch.split(self.micro_batch)
        cached = []
        with torch.no_grad(), statistics_still(self._statistics.norms):
            for micro, piece in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                cached.append(self._forward(piece))
        outputs = {name: torch.cat([one[name] for one in cached]).requires_grad_() for name in self._features}
        outputs |= {name: cached[0][name].detach().requires_grad_() for name in self.scalars}
        del cached
        value, terms = self._loss(outputs, batch)
        return _Forward(value, terms, outputs, partial(self._backward_again, pieces, step, value, outputs))

    def _backward_again(self, pieces: list[Batch], step: int, value: Tensor, outputs: dict[str, Tensor]) -> None:
        """The second half of _cached."""
        scale = self.zero.loss_scale  # fp16 features have fp16 gradients, which vanish without it
        found = torch.autograd.grad(value * scale, list(outputs.values()))
        gradients = {name: gradient.float() / scale for name, gradient in zip(outputs, found)}
        shares = {name: gradients[name].split(self.micro_batch) for name in self._features}
        with statistics_once(self._statistics.norms):
            for micro, piece in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                again = self._forward(piece)
                parts = [(again[name].float() * shares[name][micro]).sum() for name in self._features]
                # Every micro-batch carries an equal part of a scalar's: a reduction may wait for all parameters.
                parts += [(again[name] * gradients[name] / len(pieces)).sum() for name in self.scalars]
                self.zero.accumulate(torch.stack(parts).sum(), last=micro == len(pieces) - 1)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """The features that the objectives read, and the scalars, with their masters' values."""
        outputs = self.zero.forward(**batch.inputs())
        kept = {name: outputs[name] for name in self._features}
        for name, master in self.scalars.items():
            scalar = outputs[name]
            kept[name] = scalar.float() + (master - scalar.detach().float())
        return kept

    def _loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Term]]:
        """The weighted sum of the terms, whose mean over ranks is the global loss, and the terms by name."""
        terms = {objective.name: objective.loss(outputs, batch) for objective in self.objectives}
        world = self.dist_env.world_size
        values = [term.weight * (world / term.count) * term.sum for term in terms.values()]
        return (torch.stack(values).sum() if len(values) > 1 else values[0]), terms

    # Update

    def _update(
        self, done: _Forward, step: int, guard: StepGuard | None, loss: float, gradients: GradientStatistics | None
    ) -> StepResult:
        """The optimiser's step, and what belongs to it. In fp16 DeepSpeed leaves it out where gradients overflowed."""
        if self.before_update is not None:
            self.before_update()
        scale, lowest = self.zero.loss_scale, self.zero.loss_scale_is_lowest
        applied, skipped = self.zero.step(), ""
        if applied:
            for objective in self.objectives:
                for name, most in objective.upper_bounds.items():
                    self.zero.clamp(name, most)
            self.refresh_scalars()
            self._statistics.average()
            if guard:
                guard.accepted(step, loss, gradients.sizes if gradients else {})
        else:
            self._statistics.put_back()
            if guard:
                skipped = f"the gradients overflow at a loss scale of {scale:g}"
                guard.overflowed(step, skipped, lowest)
        return done.result(applied, skipped, loss, gradients)

    def _left_out(
        self,
        done: _Forward,
        step: int,
        guard: StepGuard | None,
        reason: str,
        loss: float = math.nan,
        gradients: GradientStatistics | None = None,
        *,
        finite: bool = True,
    ) -> StepResult:
        """The result of a step that was not taken. The gradients, where there were any, are dropped already."""
        self._statistics.put_back()
        if not finite and not self.skip_nonfinite:
            raise Fault(
                f"step {step}: {reason}; nothing was changed. Lower optim.lr, look at the data of this step, or set"
                " guard.nonfinite=skip"
            )
        if guard is not None:
            guard.left_out(step, reason)
        return done.result(False, reason, loss, gradients)

    # Between steps

    @torch.no_grad()
    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Features in evaluation mode, unnormalised. With ZeRO-3 every rank must make the same calls."""
        self.zero.train(False)
        given = {name: x.to(self.dist_env.device) for name, x in ((IMAGE, image), ("tokens", tokens)) if x is not None}
        outputs = self.zero.forward(**given)
        return outputs.get(IMAGE), outputs.get("text")

    def logit_scale(self) -> float:
        """The log scale t of the fp32 master weights, on every rank."""
        return float(self.scalars["logit_scale"])

    def refresh_scalars(self) -> None:
        """Reads the scalars from the master weights: to be called when those were changed from outside. Collective."""
        self.scalars = self.zero.scalars(self.zero.module.scalars)

    def close(self) -> None:
        """Gives the memory back; at stage 3 some of it stays."""
        self.zero.close()


def _not_finite(names: tuple[str, ...]) -> str:
    more = f" and of {len(names) - 4} more parameters" if len(names) > 4 else ""
    return f"the gradient is not finite: that of {', '.join(names[:4])}{more}"


def seed_step(seed: int, step: int, rank: int, micro: int = 0) -> None:
    """Dropout's random numbers are a function of (seed, step, rank, micro-batch): nothing to store, all to replay."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank) * 8_191 + micro
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
