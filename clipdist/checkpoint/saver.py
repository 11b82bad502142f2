"""Saving and restoring a run: engine state to a checkpoint folder, in the background, and back.

The loop only notes where this rank's fragments lie; a thread copies them while the next forward and backward pass run,
and writes them. Ranks meet through the file system, not through collectives, so that a slow disk never mixes with the
training's communication.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from clipdist.checkpoint.format import Manifest, Piece, checkpoint_dir
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.checkpoint.retention import RetentionPolicy
from clipdist.checkpoint.writer import CheckpointWriter, SaveFailed
from clipdist.engine.zero import MOMENTS, base_optimizer, fragments, loss_scaler
from clipdist.errors import Fault, UserError

WRITER = "checkpoint writer"  # the thread's name
NICENESS = 10  # of the thread that writes: the steps beside it go first
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Saver:
    """Writes checkpoints of one run, one at a time.

    Between save() and wait_copied() weights and moments must stay as they are: the engine calls wait_copied() before
    its optimiser steps.

    Args:
        attempt: a token that all ranks of this start share, so that leftovers of an earlier one are not mistaken.
        retry_s: what the storage refuses is tried again for so long, then the save counts as failed.

    Attributes:
        failed: why the last save failed, or "". Rank 0 knows of every rank's failure, another rank of its own.
        seconds_in_loop: what the last save has taken of the training loop's time: save() and wait_copied().
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
        """Whether the last save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def prepare(self, engine: Any) -> None:
        """Takes the memory that saves need, beside the first steps, so that the first save costs what others cost."""
        numel = sum(
            (fragment.own[1] - fragment.own[0]) * (1 + len(MOMENTS) if fragment.trained else 1)
            for fragment in fragments(engine)
        )
        pinned = any(fragment.flat.is_cuda for fragment in fragments(engine))
        self._thread = threading.Thread(target=self._memory.touch, args=(numel, pinned), name=WRITER, daemon=True)
        self._thread.start()

    def save(self, engine: Any, manifest: Manifest) -> Path:
        """Begins to save what this rank holds, and returns. Where a save is being written it is waited for: one that
        has met a failing disk is given up."""
        began = time.perf_counter()
        if self._thread is not None:
            self._writer.hurry.set()
            self._thread.join()
            self._writer.hurry.clear()
        self.failed = ""
        self._saves += 1  # the same on all ranks: a step that is saved twice makes two attempts
        attempt = f"{self.attempt}-{manifest.step}-{self._saves}"
        self._copying = _Copying(list(live_pieces(engine)), list(buffer_pieces(engine)))
        work = (self._copying, manifest, attempt)
        self._thread = threading.Thread(target=self._run, args=work, name=WRITER, daemon=True)
        self._thread.start()
        self.seconds_in_loop = time.perf_counter() - began
        return checkpoint_dir(self.run_dir, manifest.step)

    def wait_copied(self) -> None:
        """Returns when weights and moments may change: to be called right before the optimiser's step."""
        if self._copying is None:
            return
        began = time.perf_counter()
        self._copying.wait()
        self._copying = None
        self.seconds_in_loop += time.perf_counter() - began

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns when this rank's last save is on disk.

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
        except Exception as error:  # not of the storage; told by the loop, which goes on
            self.failed = f"{type(error).__name__}: {error}"
        finally:
            copying.end()


class _HostMemory:
    """fp32 memory that is kept from save to save: fresh pages would cost more than the copying."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, numel: int, pinned: bool) -> torch.Tensor:
        if self._flat.numel() < numel:
            self._flat = torch.empty(0)  # the old one goes first
            self._flat = torch.empty(numel, dtype=torch.float32, pin_memory=pinned)
        return self._flat[:numel]

    def touch(self, numel: int, pinned: bool) -> None:
        """Takes memory and has the system give its pages, at the lowest priority."""
        _step_back()
        with suppress(MemoryError, RuntimeError):  # where there is none left the save will say so
            self.take(numel, pinned).numpy().fill(0)


class _Copying:
    """One save's copying to the host: begun by the loop, done by the writer's thread.

    Args:
        live: views of the engine's tensors, which stay as they are until wait() returns.
        copied: what was copied already.
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
        """Copies; returns the pieces, on the host."""
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
        """Holds back the calling thread, and on a GPU its stream, until all is copied."""
        self._issued.wait()
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)

    def end(self) -> None:
        self._issued.set()


def _step_back() -> None:
    """Lets the training's threads go first where there are fewer cores than threads."""
    if sys.platform == "linux":  # elsewhere niceness is the whole process's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def live_pieces(engine: Any) -> Iterator[Piece]:
    """What this rank writes of the fp32 weights and moments: views that stay as they are until the optimiser steps."""
    state = base_optimizer(engine).state
    for fragment in fragments(engine):
        first, last = fragment.own
        if first == last:
            continue
        own = slice(first - fragment.start, last - fragment.start)
        tensors = {"param": fragment.flat}
        if fragment.trained:
            tensors |= {moment: state[fragment.flat][moment] for moment in MOMENTS if state.get(fragment.flat)}
        for kind, tensor in tensors.items():
            yield Piece(f"{kind}/{fragment.name}", fragment.shape, first, fragment.of(tensor)[own])


def buffer_pieces(engine: Any) -> Iterator[Piece]:
    """Copies of the buffers, which the next forward pass may change; rank 0 writes them."""
    if dist.get_rank() == 0:
        for name, buffer in _buffers(engine.module):
            yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer.detach().to("cpu", copy=True).reshape(-1))


def scaler_state(engine: Any) -> dict[str, float]:
    """fp16's loss scale and its counters; empty in other precisions."""
    scaler = loss_scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def restore(engine: Any, reader: CheckpointReader) -> None:
    """Puts the fp32 weights, moments and counters of a checkpoint into an engine of any rank count and ZeRO stage.

    The module's own weights and buffers must have been loaded before the engine was built. The reader is closed.

    Raises:
        UserError: a parameter is missing or has another shape.
        Fault: the storage refuses.
    """
    optimizer = base_optimizer(engine)
    step = reader.manifest.optimizer_step
    for fragment in fragments(engine):
        where = f"param/{fragment.name}"
        if where not in reader.manifest.tensors or reader.shape(where) != fragment.shape:
            raise UserError(f"{reader.folder}: a checkpoint of another model ({fragment.name} does not fit)")
        reader.read_into(fragment.of(fragment.flat), where, fragment.start)
        if not fragment.trained or step == 0:
            continue
        state = optimizer.state[fragment.flat]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(fragment.flat, requires_grad=False)
            saved = f"{moment}/{fragment.name}"
            if saved in reader.manifest.tensors:  # not where the parameter was locked until now: it begins with zeros
                reader.read_into(fragment.of(state[moment]), saved, fragment.start)
        # torch's fused AdamW counts steps in a tensor beside the weights, DeepSpeed's CPU Adam in an int
        counted = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=fragment.flat.device) if counted else step
    scaler = loss_scaler(engine)
    for name, value in reader.manifest.state.get("scaler", {}).items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)
    reader.close()  # the run would keep the checkpoint's room on the disk, even when it is pruned


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers, by the names of the state dict."""
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in module.state_dict().items():
        if name not in parameters:
            yield name, tensor
