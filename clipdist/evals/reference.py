"""Compute the reference loss and gradients of the audit: one process on the whole global batch.

It runs every rank's micro-batches from the same weights, with their random state and BatchNorm grouping, concatenates
the features, applies the dense formula in float64 and averages over the valid rows. The towers run in the precision of
the training: the audit measures errors of the distribution and the loss, not the rounding inside a tower. It shares no
code with clipdist/losses.

Shapes: B rows of the global batch, b = B / W rows of a rank, m rows of a micro-batch, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from clipdist import config
from clipdist.config import Config
from clipdist.data.batch import CAPTION, EMPTY, IMAGE, MODALITIES, Batch
from clipdist.distributed.rank import DistEnv
from clipdist.engine.step import seed_step
from clipdist.models.dual_encoder import DualEncoder
from clipdist.objectives.teacher import Teacher

# Below this loss the relative error of any fp32 implementation grows; the dense formula's is measured for comparison.
LOW_LOSS = 0.1


@dataclass(frozen=True)
class LossAndGradients:
    """The global loss, and the gradients of trained parameters by name, [numel], before clipping."""

    loss: float
    gradients: dict[str, torch.Tensor]


# The formulas


def dense_loss(
    cfg: config.Clip,
    images: torch.Tensor,
    texts: torch.Tensor,
    t: torch.Tensor,
    bias: torch.Tensor | None,
    batch: Batch,
) -> torch.Tensor:
    """Compute the global loss with the full matrix of logits, in the dtype of its inputs: the mean over the widths.

    Args:
        images, texts: features [B, D], not normalised; texts [B, K, D] where the batch has several for each image.
        t, bias: [1]; the logits are exp(t) * cosine (+ bias).
        batch: gives valid rows and groups.

    Returns:
        scalar.
    """
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


def _info_nce(logits: torch.Tensor, positive: torch.Tensor, caption: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the cross-entropy of rows, and of the columns of captions; targets uniform over positives, smoothed.

    Args:
        logits, positive: [N, M].  caption: bool [M].
    """
    losses = []
    for s, y in ((logits, positive), (logits[:, caption].T, positive[:, caption].T)):
        target = (1 - smoothing) * y / y.sum(1, keepdim=True) + smoothing / y.shape[1]
        losses.append(-(target * s.log_softmax(1)).sum(1).mean())
    return (losses[0] + losses[1]) / 2


