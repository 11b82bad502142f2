"""Predict what objectives on views of an image need beside the model: outputs over the batch, state, traffic.

W ranks with b images each, N = W b; P is the width of the outputs of an objective's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clipdist.data.batch import IMAGE
from clipdist.losses.tiles import Tile
from clipdist.losses.wire import BYTES, contrast_bytes, koleo_bytes, nt_xent_bytes, reduced_bytes
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.towers import run_on_shapes
from clipdist.objectives.dino import DinoObjective, KoLeoObjective
from clipdist.objectives.ibot import IbotObjective
from clipdist.objectives.make import reads_image
from clipdist.objectives.moco import MocoObjective
from clipdist.objectives.objective import Objective
from clipdist.objectives.simclr import SimClrObjective


@dataclass(frozen=True)
class Viewed:
    """An objective on views.

    Attributes:
        width: P; of KoLeo, which reads what precedes the heads, that of the tower.
        state_bytes: of what is kept between steps.
    """

    objective: Objective
    width: int
    state_bytes: int

    @property
    def taught_views(self) -> int:
        """Number of views that a teacher sees."""
        return len(self.objective.teacher.views) if self.objective.teacher else 0

    def feature_bytes(self, share: int, micro: int, world: int, itemsize: int) -> int:
        """Return the bytes of outputs over a rank's rows, of those that are gathered, and of their gradients.

        Args:
            share: b.  micro: rows of one forward pass.  itemsize: bytes of an output.
        """
        width, coupled = self.width, len(self.objective.features)
        taught = self.taught_views * share * width * itemsize
        gradients = coupled * share * width * 4
        cached = coupled * share * width * (itemsize + 4) if micro < share else 0
        gathered = world * share * width * (itemsize * (world > 1) + 4)  # as sent, and unit vectors
        match self.objective:
            case SimClrObjective():
                return gradients + cached + 2 * gathered
            case MocoObjective() | KoLeoObjective() if coupled:
                return taught + gradients + cached + gathered
            case IbotObjective():  # of masked patches: the teacher's, its softmax, and the model's with its gradient
                masked = self.objective.masked_patches * width
                return round(masked * (share * (itemsize + 4) + 2 * micro * itemsize))
            case DinoObjective():  # and the softmax of the teacher's
                return taught + self.taught_views * share * width * 4
            case _:  # one view with another: unit vectors and their difference, of both ways, or of a query and its key
                return taught + 6 * micro * width * 4

    def tile_bytes(self, tile: Tile, share: int, micro: int, world: int) -> int:
        """Return the bytes of logits that exist at one time, and of the outputs beside them."""
        width, rows, columns = self.width, tile.rows, tile.columns
        match self.objective:
            case SimClrObjective():
                side = min(rows, columns, 2 * world * share)
                return 4 * (2 * side**2 + 2 * side * width)
            case MocoObjective():
                queue = self.objective.cfg.queue
                rows, columns = min(rows, micro if queue else share), min(columns, queue or world * share)
                return 4 * (rows * columns + (rows + columns) * width)
            case KoLeoObjective():
                return 4 * min(rows, share) * min(columns, world * share)
            case DinoObjective() | IbotObjective():  # chunks of rows: logits, exponentials and targets
                return 3 * 4 * min(micro, max(1, rows * columns // width)) * width
            case _:
                return 0

    def wire_bytes(self, world: int, share: int, dtype: str) -> float:
        """Return the bytes that a rank sends in a step for the loss and the state.

        Args:
            dtype: of the outputs, a key of BYTES.
        """
        count = reduced_bytes(world, 4) if self.objective.additive else 0.0
        keys = (world - 1) * share * (self.width * BYTES[dtype] + 1)  # and their validity
        match self.objective:
            case SimClrObjective():
                return nt_xent_bytes(world, share, self.width, dtype)
            case MocoObjective():
                return count + keys if self.objective.additive else 2 * contrast_bytes(world, share, self.width, dtype)
            case KoLeoObjective():
                return 2 * koleo_bytes(world, share, self.width, dtype, self.objective.cfg.koleo_group)
            case DinoObjective() | IbotObjective() if self.objective.cfg.balance == "centre":
                return count + reduced_bytes(world, 8 * (self.width + 1))
            case DinoObjective() | IbotObjective():  # Sinkhorn-Knopp: the largest and the sums, float64, thrice
                parts = max(1, self.taught_views)
                return count + parts * (3 * 2 * reduced_bytes(world, 8 * self.width) + 8 * (world - 1))
            case _:
                return count


def viewed_objectives(objectives: Sequence[Objective], model: DualEncoder) -> tuple[Viewed, ...]:
    """Return the objectives on views of a model that has their heads, on the meta device."""
    found = []
    for objective in objectives:
        if isinstance(objective, KoLeoObjective):
            found.append(Viewed(objective, model.hidden_width(), 0))
        elif isinstance(objective, IbotObjective):
            width = objective.ibot.prototypes
            found.append(Viewed(objective, width, 4 * width * (objective.cfg.balance == "centre")))
        elif objective.views:
            head = model.heads[objective.name]
            dtype = next(head.parameters()).dtype
            width = run_on_shapes(head, (2, model.hidden_width()), dtype)[-1]
            with torch.device("meta"):
                state = objective.state().values()
            found.append(Viewed(objective, width, sum(tensor.nbytes for tensor in state)))
    return tuple(found)


def taught_sides(objectives: Sequence[Objective], sides: Mapping[str, int]) -> dict[str, int]:
    """Return the sides of the views that a teacher which follows the weights sees, by name; empty: there is none."""
    return {view: sides[view] for each in objectives if each.teacher for view in each.teacher.views}


def normalised_channels(objectives: Sequence[Objective], model: DualEncoder) -> int:
    """Return the channels of BatchNorm in training that a step normalises, forward and backward, in all views.

    A teacher whose BatchNorm normalises by the batch adds those of its passes.
    """

    def channels(view: str) -> int:
        norms = (module for module in model.modules_of(view) if isinstance(module, _BatchNorm))
        return sum(norm.num_features for norm in norms if norm.training)

    total = 2 * channels(IMAGE) if reads_image(objectives) else 0
    for objective in objectives:
        seen = [view.name for view in objective.views if view.name not in objective.taught_alone]
        total += 2 * sum(map(channels, seen))
        if objective.teacher and objective.teacher.training:
            total += sum(map(channels, objective.teacher.views))
    return total
