"""Keep an exponential moving average of the weights, sharded as ZeRO shards their fp32 master weights.

After an optimiser step, average = m average + (1 - m) weights, in fp32. Averaged are the trained parameters and, in
the same way, BatchNorm's running statistics: they belong to weights of the same age. A teacher whose BatchNorm
normalises by its own batches has statistics of its own instead (clipdist.engine.moving_teacher).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from clipdist.checkpoint.format import EMA, Piece
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.engine.fragment import Fragment
from clipdist.engine.zero import Zero
from clipdist.models.norms import running_norms


def warmed_up(momentum: float, step: int) -> float:
    """Return the momentum m_n of step n: at most (1 + n) / (10 + n), so that a short run forgets its initial weights.

    The rule of TensorFlow's ExponentialMovingAverage(num_updates). 0.999 is reached after 8990 steps.

    Args:
        step: n, optimiser steps taken, this one included.
    """
    return min(momentum, (1 + step) / (10 + step))


class Ema:
    """The moving average of the trained weights and of the running statistics of a model.

    Args:
        zero: whose weights the average starts from.
        averages_buffers: whether `update` moves the running statistics, too.

    Attributes:
        steps: optimiser steps taken.
        buffers: fp32 running statistics that belong to the average, by name.
    """

    def __init__(self, zero: Zero, averages_buffers: bool = True) -> None:
        self.steps = 0
        self._zero, self._averages_buffers = zero, averages_buffers
        flats = dict.fromkeys(fragment.flat for fragment in zero.fragments() if fragment.trained)
        self._averages = {flat: flat.detach().clone() for flat in flats}
        norms = {norm for norm in running_norms(zero.module) if norm.training}  # not those of a locked tower
        self._buffers = {
            f"{layer}.{name}": buffer
            for layer, norm in zero.module.named_modules()
            for name, buffer in norm.named_buffers(recurse=False)
            if norm in norms and buffer.is_floating_point()
        }
        self.buffers = {name: buffer.float().clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the average; call it once after every step that the optimiser took."""
        self.steps += 1
        averages, current = [*self._averages.values()], [flat.detach() for flat in self._averages]
        if self._averages_buffers:
            averages += self.buffers.values()
            current += [buffer.float() for buffer in self._buffers.values()]
        torch._foreach_lerp_(averages, current, 1 - momentum)

    def read(self, fragment: Fragment) -> Tensor:
        """Return the average of a fragment, 1-D; of one that is not trained, its weights."""
        return fragment.of(self._averages[fragment.flat]) if fragment.trained else fragment.master

    @contextmanager
    @torch.no_grad()
    def in_use(self) -> Iterator[None]:
        """Let the module compute with the average inside the context; see Zero.computing_with. Collective."""
        own = [buffer.clone() for buffer in self._buffers.values()]
        with self._zero.computing_with(self.read):
            for name, buffer in self._buffers.items():
                buffer.copy_(self.buffers[name])
            try:
                yield
            finally:
                for buffer, before in zip(self._buffers.values(), own):
                    buffer.copy_(before)

    def live_pieces(self) -> Iterator[Piece]:
        """Iterate over this rank's checkpoint pieces: views, valid until update()."""
        for fragment in self._zero.fragments():
            first, last = fragment.own
            if fragment.trained and first < last:
                own = self.read(fragment)[first - fragment.start : last - fragment.start]
                yield Piece(EMA + fragment.name, fragment.shape, first, own)
        for name, average in self.buffers.items() if dist.get_rank() == 0 else ():
            yield Piece(EMA + name, tuple(average.shape), 0, average.view(-1))

    def restore(self, reader: CheckpointReader) -> None:
        """Load the average of a checkpoint whose weights were restored; where it has none, start from them."""
        self.steps = reader.manifest.optimizer_step
        for fragment in self._zero.fragments():
            if fragment.trained:
                _load(self.read(fragment), reader, fragment.name, fragment.start, fragment.master)
        for name, average in self.buffers.items():
            _load(average.view(-1), reader, name, 0, self._buffers[name].view(-1))
        reader.close()

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over (name, tensor) of the averages that are replicated on every rank: see Zero.replicated."""
        for fragment in self._zero.fragments() if self._zero.stage == 0 else ():
            if fragment.trained:
                yield EMA + fragment.name, self.read(fragment)
        for name, average in self.buffers.items():
            yield EMA + name, average


def _load(average: Tensor, reader: CheckpointReader, name: str, start: int, weights: Tensor) -> None:
    if EMA + name in reader.manifest.tensors:
        reader.read_into(average, EMA + name, start)
    else:
        average.copy_(weights)
