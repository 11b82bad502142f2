"""Contrast images and captions over the global batch: CLIP's InfoNCE (Radford et al., arXiv:2103.00020) or SigLIP's
sigmoid loss (Zhai et al., arXiv:2303.15343)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from clipdist import config
from clipdist.data.batch import CAPTION, EMPTY, IMAGE, MODALITIES, Batch
from clipdist.distributed.collectives import rank_and_world
from clipdist.losses.global_batch import global_statistics
from clipdist.losses.infonce import batch_accuracy, info_nce
from clipdist.losses.several_texts import contrast_texts, texts_accuracy
from clipdist.losses.sigmoid import sigmoid_loss
from clipdist.objectives.objective import Objective, Term

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]
LOSSES: dict[str, LossFunction] = {"infonce": info_nce, "sigmoid": sigmoid_loss}


class ClipObjective(Objective):
    """The contrastive objective of CLIP and SigLIP. See Objective.

    Attributes:
        function: the loss function, with the arguments of clipdist.losses.infonce.info_nce.
        several: that of batches with several texts per image, see clipdist.losses.several_texts.contrast_texts.
    """

    name = "clip"
    modalities = MODALITIES
    features = (IMAGE, "text")

    def __init__(self, cfg: config.Clip) -> None:
        self.cfg = cfg
        self.upper_bounds = {"logit_scale": cfg.logit_scale_max}
        settings: dict[str, Any] = {"label_smoothing": cfg.label_smoothing, "logit_scale_max": cfg.logit_scale_max}
        self.function: LossFunction = partial(LOSSES[cfg.loss], implementation=cfg.implementation, **settings)
        self.several: LossFunction = partial(contrast_texts, loss=cfg.loss, **settings)

    def loss(self, outputs: Mapping[str, Tensor], batch: Batch) -> Term:
        """Return the term: with objectives.clip.widths the mean of the losses of the first d features, each normalised
        anew (Kusupati et al., arXiv:2205.13147, eq. 1 with equal weights). See Objective.loss.
        """
        scalars, rows = (outputs["logit_scale"], outputs.get("logit_bias")), self._rows(batch)
        image, text = outputs[IMAGE], outputs["text"]
        function = self.function if batch.roles is None else self.several
        nested = [
            function(image[..., :width].contiguous(), text[..., :width].contiguous(), *scalars, **rows)
            for width in self.cfg.nested_widths(image.shape[-1])
        ]
        value = torch.stack([value for value, _ in nested]).mean() if len(nested) > 1 else nested[0][0]
        return Term(value, rank_and_world()[1], self.cfg.weight, nested[0][1])

    def metrics(self, outputs: Mapping[str, Tensor], batch: Batch, term: Term) -> dict[str, float]:
        """Return the number of valid pairs and the in-batch accuracies (percent). Collective."""
        measure = batch_accuracy if batch.roles is None else texts_accuracy
        accuracy = measure(outputs[IMAGE], outputs["text"], **self._rows(batch))
        return global_statistics({**term.statistics, **accuracy})

    def _rows(self, batch: Batch) -> dict[str, Any]:
        """Return the valid rows and groups of a batch, as arguments of the loss."""
        groups = batch.group_id if self.cfg.group_positives else None
        several = {}
        if batch.roles is not None:
            several = {"captions": batch.roles == CAPTION, "candidates": batch.roles != EMPTY}
        return {"valid": batch.valid_in(self.modalities), "group_id": groups, **several}
