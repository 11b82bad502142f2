"""Train a model step by step: forward pass, whole or in micro-batches, loss of the objectives, backward pass, update.

Gradients are averaged over ranks, and every term of the loss is exact under that mean. A step either updates weights,
moments and running statistics together or changes none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from clipdist.checkpoint.format import Piece
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch
from clipdist.distributed.rank import DistEnv
from clipdist.engine.ema import Ema, warmed_up
from clipdist.engine.gradients import GradientStatistics, gradient_statistics
from clipdist.engine.zero import Zero
from clipdist.errors import Fault
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.models.compiled import uncompiled
from clipdist.models.norms import RunningStatistics, statistics_frozen, statistics_updated_once
from clipdist.objectives.objective import Objective, Term
from clipdist.objectives.teacher import Teacher


class StepGuard(Protocol):
    """Decides which steps to skip, equally on all ranks. See clipdist.fault_tolerance.guard.Guard."""

    @property
    def wants_sizes(self) -> bool: ...

    def judge_loss(self, loss: float) -> str: ...

    def judge_updates(self, sizes: dict[str, float]) -> str: ...

    def accepted(self, step: int, loss: float, sizes: dict[str, float]) -> None: ...

    def skipped(self, step: int, reason: str) -> None: ...

    def overflowed(self, step: int, reason: str, scale_is_lowest: bool) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """Result of one step.

    Attributes:
        value: this rank's loss, a scalar whose mean over ranks is the global loss; nan if features were not finite.
        terms: the terms of the loss by objective, detached.
        outputs: the features [b, D] that the objectives use, and the model's scalars [1], detached.
        grad_norms: L2 norms by part of the model, before clipping; empty unless requested or measured for a guard.
        applied: whether the optimiser took a step; otherwise weights, moments and running statistics are unchanged.
        skipped: the reason why it did not, the same on all ranks; empty if only DeepSpeed knows (fp16 without a guard).
        loss: the global loss; nan unless norms were requested or a guard was given.
        update_sizes: by tower, see clipdist.engine.gradients; empty unless a guard uses them.
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
    """Result of a forward pass, and the function that runs its backward pass."""

    value: Tensor
    terms: dict[str, Term]
    outputs: dict[str, Tensor]
    backward: Callable[[], None]

    def result(self, applied: bool, skipped: str, gradients: GradientStatistics | None) -> StepResult:
        """Return the result of the step, with detached tensors."""
        terms = {name: Term(t.sum.detach(), t.count, t.weight, t.statistics) for name, t in self.terms.items()}
        outputs = {name: output.detach() for name, output in self.outputs.items()}
        measured = gradients or GradientStatistics({}, {}, (), math.nan)
        norms, sizes, loss = measured.norms, measured.sizes, measured.loss
        return StepResult(self.value.detach(), terms, outputs, norms, applied, skipped, loss, sizes)


