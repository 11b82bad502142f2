"""InfoNCE over the exact global batch: unnormalised features of this rank in, this rank's share of the loss out.

    s_ij = exp(t) * cos(image_i, text_j)          logits, fp32
    L    = 1/(2N) sum_i [ lse_j s_ij - s_i,pos ] + 1/(2N) sum_j [ lse_i s_ij - s_pos,j ]

over the N valid pairs of all ranks (Oord et al., arXiv:1807.03748, eq. 4; Radford et al., arXiv:2103.00020, figure 3).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from clipdist.loss.collectives import all_gather, all_reduce_sum, rank_and_world

LN_100 = math.log(100)
_MASKED = -1e30  # finite: a row whose every candidate is masked must not turn into nan


def info_nce(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    group_id: torch.Tensor | None = None,
    process_group: ProcessGroup | None = None,
    logit_scale_max: float = LN_100,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Symmetric InfoNCE with the negatives of all ranks.

    Args:
        image_features, text_features: [b, D] as the projections give them, any float dtype; the same b on every rank.
        logit_scale: the log scale t, shape [1]; read as at most `logit_scale_max`.
        logit_bias: taken for the interface's sake; a constant on all logits changes neither value nor gradients.
        valid: bool [b]; rows that are False count neither as pairs nor as negatives. None: all are valid.
        group_id: int64 [b]; pairs of equal id are positives of one another, uniformly weighted. None: only a
            pair's own other half is.

    Returns:
        value: fp32 scalar; W * (this rank's share), so that its mean over ranks is the global loss, and the mean over
            ranks of any parameter's gradients is the gradient of the global loss: towers and temperature alike.
        statistics: detached fp32 scalars, this rank's: "correct_i2t" and "correct_t2i" (rows whose best candidate
            is a positive), "valid" (rows).
    """
    rank, world = rank_and_world(process_group)
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    b = images.shape[0]
    if valid is None:
        valid = torch.ones(b, dtype=torch.bool, device=images.device)
    all_valid = all_gather(valid.to(torch.uint8), process_group).bool()
    positives = _positives(b, rank, all_valid, group_id, process_group)
    scale = _bounded(logit_scale.float(), logit_scale_max).exp()
    count = all_valid.sum().clamp(min=1)
    value = torch.zeros((), device=images.device)
    correct = []
    for rows, candidates in ((images, texts), (texts, images)):
        logits = scale * rows @ all_gather(candidates, process_group).T
        logits = logits.masked_fill(~all_valid, _MASKED)
        loss = logits.logsumexp(dim=1) - (logits * positives).sum(dim=1)
        value = value + torch.where(valid, loss, 0.0).sum() * (world / (2 * count))
        best = positives.gather(1, logits.detach().argmax(dim=1, keepdim=True))[:, 0] > 0
        correct.append((best & valid).sum().float())
    return value, {"correct_i2t": correct[0], "correct_t2i": correct[1], "valid": valid.sum().float()}


def _bounded(t: torch.Tensor, most: float) -> torch.Tensor:
    """At most `most`, with the gradient of the identity: torch's clamp gives none at a bound that fp32 rounds up."""
    bound = torch.full_like(t, most)
    return torch.where(t > bound, bound + (t - t.detach()), t)


def _positives(
    b: int, rank: int, all_valid: torch.Tensor, group_id: torch.Tensor | None, group: ProcessGroup | None
) -> torch.Tensor:
    """fp32 [b, W*b]: the weight of each candidate as a positive of this rank's rows; a valid row sums to 1."""
    own = torch.arange(rank * b, (rank + 1) * b, device=all_valid.device)
    if group_id is None:
        weights = F.one_hot(own, num_classes=len(all_valid)).float()
    else:
        weights = (group_id[:, None] == all_gather(group_id, group)[None, :]).float()
    weights = weights * all_valid
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1)


def global_statistics(
    value: torch.Tensor, statistics: dict[str, torch.Tensor], process_group: ProcessGroup | None = None
) -> dict[str, float]:
    """One collective: the global loss, the in-batch accuracies in percent, and the number of valid pairs."""
    world = rank_and_world(process_group)[1]
    names = ("correct_i2t", "correct_t2i", "valid")
    total = all_reduce_sum(torch.stack([value.detach() / world, *(statistics[name] for name in names)]), process_group)
    loss, i2t, t2i, valid = total.tolist()
    rows = max(valid, 1.0)
    return {"loss": loss, "batch_i2t_r1": 100 * i2t / rows, "batch_t2i_r1": 100 * t2i / rows, "valid": valid}
