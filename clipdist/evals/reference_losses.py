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
from clipdist.objectives.objective import Moment

Outputs = Mapping[str, Tensor]


def clip(cfg: config.Clip, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
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


def distill(cfg: config.Distill, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute distillation from the whole softmaxes, or by cosines."""
    t = outputs["logit_scale"]
    valid = batch.valid_in(MODALITIES).to(t.device)
    own, theirs = (
        [_unit(side[f"{of}{name}"][valid].to(t.dtype)) for name in (IMAGE, "text")]
        for side, of in ((outputs, ""), (constants, "teacher/"))
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


def simclr(cfg: config.SimClr, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute NT-Xent from the whole matrix of similarities."""
    valid = batch.valid["image"]
    unit = torch.cat([_unit(outputs[f"simclr/{view}"][valid]) for view in (0, 1)])
    number = len(unit) // 2
    logits = (unit @ unit.T / cfg.temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * number, device=unit.device).roll(number)
    return F.cross_entropy(logits, partner)


def moco(cfg: config.Moco, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute the cross-entropy of whole rows of logits, the key's first."""
    valid, tau = batch.valid["image"], cfg.temperature
    if cfg.queue:
        query, key = _unit(outputs["moco/0"][valid]), _unit(constants["teacher/moco/1"][valid])
        negatives = constants["moco/queue"][: int(constants["moco/fill"])]
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ negatives.T], dim=1) / tau
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))
    values = []
    for own, other in ((0, 1), (1, 0)):
        query, key = _unit(outputs[f"moco/{own}"][valid]), _unit(constants[f"teacher/moco/{other}"][valid])
        values.append(F.cross_entropy(query @ key.T / tau, torch.arange(len(query), device=query.device)))
    return 2 * tau * (values[0] + values[1])


