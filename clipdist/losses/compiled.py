"""The sweeps of clipdist.losses.tiles with what happens inside a tile compiled into one pass over it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from clipdist.losses import tiles
from clipdist.losses.tiles import Logits


@lru_cache
def _compiled(step: tiles.TileStep) -> Any:
    return torch.compile(step, dynamic=True)  # uneven last tiles must not compile anew


def exponential_sums(logits: Logits, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tiles.exponential_sums(logits, *args, exponentials=_compiled(tiles.exponentials_of_tile))


def softmax_gradients(logits: Logits, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tiles.softmax_gradients(logits, *args, weights=_compiled(tiles.weights_of_tile))


def sigmoid_sweep(logits: Logits, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return tiles.sigmoid_sweep(logits, *args, sigmoids=_compiled(tiles.sigmoids_of_tile))
