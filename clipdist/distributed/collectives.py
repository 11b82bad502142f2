"""Collectives. None of them is differentiable: the losses carry gradients by closed forms.

A process group of None is the default group; without torch.distributed there is one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def rank_and_world(group: ProcessGroup | None = None) -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Gather the rows of all ranks in rank order: [b, ...] to [W*b, ...]. Return x itself if there is one rank."""
    world = rank_and_world(group)[1]
    x = x.detach()
    if world == 1:
        return x
    out = x.new_empty(x.shape[0] * world, *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def reduce_scatter_sum(x: torch.Tensor, wire: torch.dtype, group: ProcessGroup | None = None) -> torch.Tensor:
    """Sum fp32 [W*b, ...] over ranks. Return rows r*b .. (r+1)*b on rank r, in fp32; x itself if there is one rank.

    Args:
        wire: dtype in which it is sent.
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


def all_to_all_uneven(parts: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
    """Send parts[r] to rank r; return what rank r sent here, cut into pieces. Of one rank, its own part.

    Args:
        parts: 1-D, of one dtype, by receiver.
        sizes: elements of the pieces, by sender.
    """
    received = torch.cat([*parts])
    if len(parts) > 1:
        sent, lengths = received, [sum(of_rank) for of_rank in sizes]
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, lengths, [len(part) for part in parts])
    pieces = iter(received.split([size for of_rank in sizes for size in of_rank]))
    return [[next(pieces) for _ in of_rank] for of_rank in sizes]


def all_reduce_sum(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum over ranks, as a new tensor."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Return the largest over ranks, as a new tensor."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def all_reduce_logsumexp(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Return the log-sum-exp over ranks, as a new tensor; -inf adds nothing."""
    largest = all_reduce_max(x, group)
    return largest + all_reduce_sum((x - largest.clamp(min=torch.finfo(x.dtype).min)).exp(), group).log()


def _all_reduce(x: torch.Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> torch.Tensor:
    x = x.detach().clone()
    if rank_and_world(group)[1] > 1:
        dist.all_reduce(x, op, group=group)
    return x


# For tensors and values that lie anywhere: slower than the above, which take what lies on the group's device.


def group_device(group: ProcessGroup | None = None) -> torch.device:
    """Return where a tensor must lie for the group to send it: NCCL sends device tensors only."""
    if rank_and_world(group)[1] == 1 or "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def sum_over_ranks(x: torch.Tensor, group: ProcessGroup | None = None) -> torch.Tensor:
    """Return the sum over ranks of a tensor on any device, on that device; x itself if there is one rank."""
    if rank_and_world(group)[1] == 1:
        return x
    return all_reduce_sum(x.to(group_device(group)), group).to(x.device)


def all_gather_uneven(x: torch.Tensor, group: ProcessGroup | None = None) -> list[torch.Tensor]:
    """Gather tensors [n_r, ...] whose n_r may differ among ranks. Return them in rank order, on the CPU."""
    device = group_device(group)
    lengths = all_gather(torch.tensor([len(x)], device=device), group).tolist()
    padded = torch.zeros(max(lengths), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x
    rows = all_gather(padded, group).cpu()
    return [rows[rank * len(padded) :][:length] for rank, length in enumerate(lengths)]


def gather_json(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return every rank's JSON value, in rank order. Nothing is pickled."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in all_gather_uneven(payload, group)]


def all_equal(data: bytes, group: ProcessGroup | None = None) -> bool:
    """Return whether all ranks gave the same bytes: one all-gather of 8 bytes per rank."""
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
    return len(set(all_gather(torch.tensor([digest], device=group_device(group)), group).tolist())) == 1
