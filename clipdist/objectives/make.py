"""Make the objectives of a run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from clipdist import config
from clipdist.data.batch import IMAGE
from clipdist.objectives.byol import ByolObjective
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.distill import DistillObjective
from clipdist.objectives.objective import Objective


def make_objectives(cfg: config.Objectives, image_size: int) -> tuple[Objective, ...]:
    """Return the objectives whose sections are set.

    Args:
        image_size: of the model: that of views which say no other.
    """
    found: list[Objective] = []
    if cfg.clip is not None:
        found.append(ClipObjective(cfg.clip))
    if cfg.distill is not None:
        found.append(DistillObjective(cfg.distill))
    if cfg.byol is not None:
        found.append(ByolObjective(cfg.byol, image_size))
    return tuple(found)


def make_heads(objectives: Sequence[Objective], width: int) -> dict[str, nn.Module]:
    """Return the heads of objectives, by the objective's name. Weights are drawn from torch's global generator.

    Args:
        width: of the image tower's features before its projection.
    """
    heads = {objective.name: objective.head(width) for objective in objectives}
    return {name: head for name, head in heads.items() if head is not None}


def reads_image(objectives: Sequence[Objective]) -> bool:
    """Whether an objective reads the features of CLIP's own view, behind the image tower's projection."""
    return any(IMAGE in objective.features for objective in objectives)
