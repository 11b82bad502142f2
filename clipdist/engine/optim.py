"""Parameter groups, the optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from clipdist import config

# Positions and marks that are matrices: open_clip's, timm's and Hugging Face's names.
NO_DECAY = (
    "positional_embedding",
    "pos_embed",
    "position_embeddings",
    "token_type_embeddings",
    "cls_token",
    "reg_token",
)


def learning_rate(cfg: config.Optim, step: int, steps: int) -> float:
    """Linear warm-up over cfg.warmup_steps, then half a cosine down to cfg.min_lr at `steps` (arXiv:1608.03983)."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and filters decay; gains, biases, positions and the temperature do not."""
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or any(word in name for word in NO_DECAY)
            (keep if no_decay else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, cfg: config.Optim, cpu_offload: bool) -> torch.optim.Optimizer:
    """torch's fused AdamW (one pass over a tensor; nothing to compile), or DeepSpeed's CPU Adam for ZeRO-Offload.

    The learning rate starts at 0 and is set before every step: DeepSpeed's half-precision wrapper for stage 0 takes a
    step with zero gradients when it is built, which must change nothing.
    """
    groups = parameter_groups(model, cfg.weight_decay)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
