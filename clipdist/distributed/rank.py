"""Which device and which rank this process is: environment variables in, an initialised process group out."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from clipdist.errors import UserError

AFTER_THE_WATCH_S = 120


@dataclass(frozen=True)
class DistEnv:
    """Where this process stands."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def world_size() -> int:
    """The number of ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_device(wanted: str) -> str:
    """auto, cpu or cuda to cpu or cuda.

    Raises:
        UserError: cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device; set device=cpu, or look at nvidia-smi")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


def resolve_precision(wanted: str, device: str) -> str:
    """auto is bf16 on a GPU that has it, else fp16; on a CPU it is fp32.

    Raises:
        UserError: fp16 on a CPU.
    """
    if wanted == "fp16" and device == "cpu":
        raise UserError("train.precision=fp16: not on a CPU; set train.precision=fp32 or bf16")
    if wanted != "auto":
        return wanted
    if device == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def time_limit(hang_s: float) -> timedelta:
    """Of a collective: the watch over the ranks ends a run that hangs, and says why; this says less and comes later."""
    return timedelta(seconds=hang_s + AFTER_THE_WATCH_S) if hang_s else timedelta(days=30)


def start(device: str, hang_s: float = 0.0) -> DistEnv:
    """Joins the process group through DeepSpeed (gloo on CPU, NCCL on GPUs). A single process needs no launcher.

    Args:
        hang_s: as train.hang_s; see time_limit.
    """
    os.environ["DS_ACCELERATOR"] = device  # before the first import of deepspeed
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
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
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=time_limit(hang_s)
        )
    return DistEnv(
        rank, world, local_rank, torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
