"""Save a run's tensors to checkpoint folders in the background.

The loop passes views of this rank's fragments; a thread copies them while the next forward and backward pass run, and
writes them. Ranks meet through the file system, not through collectives, so that a slow disk never mixes with the
training's communication.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clipdist.checkpoint.format import Manifest, Piece, checkpoint_dir
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.writer import CheckpointWriter, SaveFailed
from clipdist.errors import Fault

WRITER = "checkpoint writer"  # the thread's name
NICENESS = 10  # of the writer's thread: training comes first


class Saver:
    """Write checkpoints of one run, one at a time.

    Between save() and wait_copied() the live tensors must not change: call wait_copied() before the optimiser steps.

    Args:
        attempt: token that all ranks of this start share; it tells this start's files from leftovers.
        retry_s: how long to retry what the storage refuses before the save counts as failed.

    Attributes:
        failed: why the last save failed, or "". Rank 0 knows every rank's failure, another rank its own.
        seconds_in_loop: time of the training loop that the last save took: save() and wait_copied().
    """

    def __init__(self, run_dir: Path, keep: RetentionPolicy, rank: int, attempt: str, retry_s: float) -> None:
        self.run_dir = run_dir
        self.attempt = attempt
        self.failed = ""
        self.seconds_in_loop = 0.0
        self._writer = CheckpointWriter(run_dir, keep, rank, retry_s)
        self._saves = 0
        self._memory = _HostMemory()
        self._thread: threading.Thread | None = None
        self._copying: _Copying | None = None

    @property
    def busy(self) -> bool:
        """Return whether the last save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, numel: int, pinned: bool) -> None:
        """Allocate host memory beside the first steps, so that the first save takes no longer than the others.

        Args:
            numel: fp32 elements of all live pieces of a save.
            pinned: page-lock it, for copies from a GPU.
        """
        self._thread = threading.Thread(target=self._memory.touch, args=(numel, pinned), name=WRITER, daemon=True)
        self._thread.start()

    def save(self, live: list[Piece], copied: list[Piece], manifest: Manifest) -> Path:
        """Begin to save what this rank holds. Return the checkpoint's folder.

        A save that is still being written is waited for; one that is retrying is given up.

        Args:
            live: fp32 views on any device, which must not change until wait_copied() returns.
            copied: tensors on the CPU that nobody changes.
        """
        began = time.perf_counter()
        if self._thread is not None:
            self._writer.hurry.set()
            self._thread.join()
            self._writer.hurry.clear()
        self.failed = ""
        self._saves += 1  # the same on all ranks: a step that is saved twice makes two attempts
        attempt = f"{self.attempt}-{manifest.step}-{self._saves}"
        self._copying = _Copying(live, copied)
        work = (self._copying, manifest, attempt)
        self._thread = threading.Thread(target=self._run, args=work, name=WRITER, daemon=True)
        self._thread.start()
        self.seconds_in_loop = time.perf_counter() - began
        return checkpoint_dir(self.run_dir, manifest.step)

    def wait_copied(self) -> None:
        """Wait until the live pieces of the last save may change; call it right before the optimiser's step."""
        if self._copying is None:
            return
        began = time.perf_counter()
        self._copying.wait()
        self._copying = None
        self.seconds_in_loop += time.perf_counter() - began

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until this rank's last save is on disk.

        Raises:
            Fault: it failed, or is not on disk in time.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        reason = f"still being written after {timeout_s} s" if self.busy else self.failed
        if reason:
            raise Fault(
                f"{self.run_dir}: the last checkpoint was not written ({reason}); the one before it is good. Mend the"
                " storage or make room, and start again: the run goes on from there"
            )

    def _run(self, copying: _Copying, manifest: Manifest, attempt: str) -> None:
        try:
            pieces = copying.run(self._memory)
            _step_back()
            self._writer.write(pieces, manifest, attempt)
        except SaveFailed as error:
            self.failed = str(error)
        except Exception as error:  # not the storage's; the loop reports it and goes on
            self.failed = f"{type(error).__name__}: {error}"
        finally:
            copying.end()


class _HostMemory:
    """Keep fp32 memory from save to save: fresh pages would cost more than the copying."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, numel: int, pinned: bool) -> torch.Tensor:
        if self._flat.numel() < numel:
            self._flat = torch.empty(0)  # the old one goes first
            self._flat = torch.empty(numel, dtype=torch.float32, pin_memory=pinned)
        return self._flat[:numel]

    def touch(self, numel: int, pinned: bool) -> None:
        """Allocate memory and touch its pages, at the lowest priority."""
        _step_back()
        with suppress(MemoryError, RuntimeError):  # if there is none left, the save reports it
            self.take(numel, pinned).numpy().fill(0)


class _Copying:
    """Copy one save's pieces to the host: created by the loop, run by the writer's thread.

    Args:
        live: views of tensors that do not change until wait() returns.
        copied: pieces that are on the host already.
    """

    def __init__(self, live: list[Piece], copied: list[Piece]) -> None:
        self._live, self._copied = live, copied
        self._issued = threading.Event()
        devices = {piece.data.device for piece in live if piece.data.is_cuda}
        self._device = devices.pop() if devices else None
        self._done: torch.cuda.Event | None = None
        if self._device:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._device))

    def run(self, memory: _HostMemory) -> list[Piece]:
        """Copy the live pieces. Return all pieces, on the host."""
        flat = memory.take(sum(piece.data.numel() for piece in self._live), pinned=self._device is not None)
        parts = flat.split([piece.data.numel() for piece in self._live])
        pieces = [replace(piece, data=part) for piece, part in zip(self._live, parts)]
        if self._device:
            with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream()) as _:
                torch.cuda.current_stream().wait_event(self._ready)
                self._copy_all(parts)
                self._done = torch.cuda.Event(blocking=True)
                self._done.record()
            self.end()
            self._done.synchronize()
        else:
            self._copy_all(parts)
            self.end()
        return pieces + self._copied

    def _copy_all(self, parts: tuple[torch.Tensor, ...]) -> None:
        for piece, part in zip(self._live, parts):
            if piece.data.device.type == "cpu" and piece.data.dtype == torch.float32:
                np.copyto(part.numpy(), piece.data.numpy())  # torch would start threads of its own beside the step's
            else:
                part.copy_(piece.data, non_blocking=True)

    def wait(self) -> None:
        """Block the calling thread, and on a GPU its stream, until all is copied."""
        self._issued.wait()
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def end(self) -> None:
        self._issued.set()


def _step_back() -> None:
    """Lower the calling thread's priority, so that training comes first where cores are few."""
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
