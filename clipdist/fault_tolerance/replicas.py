"""Find ranks whose replicated tensors differ.

Replicated tensors are bit-identical by construction: every rank applies the same operations to the same reduced
gradients, or receives the result of one rank. A difference is therefore a hardware or driver fault, not rounding.
"""

from __future__ import annotations

import functools
import hashlib
import socket

import torch

from clipdist.distributed.collectives import all_equal, gather_json
from clipdist.distributed.compare import by_value, name_ranks
from clipdist.distributed.rank import DistEnv
from clipdist.engine.step import Engine
from clipdist.errors import Fault

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}  # elements at one time: fits a core's cache; few kernel launches


def checksums(tensor: torch.Tensor) -> torch.Tensor:
    """Return the checksums of a tensor's chunks: sums of bit patterns x_i weighted by 2i + 1, modulo 2^64.

    Any single flipped bit changes the sum, since the weights are odd; so do two swapped elements of a chunk: the sum
    changes by (x_i - x_j) * 2(i - j), whose factors are divisible by at most 2^31 and 2^22.

    Returns:
        int64 [chunks], on the tensor's device.
    """
    bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
    chunk = _CHUNK[tensor.device.type]
    weights = _weights(chunk, tensor.device)
    sums = [(part * weights[: len(part)]).sum() for part in bits.split(chunk)]
    return torch.stack(sums) if len(bits) else torch.zeros(0, dtype=torch.int64, device=tensor.device)


@functools.lru_cache(maxsize=4)
def _weights(chunk: int, device: torch.device) -> torch.Tensor:
    return torch.arange(1, 2 * chunk, 2, dtype=torch.int64, device=device)


@torch.no_grad()
def compare_replicas(engine: Engine, dist_env: DistEnv, step: int) -> None:
    """Compare the checksums of the replicated tensors among ranks. Collective.

    Args:
        step: steps done so far, for the message.

    Raises:
        Fault: they differ; on all ranks. Names the ranks that differ from the majority, and the first such tensor.
    """
    if dist_env.world_size == 1:
        return
    names, sums = [], []
    for name, tensor in engine.replicated():
        names.append(name)
        sums.append(checksums(tensor).to(dist_env.device))
    on_host = torch.cat(sums).cpu().numpy()  # the only synchronisation with the device
    lengths = [len(part) for part in sums]
    if all_equal(f"{names} {lengths} ".encode() + on_host.tobytes()):
        return
    parts = torch.from_numpy(on_host).split(lengths)
    own = {name: hashlib.blake2b(part.numpy().tobytes(), digest_size=8).hexdigest() for name, part in zip(names, parts)}
    by_rank = gather_json([socket.gethostname(), own])
    raise Fault(divergence(step, [sums for _, sums in by_rank], [node for node, _ in by_rank]))


def divergence(step: int, sums: list[dict[str, str]], nodes: list[str]) -> str:
    """Return the error message for ranks whose replicated tensors differ.

    Args:
        sums: checksums by the name of the tensor, of every rank.
        nodes: the host name of every rank.
    """
    groups, majority = by_value([str(sorted(own.items())) for own in sums])
    names = list(dict.fromkeys(name for own in sums for name in own))
    differing = [name for name in names if len({own.get(name) for own in sums}) > 1]
    divergent = sorted(rank for ranks in (groups[:-1] if majority else groups) for rank in ranks)
    who = name_ranks(divergent, nodes)
    held = "other values than the other ranks" if majority else "different values"
    return (
        f"step {step}: {who} hold{'s' * (len(divergent) == 1)} {held} where all should be equal, in {len(differing)} of"
        f" {len(names)} tensors, first in {differing[0]}. Memory, processor or driver may be faulty: look at the"
        f" node{'s' * (len({nodes[rank] for rank in divergent}) > 1)}, and go on from a checkpoint before the last"
        " comparison that passed (train.compare_every)"
    )
