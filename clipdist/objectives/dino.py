"""Agree with a teacher on soft classes of an image's views (DINO, Caron et al., arXiv:2104.14294), balanced by a centre
or by Sinkhorn-Knopp, and spread by KoLeo (DINOv2, Oquab et al., arXiv:2304.07193)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clipdist import config
from clipdist.data.batch import Batch
from clipdist.data.views import views_of
from clipdist.distributed.collectives import rank_and_world
from clipdist.losses.koleo import koleo
from clipdist.losses.prototypes import (
    prototype_cross_entropy,
    sinkhorn_centre,
    soft_targets,
    sum_rows,
    update_centre,
)
from clipdist.models.dual_encoder import HIDDEN
from clipdist.models.heads import PatchHead, PrototypeHead
from clipdist.objectives.ibot import held_prototypes
from clipdist.objectives.objective import TEACHER, Given, Moment, Objective, TeacherSpec, Term


class DinoObjective(Objective):
    """Cross-entropy of the model's softmax of each view with the teacher's of each other global view. See Objective."""

    name = "dino"
    additive = True

    def __init__(self, cfg: config.Dino, image_size: int) -> None:
        self.cfg = cfg
        self.views = views_of(self.name, [*cfg.views, *[cfg.local] * cfg.local_views], image_size)
        self.names = tuple(view.name for view in self.views)
        self.globals = self.names[:2]
        self.held = held_prototypes(cfg, "dino")
        self.teacher = TeacherSpec(self.globals, lambda at: at.cosine(cfg.momentum, 1.0))

    def head(self, width: int) -> nn.Module:
        """Return linear layers with GELU between them, and the prototypes; with iBOT the same for patches."""
        cfg = self.cfg
        head = PrototypeHead([width, *cfg.head], cfg.prototypes, cfg.free_norm)
        if cfg.ibot:
            head.patches = PatchHead([width, *cfg.ibot.head], cfg.ibot.prototypes, cfg.free_norm)
        return head

    def state(self) -> dict[str, Tensor]:
        """Return the centre, one number for each prototype. See Objective.state."""
        return {"centre": torch.zeros(self.cfg.prototypes)} if self.cfg.balance == "centre" else {}

    def given(self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor], at: Moment) -> Given:
        """Return the teacher's softmax of the global views. See Objective.given."""
        cfg, valid = self.cfg, batch.valid_in(self.modalities)
        temperature = at.ramp(cfg.teacher_temperature, cfg.teacher_warmup_steps)
        rows = {}
        for name in self.globals:
            logits = taught[TEACHER + name]
            centre = state.get("centre")
            if centre is None:
                centre = sinkhorn_centre(logits.__getitem__, valid, cfg.prototypes, temperature)
            rows[TEACHER + name] = soft_targets(logits, centre, temperature)
        return Given(rows, super().given(taught, batch, {}, at).shared)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over valid rows of the mean over all pairs of views (algorithm 1). See Objective.loss."""
        valid = batch.valid_in(self.modalities)
        pairs = 2 * len(self.names) - 2
        total = torch.stack(
            [
                prototype_cross_entropy(
                    outputs[name],
                    [outputs[TEACHER + other] for other in self.globals if other != name],
                    self.cfg.temperature,
                    valid.float(),
                )
                for name in self.names
            ]
        ).sum()
        return Term(total / pairs, outputs["dino/count"], self.cfg.weight, {"valid": valid.sum().float()})

    def after_update(
        self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the centre, moved towards the mean of the teacher's logits. See Objective.after_update."""
        if self.cfg.balance != "centre":
            return state
        valid = batch.valid_in(self.modalities)
        sums = torch.stack([sum_rows(taught[TEACHER + name], valid) for name in self.globals]).sum(0)
        return {"centre": update_centre(state["centre"], sums, self.cfg.centre_momentum)}


class KoLeoObjective(Objective):
    """KoLeo of the image tower's features of DINO's global views, with the weight of both. See Objective."""

    name = "koleo"

    def __init__(self, cfg: config.Dino) -> None:
        self.cfg = cfg
        self.features = tuple(f"{HIDDEN}/dino/{view}" for view in (0, 1))

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the sum over both views, each spread by itself. See Objective.loss."""
        valid = batch.valid_in(self.modalities)
        parts = [koleo(outputs[name], group_size=self.cfg.koleo_group, valid=valid) for name in self.features]
        value = parts[0][0] + parts[1][0]
        return Term(value, rank_and_world()[1], self.cfg.weight * self.cfg.koleo, parts[0][1])
