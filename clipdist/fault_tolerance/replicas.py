"""Find the rank whose bits differ in what all ranks hold alike.

All of it is equal bit for bit by construction: every rank applies the same operations to the same reduced gradients,
or gets the result of one rank. So one flipped bit is an error of a machine, and no rounding is.
"""

from __future__ import annotations

import functools
import hashlib
import socket

import torch

from clipdist.distributed.collectives import all_equal, gather_json
from clipdist.distributed.compare import by_value, name_ranks
from clipdist.distributed.rank import DistEnv
from clipdist.engine.zero import Zero
from clipdist.errors import Fault

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}  # elements at one time: what fits a core's cache; few starts of kernels


def checksums(tensor: torch.Tensor) -> torch.Tensor:
    """int64 [chunks], on the tensor's device: sums of a chunk's bit patterns x_i weighted by 2i + 1, modulo 2^64.

    No flipped bit escapes, since the weights are odd; nor do two elements that changed places: within a chunk their
    sum moves by (x_i - x_j) * 2(i - j), and 2^31 and 2^22 are the largest powers of two that divide these.
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
def compare_replicas(zero: Zero, dist_env: DistEnv, step: int) -> None:
    """Compares the checksums of all that Zero.replicated gives among the ranks. Collective.

    Raises:
        Fault: on all ranks, with the ranks that differ from the majority, and the first tensor in which they do.
    """
    if dist_env.world_size == 1:
        return
    names, sums = [], []
    for name, tensor in zero.replicated():
        names.append(name)
        sums.append(checksums(tensor).to(dist_env.device))
    on_host = torch.cat(sums).cpu().numpy()  # one copy: until here nothing waited for the device
    lengths = [len(part) for part in sums]
    if all_equal(f"{names} {lengths} ".encode() + on_host.tobytes()):
        return
    parts = torch.from_numpy(on_host).split(lengths)
    mine = {
        name: hashlib.blake2b(part.numpy().tobytes(), digest_size=8).hexdigest() for name, part in zip(names, parts)
    }
    everyone = gather_json([socket.gethostname(), mine])
    raise Fault(divergence(step, [sums for _, sums in everyone], [node for node, _ in everyone]))


def divergence(step: int, sums: list[dict[str, str]], nodes: list[str]) -> str:
    """What is to be said of ranks that do not all hold the same.

    Args:
        sums: of every rank, the checksum of each tensor by its name.
    """
    groups, majority = by_value([str(sorted(own.items())) for own in sums])
    names = list(dict.fromkeys(name for own in sums for name in own))
    differing = [name for name in names if len({own.get(name) for own in sums}) > 1]
    strange = sorted(rank for ranks in (groups[:-1] if majority else groups) for rank in ranks)
    who = name_ranks(strange, nodes)
    held = "other values than the other ranks" if majority else "different values"
    return (
        f"step {step}: {who} hold{'s' * (len(strange) == 1)} {held} where all should be equal, in {len(differing)} of"
        f" {len(names)} tensors, first in {differing[0]}. Memory, processor or driver may be faulty: look at the"
        f" node{'s' * (len({nodes[rank] for rank in strange}) > 1)}, and go on from a checkpoint before the last"
        " comparison that passed (train.compare_every)"
    )
