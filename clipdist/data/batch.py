"""Define the batch: one rank's rows of a global batch, which can be sliced by rows and moved to a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist.data.augment import apply_colour
from clipdist.data.patches import is_buffer

IMAGE = "image"  # the only view of CLIP
MODALITIES = ("image", "text")
EMPTY, CAPTION, NEGATIVE = 0, 1, 2  # what one of several places for texts of an image holds


@dataclass(frozen=True)
class Batch:
    """The rows of one rank, in the order of the global batch.

    A row whose image cannot be decoded has zero pixels in every view.

    Attributes:
        images: uint8 [b, 3, H, W] by the name of the view; of a model whose images keep their aspect ratio, patches in
            a buffer (see clipdist.data.patches), on the CPU.
        tokens: int64 [b, L], on the CPU; [b, K, L] with several texts of an image, where K may differ between ranks;
            [b, 0] where no text is read.
        valid: bool [b] by modality: whether a row has a usable image, or a usable caption.
        sample_id: int64 [b], on the CPU.
        group_id: int64 [b]; pairs with equal captions form a group. [b, K] with several texts.
        roles: uint8 [b, K], what the K places of an image hold: EMPTY, CAPTION or NEGATIVE; None: one text an image.
        patches: int64 [b, n], the patches of every image that the tower sees in training; None: all.
        position: the number of the global batch, counted over all epochs.
        bad: (sample id, reason) of the rows that no objective can use.
        colour: float32 [b, C] on the CPU by the name of the view: colour changes that to() will apply.
    """

    images: dict[str, Tensor]
    tokens: Tensor
    valid: dict[str, Tensor]
    sample_id: Tensor
    group_id: Tensor
    roles: Tensor | None = None
    patches: Tensor | None = None
    position: int = 0
    bad: list[tuple[int, str]] = field(default_factory=list)
    colour: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def inputs(self, without: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the inputs of the model's forward pass by name: views, the tokens, and the choice of patches.

        Args:
            without: names of views to leave out.
        """
        chosen = {} if self.patches is None else {"patches": self.patches}
        views = {name: pixels for name, pixels in self.images.items() if name not in without}
        tokens = {"tokens": self.tokens} if self.tokens.shape[-1] else {}  # a run may read no captions
        return {**views, **tokens, **chosen}

    def valid_in(self, modalities: tuple[str, ...]) -> Tensor:
        """Return which rows have all of these modalities, bool [b]."""
        return torch.stack([self.valid[modality] for modality in modalities]).all(0)

    def rows(self, start: int, stop: int) -> Batch:
        """Return rows start .. stop of every tensor, as views, without `bad`."""
        return self.each(lambda tensor: tensor[start:stop], bad=[])

    def split(self, rows: int) -> list[Batch]:
        """Split into batches of `rows` rows; the last may have fewer."""
        return [self.rows(start, start + rows) for start in range(0, len(self), rows)]

    def with_places(self, places: int) -> Batch:
        """Return the batch with so many places for texts of each image, at least those that it has."""
        assert self.roles is not None
        more = places - self.roles.shape[1]
        tokens = torch.cat([self.tokens, self.tokens[:, :1].expand(-1, more, -1)], dim=1)
        group_id, roles = F.pad(self.group_id, (0, more)), F.pad(self.roles, (0, more), value=EMPTY)
        return replace(self, tokens=tokens, group_id=group_id, roles=roles)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device, with the colour changes applied there.

        Tokens stay, and patches in buffers: the model reads lengths and grids on the CPU, and moves what they hold.
        Sample ids stay, of which random numbers are made there.
        """

        def moving(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        images = {view: pixels if is_buffer(pixels) else moving(pixels) for view, pixels in self.images.items()}
        moved = self.each(moving, colour={}, tokens=self.tokens, sample_id=self.sample_id, images=images)
        coloured = {view: apply_colour(moved.images[view], parameters) for view, parameters in self.colour.items()}
        return replace(moved, images=moved.images | coloured)

    def each(self, change: Callable[[Tensor], Tensor], **fixed: Any) -> Batch:
        """Return the batch with `change` applied to every tensor; fields in `fixed` get the given values instead."""
        changed: dict[str, Any] = {}
        for name in ("images", "valid", "colour"):
            if name not in fixed:
                changed[name] = {key: change(tensor) for key, tensor in getattr(self, name).items()}
        for name in ("tokens", "sample_id", "group_id"):
            if name not in fixed:
                changed[name] = change(getattr(self, name))
        for name in ("roles", "patches"):
            tensor = getattr(self, name)
            changed[name] = None if tensor is None else change(tensor)
        return replace(self, **changed, **fixed)


def pair_batch(image: Tensor, tokens: Tensor, valid: Tensor, group_id: Tensor) -> Batch:
    """Return a batch of one view whose rows are valid in both modalities or in neither.

    Args:
        image: uint8 [b, 3, H, W].  tokens: int64 [b, L].  valid: bool [b].  group_id: int64 [b].
    """
    both = dict.fromkeys(MODALITIES, valid)
    return Batch({IMAGE: image}, tokens, both, torch.arange(len(tokens)), group_id)
