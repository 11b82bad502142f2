"""The proof that a step of optim.name=muon is that of whole matrices in float64, on the ranks of optimizers.py.

Gives, by cell, relative errors of the change of fp32 master weights in two steps: of every parameter, and of all
matrices and the rest of a tower. The reference takes the engine's reduced gradients, and decomposes matrices.
"""

from __future__ import annotations

import math
import re
from functools import partial

import torch
from guarded import data
from torch import Tensor

from clipdist.config import load_config
from clipdist.distributed.rank import DistEnv
from clipdist.engine.optim import parameter_groups
from clipdist.engine.step import Engine
from clipdist.models.build import build_model
from clipdist.objectives.make import make_objectives

LR, DECAY, STEPS, BATCH = 1e-2, 0.3, 2, 16
VIT, RESNET = "configs/models/tiny_vit.json", "configs/models/tiny_rn.json"
SPLIT = ("engine.deepspeed.zero_optimization={stage3_param_persistence_threshold: 0}",)
CELLS = [(stage, "fp32", (VIT, RESNET)[stage % 2], ()) for stage in range(3)]
CELLS += [(3, "fp32", VIT, SPLIT)]
CELLS_OF_TWO = [
    *((stage, "bf16", VIT, ()) for stage in (0, 3)),
    (1, "bf16", VIT, ("train.micro_batch=4",)),  # DeepSpeed's BF16_Optimizer
    (3, "fp32", RESNET, ("engine.deepspeed.zero_optimization={sub_group_size: 20000}",)),  # several calls of step
    (2, "fp32", VIT, ("model.lock_image=true", "model.image_unlocked_groups=2", "optim.layer_decay=0.75")),
]


def singular(values: Tensor) -> Tensor:
    """What five iterations make of singular values, divided by their norm."""
    x = values / values.norm().clamp_min(1e-7)  # those of filters before a norm with gain 0 are 0
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def orthogonalised(momentum: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(momentum, full_matrices=False)
    return u @ singular(s).diag() @ v * 0.2 * max(momentum.shape) ** 0.5


class Reference:
    """Weights of one process, whole, in float64."""

    def __init__(self, weights: dict[str, Tensor], rates: dict[str, tuple[float, float]]) -> None:
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.momenta = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.rates = rates
        others = [{"params": [w], "lr": rates[n][0], "weight_decay": rates[n][1]} for n, w in self.weights.items()]
        self.adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-6)

    def step(self, gradients: dict[str, Tensor], matrices: dict[str, list[tuple[int, int]]]) -> None:
        for name, gradient in gradients.items():
            gradient, weight = gradient.double(), self.weights[name]
            if name not in matrices:
                weight.grad = gradient.view_as(weight)
                continue
            lr, decay = self.rates[name]
            momentum = self.momenta[name].mul_(0.95).add_(0.05 * gradient)
            pieces = (0.05 * gradient + 0.95 * momentum).split([rows * columns for rows, columns in matrices[name]])
            update = [orthogonalised(piece.view(shape)).flatten() for piece, shape in zip(pieces, matrices[name])]
            weight.mul_(1 - lr * decay).sub_(lr * torch.cat(update))
        self.adamw.step()


def run_cell(stage: int, precision: str, name: str, more: tuple[str, ...], dist_env: DistEnv) -> dict[str, float]:
    words = [f"model.name={name}", f"engine.zero_stage={stage}", f"train.precision={precision}", *more]
    words += ["optim.name=muon", f"optim.weight_decay={DECAY}", "optim.grad_clip=0", f"train.global_batch={BATCH}"]
    config = load_config(None, words)
    torch.manual_seed(0)
    model = build_model(config.model, config.objectives.clip)
    rates = {}
    for group in parameter_groups(model, config.optim):
        for parameter in group["params"]:
            rates[id(parameter)] = LR * group["lr_scale"], group["weight_decay"]
    rates = {n: rates[id(p)] for n, p in model.named_parameters() if id(p) in rates}
    spec, shapes = model.spec, {n: p.shape for n, p in model.named_parameters()}
    engine = Engine(model, make_objectives(config.objectives, model.spec.image_size), config, dist_env)
    zero = engine.zero
    names = list(zero.numel(trained_only=True))
    whole = partial(zero.gather, lambda fragment: fragment.master, names)
    before = whole()
    reference = Reference(before, rates)
    matrices = {n: [(s[0], s[1:].numel())] for n, s in shapes.items() if hidden(n) and n in names}
    for n, ((rows, columns),) in matrices.items():
        matrices[n] = [(rows // 3, columns)] * 3 if "in_proj" in n else matrices[n]
    assert matrices
    engine.before_update = lambda: reference.step(zero.gather(zero.gradient, names), matrices)
    for step in range(STEPS):
        sizes = spec.context_length, spec.tokenizer["vocab_size"], spec.image_size
        assert engine.train_step(data(dist_env.rank, dist_env.world_size, step, *sizes), step=step, lr=LR).applied
    after = whole()
    assert zero.save_numel()[0] == sum(piece.data.numel() for piece in zero.live_pieces())
    engine.close()
    errors: dict[str, list[float]] = {}
    for n in names:
        moved = reference.weights[n] - before[n].double()
        # A tenth of AdamW's usual step at least: the gradient of a key's bias is 0 but for rounding.
        size = max(float(moved.norm()), 0.1 * LR * moved.numel() ** 0.5)
        wrong = float((after[n].double() - before[n].double() - moved).norm())
        part = f"{n.partition('.')[0]} {'matrices' if n in matrices else 'rest'}"
        for key in (part, n):
            total = errors.setdefault(key, [0.0, 0.0])
            errors[key] = [math.hypot(total[0], wrong), math.hypot(total[1], size)]
    return {key: wrong / size for key, (wrong, size) in errors.items()}


def hidden(name: str) -> bool:
    """By the names of the tiny models' parameters, and not as the engine finds them."""
    block = r"\.resblocks\..*(in_proj_weight|out_proj\.weight|c_fc\.weight|c_proj\.weight)$"
    resnet = r"^visual\.(layer.*(conv\d|downsample\.0)|conv[23]|attnpool\.[qkv]_proj)\.weight$"
    return bool(re.search(block, name) or re.search(resnet, name))
