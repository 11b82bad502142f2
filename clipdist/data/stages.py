"""What batches are made of, by their position, and the patches of an image that the tower sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from clipdist.data.augment import View
from clipdist.data.order import mix, sample_uniforms
from clipdist.data.tokens import Tokenizer

_PATCHES = 53  # the key of the choice of patches


@dataclass(frozen=True)
class BatchStage:
    """What the loader makes of the samples of batches from position `first` on.

    Attributes:
        tokenizer: of the texts; None: none is read.
        patches: of an image.  kept: how many of them the tower sees; 0: all.
    """

    first: int
    views: Sequence[View]
    tokenizer: Tokenizer | None
    patches: int = 0
    kept: int = 0


def kept_patches(seed: int, epochs: np.ndarray, sample_ids: np.ndarray, stage: BatchStage) -> torch.Tensor:
    """Choose the patches of images that the tower sees: patch dropout (FLIP, Li et al., arXiv:2212.00794).

    The choice is a function of (seed, epoch, sample): ranks, micro-batches and restarts do not change it.

    Args:
        epochs, sample_ids: int64 [m].

    Returns:
        int64 [m, kept], ascending numbers below `patches`.
    """
    uniforms = sample_uniforms(int(mix(seed, _PATCHES)), epochs, sample_ids, stage.patches)
    chosen = np.argpartition(uniforms, stage.kept - 1, axis=1)[:, : stage.kept]
    return torch.from_numpy(np.sort(chosen, axis=1).astype(np.int64))
