"""Distil a frozen teacher into the model, by its features or by its logits over the global batch.

Towards the weights that a run starts from it keeps what fine-tuning would forget (Li & Hoiem, arXiv:1606.09282);
towards a larger model it is CLIP-KD (Yang et al., arXiv:2307.12732).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipdist import config
from clipdist.data.batch import EMPTY, IMAGE, MODALITIES, Batch
from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.losses.cosine import cosine_distance
from clipdist.losses.distillation import distill_logits
from clipdist.losses.global_batch import LN_100
from clipdist.objectives.objective import TEACHER, Given, Moment, Objective, Term


class DistillObjective(Objective):
    """Distillation from the outputs of a clipdist.objectives.teacher.Teacher. See Objective."""

    name = "distill"
    modalities = MODALITIES
    features = (IMAGE, "text")

    def __init__(self, cfg: config.Distill) -> None:
        self.cfg = cfg
        self.upper_bounds = {"logit_scale": LN_100} if cfg.target == "logits" else {}

    def given(self, taught: Mapping[str, Tensor], batch: Batch, state: Mapping[str, Tensor], at: Moment) -> Given:
        """Return the frozen teacher's outputs. See Objective.given."""
        rows = {TEACHER + name: taught[TEACHER + name] for name in self.features}
        return Given(rows, {name: taught[name] for name in (f"{TEACHER}logit_scale",)})

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the term. See Objective.loss."""
        valid = batch.valid_in(self.modalities)
        if self.cfg.target == "features":
            return self._of_features(outputs, batch, valid)
        value, statistics = distill_logits(
            outputs[IMAGE],
            outputs["text"],
            outputs["logit_scale"],
            outputs[TEACHER + IMAGE],
            outputs[f"{TEACHER}text"],
            float(outputs[f"{TEACHER}logit_scale"]),
            valid=valid,
        )
        return Term(value, rank_and_world()[1], self.cfg.weight, statistics)

    def _of_features(self, outputs: Mapping[str, Tensor], batch: Batch, valid: Tensor) -> Term:
        """Return the mean over valid rows and both towers of 1 - cos(student, teacher); of several texts their mean."""
        image, text = (cosine_distance(outputs[name], outputs[TEACHER + name]) for name in (IMAGE, "text"))
        if batch.roles is not None:
            there = batch.roles != EMPTY
            text = (text * there).sum(1) / there.sum(1).clamp(min=1)
        total = torch.where(valid, (image + text) / 2, 0.0).sum()
        rows = valid.sum().float()
        return Term(total, all_reduce_sum(rows).clamp_(min=1), self.cfg.weight, {"valid": rows})
