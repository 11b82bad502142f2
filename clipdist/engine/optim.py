"""Make the optimiser with its parameter groups, and compute learning rate and weight decay of a step."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from clipdist import config
from clipdist.engine.layerwise import TRUST, Lamb, Sgd
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


def weight_decay(cfg: config.Optim, step: int, steps: int) -> float:
    """Return the weight decay of a step: half a cosine from cfg.weight_decay to cfg.weight_decay_end (DINO).

    Args:
        step: from 0.
        steps: of the whole run; the decay is cfg.weight_decay_end there.
    """
    if cfg.weight_decay_end is None:
        return cfg.weight_decay
    progress = min(1.0, step / steps)
    return cfg.weight_decay_end + (cfg.weight_decay - cfg.weight_decay_end) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    model: nn.Module, cfg: config.Optim, orthogonal: Container[str] = (), held: Mapping[str, int] | None = None
) -> list[dict]:
    """Return the groups of trained parameters, with the settings of each.

    "lr_scale" is the factor of the learning rate: optim.layer_decay^n for a parameter with n layers of its tower behind
    it (BEiT, Bao et al., arXiv:2106.08254; Clark et al., arXiv:2003.10555). "decays": matrices and filters do; gains,
    biases, positions, scalars do not. "held": see below. "orthogonal": for Muon.

    Args:
        orthogonal: names of the parameters whose updates Muon orthogonalises.
        held: by parameter name, how many optimiser steps leave it as it is.

    Raises:
        ValueError: the model has no parameter of a name in `held`.
        UserError: see layers_behind.
    """
    behind = layers_behind(model) if cfg.layer_decay < 1 else {}
    held = held or {}
    if unknown := held.keys() - dict(model.named_parameters()).keys():
        raise ValueError(f"held: the model has no parameter {min(unknown)}")
    groups: dict[tuple[int, bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or any(word in name for word in NO_DECAY)
            key = behind.get(name, 0), exempt, name in orthogonal, held.get(name, 0)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": 0.0 if exempt else cfg.weight_decay,
            "lr_scale": cfg.layer_decay**layers,
            "decays": not exempt,
            "orthogonal": whole,
            "held": steps,
        }
        for (layers, exempt, whole, steps), params in sorted(groups.items(), key=lambda group: group[0])
    ]


def make_optimizer(
    model: nn.Module, cfg: config.Optim, cpu_offload: bool, held: Mapping[str, int] | None = None
) -> torch.optim.Optimizer:
    """Return torch's fused AdamW, DeepSpeed's CPU Adam for ZeRO-Offload, Muon, LARS, LAMB or SGD.

    The learning rate starts at 0 and is set before every step: DeepSpeed's half-precision wrapper for stage 0 takes a
    step with zero gradients when it is built, which must not change the weights.

    Args:
        held: see parameter_groups.

    Raises:
        UserError: see layers_behind and hidden_matrices.
    """
    stacked = hidden_matrices(model) if cfg.name == "muon" else {}
    groups = parameter_groups(model, cfg, stacked, held)
    if cfg.name in ("lars", "sgd"):
        return Sgd(groups, TRUST if cfg.name == "lars" else 0.0, lr=0.0, momentum=cfg.beta1)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps}
    if cpu_offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    if cfg.name == "lamb":
        return Lamb(groups, **settings)
    if stacked:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return Muon(groups, split_matrices(shapes, stacked), fused=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