class Engine:
    """Trains one model by its objectives on all ranks.

    Args:
        model: takes the inputs of a batch by name, returns outputs by name, and has `scalars` and `part_of`: see
            clipdist.models.dual_encoder.DualEncoder.
        objectives: whose weighted sum is the loss.
        teacher: gives each step further outputs for the objectives, before the model's forward pass.

    Attributes:
        zero: the weights and optimiser states under ZeRO.
        before_update: called right before weights change; a background copy of them must have ended when it returns.
            (BatchNorm's running statistics change earlier, in the forward pass.)
        scalars: fp32 master weights of the model's scalars, [1], on every rank.
        ema: the moving average of the weights (train.ema), or None.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Objective],
        config: Config,
        dist_env: DistEnv,
        teacher: Teacher | None = None,
    ) -> None:
        self.dist_env, self.objectives, self.teacher = dist_env, objectives, teacher
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
        self._compiled = config.engine.compile
        momentum = config.train.ema
        self.ema = Ema(self.zero, partial(warmed_up, momentum)) if momentum else None

    def train_step(
        self, batch: Batch, *, step: int, lr: float, want_norms: bool = False, guard: StepGuard | None = None
    ) -> StepResult:
        """Train on this rank's rows of global batch `step`. Collective.

        Args:
            batch: on this rank's device, but for the tokens; see Batch.to.
            lr: the learning rate of this step.
            want_norms: whether to measure gradient norms (one pass over the gradients and a small collective).
            guard: judges the global loss and the gradients after the backward pass, and records the result of the
                step; it has the same state on all ranks. Without one only the features are checked.

        Raises:
            Fault: features, or with a guard the loss or gradients, are not finite, unless guard.nonfinite=skip.
        """
        self.zero.train()
        self.zero.set_lr(lr)
        self._statistics.save()
        run_forward = self._forward_whole if self.micro_batch >= len(batch) else self._forward_cached
        taught = self.teacher(batch) if self.teacher else {}
        try:
            forward = run_forward(batch, step, taught)
        except NonFiniteFeatures as error:
            nothing = _Forward(torch.full((), torch.nan, device=self.dist_env.device), {}, {}, lambda: None)
            return self._skip_step(nothing, step, guard, str(error), finite=False)
        forward.backward()
        if guard is None and not want_norms:
            return self._update(forward, step, None, None)
        want_sizes = guard is not None and guard.wants_sizes
        gradients = gradient_statistics(self.zero, forward.value, self.grad_clip, want_sizes)
        reason, finite = self._judge(gradients, guard) if guard else ("", True)
        if reason:
            self.zero.discard_gradients()
            return self._skip_step(forward, step, guard, reason, gradients, finite=finite)
        return self._update(forward, step, guard, gradients)

    def _judge(self, gradients: GradientStatistics, guard: StepGuard) -> tuple[str, bool]:
        """Return the reason to skip the step, or "", and whether its loss and gradients are finite.

        The loss is judged after the backward pass, so that the host waits for both at one time.
        """
        if reason := guard.judge_loss(gradients.loss):
            return reason, math.isfinite(gradients.loss)
        if gradients.not_finite:  # of fp16, DeepSpeed's loss scaler decides
            return ("" if self.zero.fp16 else _not_finite(gradients.not_finite)), False
        return guard.judge_updates(gradients.sizes), True

    # Forward and backward

    def _forward_whole(self, batch: Batch, step: int, taught: Mapping[str, Tensor]) -> _Forward:
        """Run the forward pass over all rows of this rank at once.

        Args:
            taught: what the teacher gives for these rows.
        """
        seed_step(self.seed, step, self.dist_env.rank)
        outputs = self._forward(batch)
        value, terms = self._loss(outputs, taught, batch)
        return _Forward(value, terms, outputs, partial(self.zero.backward, value))

    def _forward_cached(self, batch: Batch, step: int, taught: Mapping[str, Tensor]) -> _Forward:
        """Run the forward pass in micro-batches by gradient caching (Gao et al., arXiv:2101.06983, section 3).

        First the features of all micro-batches without gradients, then the gradients of the loss with respect to them;
        the backward pass repeats each micro-batch with its random state. Memory: the features [b, D] and the
        activations of one micro-batch.
        """
        pieces = batch.split(self.micro_batch)
        cached = []
        with torch.no_grad(), statistics_frozen(self._statistics.norms):
            for micro, piece in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                cached.append(self._forward(piece))
        outputs = {name: torch.cat([one[name] for one in cached]).requires_grad_() for name in self._features}
        outputs |= {name: cached[0][name].detach().requires_grad_() for name in self.scalars}
        del cached
        value, terms = self._loss(outputs, taught, batch)
        return _Forward(value, terms, outputs, partial(self._backward_cached, pieces, step, value, outputs))

    def _backward_cached(self, pieces: list[Batch], step: int, value: Tensor, outputs: dict[str, Tensor]) -> None:
        """Repeat each micro-batch of _forward_cached and propagate the gradients of its features."""
        scale = self.zero.loss_scale  # fp16 features have fp16 gradients, which underflow without it
        found = torch.autograd.grad(value * scale, list(outputs.values()))
        gradients = {name: gradient.float() / scale for name, gradient in zip(outputs, found)}
        shares = {name: gradients[name].split(self.micro_batch) for name in self._features}
        with statistics_updated_once(self._statistics.norms) as updated:
            for micro, piece in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                again = self._forward(piece)
                updated()
                parts = [(again[name].float() * shares[name][micro]).sum() for name in self._features]
                # Divide a scalar's gradient among all micro-batches: a reduction may wait for all parameters.
                parts += [(again[name] * gradients[name] / len(pieces)).sum() for name in self.scalars]
                self.zero.accumulate(torch.stack(parts).sum(), last=micro == len(pieces) - 1)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the features that the objectives use, and the scalars with the values of their fp32 masters."""
        outputs = self.zero.forward(**batch.inputs())
        kept = {name: outputs[name] for name in self._features}
        for name, master in self.scalars.items():
            scalar = outputs[name]
            kept[name] = scalar.float() + (master - scalar.detach().float())
        return kept

    def _loss(
        self, outputs: Mapping[str, Tensor], taught: Mapping[str, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Term]]:
        """Return the weighted sum of the terms, whose mean over ranks is the global loss, and the terms by name."""
        terms = {objective.name: objective.loss({**outputs, **taught}, batch) for objective in self.objectives}
        world = self.dist_env.world_size
        values = [term.weight * (world / term.count) * term.sum for term in terms.values()]
        # Of a scalar that no objective reads the gradient is 0: a reduction may wait for all parameters.
        values += [0 * outputs[name].sum() for name in self.scalars]
        return torch.stack(values).sum(), terms

    # Update

    def _update(
        self, forward: _Forward, step: int, guard: StepGuard | None, gradients: GradientStatistics | None
    ) -> StepResult:
        """Take the optimiser step, bound scalars, average statistics and weights. In fp16 DeepSpeed skips overflows."""
        if self.before_update is not None:
            self.before_update()
        scale, lowest = self.zero.loss_scale, self.zero.loss_scale_is_lowest
        applied, skipped = self.zero.step(), ""
        if applied:
            for objective in self.objectives:
                for name, maximum in objective.upper_bounds.items():
                    self.zero.clamp(name, maximum)
            self.refresh_scalars()
            self._statistics.average()
            if self.ema:
                self.ema.update()
            if guard and gradients:
                guard.accepted(step, gradients.loss, gradients.sizes)
        else:
            self._statistics.restore()
            if guard:
                skipped = f"the gradients overflow at a loss scale of {scale:g}"
                guard.overflowed(step, skipped, lowest)
        return forward.result(applied, skipped, gradients)

    def _skip_step(
        self,
        forward: _Forward,
        step: int,
        guard: StepGuard | None,
        reason: str,
        gradients: GradientStatistics | None = None,
        *,
        finite: bool = True,
    ) -> StepResult:
        """Restore the running statistics, inform the guard, and return the result of a skipped step.

        Raises:
            Fault: `finite` is False, and the configuration does not skip such steps.
        """
        self._statistics.restore()
        if not finite and not self.skip_nonfinite:
            raise Fault(
                f"step {step}: {reason}; nothing was changed. Lower optim.lr, look at the data of this step, or set"
                " guard.nonfinite=skip"
            )
        if guard is not None:
            guard.skipped(step, reason)  # the caller has discarded the gradients
        return forward.result(False, reason, gradients)

    # Between steps

    @torch.no_grad()
    def encode(self, image: Tensor | None, tokens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return features in evaluation mode, not normalised, computed by no compiled code. With ZeRO-3 collective.

        Args:
            image: uint8 [b, 3, H, W] or None.  tokens: int64 [b, L] on the CPU, or None.

        Returns:
            image and text features [b, D]; None where the input is None.
        """
        self.zero.train(False)
        images = {} if image is None else {IMAGE: image.to(self.dist_env.device)}
        with uncompiled() if self._compiled else nullcontext():  # as in the offline tools, for batches of any size
            outputs = self.zero.forward(**images, **({} if tokens is None else {"tokens": tokens}))
        return outputs.get(IMAGE), outputs.get("text")

    def logit_scale(self) -> float:
        """Return the log scale t of the fp32 master weights."""
        return float(self.scalars["logit_scale"])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let `encode` and `logit_scale` use the moving average of the weights inside the context. Collective."""
        assert self.ema is not None
        if self.before_update is not None:
            self.before_update()  # the weights that a background copy reads change, too
        own, self.scalars = self.scalars, self.zero.gather(self.ema.read, self.zero.module.scalars)
        try:
            with self.ema.in_use():
                yield
        finally:
            self.scalars = own

    # Checkpoints, and the comparison of ranks: see Zero, whose tensors come first

    def live_pieces(self, trained_only: bool = False) -> Iterator[Piece]:
        """Iterate over this rank's checkpoint pieces, fp32 weights, moments, average: views, valid until a step."""
        yield from self.zero.live_pieces(trained_only)
        if self.ema:
            yield from self.ema.live_pieces()

    def save_numel(self, trained_only: bool = False) -> tuple[int, bool]:
        """Return the number of elements of live_pieces() once moments exist, and whether they are on a GPU."""
        numel, on_gpu = self.zero.save_numel(trained_only)
        return numel + sum(piece.data.numel() for piece in self.ema.live_pieces()) if self.ema else numel, on_gpu

    def restore(self, reader: CheckpointReader) -> None:
        """Load weights, moments, counters and average of a checkpoint; see Zero.restore."""
        self.zero.restore(reader)
        self.refresh_scalars()
        if self.ema:
            self.ema.restore(reader)

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, tensor) of all tensors that are replicated on every rank, between steps."""
        yield from self.zero.replicated()
        if self.ema:
            yield from self.ema.replicated()

    def refresh_scalars(self) -> None:
        """Read the scalars from the master weights; call it after those were changed from outside. Collective."""
        self.scalars = self.zero.scalars(self.zero.module.scalars)

    def close(self) -> None:
        """Release the memory; at stage 3 some of it stays allocated."""
        self.zero.close()


def _not_finite(names: tuple[str, ...]) -> str:
    """Return the reason for skipping a step whose gradients of these parameters are not finite."""
    more = f" and of {len(names) - 4} more parameters" if len(names) > 4 else ""
    return f"the gradient is not finite: that of {', '.join(names[:4])}{more}"


def seed_step(seed: int, step: int, rank: int, micro: int = 0) -> None:
    """Seed torch for a forward pass: dropout is a function of (seed, step, rank, micro-batch) and can be repeated."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank) * 8_191 + micro
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
