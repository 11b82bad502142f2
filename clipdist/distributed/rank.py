"""This process' device and rank, and the process group that joins the ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from clipdist.distributed.node import cores_of_rank
from clipdist.errors import Fault, UserError

AFTER_THE_WATCHDOG_S = 120


@dataclass(frozen=True)
class DistEnv:
    """This process' rank and device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def world_size() -> int:
    """Return the number of ranks that the launcher announced; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_device(wanted: str) -> str:
    """Resolve auto, cpu or cuda to cpu or cuda.

    Raises:
        UserError: cuda is wanted and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device; set device=cpu, or look at nvidia-smi")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(wanted: str, device: str) -> str:
    """Resolve auto to bf16 on a GPU that has it, else to fp16; on a CPU to fp32.

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


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor [n] on the device; the host does not wait for it, as it does in torch.tensor."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device; the host does not wait for the copy of one of its own."""
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_index(local_rank: int, visible: int) -> int:
    """Return the number of this rank's GPU among those that it sees.

    Sites that bind GPUs (srun --gpus-per-task, --gpu-bind) show each task its own alone, as number 0.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if local_rank < visible:
        return local_rank
    if visible == 1 and "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        return 0
    raise UserError(
        f"rank {local_rank} of this node has no GPU: torch sees {visible}; start one rank per GPU, or let each see its"
        " own (CUDA_VISIBLE_DEVICES)"
    )


def time_limit(hang_s: float) -> timedelta:
    """Return the time limit of a collective: after the watchdog's, which says why a run hangs."""
    return timedelta(seconds=hang_s + AFTER_THE_WATCHDOG_S) if hang_s else timedelta(days=30)


@contextmanager
def _meeting(rank: int) -> Iterator[None]:
    """Turn the errors of the rendezvous into one line.

    Raises:
        Fault: the ranks did not meet. A job that starts again does so at another port.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise Fault(
                f"the ranks cannot meet at {where}: another program uses this port, perhaps another training run;"
                " choose a free one (deepspeed --master_port PORT, torchrun --master-port PORT, else MASTER_PORT)"
            ) from None
        reason = str(error).partition("\n")[0]
        raise Fault(f"rank {rank} cannot meet the others at {where} ({reason}); all nodes must reach it") from None


@contextmanager
def joined_ranks(device: str, hang_s: float = 0.0) -> Iterator[DistEnv]:
    """Join the ranks that a launcher started into one process group (gloo on CPU, NCCL on GPUs), for a with block.

    A process without a launcher is the only rank of its group. After an error the group of several ranks is left as it
    is: the others may be inside a collective, and the process is about to end.

    Args:
        device: cpu or cuda, as resolve_device returns it.
        hang_s: as train.hang_s; see time_limit.

    Raises:
        Fault: the ranks cannot meet.
    """
    os.environ["DS_ACCELERATOR"] = device  # before the first import of deepspeed
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    added = [name for name in alone if name not in os.environ]
    os.environ.update({name: alone[name] for name in added})
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device(device, device_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(where)
        os.environ["LOCAL_RANK"] = str(where.index)  # which DeepSpeed takes for the device
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_of_rank())
    failed = True
    try:
        backend, timeout = "nccl" if device == "cuda" else "gloo", time_limit(hang_s)
        if world == 1:  # the store is in this process: no port is needed
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        else:
            with _meeting(rank):
                dist.init_process_group(backend, timeout=timeout)
        yield DistEnv(rank, world, local_rank, where)
        failed = False
    finally:
        if dist.is_initialized() and (world == 1 or not failed):
            dist.destroy_process_group()
        for name in added:
            os.environ.pop(name, None)
