"""Make the objectives of a run."""

from __future__ import annotations

from clipdist import config
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.distill import DistillObjective
from clipdist.objectives.objective import Objective


def make_objectives(cfg: config.Objectives) -> tuple[Objective, ...]:
    """Return the objectives whose sections are set."""
    found: list[Objective] = []
    if cfg.clip is not None:
        found.append(ClipObjective(cfg.clip))
    if cfg.distill is not None:
        found.append(DistillObjective(cfg.distill))
    return tuple(found)
