"""Prepare DeepSpeed before an engine is built."""

from __future__ import annotations

import logging

import torch.distributed as dist


def prepare_deepspeed() -> None:
    """Import DeepSpeed, silence it, and have it use the process group of `joined_ranks`. May be called again."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's all-reduce through shared memory serves tensor-parallel inference alone; training never calls it, but
    # on a CPU the first start would compile it for a minute or two, and end in a traceback where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Stage 1 in bf16 with accumulation prints a dozen lines of memory figures when it is built, whatever the log level.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # DeepSpeed asks of every optimiser whether it is Muon, and to have an answer wraps Muon's kernels in torch.compile,
    # whose imports are a fifth of a start on a CPU. This is its own stand-in for a torch without compile.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
