"""Scalars, texts and pictures in, TensorBoard's event files out: as long as the disk takes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from clipdist.monitor.line_file import tell

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

AGAIN_S = 60.0  # from a failure to the next attempt


class Board:
    """What TensorBoard shows of one run. What comes while the disk refuses is left out; metrics.jsonl has the numbers.

    TensorBoard's writer is of no use after an error: its thread has ended, and its file may end in half a record. So a
    new one takes its place, with a file of its own.

    Args:
        first_step: what an earlier attempt has shown of this step and later ones is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._hide_from: int | None = first_step
        self._writer: SummaryWriter | None = None
        self._not_before = 0.0  # monotonic time
        self._told = False
        self.show(lambda writer: None)

    def show(self, put: Callable[[SummaryWriter], object]) -> None:
        """Has `put` add to TensorBoard's writer."""
        if self._writer is None and time.monotonic() < self._not_before:
            return
        try:
            put(self._writer or self._open())
        except OSError as error:  # of the writer's thread, too: it comes with a later call
            self._give_up()
            if not self._told:
                tell(f"note: {self._folder}: TensorBoard's events cannot be written ({error.strerror or error})")
            self._told = True

    def close(self) -> None:
        if self._writer is not None:
            self.show(lambda writer: writer.close())
        self._writer = None

    def _open(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._hide_from)
        self._hide_from = None
        return self._writer

    def _give_up(self) -> None:
        writer, self._writer = self._writer, None
        self._not_before = time.monotonic() + AGAIN_S
        if writer is not None:
            with suppress(OSError):
                writer.close()  # ends its thread, where that still runs
