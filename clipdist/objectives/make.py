"""Make the objectives of a run."""

from __future__ import annotations

from clipdist import config
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.objective import Objective


def make_objectives(cfg: config.Objectives) -> tuple[Objective, ...]:
    """Return the objectives whose sections are set."""
    return tuple(make(section) for section, make in ((cfg.clip, ClipObjective),) if section is not None)
