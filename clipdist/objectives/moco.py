"""Contrast a view of an image with a teacher's keys: MoCo's queue (He et al., arXiv:1911.05722; Chen et al.,
arXiv:2003.04297), or the keys of the global batch (MoCo v3, Chen et al., arXiv:2104.02057)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.views import views_of
from clipdist.distributed.collectives import rank_and_world
from clipdist.losses.momentum_contrast import contrast_batch, contrast_queue, empty_queue, enqueue
from clipdist.models.heads import ProjectionHead, mlp
from clipdist.objectives.objective import TEACHER, Moment, Objective, TeacherSpec, Term


class MocoObjective(Objective):
    """With a queue the first view is the query and the second the key; without one both are both. See Objective."""

    name = "moco"

    def __init__(self, cfg: config.Moco, image_size: int) -> None:
        self.cfg = cfg
        self.views = views_of(self.name, cfg.views, image_size)
        self.names = tuple(view.name for view in self.views)
        self.additive = bool(cfg.queue)
        self.taught_alone = self.names[1:] if cfg.queue else ()
        self.features = () if cfg.queue else self.names
        taught = self.names[1:] if cfg.queue else self.names
        self.teacher = TeacherSpec(taught, self.momentum, training=True, shuffled=bool(cfg.queue))

    def momentum(self, at: Moment) -> float:
        """Return the constant of MoCo v1 and v2, or v3's, which rises to 1."""
        return self.cfg.momentum if self.cfg.queue else at.cosine(self.cfg.momentum, 1.0)

    def head(self, width: int) -> nn.Module:
        """Return v1's and v2's linear layers; with BatchNorm, and a predictor that the teacher lacks, v3's."""
        cfg = self.cfg
        if cfg.queue:
            return ProjectionHead(mlp([width, *cfg.head], norm=False))
        predictor = mlp([cfg.head[-1], *cfg.predictor], last_norm=True)
        return ProjectionHead(mlp([width, *cfg.head], last_norm=True), predictor)

    def state(self) -> dict[str, Tensor]:
        """Return an empty queue. See Objective.state."""
        return empty_queue(self.cfg.queue, self.cfg.head[-1]) if self.cfg.queue else {}

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over valid queries, or v3's mean, both ways. See Objective.loss."""
        cfg, valid = self.cfg, batch.valid_in(self.modalities)
        first, second = self.names
        if cfg.queue:
            queue = {name: outputs[f"moco/{name}"] for name in ("queue", "fill")}
            total, statistics = contrast_queue(
                outputs[first], outputs[TEACHER + second], queue, cfg.temperature, valid=valid
            )
            return Term(total, outputs["moco/count"], cfg.weight, statistics)
        parts = [
            contrast_batch(outputs[query], outputs[TEACHER + key], cfg.temperature, valid=valid)
            for query, key in ((first, second), (second, first))
        ]
        value = parts[0][0] + parts[1][0]
        return Term(value, rank_and_world()[1], cfg.weight, parts[0][1])

    @torch.no_grad()
    def after_update(
        self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the queue with this batch's keys. See Objective.after_update."""
        if not self.cfg.queue:
            return state
        return enqueue(state, taught[TEACHER + self.names[1]], valid=batch.valid_in(self.modalities))