def _sigmoid(logits: torch.Tensor, same: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return 1/N sum_ij softplus(s_ij) - y_ij s_ij, y = (1 - e) * same + e / 2 (arXiv:2303.15343, algorithm 1)."""
    target = (1 - smoothing) * same + smoothing / 2
    return (F.softplus(logits) - target * logits).sum() / len(logits)


def dense_distillation(
    cfg: config.Distill,
    features: tuple[torch.Tensor, torch.Tensor],
    t: torch.Tensor,
    taught: dict[str, torch.Tensor],
    batch: Batch,
) -> torch.Tensor:
    """Compute the global term of distillation, in the dtype of its inputs.

    Args:
        features: of images and texts, as in dense_loss.
        t: [1], the student's log scale.
        taught: what the teacher gives for the global batch.

    Returns:
        scalar.
    """
    valid = batch.valid_in(MODALITIES).to(t.device)
    own, theirs = (
        [side / side.norm(dim=-1, keepdim=True) for side in (x[valid].to(t.dtype), y[valid].to(t.dtype))]
        for x, y in (features, (taught["teacher/image"], taught["teacher/text"]))
    )
    if cfg.target == "features":
        apart = [1 - (x * y).sum(-1) for x, y in zip(own, theirs)]
        if batch.roles is not None:
            there = (batch.roles.to(t.device)[valid] != EMPTY).to(t.dtype)
            apart[1] = (apart[1] * there).sum(1) / there.sum(1)
        return (apart[0] + apart[1]).mean() / 2
    logits = t.exp() * own[0] @ own[1].T
    target = taught["teacher/logit_scale"].to(t.device).to(t.dtype).exp() * theirs[0] @ theirs[1].T
    values = [
        F.kl_div(s.log_softmax(1), r.log_softmax(1), reduction="batchmean", log_target=True)
        for s, r in ((logits, target), (logits.T, target.T))
    ]
    return (values[0] + values[1]) / 2


# The reference


class Reference:
    """A model trained by one process on the whole global batch, with one micro-batch in memory at a time.

    Args:
        model: a copy of the engine's model before training, fp32; modified and cast to `dtype`.
        dist_env: gives the number of ranks to reproduce, and the device.
        dtype: of the towers.
        teacher: of the engine, if it has one; it is frozen, and in evaluation mode a row's outputs are its own.

    Attributes:
        scalars: fp32 values of the model's scalars, [1].
        draws_random_numbers: whether a forward pass has drawn random numbers (dropout).
    """

    def __init__(
        self, model: DualEncoder, cfg: Config, dist_env: DistEnv, dtype: torch.dtype, teacher: Teacher | None = None
    ) -> None:
        self.seed, self.world, self.device, self.dtype = cfg.train.seed, dist_env.world_size, dist_env.device, dtype
        self.objectives, self.teacher = cfg.objectives, teacher
        self.scalars = {
            name: parameter.detach().to(self.device).clone()
            for name, parameter in model.named_parameters()
            if name in model.scalars
        }
        self.model = model.to(self.device).to(dtype).train()
        self.draws_random_numbers = False

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the engine's fp32 master weights [numel], rounded to `dtype` as the engine does."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name].view_as(parameter))
            if name in self.scalars:
                self.scalars[name] = weights[name].clone()

    @torch.no_grad()
    def load_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Copy buffers by name."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def measure(
        self, batch: Batch, step: int, *, micro: int, scale: float = 1.0, clip: config.Clip | None = None
    ) -> tuple[LossAndGradients, LossAndGradients | None]:
        """Compute loss and gradients of the global batch, in float64 except for the towers.

        Args:
            batch: the global batch.
            step: from 0; determines dropout.
            micro: m, rows of one forward pass.
            scale: the loss scale of feature gradients in the towers (fp16).
            clip: the only objective; None: those that are configured.

        Returns:
            the reference, and the result of the dense formula in fp32 if the loss is below LOW_LOSS.

        Raises:
            RuntimeError: the model draws random numbers outside torch's generators.
        """
        cfg = config.Objectives(clip=clip) if clip else self.objectives
        taught = self.teacher(batch.to(self.device)) if self.teacher else {}
        with torch.no_grad(), self._update_statistics_once():
            cached = [self._features(batch, step, where) for where in self._micro_batches(batch, micro)]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        images, texts = (torch.cat(side) for side in zip(*cached))
        heads = [self._head(cfg, images, texts, taught, batch, torch.float64)]
        if self.dtype == torch.float32 and heads[0].loss <= LOW_LOSS:
            heads.append(self._head(cfg, images, texts, taught, batch, torch.float32))
        for where, before in zip(self._micro_batches(batch, micro), cached):
            features = self._features(batch, step, where)
            _check_replay(features, before)
            for head in heads:
                self._through_towers(head, features, where[2], scale)
        self.load_buffers(buffers)  # the second pass has updated the running statistics again
        measured = [LossAndGradients(head.loss, head.gradients) for head in heads]
        return measured[0], (measured[1] if len(measured) > 1 else None)

    @contextmanager
    def _update_statistics_once(self) -> Iterator[None]:
        """Update BatchNorm's running statistics once, by the mean over the forward passes inside.

        With momentum 1 the buffers hold the statistics of the last pass, which a hook collects.
        """
        norms: list[Any] = [
            norm
            for norm in self.model.modules()
            if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats
        ]
        before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        collected: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {norm: [] for norm in norms}

        def collect(norm: Any, *_: Any) -> None:
            collected[norm].append((norm.running_mean.double(), norm.running_var.double()))

        hooks = [norm.register_forward_hook(collect) for norm in norms]
        counts = [norm.num_batches_tracked.clone() for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        yield
        for norm, hook, count, (momentum, mean, var) in zip(norms, hooks, counts, before):
            hook.remove()
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count + 1)
            share = 1 / (int(count) + 1) if momentum is None else momentum
            for running, old, new in zip((norm.running_mean, norm.running_var), (mean, var), zip(*collected[norm])):
                running.copy_(old.double().lerp(torch.stack(new).mean(0), share))

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro: int) -> torch.Tensor:
        """Return image and text features in evaluation mode, normalised: float64 [2 B, D]."""
        self.model.eval()
        outputs = [self.model(**piece.to(self.device).inputs()) for piece in batch.split(micro)]
        self.model.train()
        return concatenate_normalised([(output[IMAGE], output["text"]) for output in outputs])

    def _micro_batches(self, batch: Batch, micro: int) -> Iterator[tuple[int, int, slice]]:
        """Iterate over (rank, number of the micro-batch, rows) of all forward passes, in the order of the batch."""
        share = len(batch) // self.world
        for rank in range(self.world):
            for k in range(share // micro):
                start = rank * share + k * micro
                yield rank, k, slice(start, start + micro)

    def _features(self, batch: Batch, step: int, where: tuple[int, int, slice]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image and text features [m, D] of one of _micro_batches, with that rank's random state."""
        rank, k, rows = where
        seed_step(self.seed, step, rank, k)
        before = _random_state(self.device)
        outputs = self.model(**batch.rows(rows.start, rows.stop).to(self.device).inputs())
        self.draws_random_numbers = self.draws_random_numbers or not torch.equal(before, _random_state(self.device))
        return outputs[IMAGE], outputs["text"]

    def _head(
        self,
        cfg: config.Objectives,
        images: torch.Tensor,
        texts: torch.Tensor,
        taught: dict[str, torch.Tensor],
        batch: Batch,
        dtype: torch.dtype,
    ) -> _Head:
        """Compute the dense formulas in `dtype`, and their gradients with respect to features and scalars."""
        leaves = {"images": images, "texts": texts, **self.scalars}
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        features, scalars = (leaves["images"], leaves["texts"]), (leaves["logit_scale"], leaves.get("logit_bias"))
        value = torch.zeros((), dtype=dtype, device=self.device)
        if cfg.clip:
            value = value + cfg.clip.weight * dense_loss(cfg.clip, *features, *scalars, batch)
        if cfg.distill:
            value = value + cfg.distill.weight * dense_distillation(cfg.distill, features, scalars[0], taught, batch)
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True)))
        gradients = {
            name: torch.zeros(parameter.numel(), dtype=torch.float64, device=self.device)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        for name in self.scalars:
            if grads[name] is not None:
                gradients[name] += grads[name].double()
        return _Head(float(value.detach()), grads["images"], grads["texts"], gradients)

    def _through_towers(
        self, head: _Head, features: tuple[torch.Tensor, torch.Tensor], rows: slice, scale: float
    ) -> None:
        """Propagate feature gradients of one micro-batch through the towers; add up their parameters' gradients."""
        towers = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in self.scalars}
        sides = [(f, g[rows]) for f, g in zip(features, (head.image_grad, head.text_grad)) if f.requires_grad]
        if not sides:
            return
        outputs = [feature for feature, _ in sides]
        weights = [(scale * grad).to(feature.dtype) for feature, grad in sides]
        grads = torch.autograd.grad(outputs, list(towers.values()), weights, allow_unused=True, retain_graph=True)
        for name, grad in zip(towers, grads):
            if grad is not None:
                head.gradients[name] += grad.double().reshape(-1) / scale  # may be channels_last, which view() rejects


@dataclass(frozen=True)
class _Head:
    """Value and gradients of the dense formula.

    Attributes:
        image_grad, text_grad: of the features, [B, D].
        gradients: of the parameters by name, float64 [numel]; _through_towers adds to them.
    """

    loss: float
    image_grad: torch.Tensor
    text_grad: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _check_replay(features: tuple[torch.Tensor, torch.Tensor], before: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raise RuntimeError if a repeated forward pass gave other features."""
    for again, first in zip(features, before):
        if (again.detach() - first).double().norm() > 1e-3 * first.double().norm():
            raise RuntimeError("the model draws random numbers outside torch's generators: no pass can be repeated")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def concatenate_normalised(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Concatenate and normalise (image, text) features of micro-batches: float64 [rows, D], all images first."""
    images, texts = (F.normalize(torch.cat(side).double().flatten(0, -2), dim=1) for side in zip(*rows))
    return torch.cat([images, texts])
