"""Agree with a teacher on soft classes of patches that the model does not see (iBOT, Zhou et al., arXiv:2111.07832,
as in DINOv2, Oquab et al., arXiv:2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.order import sample_uniforms
from clipdist.distributed.rank import moved
from clipdist.losses.prototypes import (
    prototype_cross_entropy,
    sinkhorn_centre,
    soft_targets,
    sum_rows,
    update_centre,
)
from clipdist.models.dual_encoder import HEADS, PATCHES, DualEncoder
from clipdist.models.masked_patches import allow_masks
from clipdist.objectives.objective import COUNTS, TEACHER, Given, Moment, Objective, Term


class IbotObjective(Objective):
    """Cross-entropy of masked patches of DINO's global views, with the weight of both. See Objective.

    The head is a part of DINO's, with prototypes of its own. The teacher sees the views without masks.
    """

    name = "ibot"
    additive = True

    def __init__(self, cfg: config.Dino, ibot: config.Ibot, image_size: int) -> None:
        self.cfg, self.ibot = cfg, ibot
        self.masked = {f"dino/{number}": view.size or image_size for number, view in enumerate(cfg.views)}
        self.outputs = [f"{PATCHES}/{view}" for view in self.masked]
        self.held = held_prototypes(cfg, "dino.patches")
        self.grid = [0, 0]  # patches along a side of each view

    def adapt(self, model: DualEncoder) -> None:
        """Let the image tower mask patches. See Objective.adapt."""
        self.grid = [allow_masks(model.visual, side, "objectives.dino.ibot") for side in self.masked.values()]

    @property
    def masked_patches(self) -> float:
        """Patches of an image that are masked on average, in all views."""
        return self.ibot.masked_images * sum(self.ibot.mask_ratio) / 2 * sum(grid**2 for grid in self.grid)

    def state(self) -> dict[str, Tensor]:
        """Return the centre, one number for each prototype. See Objective.state."""
        return {"centre": torch.zeros(self.ibot.prototypes)} if self.cfg.balance == "centre" else {}

    def noise(self, batch: Batch, at: Moment) -> Mapping[str, Tensor]:
        """Return the masks of each sample in this step, bool [b, patches], by view. See Objective.noise."""
        ids = batch.sample_id.numpy()
        uniforms = sample_uniforms(_KEY, np.full(len(ids), at.step), ids, len(self.masked) * _DRAWN)
        parts = np.split(uniforms, len(self.masked), axis=1)
        return {
            view: torch.from_numpy(block_masks(part, grid, self.ibot.masked_images, self.ibot.mask_ratio))
            for view, part, grid in zip(self.masked, parts, self.grid)
        }

    def given(self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor], at: Moment) -> Given:
        """Return the teacher's softmax of masked patches, balanced over those of both views. See Objective.given."""
        cfg = self.cfg
        temperature = at.ramp(cfg.teacher_temperature, cfg.teacher_warmup_steps)
        centre = state.get("centre")
        if centre is None:
            logits = torch.cat([taught[TEACHER + name] for name in self.outputs])
            centre = sinkhorn_centre(logits.__getitem__, self._valid(taught, batch), self.ibot.prototypes, temperature)
        ragged = {
            TEACHER + name: (soft_targets(taught[TEACHER + name], centre, temperature), taught[TEACHER + name + COUNTS])
            for name in self.outputs
        }
        return Given(shared=super().given(taught, batch, {}, at).shared, ragged=ragged)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over valid rows of the mean over an image's masked patches, of both views. See Objective.loss.

        An image without masked patches gives 0, and counts: the mean is over all global views (DINOv2's code).
        """
        valid = batch.valid_in(self.modalities)
        total = torch.stack(
            [
                prototype_cross_entropy(
                    outputs[name],
                    [outputs[TEACHER + name]],
                    self.cfg.temperature,
                    shares(valid, outputs[TEACHER + name + COUNTS]),
                )
                for name in self.outputs
            ]
        ).sum()
        weight = self.cfg.weight * self.ibot.weight
        statistics = {"valid": valid.sum().float()}
        return Term(total / len(self.outputs), outputs["ibot/count"], weight, statistics)

    def after_update(
        self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the centre, moved towards the mean of the teacher's logits of masked patches of all ranks."""
        if self.cfg.balance != "centre":
            return state
        valid = self._valid(taught, batch).split([len(taught[TEACHER + name]) for name in self.outputs])
        sums = [sum_rows(taught[TEACHER + name], own) for name, own in zip(self.outputs, valid)]
        return {"centre": update_centre(state["centre"], torch.stack(sums).sum(0), self.cfg.centre_momentum)}

    def _valid(self, taught: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return which masked patches of all views are of valid rows, bool [n]."""
        valid = batch.valid_in(self.modalities)
        return torch.cat([shares(valid, taught[TEACHER + name + COUNTS]) > 0 for name in self.outputs])


def held_prototypes(cfg: config.Dino, head: str) -> dict[str, int]:
    """Return how many steps leave the prototypes of a head as they are, by the name of the parameter."""
    names = [f"{HEADS}{head}.last_layer.{name}" for name in ("weight", *(["norm"] if cfg.free_norm else []))]
    return dict.fromkeys(names, cfg.frozen_steps) if cfg.frozen_steps else {}


def shares(valid: Tensor, counts: Tensor) -> Tensor:
    """Return for each masked patch 1 / the masked patches of its image, or 0 where the row is not valid: fp32 [n].

    Args:
        valid: bool [b].
        counts: masked patches of each row, int64 [b], on the CPU.
    """
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    share = moved((1 / counts.float())[owner], valid.device)
    return share * valid[moved(owner, valid.device)]


def block_masks(uniforms: np.ndarray, grid: int, share: float, ratio: Sequence[float]) -> np.ndarray:
    """Mask blocks of patches (BEiT, Bao et al., arXiv:2106.08254, algorithm 1), as DINOv2 does.

    An image is masked or not; of one that is, a ratio of the patches is drawn, and blocks are added that mask at least
    one more patch and not more than that ratio in all. A block has 4 patches or more, and sides of 0.3 : 1 to 1 : 0.3.

    Args:
        uniforms: of each image, in [0, 1), [b, _DRAWN].
        grid: patches along a side.
        share: of the images that are masked.
        ratio: smallest and largest share of masked patches.

    Returns:
        bool [b, grid * grid].
    """
    masked, drawn = uniforms[:, 0] < share, ratio[0] + (ratio[1] - ratio[0]) * uniforms[:, 1]
    wanted = np.where(masked, np.round(drawn * grid**2), 0)
    place = np.arange(grid)
    mask = np.zeros((len(uniforms), grid, grid), dtype=bool)
    for area, aspect, top, left in uniforms[:, 2:].reshape(len(uniforms), _BLOCKS, 4).transpose(1, 2, 0):
        room = wanted - mask.sum((1, 2))
        size = np.minimum(_SMALLEST, room) + area * np.maximum(room - _SMALLEST, 0)
        sides = np.exp((2 * aspect - 1) * np.log(1 / 0.3)) ** 0.5
        height, width = np.round(size**0.5 * sides), np.round(size**0.5 / sides)
        first_row, first_column = np.floor(top * (grid - height + 1)), np.floor(left * (grid - width + 1))
        rows = (place >= first_row[:, None]) & (place < (first_row + height)[:, None])
        columns = (place >= first_column[:, None]) & (place < (first_column + width)[:, None])
        more = rows[:, :, None] & columns[:, None, :] & ~mask
        fits = (height <= grid) & (width <= grid) & (more.sum((1, 2)) <= room)
        mask |= more & fits[:, None, None]
    return mask.reshape(len(uniforms), grid**2)


_KEY = 0x1B07  # of the masks, beside the seeds of data orders
_BLOCKS = 32  # tried for each mask
_DRAWN = 2 + 4 * _BLOCKS
_SMALLEST = 4  # patches of a block
