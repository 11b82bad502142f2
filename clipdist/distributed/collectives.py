"""The few collectives that the losses need, none of them differentiable: the losses carry gradients by closed forms.

A process group of None is the default group; without torch.distributed there is one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def rank_and_world(group: ProcessGroup | None = None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Rows of all ranks, in rank order: [b, ...] to [W*b, ...]; x itself where there is one rank."""
    world = rank_and_world(group)[1]
    x = x.detach()
    if world == 1:
        return x
    out = x.new_empty(x.shape[0] * world, *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter_sum(x: torch.Tensor, wire: torch.dtype, group: ProcessGroup | None = None) -> torch.Tensor:
    """Sums fp32 [W*b, ...] over ranks and leaves rank r rows r*b .. (r+1)*b; it travels as `wire`, the result is fp32.

    Where there is one rank, x itself.
    """
    world = rank_and_world(group)[1]
    if world == 1:
        return x
    if dist.get_backend(group) != "gloo" and wire == torch.float32:
        out = x.new_empty(x.shape[0] // world, *x.shape[1:])
        dist.reduce_scatter_tensor(out, x.contiguous(), group=group)
        return out
    # gloo's own reduce-scatter is an all-reduce, twice the traffic of an all-to-all and a local sum. In half precision
    # the local sum has a second merit: it adds in fp32, where a ring would round at each of W hops.
    largest = all_reduce_max(x.abs().max(), group).clamp(min=1e-30) if wire == torch.float16 else None
    sent = (x if largest is None else x / largest).to(wire).contiguous()  # fp16's range is small
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    total = parts.view(world, -1, *x.shape[1:]).sum(0, dtype=torch.float32)
    return total if largest is None else total * largest


def all_reduce_sum(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The sum over ranks, as a new tensor."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The largest over ranks, as a new tensor."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: torch.Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> torch.Tensor:
    x = x.detach().clone()
    if rank_and_world(group)[1] > 1:
        dist.all_reduce(x, op, group=group)
    return x
