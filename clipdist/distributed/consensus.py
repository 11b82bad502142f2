"""What the ranks settle together between steps: small numbers of every rank in, the same answer on all ranks out.

On the host, beside the training's own communication: no accelerator is waited for.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipdist.distributed.rank import DistEnv, time_limit


@dataclass(frozen=True)
class Flags:
    """The flags of `Consensus.agree`, set where any rank set them."""

    stop: bool
    trouble: int | None  # the first rank that cannot go on
    overdue: bool
    busy: bool
    failed: bool


class Consensus:
    """Collective: every rank makes the same calls in the same order."""

    def __init__(self, dist_env: DistEnv, hang_s: float = 0.0) -> None:
        self._rank, self._world = dist_env.rank, dist_env.world_size
        self.group: Any = None
        if dist_env.world_size > 1 and dist_env.device.type != "cpu":
            self.group = dist.new_group(backend="gloo", timeout=time_limit(hang_s))

    def agree(self, *, stop: bool, trouble: bool, overdue: bool, busy: bool, failed: bool) -> Flags:
        """Brings the ranks' flags together.

        Args:
            stop: a signal asked this rank to end.
            trouble: this rank has no batch and will have none.
            overdue: the last checkpoint is too old.
            busy: its files are still being written.
            failed: they could not be written.
        """
        first = self._world - self._rank if trouble else 0  # the largest is that of the lowest rank
        flags = torch.tensor([int(stop), first, int(overdue), int(busy), int(failed)], dtype=torch.int32)
        if self._world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        stop, first, overdue, busy, failed = flags.tolist()
        return Flags(bool(stop), self._world - first if first else None, bool(overdue), bool(busy), bool(failed))

    def broadcast(self, text: str, source: int = 0) -> str:
        """The text that rank `source` gave."""
        if self._world == 1:
            return text
        told = [text]
        dist.broadcast_object_list(told, src=source, group=self.group)
        return told[0]

    def broadcast_path(self, path: Path | None) -> Path | None:
        """Rank 0's."""
        told = self.broadcast(str(path or ""))
        return Path(told) if told else None

    def first_text(self, text: str) -> str:
        """Of all ranks' texts the first that is not empty."""
        if self._world == 1:
            return text
        texts: list[str] = [""] * self._world
        dist.all_gather_object(texts, text, group=self.group)
        return next((found for found in texts if found), "")

    def shared_token(self) -> str:
        """A random word, the same on all ranks."""
        return self.broadcast(secrets.token_hex(7))

    def barrier(self) -> None:
        """Returns when all ranks are here."""
        if self._world > 1:
            dist.barrier(group=self.group)

    def all(self, flag: bool) -> bool:
        """Whether every rank's flag is set."""
        value = torch.tensor([int(flag)], dtype=torch.int32)
        if self._world > 1:
            dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return bool(value.item())
