"""One rank's rows of a global batch: tensors that can be sliced by rows and moved to a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clipdist.data.augment import apply_colour

IMAGE = "image"  # the one view that CLIP sees
MODALITIES = ("image", "text")


@dataclass(frozen=True)
class Batch:
    """The rows of one rank, in the order of the global batch.

    A row whose image cannot be used has zero pixels in every view.

    Attributes:
        images: a view's name -> uint8 [b, 3, H, W].
        tokens: int64 [b, L].
        valid: a modality's name -> bool [b], whether a row has a usable image, or a usable caption.
        sample_id: int64 [b].
        group_id: int64 [b]; equal captions are one group.
        position: the number of the global batch, counted over all epochs.
        bad: (sample id, reason) of the rows that no objective can use.
        colour: a view's name -> float32 [b, C] on the CPU: colour changes that are still to be applied (to() does).
    """

    images: dict[str, Tensor]
    tokens: Tensor
    valid: dict[str, Tensor]
    sample_id: Tensor
    group_id: Tensor
    position: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    colour: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward pass takes, by name: every view, and the tokens."""
        return {**self.images, "tokens": self.tokens}

    def valid_in(self, modalities: tuple[str, ...]) -> Tensor:
        """bool [b]: the rows that have all of these modalities."""
        return torch.stack([self.valid[modality] for modality in modalities]).all(0)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start .. stop of every tensor, as views. `bad` stays with the whole batch."""
        return self.each(lambda tensor: tensor[start:stop], bad=[])

    def split(self, rows: int) -> list[Batch]:
        """Pieces of `rows` rows; the last may have fewer."""
        return [self.rows(start, start + rows) for start in range(0, len(self), rows)]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, its images' colours changed there."""
        moved = self.each(lambda tensor: tensor.to(device, non_blocking=True), colour={})
        coloured = {view: apply_colour(moved.images[view], parameters) for view, parameters in self.colour.items()}
        return replace(moved, images=moved.images | coloured)

    def each(self, change: Callable[[Tensor], Tensor], **fixed: Any) -> Batch:
        """`change` applied to every tensor but those of the fields in `fixed`."""
        changed: dict[str, Any] = {}
        for name in ("images", "valid", "colour"):
            if name not in fixed:
                changed[name] = {key: change(tensor) for key, tensor in getattr(self, name).items()}
        for name in ("tokens", "sample_id", "group_id"):
            changed[name] = change(getattr(self, name))
        return replace(self, **changed, **fixed)


def pairs(image: Tensor, tokens: Tensor, valid: Tensor, group_id: Tensor) -> Batch:
    """A batch of one view, made of tensors: see Batch. A row is valid in both modalities or in none."""
    both = dict.fromkeys(MODALITIES, valid)
    return Batch({IMAGE: image}, tokens, both, torch.arange(len(tokens)), group_id)
