"""A value of every rank in, who differs from the others out, in words. For what all ranks should have alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from clipdist.distributed.collectives import all_gather
from clipdist.distributed.rank import DistEnv

_MOST_GROUPS = 4  # of ranks that are named in one sentence


def all_equal(data: bytes, dist_env: DistEnv) -> bool:
    """Whether all ranks gave the same bytes: one all-gather of 8 bytes a rank."""
    digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
    return len(set(all_gather(torch.tensor([digest], device=dist_env.device)).tolist())) == 1


def gather_json(value: Any, dist_env: DistEnv) -> list[Any]:
    """What every rank gave, in rank order. Collective; it travels as JSON, not pickled."""
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(dist_env.device)
    lengths = all_gather(torch.tensor([len(payload)], device=dist_env.device)).tolist()
    padded = payload.new_zeros(1, max(lengths))
    padded[0, : len(payload)] = payload
    rows = all_gather(padded).cpu().numpy()
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths)]


def by_value(values: Sequence[Any]) -> tuple[list[list[int]], bool]:
    """The ranks that hold each value, in groups, the largest last; and whether that one is larger than any other."""
    groups: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    ordered = sorted(groups.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    majority = len(ordered) == 1 or len(ordered[-1]) > len(ordered[-2])
    return ordered if majority else sorted(ordered), majority


def who_has_what(values: Sequence[str], nodes: Sequence[str]) -> str:
    """ "rank 3 on node2 has A, the others have B"; without a majority all are named.

    Args:
        values, nodes: of every rank, in rank order.
    """
    groups, majority = by_value(values)
    named = groups[:-1] if majority else groups
    words = [_has(name_ranks(ranks, nodes), len(ranks), values[ranks[0]]) for ranks in named[:_MOST_GROUPS]]
    if len(named) > _MOST_GROUPS:
        words.append(f"{len(named) - _MOST_GROUPS} more groups of ranks have something else again")
    if majority:
        others = groups[-1]
        words.append(_has("the others" if len(others) > 1 else "the other", len(others), values[others[0]]))
    return ", ".join(words)


def name_ranks(ranks: Iterable[int], nodes: Sequence[str]) -> str:
    """ "ranks 0-3, 5 on node1 and rank 8 on node2"."""
    of_node: dict[str, list[int]] = {}
    for rank in ranks:
        of_node.setdefault(nodes[rank], []).append(rank)
    return " and ".join(f"rank{'s' * (len(own) > 1)} {_runs(own)} on {node}" for node, own in of_node.items())


def _has(who: str, count: int, what: str) -> str:
    return f"{who} {'have' if count > 1 else 'has'} {what}"


def _runs(ranks: list[int]) -> str:
    """Ascending numbers, neighbours joined: 0-3, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
