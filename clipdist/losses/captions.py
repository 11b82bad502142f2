"""Cross-entropy of captions, token by token; the logits [tokens, vocabulary] never stand whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS_BYTES = 48 << 20  # of the fp32 logits that are alive at one time


def caption_loss(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the sum over tokens of the cross-entropy of softmax(hidden @ weight), fp32 [].

    The gradients of both are computed with the loss, chunk by chunk, and multiplied by the sum's own gradient later:
    three products in all, as without chunks.

    Args:
        hidden: [m, w].
        weight: [w, V].
        targets: int64 [m].
        smoothing: share of the target that is spread over the vocabulary.
    """
    return _CaptionLoss.apply(hidden, weight, targets, smoothing, torch.is_grad_enabled())


class _CaptionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, learns: bool) -> Tensor:
        vocabulary = weight.shape[1]
        by_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if learns else None
        by_weight = None
        if learns and ctx.needs_input_grad[1]:
            by_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = max(1, LOGITS_BYTES // (4 * vocabulary))
        for first in range(0, len(hidden), rows):
            x, target = hidden[first : first + rows], targets[first : first + rows, None]
            logits = (x @ weight).float()
            normaliser = logits.logsumexp(1, keepdim=True)
            missed = normaliser - (1 - smoothing) * logits.gather(1, target)
            if smoothing:
                missed -= smoothing * logits.mean(1, keepdim=True)
            total += missed.sum()
            if by_hidden is not None:
                slope = logits.sub_(normaliser).exp_()
                if smoothing:
                    slope -= smoothing / vocabulary
                slope.scatter_add_(1, target, torch.full_like(missed, smoothing - 1))
                slope = slope.to(weight.dtype)
                by_hidden[first : first + rows] = slope @ weight.T
                if by_weight is not None and weight.dtype == torch.float32:
                    by_weight.addmm_(x.T, slope)
                elif by_weight is not None:
                    by_weight += x.T @ slope
        ctx.save_for_backward(by_hidden, by_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        slopes = [None if each is None else each.mul_(gradients[0]) for each in (by_hidden, by_weight)]
        cast = [None if each is None else each.to(dtype) for each, dtype in zip(slopes, ctx.dtypes)]
        return (*cast, None, None, None)
