"""SGD with momentum, LARS and LAMB, whose trust ratios are those of whole tensors under every ZeRO stage.

LARS (You et al., arXiv:1708.03888, Algorithm 1, with the learning rate outside of the momentum as in torch's SGD):

    d = q (g + decay w),  q = trust |w| / (|g| + decay |w|)        m <- momentum m + d        w <- w - lr m

LAMB (You et al., arXiv:1904.00962, Algorithm 2, with phi the identity and both bias corrections):

    u = m' / (sqrt(v') + eps) + decay w                            w <- w - lr (|w| / |u|) u

Norms are of whole tensors. Where one of them is 0, the ratio is 1, and LARS does not decay. Groups with "decays": False
(gains, biases, positions, scalars) have neither decay nor a ratio. SGD is LARS without a ratio: d = g + decay w.

DeepSpeed replaces the parameters of groups by its own flat tensors, and may call `step` for a part of them at a time.
`attach` tells which elements of which parameter these hold; before that no ratios are applied. Steps are collective.
They use gradients as memory.
"""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from clipdist.engine.tensor_norms import TensorNorms

TRUST = 1e-3  # LARS's coefficient, of SimCLR and BYOL
CHUNK = 1 << 24  # elements of which LAMB computes updates at one time: bounds the memory
NORMS = attrgetter("master"), attrgetter("gradient")
Groups = dict[Tensor, dict[str, Any]]  # flat tensors that have a gradient, with their groups


class _Layerwise(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, settings)
        self._norms: TensorNorms | None = None

    def attach(self, norms: TensorNorms) -> None:
        """Take note of this rank's fragments."""
        self._norms = norms

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        groups = {flat: group for group in self.param_groups for flat in group["params"] if flat.grad is not None}
        if groups:
            self._step(groups)

    def _step(self, groups: Groups) -> None:
        raise NotImplementedError


def _gradient(flat: Tensor) -> Tensor:
    assert flat.grad is not None
    return flat.grad


class Sgd(_Layerwise):
    """SGD with momentum, and LARS.

    Args:
        groups: of parameters, each with "decays".
        trust: LARS's coefficient; 0: SGD.
        settings: lr and momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], trust: float = 0.0, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self._trust = trust

    def _step(self, groups: Groups) -> None:
        scaled = {flat: None for flat, group in groups.items() if self._trust and group["decays"]}
        for fragment, norms in self._norms.measure(scaled, *NORMS) if self._norms else ():
            decay = groups[fragment.flat]["weight_decay"]
            weights, gradients = norms
            known = (weights > 0) & (gradients > 0)
            ratio = torch.where(known, self._trust * weights / (gradients + decay * weights), 1)
            fragment.gradient.mul_(ratio).addcmul_(fragment.master, torch.where(known, ratio * decay, 0))
        for flat, group in groups.items():
            if flat not in scaled:
                _gradient(flat).add_(flat, alpha=group["weight_decay"])
            moments = self.state[flat]
            if "exp_avg" not in moments:
                moments["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
            flat.sub_(moments["exp_avg"].mul_(group["momentum"]).add_(_gradient(flat)), alpha=group["lr"])


class Lamb(_Layerwise):
    """LAMB.

    Args:
        groups: of parameters, each with "decays".
        settings: lr, betas and eps.
    """

    def _step(self, groups: Groups) -> None:
        for flat, group in groups.items():
            _adam(self.state[flat], _gradient(flat), group)
            _gradient(flat).add_(flat, alpha=group["weight_decay"])
        scaled = [flat for flat, group in groups.items() if group["decays"]]
        for fragment, norms in self._norms.measure(scaled, *NORMS) if self._norms else ():
            weights, updates = norms
            fragment.gradient.mul_(torch.where((weights > 0) & (updates > 0), weights / updates, 1))
        for flat, group in groups.items():
            flat.sub_(_gradient(flat), alpha=group["lr"])


def _adam(moments: dict[str, Any], gradient: Tensor, group: dict[str, Any]) -> None:
    """Replace a gradient by Adam's update, m' / (sqrt(v') + eps)."""
    if "exp_avg" not in moments:
        moments |= {"step": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
    moments["step"] += 1
    beta1, beta2 = group["betas"]
    moments["exp_avg"].lerp_(gradient, 1 - beta1)
    moments["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    of_m, of_v = 1 - beta1 ** moments["step"], 1 - beta2 ** moments["step"]
    whole = gradient, moments["exp_avg"], moments["exp_avg_sq"]
    for update, m, v in zip(*(tensor.view(-1).split(CHUNK) for tensor in whole)):
        torch.div(m, v.sqrt().div_(math.sqrt(of_v)).add_(group["eps"]).mul_(of_m), out=update)
