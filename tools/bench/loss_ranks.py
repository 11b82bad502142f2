"""One rank of a loss, timed in a process of its own, and what it is compared with."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from clipdist.losses.wire import written_bytes
from tools.bench.harness import timed
from tools.bench.peak_memory import MemoryGrowth, synchronize, trim_heap

# Other packages' losses: implementation -> loss -> its name in the table.
PEERS = {
    "open_clip": {"infonce": "open_clip ClipLoss", "sigmoid": "open_clip SigLipLoss"},
    "memeff": {"infonce": "memeff"},
}
COSINE = 0.3  # of a pair, about: a loss well above 0, as in training
LOG_SCALE = {"infonce": math.log(1 / 0.07), "sigmoid": math.log(10)}  # where training starts, as the papers have it
BIAS = -10.0
BLOCK = 512  # rows of the float64 matrix of similarities that are there at one time
# Pairs up to which gradients are compared with float64, whose cost grows like the loss' own.
ERROR_PAIRS = {"cpu": 16384, "cuda": 131072}


@dataclass(frozen=True)
class LossJob:
    """What one process computes: one rank of one implementation ("product": the bare matrix product)."""

    impl: str
    ops: tuple[str, ...]
    n: int
    d: int
    dtype: str
    device: str
    threads: int
    folder: Path
    world: int = 1

    @property
    def label(self) -> str:
        return PEERS[self.impl][self.ops[0]] if self.impl in PEERS else f"clipdist {self.impl}"

    def error_pairs(self) -> int:
        """Return the global batch at which gradients are compared."""
        return min(self.n, ERROR_PAIRS[self.device])


@dataclass(frozen=True)
class LossStep:
    """One forward and backward, as one rank saw it. None: cannot be measured here."""

    time_s: float
    extra_bytes: int | None
    wire_bytes: int | None


class LossRank:
    """One rank of one implementation: its features, and the loss on them."""

    def __init__(self, job: LossJob) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.op = job, job.ops[0]
        self.rank = int(os.environ["RANK"]) if job.world > 1 else 0
        if job.world > 1:
            if "lo" in (name for _, name in socket.if_nameindex()):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group("gloo")
        # fp16 gradients of a mean over n pairs would vanish; training scales its loss for the same reason.
        self.loss_scale = job.n if job.dtype == "fp16" else 1
        self.features = self.own_features(job.n)
        self.loss = loss_function(job, self.rank)
        self.log_scale = torch.tensor([LOG_SCALE[self.op]], device=job.device, requires_grad=True)
        self.bias = torch.tensor([BIAS], device=job.device, requires_grad=True)

    def own_features(self, n: int) -> list[torch.Tensor]:
        b = n // self.job.world
        rows = slice(self.rank * b, (self.rank + 1) * b)
        return [side[rows].clone().requires_grad_() for side in features(replace(self.job, n=n))]

    def prepare(self) -> tuple[float, float]:
        """Call the loss. Return the squared norms of the gradients' error and of the float64 gradients, own rows."""
        n = self.job.error_pairs()
        own = self.features if n == self.job.n else self.own_features(n)
        self.call(own)
        whole = torch.load(self.job.folder / f"{self.op}.pt", map_location=self.job.device)
        b = n // self.job.world
        off, norm = 0.0, 0.0
        for mine, exact in zip(own, whole):
            assert mine.grad is not None
            true = exact[self.rank * b : (self.rank + 1) * b]
            found = mine.grad.double() / (self.loss_scale * self.job.world)
            off += float((found - true).square().sum())
            norm += float(true.square().sum())
        return off, norm

    def step(self) -> LossStep:
        self.release()
        if self.job.device == "cuda":  # what other processes need was given back: refill the allocator's cache
            self.call(self.features)
            self.forget()
        if self.job.world > 1:
            dist.barrier()
        sent = written_bytes() if self.job.world > 1 else None
        memory = MemoryGrowth(self.job.device)
        time_s, _ = timed(self.call_and_wait)
        extra = memory.peak()
        step = LossStep(time_s, extra, None if sent is None else written_bytes() - sent)
        self.release()
        return step

    def call(self, own: list[torch.Tensor]) -> None:
        value = self.loss(*own, self.log_scale, self.bias)
        (value * self.loss_scale).backward()

    def call_and_wait(self) -> None:
        self.call(self.features)
        synchronize(self.job.device)

    def forget(self) -> None:
        for leaf in (*self.features, self.log_scale, self.bias):
            leaf.grad = None

    def release(self) -> None:
        """Give back what the last call left, so that the next one starts from the state of a first one."""
        self.forget()
        if self.job.device == "cuda":
            torch.cuda.empty_cache()
        trim_heap()


