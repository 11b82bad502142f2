"""Put an objective into words: what it reads, its teacher, and its state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from clipdist.data.augment import View
from clipdist.objectives.objective import Moment, Objective

PLACES = {"koleo": "dino.koleo", "ibot": "dino.ibot"}  # of objectives without a section of their own


def describe(objective: Objective) -> str:
    """Return one line, such as "objectives.byol: 2 views of 224 pixels; teacher ..."."""
    seen = [view for view in objective.views if view.name not in objective.taught_alone]
    parts = [views_text(seen) if seen else f"reads {', '.join(objective.features)}"]
    if objective.teacher:
        # Schedules depend on the share of the run alone.
        first, last = (f"{objective.teacher.momentum(Moment(step, 1)):g}" for step in (0, 1))
        momentum = first if first == last else f"{first} to {last}"
        taught = [view for view in objective.views if view.name in objective.teacher.views]
        parts.append(f"teacher that follows the weights, momentum {momentum}, sees {views_text(taught)}")
    with torch.device("meta"):
        state = {name: tensor.shape for name, tensor in objective.state().items() if tensor.numel() > 1}
    if state:
        parts.append("state " + ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in state.items()))
    return f"objectives.{PLACES.get(objective.name, objective.name)}: {'; '.join(parts)}"


def views_text(views: Iterable[View]) -> str:
    """Return "2 views of 224 pixels, 8 views of 96 pixels"."""
    counts = Counter(view.size for view in views)
    return ", ".join(f"{number} view{'s' * (number > 1)} of {size} pixels" for size, number in counts.items())
