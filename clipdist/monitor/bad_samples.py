"""Count the unusable samples of all ranks by reason, and name some of them."""

from __future__ import annotations

import torch

from clipdist.data.bad_sample import REASONS
from clipdist.distributed.collectives import all_gather, all_reduce_sum

# At most so many are named per rank between two logged steps; all are counted.
NAMED = 32


class BadSamples:
    """Collect the samples that this rank could not use.

    Attributes:
        totals: {reason: samples} of all ranks since the start of this process, as of the last `share`.
        seen: samples of all ranks, good and bad, as of the last `share`.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = {}
        self.seen = 0
        self._counts = [0] * (len(REASONS) + 1)  # the last: samples seen
        self._unnamed: list[tuple[int, str]] = []

    def add(self, seen: int, bad: list[tuple[int, str]]) -> None:
        """Record the number of samples, and (sample id, reason) of the bad ones; a reason is one of REASONS."""
        self._counts[-1] += seen
        for sample_id, reason in bad:
            self._counts[REASONS.index(reason)] += 1
            if len(self._unnamed) < NAMED:
                self._unnamed.append((sample_id, reason))

    def share(self, device: torch.device) -> tuple[int, list[tuple[int, str]]]:
        """Combine the findings of all ranks. Collective.

        Returns:
            How many samples are new since the last call, and the (sample id, reason) of those that are named; the same
            on all ranks.
        """
        *counts, self.seen = map(int, all_reduce_sum(torch.tensor(self._counts, device=device)).tolist())
        new = sum(counts) - sum(self.totals.values())
        self.totals = {reason: count for reason, count in zip(REASONS, counts) if count}
        if not new:
            return 0, []
        table = torch.full((NAMED, 2), -1, dtype=torch.int64, device=device)
        for row, (sample_id, reason) in enumerate(self._unnamed):
            table[row] = torch.tensor([sample_id, REASONS.index(reason)])
        self._unnamed.clear()
        return new, [(sample_id, REASONS[code]) for sample_id, code in all_gather(table).tolist() if sample_id >= 0]
