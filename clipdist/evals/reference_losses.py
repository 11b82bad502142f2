"""The formulas of all objectives over the whole global batch, in the dtype of their inputs: float64 for the audit.

They share no code with clipdist/losses and clipdist/objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdist import config
from clipdist.data.batch import CAPTION, EMPTY, IMAGE, MODALITIES, Batch

Outputs = Mapping[str, Tensor]


def clip(cfg: config.Clip, outputs: Outputs, constants: Outputs, batch: Batch) -> Tensor:
    """Compute CLIP's loss with the full matrix of logits: the mean over the widths."""
    images, texts, t, bias = outputs[IMAGE], outputs["text"], outputs["logit_scale"], outputs.get("logit_bias")
    valid = batch.valid_in(MODALITIES).to(images.device)
    roles = torch.full((len(valid), 1), CAPTION) if batch.roles is None else batch.roles
    roles = roles.to(images.device)
    there, caption = (roles != EMPTY) & valid[:, None], roles == CAPTION  # [B, K]
    owner = torch.arange(len(roles), device=images.device)[:, None].expand_as(roles)
    if cfg.group_positives:
        groups = batch.group_id.to(images.device).view_as(roles)
        positive = ((groups[:, :, None] == groups[there]) & caption[:, :, None]).any(1)  # [B, M]
    else:
        positive = (owner[:, :1] == owner[there]) & caption[there]
    positive, texts = positive[valid].to(images.dtype), texts.view(*roles.shape, -1)[there]
    values = []
    for width in sorted({*cfg.widths, images.shape[1]}):
        x, y = (part[:, :width] / part[:, :width].norm(dim=1, keepdim=True) for part in (images[valid], texts))
        logits = t.exp() * x @ y.T
        if bias is not None:
            values.append(_sigmoid(logits + bias, positive, cfg.label_smoothing))
        else:
            values.append(_info_nce(logits, positive, caption[there], cfg.label_smoothing))
    return sum(values, torch.zeros_like(t[0])) / len(values)


def _info_nce(logits: Tensor, positive: Tensor, caption: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of rows, and of the columns of captions; targets uniform over positives, smoothed.

    Args:
        logits, positive: [N, M].  caption: bool [M].
    """
    losses = []
    for s, y in ((logits, positive), (logits[:, caption].T, positive[:, caption].T)):
        target = (1 - smoothing) * y / y.sum(1, keepdim=True) + smoothing / y.shape[1]
        losses.append(-(target * s.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def _sigmoid(logits: Tensor, same: Tensor, smoothing: float) -> Tensor:
    """Return 1/N sum_ij softplus(s_ij) - y_ij s_ij, y = (1 - e) * same + e / 2 (arXiv:2303.15343, algorithm 1)."""
    target = (1 - smoothing) * same + smoothing / 2
    return (F.softplus(logits) - target * logits).sum() / len(logits)


def distill(cfg: config.Distill, outputs: Outputs, constants: Outputs, batch: Batch) -> Tensor:
    """Compute distillation from the whole softmaxes, or by cosines."""
    t = outputs["logit_scale"]
    valid = batch.valid_in(MODALITIES).to(t.device)
    own, theirs = (
        [side / side.norm(dim=-1, keepdim=True) for side in (x[valid].to(t.dtype), y[valid].to(t.dtype))]
        for x, y in ((outputs[name], constants[f"teacher/{name}"]) for name in (IMAGE, "text"))
    )
    if cfg.target == "features":
        apart = [1 - (x * y).sum(-1) for x, y in zip(own, theirs)]
        if batch.roles is not None:
            there = (batch.roles.to(t.device)[valid] != EMPTY).to(t.dtype)
            apart[1] = (apart[1] * there).sum(1) / there.sum(1)
        return (apart[0] + apart[1]).mean() / 2
    logits = t.exp() * own[0] @ own[1].T
    target = constants["teacher/logit_scale"].to(t.device).to(t.dtype).exp() * theirs[0] @ theirs[1].T
    values = [
        F.kl_div(s.log_softmax(1), r.log_softmax(1), reduction="batchmean", log_target=True)
        for s, r in ((logits, target), (logits.T, target.T))
    ]
    return (values[0] + values[1]) / 2


def byol(cfg: config.Byol, outputs: Outputs, constants: Outputs, batch: Batch) -> Tensor:
    """Compute the mean over images of 2 - 2 cos, both ways."""
    valid = batch.valid["image"]
    apart = [
        2 - 2 * F.cosine_similarity(outputs[f"byol/{own}"], constants[f"teacher/byol/{1 - own}"], dim=1, eps=0)
        for own in (0, 1)
    ]
    return (apart[0] + apart[1])[valid].mean()


# By the name of an objective's section. Each takes the section; the student's outputs [B, ...] and scalars [1]; the
# teacher's outputs and the state; and the global batch. It returns a scalar.
FORMULAS: dict[str, Callable[[Any, Outputs, Outputs, Batch], Tensor]] = {"clip": clip, "distill": distill, "byol": byol}
