"""One rank's pieces on the host in, a complete checkpoint out: with patience where the storage refuses for a while.

The ranks meet through the file system: each writes its part, rank 0 joins them. A save that fails touches no checkpoint
that is complete, and what it wrote is removed.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from clipdist.checkpoint.format import (
    MANIFEST,
    Manifest,
    PartMissing,
    Piece,
    abandon_part,
    checkpoint_dir,
    remove_strangers,
    write_manifest,
    write_part,
)
from clipdist.checkpoint.retention import RetentionPolicy, prune, remove_leftovers

FULL = (errno.ENOSPC, errno.EDQUOT)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
OTHERS_S = 60.0  # rank 0 waits for the others so long at least, beyond the patience


class SaveFailed(Exception):
    """A checkpoint was not written; the text says why."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run, one at a time.

    Attributes:
        retry_s: what the storage refuses is tried again for so long.
        hurry: while it is set nothing is tried again.
    """

    run_dir: Path
    keep: RetentionPolicy
    rank: int
    retry_s: float
    hurry: threading.Event = field(default_factory=threading.Event)

    def write(self, pieces: list[Piece], manifest: Manifest, attempt: str) -> None:
        """Writes this rank's part; rank 0 also waits for the others', completes the checkpoint and prunes older ones.

        Args:
            attempt: as in clipdist.checkpoint.format.write_part.

        Raises:
            SaveFailed: on rank 0 where any rank failed; on another rank where its own part was not written.
        """
        folder = checkpoint_dir(self.run_dir, manifest.step)
        began = time.monotonic()
        try:
            self._patiently(lambda: write_part(folder, self.rank, pieces, attempt), folder)
            if self.rank == 0:
                wait_s = self.retry_s + max(OTHERS_S, 10 * (time.monotonic() - began))
                self._patiently(lambda: write_manifest(folder, manifest, attempt, wait_s), folder)
        except (OSError, PartMissing, ValueError) as error:
            reason = str(error)
            abandon_part(folder, self.rank, attempt, reason)
            if self.rank == 0:
                _discard(folder)
            raise SaveFailed(reason) from error
        if self.rank == 0:
            with suppress(OSError):  # the checkpoint is good; what should have gone goes with the next one
                prune(self.run_dir, self.keep, folder)

    def _patiently(self, work: Callable[[], object], folder: Path) -> None:
        pause_s, deadline = FIRST_PAUSE_S, time.monotonic() + self.retry_s
        while True:
            try:
                # Where a mount is gone, its empty folder may still take files: they would fill another disk.
                if not self.run_dir.is_dir():
                    raise FileNotFoundError(errno.ENOENT, "the run folder is gone", str(self.run_dir))
                work()
                return
            except OSError as error:
                if error.errno in FULL and remove_leftovers(self.run_dir, folder):
                    continue
                if time.monotonic() + pause_s > deadline or self.hurry.wait(pause_s):
                    raise
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _discard(folder: Path) -> None:
    """Removes what a failed save left; a checkpoint that was there before it stays as it was."""
    if (folder / MANIFEST).exists():
        remove_strangers(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