def moco_state(cfg: config.Moco, constants: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Return the queue with the batch's keys written one by one."""
    if not cfg.queue:
        return {}
    queue, pointer, fill = (constants[f"moco/{name}"].clone() for name in ("queue", "pointer", "fill"))
    for key in _unit(constants["teacher/moco/1"][batch.valid["image"]]):
        queue[int(pointer)] = key
        pointer, fill = (pointer + 1) % cfg.queue, (fill + 1).clamp(max=cfg.queue)
    return {"moco/queue": queue, "moco/pointer": pointer, "moco/fill": fill}


def byol(cfg: config.Byol, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute the mean over images of 2 - 2 cos, both ways."""
    valid = batch.valid["image"]
    apart = [
        2 - 2 * (_unit(outputs[f"byol/{own}"]) * _unit(constants[f"teacher/byol/{1 - own}"])).sum(1) for own in (0, 1)
    ]
    return (apart[0] + apart[1])[valid].mean()


def dino(cfg: config.Dino, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute the mean of the cross-entropies of all pairs of a global view and another one."""
    valid, first, last = batch.valid["image"], *cfg.teacher_temperature
    warm = cfg.teacher_warmup_steps
    tau = last if at.step >= warm else first + (last - first) * at.step / warm
    targets = []
    for view in (0, 1):
        logits = constants[f"teacher/dino/{view}"][valid]
        if cfg.balance == "centre":
            targets.append(((logits - constants["dino/centre"]) / tau).softmax(1))
        else:
            targets.append(_sinkhorn_knopp(logits, tau))
    values = [
        -(target * (outputs[f"dino/{view}"][valid] / cfg.temperature).log_softmax(1)).sum(1).mean()
        for other, target in enumerate(targets)
        for view in range(2 + cfg.local_views)
        if view != other
    ]
    spread = [_koleo(outputs[f"hidden/dino/{view}"], valid, cfg.koleo_group) for view in (0, 1) if cfg.koleo]
    masked = cfg.ibot.weight * _ibot(cfg, outputs, constants, valid, tau) if cfg.ibot else 0.0
    return torch.stack(values).mean() + cfg.koleo * sum(spread, torch.zeros_like(values[0])) + masked


def _ibot(cfg: config.Dino, outputs: Outputs, constants: Outputs, valid: Tensor, tau: float) -> Tensor:
    """Compute the mean over all valid global views of the mean over a view's masked patches, 0 where it has none."""
    student = _of_images("patches/dino", outputs, constants, valid)
    teacher = _of_images("teacher/patches/dino", constants, constants, valid)
    logits = torch.cat(teacher)
    if cfg.balance == "centre":
        targets = ((logits - constants["ibot/centre"]) / tau).softmax(1)
    else:
        targets = _sinkhorn_knopp(logits, tau)
    values = [
        -(target * (own / cfg.temperature).log_softmax(1)).sum(1).mean()
        for own, target in zip(student, targets.split([len(own) for own in teacher]))
        if len(own)
    ]
    return torch.stack(values).sum() / len(student)


def _of_images(name: str, outputs: Outputs, constants: Outputs, valid: Tensor) -> list[Tensor]:
    """Return the logits of masked patches [n, P] of every valid image, of both views."""
    found = []
    for view in (0, 1):
        counts = constants[f"noise/dino/{view}"].sum(1).tolist()
        found += [own for own, there in zip(outputs[f"{name}/{view}"].split(counts), valid.tolist()) if there]
    return found


def _koleo(features: Tensor, valid: Tensor, size: int) -> Tensor:
    """Return -1/N sum_i log of the distance to the nearest other valid feature of a group, or of the whole batch."""
    group = torch.arange(len(features), device=features.device)[valid] // (size or len(features))
    unit = _unit(features[valid])
    apart = group[:, None] != group
    largest, nearest = (unit @ unit.T).masked_fill(apart, -torch.inf).fill_diagonal_(-torch.inf).max(1)
    found = largest > -torch.inf
    return -(unit - unit[nearest])[found].norm(dim=1).log().mean()


def dino_state(cfg: config.Dino, constants: Outputs, batch: Batch) -> dict[str, Tensor]:
    """Return the centres moved towards the means of both views' logits: of images, and of their masked patches."""
    if cfg.balance != "centre":
        return {}
    valid, m = batch.valid["image"], cfg.centre_momentum
    logits = {"dino/centre": torch.cat([constants[f"teacher/dino/{view}"][valid] for view in (0, 1)])}
    if cfg.ibot:
        logits["ibot/centre"] = torch.cat(_of_images("teacher/patches/dino", constants, constants, valid))
    return {name: m * constants[name] + (1 - m) * rows.mean(0) for name, rows in logits.items()}


def vae(cfg: config.Vae, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute minus the evidence lower bound, by torch's distributions."""
    normal = torch.distributions.Normal
    parts, valid = outputs["vae/0"], batch.valid["image"]
    code = normal(parts[:, : cfg.latent], (parts[:, cfg.latent : 2 * cfg.latent] / 2).exp())
    divergence = torch.distributions.kl_divergence(code, normal(torch.zeros_like(code.mean), 1.0)).sum(1)
    pixels = batch.images["vae/0"].to(parts) / 255
    target = F.interpolate(pixels, (cfg.size, cfg.size), mode="area").flatten(1)
    missed = ((parts[:, 2 * cfg.latent :] - target) / cfg.deviation).square().sum(1) / 2
    return ((missed + cfg.beta * divergence)[valid] / target.shape[1]).mean()


def caption(cfg: config.Caption, outputs: Outputs, constants: Outputs, batch: Batch, at: Moment) -> Tensor:
    """Compute the mean over all words of all captions from the whole logits [B, T, V]. CLIP's byte pairs alone.

    The end of a text is its highest id. SimVLM's prefixes are drawn as the objective draws them.
    """
    logits, valid = outputs["caption"], batch.valid_in(MODALITIES).cpu()
    missed: list[Tensor] = []
    prefixes = constants.get("caption/prefix")
    for row in valid.nonzero()[:, 0].tolist():
        words = batch.tokens[row, 1 : int(batch.tokens[row].argmax()) + 1].to(logits.device)
        first = int(prefixes[row]) - 1 if prefixes is not None else 0
        own = logits[row, first : len(words)]
        missed.append(F.cross_entropy(own, words[first:], reduction="none", label_smoothing=cfg.label_smoothing))
    return torch.cat(missed).mean()


def _sinkhorn_knopp(logits: Tensor, tau: float, iterations: int = 3) -> Tensor:
    """Return assignments [N, P] whose columns are alike in sum (arXiv:2006.09882, listing 1)."""
    q = ((logits - logits.max()) / tau).exp().T
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0, keepdim=True)
    return q.T


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


# By the name of an objective's section. Each takes the section; the student's outputs [B, ...] and scalars [1]; the
# teacher's outputs and the state; the global batch; and the step. It returns a scalar.
FORMULAS: dict[str, Callable[[Any, Outputs, Outputs, Batch, Moment], Tensor]] = {
    "clip": clip,
    "distill": distill,
    "simclr": simclr,
    "moco": moco,
    "byol": byol,
    "dino": dino,
    "vae": vae,
    "caption": caption,
}
# What a step makes of the state of objectives, by OBJECTIVE/NAME.
STATES: dict[str, Callable[[Any, Outputs, Batch], dict[str, Tensor]]] = {"moco": moco_state, "dino": dino_state}
