"""Train a model step by step: forward pass, whole or in micro-batches, loss of the objectives, backward pass, update.

Gradients are averaged over ranks, and every term of the loss is exact under that mean. A step either updates weights,
moments and running statistics together or changes none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from clipdist.checkpoint.format import STATE, Piece
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch
from clipdist.distributed.rank import DTYPES, DistEnv, resolve_precision
from clipdist.engine.ema import Ema, warmed_up
from clipdist.engine.gradients import GradientStatistics, gradient_statistics
from clipdist.engine.moving_teacher import MovingTeacher, copy_for_teacher
from clipdist.engine.zero import Zero
from clipdist.errors import Fault
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.models.compiled import uncompiled
from clipdist.models.dual_encoder import HIDDEN
from clipdist.models.norms import RunningStatistics, statistics_frozen, statistics_of_views
from clipdist.models.towers import group_batchnorm
from clipdist.objectives.objective import Given, Moment, Objective, Term
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


@dataclass
class _Forward:
    """Result of a forward pass, and the function that runs its backward pass.

    With micro-batches the terms of additive objectives are known after the backward pass, which adds them to `value`
    and `terms`.
    """

    value: Tensor
    terms: dict[str, Term]
    outputs: dict[str, Tensor]
    backward: Callable[[], None]
    batch: Batch
    taught: Mapping[str, Tensor]

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
        model: takes the inputs of a batch by name, returns outputs by name, and has `scalars`, `part_of` and
            `draw_kept`: see clipdist.models.dual_encoder.DualEncoder.
        objectives: whose weighted sum is the loss.
        teacher: a frozen one, which gives each step further outputs for the objectives.
        steps: of the run, for the momentum of a teacher that follows the weights.

    Attributes:
        zero: the weights and optimiser states under ZeRO.
        before_update: called right before weights change; a background copy of them must have ended when it returns.
            (BatchNorm's running statistics change earlier, in the forward pass.)
        scalars: fp32 master weights of the model's scalars, [1], on every rank.
        ema: the moving average of the weights (train.ema, or a teacher's), or None.
        moving_teacher: the teacher that has this average, or None.
        state: the tensors of the objectives between steps, the same on all ranks, by objective and by name.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Sequence[Objective],
        config: Config,
        dist_env: DistEnv,
        teacher: Teacher | None = None,
        steps: int = 0,
    ) -> None:
        self.dist_env, self.objectives, self.teacher, self.steps = dist_env, objectives, teacher, steps
        self.seed = config.train.seed
        self.before_update: Callable[[], None] | None = None
        self.skip_nonfinite = config.guard.nonfinite == "skip"
        self.optim = config.optim
        self.micro_batch = config.train.micro_batch or config.train.global_batch // dist_env.world_size
        group = config.model.batchnorm_group
        if group:
            group_batchnorm(model, group)
        spec = next((objective.teacher for objective in objectives if objective.teacher), None)
        copied = None
        if spec and config.engine.zero_stage < 3:
            precision = resolve_precision(config.train.precision, dist_env.device.type)
            copied = copy_for_teacher(model, DTYPES[precision])
        held = {name: until for objective in objectives for name, until in objective.held.items()}
        self.zero = Zero(model, config, dist_env, held)
        self.scalars: dict[str, Tensor] = {}
        self.refresh_scalars()
        self._coupled = [objective for objective in objectives if not objective.additive]
        self._additive = [objective for objective in objectives if objective.additive]
        self._taught_alone = tuple(name for objective in objectives for name in objective.taught_alone)
        self._features = tuple(dict.fromkeys(name for objective in self._coupled for name in objective.features))
        self.state = {each.name: dict(each.state()) for each in objectives}
        for own in self.state.values():
            own.update({name: tensor.to(dist_env.device) for name, tensor in own.items()})
        self._statistics = RunningStatistics(self.zero.module)
        self._compiled = config.engine.compile
        self._momentum = config.train.ema
        self.ema = Ema(self.zero, not (spec and spec.training)) if self._momentum or spec else None
        self.moving_teacher: MovingTeacher | None = None
        if spec and self.ema:
            self.moving_teacher = MovingTeacher(spec, self.zero, self.ema, copied, self.micro_batch, group)

    def train_step(
        self,
        batch: Batch,
        *,
        step: int,
        lr: float,
        weight_decay: float | None = None,
        want_norms: bool = False,
        guard: StepGuard | None = None,
    ) -> StepResult:
        """Train on this rank's rows of global batch `step`. Collective.

        Args:
            batch: on this rank's device, but for the tokens; see Batch.to.
            lr: the learning rate of this step.
            weight_decay: of this step; None: that of the step before, at first optim.weight_decay.
            want_norms: whether to measure gradient norms (one pass over the gradients and a small collective).
            guard: judges the global loss and the gradients after the backward pass, and records the result of the
                step; it has the same state on all ranks. Without one only the features are checked.

        Raises:
            Fault: features, or with a guard the loss or gradients, are not finite, unless guard.nonfinite=skip.
        """
        self.zero.train()
        self.zero.set_rates(lr, weight_decay)
        self._statistics.save()
        run_forward = self._forward_whole if self.micro_batch >= len(batch) else self._forward_cached
        try:
            forward = run_forward(batch, step, *self._given(batch, step))
        except NonFiniteFeatures as error:
            nan = torch.full((), torch.nan, device=self.dist_env.device)
            nothing = _Forward(nan, {}, {}, lambda: None, batch, {})
            return self._skip_step(nothing, step, guard, str(error), finite=False)
        forward.backward()
        if guard is None and not want_norms:
            return self._update(forward, step, None, None)
        want_sizes = guard is not None and guard.wants_sizes
        gradients = gradient_statistics(self.zero, forward.value, self.optim, want_sizes)
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

    @torch.no_grad()
    def _given(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], Given]:
        """Return what the teachers give for these rows, and what the objectives make constant of it in this step."""
        taught = self.teacher(batch) if self.teacher else {}
        if self.moving_teacher:
            taught |= self.moving_teacher(batch, self._noise(batch, step))
        given = Given()
        for objective in self.objectives:
            own = objective.given(taught, batch, self.state[objective.name], Moment(step, self.steps))
            given = Given({**given.rows, **own.rows}, {**given.shared, **own.shared}, {**given.ragged, **own.ragged})
        return taught, given

    def _forward_whole(self, batch: Batch, step: int, taught: dict[str, Tensor], given: Given) -> _Forward:
        """Run the forward pass over all rows of this rank at once.

        Args:
            taught: what the teachers give for these rows.
            given: see _given.
        """
        seed_step(self.seed, step, self.dist_env.rank)
        with self._statistics_of_views() if len(batch.images) > 1 else nullcontext():
            outputs = self._forward(batch, step)
        terms = self._terms(self.objectives, outputs | given.split(len(batch), len(batch))[0], batch)
        value = self._weighted(terms) + self._nothing(outputs)
        return _Forward(value, terms, outputs, partial(self.zero.backward, value), batch, taught)

    def _forward_cached(self, batch: Batch, step: int, taught: dict[str, Tensor], given: Given) -> _Forward:
        """Run the forward pass in micro-batches by gradient caching (Gao et al., arXiv:2101.06983, section 3).

        First the features of all micro-batches without gradients, then the gradients of the loss with respect to them;
        the backward pass repeats each micro-batch with its random state, and adds the terms of additive objectives.
        Memory: the features [b, D] and the activations of one micro-batch.
        """
        pieces = batch.split(self.micro_batch)
        cached = []
        with torch.no_grad(), statistics_frozen(self._statistics.norms):
            for micro, piece in enumerate(pieces if self._coupled else ()):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                cached.append(_select(self._forward(piece, step), self._features))
        outputs = {name: torch.cat([one[name] for one in cached]).requires_grad_() for name in self._features}
        outputs |= {name: master.clone().requires_grad_() for name, master in self.scalars.items()}
        del cached
        terms = self._terms(self._coupled, outputs | given.split(len(batch), len(batch))[0], batch)
        forward = _Forward(self._weighted(terms) + self._nothing(outputs), terms, outputs, lambda: None, batch, taught)
        forward.backward = partial(self._backward_cached, pieces, step, forward, given)
        return forward

    def _backward_cached(self, pieces: list[Batch], step: int, forward: _Forward, given: Given) -> None:
        """Repeat each micro-batch of _forward_cached and propagate the gradients of its features."""
        scale = self.zero.loss_scale  # fp16 features have fp16 gradients, which underflow without it
        outputs = forward.outputs
        found = torch.autograd.grad(forward.value * scale, list(outputs.values())) if outputs else ()
        gradients = {name: gradient.float() / scale for name, gradient in zip(outputs, found)}
        shares = {name: gradients[name].split(self.micro_batch) for name in self._features}
        constants = given.split(self.micro_batch, len(forward.batch))
        with self._statistics_of_views():
            for micro, piece in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                again = self._forward(piece, step)
                parts = [(again[name].float() * shares[name][micro]).sum() for name in self._features]
                # Divide a scalar's gradient among all micro-batches: a reduction may wait for all parameters.
                parts += [(again[name] * gradients[name] / len(pieces)).sum() for name in self.scalars]
                terms = self._terms(self._additive, again | constants[micro], piece)
                added = self._weighted(terms)
                self.zero.accumulate(torch.stack([*parts, added]).sum(), last=micro == len(pieces) - 1)
                forward.value = forward.value.detach() + added.detach()
                forward.terms |= {name: _sum(forward.terms.get(name), term) for name, term in terms.items()}

    def _statistics_of_views(self) -> AbstractContextManager[None]:
        return statistics_of_views(self.zero.module, self._statistics.norms)

    def _forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Return the model's outputs, the scalars with the values of their fp32 masters."""
        views = [view for view in batch.images if view not in self._taught_alone]
        more = {"noise": self._noise(batch, step), "kept": self.zero.module.draw_kept(self.seed, step, batch, views)}
        more = {name: drawn for name, drawn in more.items() if drawn}
        outputs = self.zero.forward(**batch.inputs(without=self._taught_alone), **more)
        for name, master in self.scalars.items():
            scalar = outputs[name]
            outputs[name] = scalar.float() + (master - scalar.detach().float())
        return outputs

    def _noise(self, batch: Batch, step: int) -> dict[str, Tensor]:
        at = Moment(step, self.steps)
        return {name: own for each in self.objectives for name, own in each.noise(batch, at).items()}

    def _terms(self, objectives: Sequence[Objective], outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Term]:
        return {objective.name: objective.loss(outputs, batch) for objective in objectives}

    def _weighted(self, terms: Mapping[str, Term]) -> Tensor:
        """Return the weighted sum of terms, whose mean over ranks is that of the global batch."""
        world = self.dist_env.world_size
        values = [term.weight * (world / term.count) * term.sum for term in terms.values()]
        return torch.stack(values).sum() if values else torch.zeros((), device=self.dist_env.device)

    def _nothing(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return 0, with gradients for scalars that no objective reads: a reduction may wait for all parameters."""
        return sum((0 * outputs[name].sum() for name in self.scalars), torch.zeros((), device=self.dist_env.device))

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
            for objective in self.objectives:
                own = self.state[objective.name]
                own.update(objective.after_update(forward.taught, forward.batch, own))
            if self.moving_teacher:
                self.moving_teacher.update(Moment(step, self.steps))
            elif self.ema:
                self.ema.update(warmed_up(self._momentum, self.ema.steps + 1))
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
        images = {} if image is None else {IMAGE: image.to(self.dist_env.device)}
        outputs = self._evaluate(**images, **({} if tokens is None else {"tokens": tokens}))
        return outputs.get(IMAGE), outputs.get("text")

    @torch.no_grad()
    def encode_hidden(self, image: Tensor) -> Tensor:
        """Return the features [b, w] of images before the projection; see DualEncoder.encode_hidden and `encode`."""
        return self._evaluate(**{HIDDEN: image.to(self.dist_env.device)})[HIDDEN]

    def _evaluate(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.zero.train(False)
        with uncompiled() if self._compiled else nullcontext():  # as in the offline tools, for batches of any size
            return self.zero.forward(**inputs)

    def logit_scale(self) -> float:
        """Return the log scale t of the fp32 master weights. Of a model with a text tower."""
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
        for name, tensor in self._states() if self.dist_env.rank == 0 else ():
            yield Piece(name, tuple(tensor.shape), 0, tensor.view(-1))

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name in checkpoints, tensor) of the objectives' state."""
        for objective, own in self.state.items():
            for name, tensor in own.items():
                yield f"{STATE}{objective}/{name}", tensor

    def save_numel(self, trained_only: bool = False) -> tuple[int, bool]:
        """Return the number of elements of live_pieces() once moments exist, and whether they are on a GPU."""
        numel, on_gpu = self.zero.save_numel(trained_only)
        numel += sum(piece.data.numel() for piece in self.ema.live_pieces()) if self.ema else 0
        return numel + sum(tensor.numel() for _, tensor in self._states()), on_gpu

    def restore(self, reader: CheckpointReader) -> None:
        """Load weights, moments, counters and average of a checkpoint; see Zero.restore."""
        self.zero.restore(reader)
        self.refresh_scalars()
        if self.ema:
            self.ema.restore(reader)
        for name, tensor in self._states():
            if name in reader.manifest.tensors:  # else it starts anew: see clipdist.run_plan
                reader.read_into(tensor.view(-1), name)
        reader.close()
        if self.moving_teacher:
            self.moving_teacher.refresh()

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, tensor) of all tensors that are replicated on every rank, between steps."""
        yield from self.zero.replicated()
        if self.ema:
            yield from self.ema.replicated()
        yield from self._states()

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


def _select(outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return these outputs alone, so that others, such as logits over prototypes, are freed."""
    return {name: outputs[name] for name in names}


def _sum(before: Term | None, term: Term) -> Term:
    """Return the sum of the terms of micro-batches, detached."""
    if before is None:
        return replace(term, sum=term.sum.detach())
    statistics = {name: value + before.statistics[name] for name, value in term.statistics.items()}
    return replace(term, sum=before.sum + term.sum.detach(), statistics=statistics)


def seed_step(seed: int, step: int, rank: int, micro: int = 0) -> None:
    """Seed torch for a forward pass: dropout is a function of (seed, step, rank, micro-batch) and can be repeated."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank) * 8_191 + micro
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)
