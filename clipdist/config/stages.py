"""Plan the stages of a run: from which step on images are of which size, texts how long, and which patches are dropped.

A stage is a pure function of the step and of the number of steps: it does not depend on ranks or restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipdist.config.schema import Stage
from clipdist.errors import UserError


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run.

    Attributes:
        first: its first step, counted from 0.
        image_size: side of the images in pixels.  tokens: of a text at most.
        patch_dropout: share of an image's patches that the tower does not see.
    """

    first: int
    image_size: int
    tokens: int
    patch_dropout: float

    def __str__(self) -> str:
        dropped = f", {100 * self.patch_dropout:g} % of the patches dropped" if self.patch_dropout else ""
        return f"images of {self.image_size} pixels, at most {self.tokens} tokens{dropped}"


def plan_stages(stages: Sequence[Stage], steps: int, image_size: int, tokens: int) -> tuple[PlannedStage, ...]:
    """Return the stages of a run of so many steps; without any, one.

    Args:
        image_size, tokens: the model's, of stages that give none.

    Raises:
        UserError: the run is so short that a stage has no step.
    """
    if not stages:
        return (PlannedStage(0, image_size, tokens, 0.0),)
    shares = [stage.share for stage in stages]
    borders = [round(steps * sum(shares[:number])) for number in range(len(stages))]
    for number, (first, end) in enumerate(zip(borders, [*borders[1:], steps])):
        if first >= end:
            raise UserError(f"train.stages[{number}].share={shares[number]}: leaves it no step of {steps}")
    return tuple(
        PlannedStage(first, stage.image_size or image_size, stage.tokens or tokens, stage.patch_dropout)
        for first, stage in zip(borders, stages)
    )


def stage_number(stages: Sequence[PlannedStage], step: int) -> int:
    """Return the number of the stage that a step belongs to."""
    return sum(stage.first <= step for stage in stages) - 1


def check_stages(stages: Sequence[Stage], image_size: int, tokens: int, patch: int | None) -> None:
    """Check the stages against a model that is not built yet.

    Args:
        image_size, tokens: the model's.
        patch: side of the image tower's patches in pixels; 0: it has none; None: not known.

    Raises:
        UserError: one does not fit.
    """
    for number, stage in enumerate(stages):
        where, size = f"train.stages[{number}].", stage.image_size
        if size > image_size:
            raise UserError(f"{where}image_size={size}: must not exceed the model's {image_size}")
        if patch and size % patch:
            below, above = size // patch * patch, (size // patch + 1) * patch
            fits = " or ".join(str(side) for side in (below, above) if 0 < side <= image_size)
            raise UserError(f"{where}image_size={size}: must be a multiple of the model's patches of {patch}: {fits}")
        if stage.tokens > tokens:
            raise UserError(f"{where}tokens={stage.tokens}: must not exceed the model's {tokens}")
        if stage.patch_dropout and patch == 0:
            raise UserError(f"{where}patch_dropout={stage.patch_dropout}: the image tower has no patches; take a ViT")
