"""Prepare DeepSpeed before an engine is built."""

from __future__ import annotations

import logging

import torch.distributed as dist


def prepare_deepspeed() -> None:
    """Import DeepSpeed, lower its log level, and set the process group of `joined_ranks`. May be called again."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's shared-memory all-reduce is for tensor-parallel inference; training never calls it, but on a CPU the
    # first start would compile it for one or two minutes, and fail where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Stage 1 in bf16 with accumulation prints memory figures when it is built, whatever the log level.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # To check whether an optimiser is Muon, DeepSpeed wraps Muon's kernels in torch.compile, whose imports take a fifth
    # of the start-up time on a CPU. This is its own substitute for a torch without compile.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
