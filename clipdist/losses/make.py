"""The loss section of the configuration in; the loss function that the engine calls out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from clipdist import config
from clipdist.losses.infonce import info_nce
from clipdist.losses.sigmoid import sigmoid_loss
from clipdist.losses.tiles import Tile

LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def make_loss(cfg: config.Loss) -> LossFunction:
    """info_nce or sigmoid_loss with the configuration's settings; both are exact, whatever is set."""
    return partial(
        {"infonce": info_nce, "sigmoid": sigmoid_loss}[cfg.name],
        label_smoothing=cfg.label_smoothing,
        logit_scale_max=cfg.logit_scale_max,
        implementation=cfg.implementation,
        tile=Tile(cfg.tile_rows, cfg.tile_columns) if cfg.tile_rows else None,
    )
