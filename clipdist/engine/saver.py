"""Saving and restoring a run: engine state to a checkpoint folder, in the background, and back.

The loop only copies this rank's fragments; a thread writes them. Ranks meet through the file system, not through
collectives, so that a slow disk never mixes with the training's communication.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clipdist.checkpoint import (
    CheckpointReader,
    Manifest,
    Piece,
    checkpoint_dir,
    prune,
    write_manifest,
    write_part,
)
from clipdist.engine.fragments import MOMENTS, base_optimizer, fragments, loss_scaler
from clipdist.errors import UserError

WRITER = "checkpoint writer"  # the thread's name
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Saver:
    """Writes checkpoints of one run.

    Args:
        attempt: a token that all ranks of this start share, so that leftovers of an earlier one are not mistaken.
    """

    def __init__(self, run_dir: Path, keep: int, rank: int, attempt: str) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.rank = rank
        self.attempt = attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, engine: Any, manifest: Manifest) -> Path:
        """Copies what this rank holds and returns; the files are written while training goes on.

        Raises:
            RuntimeError: the save before this one failed.
        """
        self.wait()
        folder = checkpoint_dir(self.run_dir, manifest.step)
        pieces = list(pieces_of(engine))
        attempt = f"{self.attempt}-{manifest.step}"
        work = (folder, pieces, manifest, attempt)
        self._thread = threading.Thread(target=self._write, args=work, name=WRITER, daemon=True)
        self._thread.start()
        return folder

    def wait(self) -> None:
        """Returns when this rank's last save is on disk.

        Raises:
            RuntimeError: it failed; the cause is chained.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise RuntimeError(f"rank {self.rank}: writing a checkpoint failed: {self._error}") from self._error

    def _write(self, folder: Path, pieces: list[Piece], manifest: Manifest, attempt: str) -> None:
        try:
            write_part(folder, self.rank, pieces, attempt)
            if self.rank == 0:
                write_manifest(folder, manifest, attempt)
                prune(self.run_dir, self.keep)
        except BaseException as error:  # handed to the loop by wait()
            self._error = error


def pieces_of(engine: Any) -> Iterator[Piece]:
    """Copies of what this rank writes: its own part of the fp32 weights and moments; rank 0 adds the buffers."""
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
            data = fragment.of(tensor)[own].to("cpu", torch.float32, copy=True)
            yield Piece(f"{kind}/{fragment.name}", fragment.shape, first, data)
    if dist.get_rank() == 0:
        for name, buffer in _buffers(engine.module):
            yield Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer.detach().to("cpu", copy=True).reshape(-1))


def scaler_state(engine: Any) -> dict[str, float]:
    """fp16's loss scale and its counters; empty in other precisions."""
    scaler = loss_scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def restore(engine: Any, reader: CheckpointReader) -> None:
    """Puts the fp32 weights, moments and counters of a checkpoint into an engine of any rank count and ZeRO stage.

    The module's own weights and buffers must have been loaded before the engine was built.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    optimizer = base_optimizer(engine)
    step = reader.manifest.optimizer_step
    for fragment in fragments(engine):
        where = f"param/{fragment.name}"
        if where not in reader.manifest.tensors or reader.shape(where) != fragment.shape:
            raise UserError(f"{reader.folder}: a checkpoint of another model ({fragment.name} does not fit)")
        fragment.of(fragment.flat).copy_(reader.read(where, fragment.start, fragment.numel))
        if not fragment.trained or step == 0:
            continue
        state = optimizer.state[fragment.flat]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(fragment.flat, requires_grad=False)
            saved = f"{moment}/{fragment.name}"
            if saved in reader.manifest.tensors:  # not where the parameter was locked until now: it begins with zeros
                fragment.of(state[moment]).copy_(reader.read(saved, fragment.start, fragment.numel))
        # torch's fused AdamW counts steps in a tensor beside the weights, DeepSpeed's CPU Adam in an int
        counted = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=fragment.flat.device) if counted else step
    scaler = loss_scaler(engine)
    for name, value in reader.manifest.state.get("scaler", {}).items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Persistent buffers, by the names of the state dict."""
    parameters = {name for name, _ in module.named_parameters()}
    for name, tensor in module.state_dict().items():
        if name not in parameters:
            yield name, tensor
