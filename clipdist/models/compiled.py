"""Compile the residual blocks of towers by torch.compile, in place: parameters keep their names, modules their hooks.

Only a block's forward function is replaced, so that blocks of one shape share their code, and what surrounds a block
stays as it is: activation checkpointing, ZeRO, packed texts, patch dropout.

Every shape is compiled for itself. Code for any shape (dynamic=True) is tuned to the shape that comes first, so that
the rounding of a resumed run could differ from that of the run that it continues.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from clipdist.errors import brief
from clipdist.models.lstm import LSTMLayer

# Blocks of open_clip's, timm's and Hugging Face's transformers; those of a ResNet's stages layer1, layer2 ...
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layers?|blocks?|layer\d+)\.\d+$")
# fallback_random: random numbers are those of torch without a compiler, so that dropout is the same in both passes of
# gradient caching. deterministic: no choice of code by measured times.
_OPTIONS: dict[str, Any] = {"fallback_random": True, "deterministic": True}
_MOST_VARIANTS = 512  # of one forward function: shapes, blocks, modes. With more, torch runs it uncompiled


def compile_blocks(tower: nn.Module) -> int:
    """Compile the forward functions of a tower's blocks, in place. Return the number of blocks; 0: none are known.

    Call it before activation checkpointing is set. Nothing is compiled before the first forward pass.
    """
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = _MOST_VARIANTS
    compiled: dict[type[nn.Module], type[nn.Module]] = {}
    blocks = _residual_blocks(tower)
    for block in blocks:
        kind = type(block)
        if kind not in compiled:
            forward = torch.compile(kind.forward, dynamic=False, options=_OPTIONS)
            compiled[kind] = type(kind.__name__, (kind,), {"forward": forward})
        block.__class__ = compiled[kind]
    return len(blocks)


def _residual_blocks(tower: nn.Module) -> list[nn.Module]:
    """Return the blocks of a tower, none of them inside another. An LSTM's layers are one call of a library each."""
    found: dict[str, nn.Module] = {}
    for name, module in tower.named_modules():
        if isinstance(module, LSTMLayer):
            continue
        if _BLOCK.search(name) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def why_not(device: torch.device) -> str:
    """Return why nothing can be compiled for a device, such as a missing C++ compiler; "" where a trial succeeds."""
    import torch._inductor.config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a CPU it warns of CUDA
    if device.type == "cpu":
        inductor.compile_threads = 1  # no pool of processes beside the ranks, which use the cores already
    try:
        if device.type == "cpu":
            get_cpp_compiler()  # the trial may be found in the cache
        torch.compile(_trial, dynamic=False, options=_OPTIONS)(torch.ones(8, device=device))
    except Exception as error:  # of the compilers and their drivers: of many types
        return brief(error)
    return ""


def uncompiled() -> AbstractContextManager[None]:
    """Let compiled blocks run as they were, inside the context."""
    return torch.compiler.set_stance("force_eager")


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1


class CompileClock:
    """Counts the compilations of this process.

    Args:
        ended: called after each.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        from torch._dynamo.callback import callback_handler

        self._handler, self._ended = callback_handler, ended
        self._began, self._count, self._seconds = 0.0, 0, 0.0
        self._handler.register_start_callback(self._start)
        self._handler.register_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Any) -> None:
        self._count += 1
        self._seconds += time.perf_counter() - self._began
        self._ended()

    def lap(self) -> tuple[int, float]:
        """Return the number of compilations since the previous lap, and their seconds."""
        lap = self._count, self._seconds
        self._count, self._seconds = 0, 0.0
        return lap

    def close(self) -> None:
        """Count no more."""
        self._handler.remove_start_callback(self._start)
        self._handler.remove_end_callback(self._end)


def cache_folder() -> str:
    """Return where torch keeps compiled code, for all ranks of a node and for later runs."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()
