"""What happens to reduced gradients before an optimiser's step: clipping by tensor, and parameters that are held.

The order is DINO's (arXiv:2104.14294): gradients are clipped, then those of held parameters are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from clipdist.engine.tensor_norms import TensorNorms


class StepRules:
    """Rules that apply when DeepSpeed calls the step of an optimiser, for all groups or for a part of them.

    A group is held while the optimiser has taken fewer steps than its "held": the optimiser is not told of it, so that
    its weights do not decay, and its moments and bias correction begin with the first step that changes it.

    Args:
        clip_each: largest norm of the gradient of a tensor; 0: no clipping.

    Attributes:
        steps: that the optimiser has taken.
        discarding: whether the steps do nothing.
    """

    def __init__(self, norms: TensorNorms, clip_each: float) -> None:
        self.steps = 0
        self.discarding = False
        self._norms, self._clip_each = norms, clip_each

    def govern(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply the rules to an optimiser until `release`."""
        optimizer.step = partial(self._step, optimizer, optimizer.step)  # type: ignore

    def release(self, optimizer: torch.optim.Optimizer) -> None:
        """Let go of an optimiser, which otherwise lives as long as this object."""
        vars(optimizer).pop("step", None)

    def _step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any], *_: Any, **__: Any) -> None:
        if self.discarding:
            return
        groups = optimizer.param_groups
        optimizer.param_groups = [group for group in groups if group.get("held", 0) <= self.steps]
        try:
            if self._clip_each:
                self._clip(optimizer.param_groups)
            step()
        finally:
            optimizer.param_groups = groups

    @torch.no_grad()
    def _clip(self, groups: list[dict[str, Any]]) -> None:
        """Scale the gradients of tensors whose norm is too large, as torch.nn.utils.clip_grad_norm_ does."""
        flats = [flat for group in groups for flat in group["params"] if flat.grad is not None]
        for fragment, norm in self._norms.measure(flats, attrgetter("gradient")):
            fragment.gradient.mul_((self._clip_each / (norm[0] + 1e-6)).clamp(max=1))
