"""The few collectives that the losses need, differentiable where a gradient crosses ranks.

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
    """Rows of all ranks, in rank order: [b, ...] to [W*b, ...]. Its gradient is reduce_scatter_sum."""
    return x if rank_and_world(group)[1] == 1 else _AllGather.apply(x, group)


def reduce_scatter_sum(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Sums [W*b, ...] over ranks and leaves rank r rows r*b .. (r+1)*b. Not differentiable."""
    world = rank_and_world(group)[1]
    if world == 1:
        return x
    x = x.contiguous()
    if dist.get_backend(group) == "gloo":
        # gloo's own reduce-scatter is an all-reduce, twice the traffic of an all-to-all and a local sum.
        parts = torch.empty_like(x)
        dist.all_to_all_single(parts, x, group=group)
        return parts.view(world, -1, *x.shape[1:]).sum(0)
    out = x.new_empty(x.shape[0] // world, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x, group=group)
    return out


def all_reduce_sum(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """The sum over ranks, as a new tensor. Not differentiable."""
    x = x.detach().clone()
    if rank_and_world(group)[1] > 1:
        dist.all_reduce(x, group=group)
    return x


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, group: ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_scatter_sum(grad, ctx.group), None
