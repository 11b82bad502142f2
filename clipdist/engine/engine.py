"""The training engine: a dual encoder and its configuration in; steps, features and checkpoints out.

This room alone imports deepspeed. Gradients are averaged over ranks, and the loss is exact under that mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from clipdist.config import Config
from clipdist.engine.distributed import Place, resolve_precision
from clipdist.engine.fragments import base_optimizer, fragments, gradient, loss_scale, part_of
from clipdist.engine.optim import make_optimizer
from clipdist.errors import UserError
from clipdist.loss.collectives import all_reduce_sum

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
PARTS = ("image", "text", "temperature")


@dataclass(frozen=True)
class StepResult:
    value: torch.Tensor  # this rank's loss; its mean over ranks is the global loss
    statistics: dict[str, torch.Tensor]
    grad_norms: dict[str, float]  # by part of the model, before clipping; empty unless asked for
    applied: bool  # False where fp16 overflowed and the step was skipped


class Engine:
    """Trains one dual encoder on all ranks.

    Args:
        model: called as model(image, tokens) -> (image_features, text_features, logit_scale); holds `logit_scale`, [1].
        loss: as clipdist.loss.contrastive.info_nce.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, config: Config, place: Place) -> None:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError
        from pydantic import ValidationError

        self.place = place
        self.loss = loss
        self.seed = config.train.seed
        self.logit_scale_max = config.loss.logit_scale_max
        settings = deepspeed_config(config, place.device.type, place.world)
        offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
        optimizer = make_optimizer(model, config.optim, cpu_offload=offload == "cpu")
        try:
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise UserError(f"engine.deepspeed: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
        base_optimizer(self.engine).state.clear()  # see make_optimizer: nothing of a step at construction stays
        self._averaged = _running_statistics(self.engine.module)

    def train_step(
        self,
        image: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor,
        group_id: torch.Tensor,
        *,
        step: int,
        lr: float,
        want_norms: bool = False,
    ) -> StepResult:
        """One optimiser step on this rank's rows of global batch `step`.

        Args:
            image: uint8 [b, 3, H, W].  tokens: int64 [b, L].  valid: bool [b].  group_id: int64 [b].
            lr: the learning rate of this step.
            want_norms: also measure the gradients' norms (one pass over them and a small collective).
        """
        seed_step(self.seed, step, self.place.rank)
        self.engine.train()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        image_features, text_features, logit_scale = self.engine(image, tokens)
        value, statistics = self.loss(image_features, text_features, logit_scale, valid=valid, group_id=group_id)
        self.engine.backward(value)
        norms = self.grad_norms() if want_norms else {}
        self.engine.step()
        self._bound_temperature()
        self._average_buffers()
        return StepResult(value.detach(), statistics, norms, applied=self.engine.was_step_applied())

    @torch.no_grad()
    def encode(
        self, image: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Features in evaluation mode, unnormalised. With ZeRO-3 every rank must make the same calls."""
        self.engine.eval()
        image = None if image is None else image.to(self.place.device)
        tokens = None if tokens is None else tokens.to(self.place.device)
        image_features, text_features, _ = self.engine(image, tokens)
        return image_features, text_features

    def grad_norms(self) -> dict[str, float]:
        """L2 norms of the reduced gradients by part of the model; between backward and step only."""
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self.place.device)
        for fragment in fragments(self.engine):
            if fragment.trained:
                part = PARTS.index(part_of(fragment.name))
                squares[part] += gradient(self.engine, fragment).double().square().sum().to(squares.device)
        if self.engine.zero_optimization_stage() > 0:
            squares = all_reduce_sum(squares)
        norms = squares.sqrt() / loss_scale(self.engine)
        return dict(zip(PARTS, norms.tolist()))

    def logit_scale(self) -> float:
        """The log scale t of the fp32 master weights, on every rank."""
        total = torch.zeros(1, device=self.place.device)
        for fragment in fragments(self.engine):
            if fragment.name == "logit_scale" and fragment.own[0] < fragment.own[1]:
                total += fragment.of(fragment.flat).to(total.device)
        return float(all_reduce_sum(total))

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
    def _average_buffers(self) -> None:
        """BatchNorm normalises over a rank's own rows; its running statistics become the mean over ranks."""
        if not self._averaged or self.place.world == 1:
            return
        flat = torch.cat([buffer.float().view(-1) for buffer in self._averaged])
        dist.all_reduce(flat)
        flat /= self.place.world
        for buffer, mean in zip(self._averaged, flat.split([buffer.numel() for buffer in self._averaged])):
            buffer.copy_(mean.view_as(buffer))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's random numbers are a function of (seed, step, rank): nothing to store, nothing to replay."""
    mixed = (seed * 1_000_003 + step) * 65_537 + rank
    torch.manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


def deepspeed_config(config: Config, device: str, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: what the trainer owns, on top of engine.deepspeed."""
    batch = config.train.global_batch
    precision = resolve_precision(config.train.precision, device)
    owned: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // world,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,  # always explicit: DeepSpeed's default is 1.0
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
    }
    return _merge(config.engine.deepspeed, owned)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _running_statistics(module: nn.Module) -> list[torch.Tensor]:
    """The floating-point buffers of normalisation layers that training updates."""
    found = []
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.track_running_stats:
            found += [buffer for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    return found
