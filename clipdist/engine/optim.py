"""Make the optimiser with its parameter groups, and compute the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from clipdist import config
from clipdist.engine.muon import Muon, split_matrices
from clipdist.models.layers import hidden_matrices, layers_behind

# Matrices that do not decay: position embeddings and special tokens, by the names of open_clip, timm and Hugging Face.
NO_DECAY = (
    "positional_embedding",
    "pos_embed",
    "position_embeddings",
    "token_type_embeddings",
    "cls_token",
    "reg_token",
)


def learning_rate(cfg: config.Optim, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine (Loshchilov and Hutter, arXiv:1608.03983).

    Args:
        step: from 0.
        steps: of the whole run; the rate is cfg.min_lr there.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, cfg: config.Optim, orthogonal: Container[str] = ()) -> list[dict]:
    """Return the groups of trained parameters: weight decay, "lr_scale", the factor of the learning rate, "orthogonal".

    Matrices and filters decay; gains, biases, positions, scalars do not. A parameter with n layers of its tower behind
    it has the factor optim.layer_decay^n (BEiT, Bao et al., arXiv:2106.08254; Clark et al., arXiv:2003.10555).

    Args:
        orthogonal: names of the parameters whose updates Muon orthogonalises.

    Raises:
        UserError: see layers_behind.
    """
    behind = layers_behind(model) if cfg.layer_decay < 1 else {}
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(word in name for word in NO_DECAY)
            groups.setdefault((behind.get(name, 0), exempt, name in orthogonal), []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if exempt else cfg.weight_decay,
            "lr_scale": cfg.layer_decay**layers,
            "orthogonal": whole,
        }
        for (layers, exempt, whole), params in sorted(groups.items(), key=lambda group: group[0])
    ]


def make_optimizer(model: nn.Module, cfg: config.Optim, cpu_offload: bool) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, DeepSpeed's CPU Adam for ZeRO-Offload, or Muon.

    The learning rate starts at 0 and is set before every step: DeepSpeed's half-precision wrapper for stage 0 takes a
    step with zero gradients when it is built, which must not change the weights.

    Raises:
        UserError: see layers_behind and hidden_matrices.
    """
    stacked = hidden_matrices(model) if cfg.name == "muon" else {}
    groups = parameter_groups(model, cfg, stacked)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if stacked:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return Muon(groups, split_matrices(shapes, stacked), fused=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