class MatrixProduct:
    """One n x n x d product in the features' dtype: the unit of time; and the float64 gradients to compare with."""

    def __init__(self, job: LossJob) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.images, self.texts = features(job)
        elements = 1 << (30 if job.device == "cuda" else 26)  # few launches on a GPU
        rows = min(job.n, max(1, elements // job.n))
        self.space = torch.empty(rows, job.n, dtype=self.images.dtype, device=job.device)
        self.rows = rows

    def prepare(self) -> None:
        n = self.job.error_pairs()
        images, texts = (side.double() for side in features(replace(self.job, n=n)))
        for op in self.job.ops:
            torch.save(exact_gradients(op, images, texts), self.job.folder / f"{op}.pt")
        del images, texts
        if self.job.device == "cuda":
            torch.cuda.empty_cache()  # others need what the float64 gradients took
        self.step()

    def step(self) -> LossStep:
        synchronize(self.job.device)
        return LossStep(timed(self.multiply)[0], None, None)

    def multiply(self) -> None:
        for start in range(0, self.job.n, self.rows):
            part = self.images[start : start + self.rows]
            torch.mm(part, self.texts.T, out=self.space[: len(part)])
        synchronize(self.job.device)


def features(job: LossJob) -> list[torch.Tensor]:
    """Draw images and texts [n, d], unnormalised, the same in every process with this device."""
    draw = torch.Generator(job.device).manual_seed(7)
    images = torch.randn(job.n, job.d, generator=draw, device=job.device)
    texts = (
        torch.randn(job.n, job.d, generator=draw, device=job.device)
        .mul_(math.sqrt(1 - COSINE**2))
        .add_(images, alpha=COSINE)
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[job.dtype]
    return [side.to(dtype) for side in (images, texts)]


def loss_function(job: LossJob, rank: int) -> Callable[..., torch.Tensor]:
    """Return a function of (images, texts, log scale, bias) to a scalar whose mean over ranks is the global loss."""
    if job.impl in PEERS:
        from tools.bench.peers.losses import memeff_loss, open_clip_loss

        if job.impl == "memeff":
            return memeff_loss(LOG_SCALE[job.ops[0]])
        return open_clip_loss(job.ops[0], rank=rank, world=job.world)
    from clipdist.losses.infonce import info_nce
    from clipdist.losses.sigmoid import sigmoid_loss

    loss = info_nce if job.ops[0] == "infonce" else sigmoid_loss
    return lambda x, y, t, bias: loss(x, y, t, bias, implementation=job.impl)[0]


def exact_gradients(op: str, images: torch.Tensor, texts: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the gradients of the global loss towards float64 features [n, d]: the dense formula, by blocks of rows.

    InfoNCE is the mean of the cross-entropies of rows and columns; the sigmoid loss takes softplus(s + bias) of all
    pairs and subtracts s + bias of the matching ones.
    """
    leaves = [images.requires_grad_(), texts.requires_grad_()]
    x, y = (F.normalize(leaf, dim=1) for leaf in leaves)
    scale = math.exp(LOG_SCALE[op])

    def block(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = scale * rows @ y.T
        if op == "sigmoid":
            return F.softplus(s + BIAS).sum(), s.new_zeros(1)
        return s.logsumexp(1).sum() / 2, s.logsumexp(0)

    parts = [checkpoint(block, rows, use_reentrant=False) for rows in x.split(BLOCK)]
    loss = sum(part for part, _ in parts) - scale * (x * y).sum()
    if op == "infonce":
        loss = loss + torch.stack([columns for _, columns in parts]).logsumexp(0).sum() / 2
    return torch.autograd.grad(loss / len(images), leaves)
