"""Contrast two views of an image with all views of the global batch (SimCLR, Chen et al., arXiv:2002.05709).

Beside CLIP it is SLIP (Mu et al., arXiv:2112.12750): CLIP has a view of its own, and this objective two more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.views import views_of
from clipdist.distributed.collectives import rank_and_world
from clipdist.losses.nt_xent import nt_xent
from clipdist.models.heads import ProjectionHead, mlp
from clipdist.objectives.objective import Objective, Term


class SimClrObjective(Objective):
    """NT-Xent of the head's outputs for two views. See Objective."""

    name = "simclr"

    def __init__(self, cfg: config.SimClr, image_size: int) -> None:
        self.cfg = cfg
        self.views = views_of(self.name, cfg.views, image_size)
        self.features = tuple(view.name for view in self.views)

    def head(self, width: int) -> nn.Module:
        """Return linear layers with BatchNorm and ReLU between them."""
        return ProjectionHead(mlp([width, *self.cfg.head]))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the mean over the 2N valid views (equation 1). See Objective.loss."""
        first, second = (outputs[name] for name in self.features)
        value, statistics = nt_xent(first, second, self.cfg.temperature, valid=batch.valid_in(self.modalities))
        return Term(value, rank_and_world()[1], self.cfg.weight, statistics)
