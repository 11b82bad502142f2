"""Describe what one rank holds of a parameter under ZeRO.

A fragment is the contiguous range of elements of a flattened parameter whose fp32 master weights, moments and gradients
this rank holds: at stages 1 and 2 a range that may begin inside the parameter, at stage 3 an equal share of it, at
stage 0 the whole parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start+numel of parameter `name`, at `offset` of `flat`, a tensor that the optimiser updates."""

    name: str
    parameter: Any  # an nn.Parameter with DeepSpeed's attributes
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    trained: bool
    own: tuple[int, int]  # the part of start .. start+numel that this rank writes to a checkpoint

    def of(self, tensor: Tensor) -> Tensor:
        """Return this fragment's elements of a tensor laid out like `flat`, as a writable 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)

    @property
    def master(self) -> Tensor:
        """The fp32 master weights, as a writable 1-D view."""
        return self.of(self.flat)

    @property
    def gradient(self) -> Tensor:
        """The gradient that the optimiser's step reads, fp32, as a writable 1-D view; exists during that step only."""
        assert self.flat.grad is not None
        return self.of(self.flat.grad)
