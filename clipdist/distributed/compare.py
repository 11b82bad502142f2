"""Name the ranks whose values differ from the others'. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_MOST_GROUPS = 4  # of ranks that are named in one sentence


def by_value(values: Sequence[Any]) -> tuple[list[list[int]], bool]:
    """Group the ranks by value, the largest group last. Return them, and whether the last is larger than any other."""
    groups: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    ordered = sorted(groups.values(), key=lambda ranks: (len(ranks), -ranks[0]))
    majority = len(ordered) == 1 or len(ordered[-1]) > len(ordered[-2])
    return ordered if majority else sorted(ordered), majority


def who_has_what(values: Sequence[str], nodes: Sequence[str]) -> str:
    """Return "rank 3 on node2 has A, the others have B"; without a majority all are named.

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
    """Return "ranks 0-3, 5 on node1 and rank 8 on node2"."""
    of_node: dict[str, list[int]] = {}
    for rank in ranks:
        of_node.setdefault(nodes[rank], []).append(rank)
    return " and ".join(f"rank{'s' * (len(own) > 1)} {join_runs(own)} on {node}" for node, own in of_node.items())


def _has(who: str, count: int, what: str) -> str:
    return f"{who} {'have' if count > 1 else 'has'} {what}"


def join_runs(ranks: Iterable[int]) -> str:
    """Return numbers in ascending order, neighbours joined: "0-3, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
