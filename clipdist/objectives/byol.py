"""Bootstrap your own latent: predict a teacher's projection of another view (Grill et al., arXiv:2006.07733)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.views import views_of
from clipdist.losses.cosine import cosine_distance
from clipdist.models.heads import ProjectionHead, mlp
from clipdist.objectives.objective import TEACHER, Moment, Objective, TeacherSpec, Term


class ByolObjective(Objective):
    """BYOL: 2 - 2 cos(prediction of one view, the teacher's projection of the other), both ways. See Objective."""

    name = "byol"
    additive = True

    def __init__(self, cfg: config.Byol, image_size: int) -> None:
        self.cfg = cfg
        self.views = views_of(self.name, cfg.views, image_size)
        self.names = tuple(view.name for view in self.views)
        self.teacher = TeacherSpec(self.names, self.momentum, training=True)

    def momentum(self, at: Moment) -> float:
        """Return 1 - (1 - m) (cos(pi k / K) + 1) / 2 (section 3.3)."""
        return at.cosine(self.cfg.momentum, 1.0)

    def head(self, width: int) -> nn.Module:
        """Return projector and predictor, each with one hidden layer and BatchNorm in it."""
        hidden, out = self.cfg.head
        return ProjectionHead(mlp([width, hidden, out]), mlp([out, hidden, out]))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over valid rows and both directions (equation 2). See Objective.loss."""
        first, second = self.names
        valid = batch.valid_in(self.modalities)
        pairs = ((first, second), (second, first))
        apart = [2 * cosine_distance(outputs[own], outputs[TEACHER + other]) for own, other in pairs]
        total = torch.where(valid, apart[0] + apart[1], 0.0).sum()
        return Term(total, outputs["byol/count"], self.cfg.weight, {"valid": valid.sum().float()})
