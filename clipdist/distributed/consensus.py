"""Decisions that the ranks take together between steps, on the host: no accelerator is waited for."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clipdist.distributed.collectives import all_reduce_max, gather_json
from clipdist.distributed.rank import DistEnv, time_limit


@dataclass(frozen=True)
class Flags:
    """The flags of `Consensus.agree`, set if any rank set them."""

    stop: bool
    trouble: int | None  # the first rank that cannot go on
    overdue: bool
    busy: bool
    failed: bool


class Consensus:
    """Collectives for flags and short texts. Every rank makes the same calls in the same order."""

    def __init__(self, dist_env: DistEnv, hang_s: float = 0.0) -> None:
        self._rank, self._world = dist_env.rank, dist_env.world_size
        self.group: Any = None
        if dist_env.world_size > 1 and dist_env.device.type != "cpu":
            self.group = dist.new_group(backend="gloo", timeout=time_limit(hang_s))

    def agree(self, *, stop: bool, trouble: bool, overdue: bool, busy: bool, failed: bool) -> Flags:
        """Combine the flags of all ranks.

        Args:
            stop: a signal asked this rank to end.
            trouble: this rank has no batch and will have none.
            overdue: the last checkpoint is too old.
            busy: its files are still being written.
            failed: they could not be written.
        """
        first = self._world - self._rank if trouble else 0  # the largest is that of the lowest rank
        first, *flags = self._max(first, int(stop), int(overdue), int(busy), int(failed))
        stop, overdue, busy, failed = map(bool, flags)
        return Flags(stop, self._world - first if first else None, overdue, busy, failed)

    def all(self, flag: bool) -> bool:
        """Return whether every rank's flag is set."""
        return not self._max(int(not flag))[0]

    def broadcast(self, text: str, source: int = 0) -> str:
        """Return the text of rank `source`."""
        return self._gather(text)[source]

    def first_text(self, text: str) -> str:
        """Return the text of the lowest rank whose text is not empty; "" if all are."""
        return next((found for found in self._gather(text) if found), "")

    def shared_token(self) -> str:
        """Return a random word, the same on all ranks."""
        return self.broadcast(secrets.token_hex(7))

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        self._max(0)

    def _max(self, *values: int) -> list[int]:
        if self._world == 1:
            return list(values)
        return all_reduce_max(torch.tensor(values, dtype=torch.int32), self.group).tolist()

    def _gather(self, text: str) -> list[str]:
        return [text] if self._world == 1 else gather_json(text, self.group)
