"""The training engine: a dual encoder and its configuration in; steps, features and checkpoints out.

This room alone imports deepspeed. GradientStatistics are averaged over ranks, and the loss is exact under that mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from clipdist.config import Config
from clipdist.distributed.collectives import all_reduce_sum
from clipdist.distributed.rank import DistEnv, resolve_precision
from clipdist.engine.gradients import GradientStatistics, gradient_statistics
from clipdist.engine.optim import make_optimizer
from clipdist.engine.setup import prepare_deepspeed
from clipdist.engine.zero import (
    PART_OF,
    base_optimizer,
    fragments,
    gradient,
    keep_on_at_lowest_scale,
    loss_scale,
    loss_scale_is_lowest,
    part_of,
)
from clipdist.errors import Fault, UserError
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.make import LossFunction
from clipdist.models.norms import running_norms, statistics_once, statistics_still

if TYPE_CHECKING:
    from clipdist.fault_tolerance.guard import Guard

SCALARS = ("logit_scale", "logit_bias")  # the parameters that the loss reads


@dataclass(frozen=True)
class StepResult:
    """What one step tells.

    Attributes:
        value: this rank's loss; its mean over ranks is the global loss. nan where features were not finite.
        statistics: of the loss, fp32 scalars, this rank's.
        features: image and text features [b, D] of this rank, detached: in-batch accuracies come from them.
        grad_norms: by part of the model, before clipping; empty unless asked for or measured for a guard.
        applied: False where the optimiser took no step: weights, moments and running statistics are as before.
        skipped: why not, the same on all ranks; empty where only DeepSpeed knows (fp16 without a guard).
        loss: the global loss; nan without a guard.
        update_sizes: by tower, as clipdist.engine.gradients has them; empty without a guard that looks at them.
    """

    value: torch.Tensor
    statistics: dict[str, torch.Tensor]
    features: tuple[torch.Tensor, torch.Tensor]
    grad_norms: dict[str, float]
    applied: bool
    skipped: str = ""
    loss: float = math.nan
    update_sizes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Forward:
    """What the forward pass gave, and the backward pass that is still to come."""

    value: torch.Tensor
    statistics: dict[str, torch.Tensor]
    features: tuple[torch.Tensor, torch.Tensor]
    backward: Callable[[], None]


class Engine:
    """Trains one dual encoder on all ranks.

    Args:
        model: called as model(image, tokens) -> (image_features, text_features, logit_scale, logit_bias or None).
        loss: as clipdist.losses.infonce.info_nce.

    Attributes:
        before_update: called in every step that changes weights, right before: who copies them in the background must
            be done when it returns. (Running statistics of BatchNorm change earlier, in the forward pass.)
    """

    def __init__(self, model: nn.Module, loss: LossFunction, config: Config, dist_env: DistEnv) -> None:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        prepare_deepspeed()
        self.dist_env = dist_env
        self.loss = loss
        self.seed = config.train.seed
        self.before_update: Callable[[], None] | None = None
        self.skip_nonfinite = config.guard.nonfinite == "skip"
        self.grad_clip = config.optim.grad_clip
        self.logit_scale_max = config.loss.logit_scale_max
        self.micro_batch = config.train.micro_batch or config.train.global_batch // dist_env.world_size
        settings = deepspeed_config(config, dist_env.device.type, dist_env.world_size)
        offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
        optimizer = make_optimizer(model, config.optim, cpu_offload=offload == "cpu")
        has = {name.partition(".")[0] for name, _ in model.named_parameters()}
        self.parts = tuple(part for prefix, part in PART_OF.items() if prefix in has)
        half = settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
        originals = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if half else {}
        try:
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"engine.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        base_optimizer(self.engine).state.clear()  # see make_optimizer: nothing of a step at construction stays
        self._set_masters(originals)
        # Stage 0 in half precision cannot accumulate in fp32: see _accumulate.
        self._accumulates_here = bool(half) and config.engine.zero_stage == 0
        self._norms = running_norms(self.engine.module)
        self._statistics = [
            buffer
            for norm in self._norms
            for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            if buffer is not None
        ]
        self._statistics_before = [torch.empty_like(buffer) for buffer in self._statistics]
        keep_on_at_lowest_scale(self.engine)
        self._scalars: dict[str, torch.Tensor] = {}
        self.refresh_scalars()

    def train_step(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor,
        group_id: torch.Tensor | None,
        *,
        step: int,
        lr: float,
        want_norms: bool = False,
        guard: Guard | None = None,
    ) -> StepResult:
        """One optimiser step on this rank's rows of global batch `step`.

        Args:
            image: uint8 [b, 3, H, W].  tokens: int64 [b, L].  valid: bool [b].
            group_id: int64 [b], or None where equal captions are negatives like all others.
            lr: the learning rate of this step.
            want_norms: also measure the gradients' norms (one pass over them and a small collective).
            guard: judges the global loss before backward and the gradients after it, and is told what came of the
                step; all ranks give one of the same state. Without one only the features are looked at.

        Raises:
            Fault: features, or with a guard the loss or gradients, that are not finite, unless the configuration wants
                such steps skipped.
        """
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self._keep_statistics()
        forward = self._whole if self.micro_batch >= len(image) else self._cached
        try:
            done = forward(image, tokens, step, valid, group_id)
        except NonFiniteFeatures as error:
            empty = image.new_zeros((0, 0), dtype=torch.float32)
            nan = torch.full((), torch.nan, device=self.dist_env.device)
            nothing = _Forward(nan, {}, (empty, empty), lambda: None)
            return self._left_out(nothing, step, guard, str(error), finite=False)
        if guard is None:
            done.backward()
            return self._update(done, step, None, math.nan, None, self.grad_norms() if want_norms else {})
        loss = float(all_reduce_sum(done.value.double())) / self.dist_env.world_size
        if reason := guard.judge_loss(loss):
            return self._left_out(done, step, guard, reason, loss, finite=math.isfinite(loss))
        done.backward()
        gradients = gradient_statistics(self.engine, self.grad_clip, guard.wants_sizes)
        if gradients.not_finite and not self.engine.fp16_enabled():
            self._drop_gradients()
            return self._left_out(done, step, guard, _not_finite(gradients), loss, finite=False)
        if not gradients.not_finite and (reason := guard.judge_updates(gradients.sizes)):
            self._drop_gradients()
            return self._left_out(done, step, guard, reason, loss, gradients)
        return self._update(done, step, guard, loss, gradients, gradients.norms)

    def _update(
        self,
        done: _Forward,
        step: int,
        guard: Guard | None,
        loss: float,
        gradients: GradientStatistics | None,
        norms: dict[str, float],
    ) -> StepResult:
        """The optimiser's step, and what belongs to it. In fp16 DeepSpeed leaves it out where gradients overflowed."""
        if self.before_update is not None:
            self.before_update()
        scale, lowest = loss_scale(self.engine), loss_scale_is_lowest(self.engine)
        self.engine.step()
        applied, skipped = self.engine.was_step_applied(), ""
        sizes = gradients.sizes if gradients else {}
        if applied:
            self._bound_temperature()
            self.refresh_scalars()
            self._average_statistics()
            if guard:
                guard.accepted(step, loss, sizes)
        else:
            self._put_back_statistics()
            if guard:
                skipped = f"the gradients overflow at a loss scale of {scale:g}"
                guard.overflowed(step, skipped, lowest)
        return StepResult(done.value.detach(), done.statistics, done.features, norms, applied, skipped, loss, sizes)

    def _left_out(
        self,
        done: _Forward,
        step: int,
        guard: Guard | None,
        reason: str,
        loss: float = math.nan,
        gradients: GradientStatistics | None = None,
        *,
        finite: bool = True,
    ) -> StepResult:
        """The result of a step that was not taken. The gradients, where there were any, are dropped already."""
        self._put_back_statistics()
        if not finite and not self.skip_nonfinite:
            raise Fault(
                f"step {step}: {reason}; nothing was changed. Lower optim.lr, look at the data of this step, or set"
                " guard.nonfinite=skip"
            )
        if guard is not None:
            guard.left_out(step, reason)
        norms, sizes = (gradients.norms, gradients.sizes) if gradients else ({}, {})
        return StepResult(done.value.detach(), done.statistics, done.features, norms, False, reason, loss, sizes)

    def _drop_gradients(self) -> None:
        """DeepSpeed's own step with an optimiser that does nothing.

        Each stage then clears its gradients, buffers and counters as after any step, and copies masters that have not
        changed. (Where it finds the gradients not finite itself, it leaves the step out in the same way.)
        """
        optimizers = [base_optimizer(self.engine), getattr(self.engine.optimizer, "backup_optimizer", None)]
        held = [optimizer for optimizer in optimizers if optimizer is not None]
        for optimizer in held:
            optimizer.step = lambda *_, **__: None  # type: ignore[method-assign]
        try:
            self.engine.step()
        finally:
            for optimizer in held:
                del optimizer.step

    def _whole(
        self, image: torch.Tensor, tokens: torch.Tensor, step: int, valid: torch.Tensor, group_id: torch.Tensor | None
    ) -> _Forward:
        """Forward over all rows of this rank at once."""
        seed_step(self.seed, step, self.dist_env.rank)
        images, texts, *scalars = self._forward(image, tokens)
        value, statistics = self.loss(images, texts, *scalars, valid=valid, group_id=group_id)
        backward = partial(self.engine.backward, value, scale_wrt_gas=False)
        return _Forward(value, statistics, (images.detach(), texts.detach()), backward)

    def _cached(
        self, image: torch.Tensor, tokens: torch.Tensor, step: int, valid: torch.Tensor, group_id: torch.Tensor | None
    ) -> _Forward:
        """The same in micro-batches, exactly: features of all without gradients, the loss' gradient towards them, then
        each micro-batch once more, its random state replayed, against its share (Gao et al., arXiv:2101.06983, 3).

        Memory grows with the features, b x D, and one micro-batch's activations.
        """
        pieces = list(zip(image.split(self.micro_batch), tokens.split(self.micro_batch)))
        cached = []
        with torch.no_grad(), statistics_still(self._norms):
            for micro, (some_images, some_tokens) in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                cached.append(self._forward(some_images, some_tokens))
        images = torch.cat([features[0] for features in cached]).requires_grad_()
        texts = torch.cat([features[1] for features in cached]).requires_grad_()
        scalars = [None if s is None else s.detach().requires_grad_() for s in cached[0][2:]]
        del cached
        value, statistics = self.loss(images, texts, *scalars, valid=valid, group_id=group_id)
        wanted = [images, texts, *(s for s in scalars if s is not None)]
        backward = partial(self._backward_again, pieces, step, value, wanted)
        return _Forward(value, statistics, (images.detach(), texts.detach()), backward)

    def _backward_again(
        self,
        pieces: list[tuple[torch.Tensor, torch.Tensor]],
        step: int,
        value: torch.Tensor,
        wanted: list[torch.Tensor],
    ) -> None:
        """The second half of _cached. wanted: image features, text features, t and the bias if there is one."""
        scale = loss_scale(self.engine)  # fp16 features have fp16 gradients, which vanish without it
        feature_gradients = [gradient.float() / scale for gradient in torch.autograd.grad(value * scale, wanted)]
        image_gradients, text_gradients = (gradient.split(self.micro_batch) for gradient in feature_gradients[:2])
        with statistics_once(self._norms):
            for micro, (some_images, some_tokens) in enumerate(pieces):
                seed_step(self.seed, step, self.dist_env.rank, micro)
                some_image_features, some_text_features, *again = self._forward(some_images, some_tokens)
                surrogate = (some_image_features.float() * image_gradients[micro]).sum()
                surrogate = surrogate + (some_text_features.float() * text_gradients[micro]).sum()
                # Every micro-batch carries an equal part, because a reduction may wait for all parameters.
                for scalar, gradient in zip((s for s in again if s is not None), feature_gradients[2:]):
                    surrogate = surrogate + (scalar * gradient / len(pieces)).sum()
                self._accumulate(surrogate, last=micro == len(pieces) - 1)

    def _accumulate(self, surrogate: torch.Tensor, last: bool) -> None:
        """Adds one micro-batch's gradients, in fp32; after the last one they are reduced over ranks.

        DeepSpeed's own accumulation does it, but for stage 0 in half precision, where it would add in half precision:
        there the sum is kept here and handed over before the reduction.
        """
        engine = self.engine
        if not self._accumulates_here:
            engine.backward(surrogate, scale_wrt_gas=False)
            if not last:
                engine.step()  # counts the micro-batch; the optimiser steps at the boundary alone
            return
        engine.set_gradient_accumulation_boundary(False)
        engine.backward(surrogate, scale_wrt_gas=False)
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                total = getattr(parameter, "_fp32_sum", None)
                parameter._fp32_sum = parameter.grad.float() if total is None else total.add_(parameter.grad)
                parameter.grad = None
        if last:
            for parameter in engine.module.parameters():
                total = parameter.__dict__.pop("_fp32_sum", None)
                if total is not None:
                    parameter.grad = total.to(parameter.dtype)
            engine.set_gradient_accumulation_boundary(True)
            engine.allreduce_gradients()

    def _forward(
        self, image: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Features, t and bias; the scalars have the values of the fp32 masters, and the module's gradients."""
        images, texts, scale, bias = self.engine(image, tokens)
        exact = [
            None if s is None else s.float() + (self._scalars[name] - s.detach().float())
            for name, s in zip(SCALARS, (scale, bias))
        ]
        assert exact[0] is not None
        return images, texts, exact[0], exact[1]

    def close(self) -> None:
        """Gives the memory back: DeepSpeed's hooks on the weights hold it otherwise. At stage 3 some of it stays."""
        self.engine.destroy()

    @torch.no_grad()
    def encode(
        self, image: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Features in evaluation mode, unnormalised. With ZeRO-3 every rank must make the same calls."""
        self.engine.eval()
        image = None if image is None else image.to(self.dist_env.device)
        tokens = None if tokens is None else tokens.to(self.dist_env.device)
        image_features, text_features, *_ = self.engine(image, tokens)
        return image_features, text_features

    def grad_norms(self) -> dict[str, float]:
        """L2 norms of the reduced gradients by part of the model; between backward and step only."""
        squares = torch.zeros(len(self.parts), dtype=torch.float64, device=self.dist_env.device)
        for fragment in fragments(self.engine):
            if fragment.trained:
                part = self.parts.index(part_of(fragment.name))
                norm = torch.linalg.vector_norm(gradient(self.engine, fragment), dtype=torch.float32)
                squares[part] += norm.to(squares.device).double().square()
        if self.engine.zero_optimization_stage() > 0:
            squares = all_reduce_sum(squares)
        norms = squares.sqrt() / loss_scale(self.engine)
        return dict(zip(self.parts, norms.tolist()))

    def logit_scale(self) -> float:
        """The log scale t of the fp32 master weights, on every rank."""
        return float(self._scalars["logit_scale"])

    def logit_bias(self) -> float | None:
        """The sigmoid loss' bias of the fp32 master weights, on every rank; None where there is none."""
        return float(self._scalars["logit_bias"]) if "logit_bias" in self._scalars else None

    @torch.no_grad()
    def refresh_scalars(self) -> None:
        """Reads t and the bias from the master weights: to be called when those were changed from outside."""
        found = {name: torch.zeros(1, device=self.dist_env.device) for name in SCALARS}
        for fragment in fragments(self.engine):
            if fragment.name in found and fragment.own[0] < fragment.own[1]:
                found[fragment.name] += fragment.of(fragment.flat).to(self.dist_env.device)
        values = all_reduce_sum(torch.stack(list(found.values())))
        kept = SCALARS if "bias" in self.parts else SCALARS[:1]
        self._scalars = {name: value for name, value in zip(SCALARS, values) if name in kept}

    @torch.no_grad()
    def _set_masters(self, originals: dict[str, torch.Tensor]) -> None:
        """The fp32 masters begin with the weights as given: DeepSpeed takes them after rounding to half precision."""
        for fragment in fragments(self.engine):
            if fragment.trained and fragment.name in originals:
                whole = originals[fragment.name].view(-1)
                fragment.of(fragment.flat).copy_(whole.narrow(0, fragment.start, fragment.numel))

    @torch.no_grad()
    def _bound_temperature(self) -> None:
        """Clamps t on the fp32 master and on the weights that the module reads: clamping only one is undone."""
        for fragment in fragments(self.engine):
            if fragment.name == "logit_scale":
                fragment.of(fragment.flat).clamp_(max=self.logit_scale_max)
        parameter = self.engine.module.logit_scale
        # Stage 3 keeps a small parameter gathered beside its partition: both are read.
        for tensor in (parameter, getattr(parameter, "ds_tensor", parameter)):
            tensor.data.clamp_(max=self.logit_scale_max)

    @torch.no_grad()
    def _keep_statistics(self) -> None:
        """A step that is left out has gone through the forward pass, and may have taken inf or nan along."""
        if self._statistics:
            torch._foreach_copy_(self._statistics_before, self._statistics)

    @torch.no_grad()
    def _put_back_statistics(self) -> None:
        if self._statistics:
            torch._foreach_copy_(self._statistics, self._statistics_before)

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """BatchNorm normalises over a micro-batch; its running statistics become the mean over ranks."""
        if not self._norms or self.dist_env.world_size == 1:
            return
        buffers = [b for norm in self._norms for b in (norm.running_mean, norm.running_var) if b is not None]
        flat = torch.cat([buffer.float().view(-1) for buffer in buffers])
        dist.all_reduce(flat)
        flat /= self.dist_env.world_size
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(mean.view_as(buffer))


def _not_finite(gradients: GradientStatistics) -> str:
    names = gradients.not_finite
    more = f" and of {len(names) - 4} more parameters" if len(names) > 4 else ""
    return f"the gradient is not finite: that of {', '.join(names[:4])}{more}"


def seed_step(seed: int, step: int, rank: int, micro: int = 0) -> None:
    """Dropout's random numbers are a function of (seed, step, rank, micro-batch): nothing to store, all to replay."""
    mixed = ((seed * 1_000_003 + step) * 65_537 + rank) * 8_191 + micro
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


def deepspeed_config(config: Config, device: str, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what the trainer owns, on top of engine.deepspeed."""
    batch = config.train.global_batch
    micro = config.train.micro_batch or batch // world
    precision = resolve_precision(config.train.precision, device)
    owned: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // world // micro,
        "gradient_clipping": config.optim.grad_clip,  # always explicit: DeepSpeed's default is 1.0
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    if batch // world > micro and precision != "fp32" and config.engine.zero_stage > 0:
        owned["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config.engine.deepspeed, owned)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
