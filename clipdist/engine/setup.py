"""Prepare DeepSpeed before an engine is built: its process group, log level and configuration."""

from __future__ import annotations

import logging
from typing import Any

import torch.distributed as dist

from clipdist.config import Config
from clipdist.distributed.rank import resolve_precision


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
    # It warns of optimisers that it does not know, such as LARS; tests/dist/test_optimizers.py checks them.
    deepspeed.runtime.engine.is_zero_supported_optimizer = lambda _: True
    # To check whether an optimiser is Muon, DeepSpeed wraps Muon's kernels in torch.compile, whose imports take a fifth
    # of the start-up time on a CPU. This is its own substitute for a torch without compile.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def deepspeed_config(config: Config, device: str, world: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration: engine.deepspeed and the keys that the trainer owns."""
    batch = config.train.global_batch
    micro = config.train.micro_batch or batch // world
    precision = resolve_precision(config.train.precision, device)
    owned: dict[str, Any] = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batch // world // micro,
        "gradient_clipping": config.optim.grad_clip,  # always explicit: DeepSpeed's default is 1.0
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 62,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice in every micro-batch
    }
    if batch // world > micro and precision != "fp32" and config.engine.zero_stage > 0:
        owned["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config.engine.deepspeed, owned)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, nested dicts merged."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
