"""Compute L2 norms of whole tensors of which every rank holds fragments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clipdist.distributed.collectives import sum_over_ranks
from clipdist.distributed.rank import upload
from clipdist.engine.fragment import Fragment


class TensorNorms:
    """Norms of whole parameters, by the flat tensors that an optimiser updates.

    Args:
        fragments: all of this rank.
        names: of all trained parameters, in one order on every rank.
    """

    def __init__(self, fragments: Iterable[Fragment], names: Iterable[str]) -> None:
        self._row = {name: number for number, name in enumerate(names)}
        self._fragments: dict[Tensor, list[Fragment]] = {}
        for fragment in fragments:
            if fragment.trained:
                self._fragments.setdefault(fragment.flat, []).append(fragment)
        self._rows: dict[tuple[Tensor, ...], Tensor] = {}

    @torch.no_grad()
    def measure(self, flats: Iterable[Tensor], *reads: Callable[[Fragment], Tensor]) -> list[tuple[Fragment, Tensor]]:
        """Return this rank's fragments of flat tensors, each with norms of its whole tensor. Collective.

        One all-reduce for all of them. Every element is summed by the one rank that writes it to a checkpoint, so that
        the norms are the same to the bit on all ranks, where these are replicas, too. The host does not wait.

        Args:
            flats: the same on every rank, of one device; none: no collective.
            reads: each returns the elements of a fragment, 1-D fp32, of a tensor whose norm is wanted.

        Returns:
            fragments with norms, fp32 [len(reads)].
        """
        flats = tuple(flats)
        if not flats:
            return []
        found = [fragment for flat in flats for fragment in self._fragments.get(flat, ())]
        sums = torch.zeros(len(self._row), len(reads), dtype=torch.float64, device=flats[0].device)
        if flats not in self._rows:
            numbers = [self._row[fragment.name] for fragment in found]
            self._rows[flats] = upload(numbers, torch.int64, sums.device)
        for column, read in enumerate(reads if found else ()):
            norms = torch._foreach_norm([_own(fragment, read(fragment)) for fragment in found], 2)
            sums[:, column].index_add_(0, self._rows[flats], torch.stack(norms).to(sums).square())
        norms_of_all = sum_over_ranks(sums).sqrt().float()
        return list(zip(found, norms_of_all[self._rows[flats]])) if found else []


def _own(fragment: Fragment, elements: Tensor) -> Tensor:
    """Return those elements of a fragment that no other rank sums."""
    start, stop = fragment.own
    return elements[start - fragment.start : stop - fragment.start]
