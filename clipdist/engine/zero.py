"""One view of the weights for all ZeRO stages: a DeepSpeed engine in, this rank's pieces of every parameter out.

A fragment names the run of elements of a flattened parameter whose fp32 master weights, moments and gradients this rank
holds. Stages 1 and 2 hold a run that may begin inside a parameter, stage 3 an equal share of each, stage 0 everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
PART_OF = {"visual": "image", "text": "text", "logit_scale": "temperature", "logit_bias": "bias"}


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start+numel of parameter `name`, at `offset` of `flat`, the tensor that the optimiser steps."""

    name: str
    parameter: Any  # an nn.Parameter with DeepSpeed's attributes
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: torch.Tensor
    offset: int
    trained: bool
    own: tuple[int, int]  # the part of start .. start+numel that no other rank writes to a checkpoint

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment's elements of a tensor laid out like `flat`, as a writable 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def fragments(engine: Any) -> Iterator[Fragment]:
    """All fragments of this rank, in the module's order of parameters.

    Args:
        engine: a DeepSpeedEngine, of any ZeRO stage and precision.
    """
    masters = _half_precision_masters(engine)
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            yield from _stage_3(engine, name, parameter)
        elif parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            yield from _stage_1_2(engine, name, parameter)
        else:
            yield _replicated(name, parameter, masters.get(id(parameter), parameter))


def _stage_3(engine: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    share = parameter.ds_tensor.numel()
    start = dist.get_rank() * share
    numel = min(share, parameter.ds_numel - start)  # the last shares are padded
    if numel <= 0:
        return
    flat, offset = parameter.ds_tensor, 0
    if parameter.requires_grad:
        group, offset, _ = engine.optimizer.grad_position[engine.optimizer.get_param_id(parameter)]
        flat = engine.optimizer.fp32_partitioned_groups_flat[group]
    shape = tuple(parameter.ds_shape)
    yield Fragment(name, parameter, shape, start, numel, flat, offset, parameter.requires_grad, (start, start + numel))


def _stage_1_2(engine: Any, name: str, parameter: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    offset = mapping.hp_fragment_address.start
    yield Fragment(name, parameter, tuple(parameter.shape), start, numel, flat, offset, True, (start, start + numel))


def _replicated(name: str, parameter: nn.Parameter, master: torch.Tensor) -> Fragment:
    numel, rank, world = parameter.numel(), dist.get_rank(), dist.get_world_size()
    own = (rank * numel // world, (rank + 1) * numel // world)
    return Fragment(name, parameter, tuple(parameter.shape), 0, numel, master, 0, parameter.requires_grad, own)


def _half_precision_masters(engine: Any) -> dict[int, torch.Tensor]:
    """Stage 0 in bf16 or fp16: id of a parameter -> its fp32 master."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_groups") or not hasattr(optimizer, "fp16_groups"):
        return {}
    if engine.zero_optimization_stage() > 0:
        return {}
    pairs = zip(chain.from_iterable(optimizer.fp16_groups), chain.from_iterable(optimizer.fp32_groups))
    return {id(parameter): master for parameter, master in pairs}


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimiser itself, without DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def gradient(engine: Any, fragment: Fragment) -> torch.Tensor:
    """The reduced gradient of a trained fragment, 1-D, loss scale included; valid between backward and step."""
    parameter = fragment.parameter
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter).view(-1)[: fragment.numel]
    if hasattr(parameter, "_hp_mapping"):
        piece = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)
        if piece.numel() != fragment.numel:  # bf16 stage 1 with accumulation keeps the whole sum on every rank
            piece = piece.narrow(0, fragment.start, fragment.numel)
        return piece
    if parameter.grad is None:
        return torch.zeros(fragment.numel, device=parameter.device)
    return parameter.grad.view(-1)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: image, text, temperature or bias."""
    return PART_OF[name.partition(".")[0]]


def loss_scaler(engine: Any) -> Any:
    """The object that holds fp16's loss scale, or None."""
    optimizer = engine.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


def loss_scale(engine: Any) -> float:
    return float(getattr(loss_scaler(engine), "cur_scale", 1.0))


def loss_scale_is_lowest(engine: Any) -> bool:
    """Whether fp16's loss scale cannot fall any further; so in other precisions, which have none."""
    scaler = loss_scaler(engine)
    lowest = getattr(scaler, "min_scale", None) or getattr(scaler, "min_loss_scale", None)
    return lowest is None or loss_scale(engine) <= float(lowest)


def keep_on_at_lowest_scale(engine: Any) -> None:
    """At its lowest fp16's loss scale would end the run with a traceback; what is to be done then, a guard says."""
    scaler = loss_scaler(engine)
    if hasattr(scaler, "raise_error_at_min_scale"):
        scaler.raise_error_at_min_scale = False
