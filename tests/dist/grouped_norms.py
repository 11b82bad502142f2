"""One rank of the proof for BatchNorm over groups: each kind of layer beside torch's own in float64, group by group.

Prints the number of cases. Every rank compares its own rows, and the statistics of all ranks to the bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from timm.layers import BatchNormAct2d
from torch import nn

from clipdist.distributed.collectives import all_equal, sum_over_ranks
from clipdist.distributed.rank import joined_ranks
from clipdist.models.norms import RunningStatistics, running_norms, statistics_frozen
from clipdist.models.towers import group_batchnorm, keep_statistics_fp32

BATCH = 16
VIEWS = 2
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    layer: nn.Module
    shape: tuple[int, ...]  # of what the layer has for each image
    dtype: torch.dtype = torch.float32

    @property
    def limit(self) -> float:
        return 2e-6 if self.dtype == torch.float32 else 3e-2


CASES = (
    Case(nn.BatchNorm2d(CHANNELS), (1, CHANNELS, 3, 4)),
    Case(nn.BatchNorm2d(CHANNELS, momentum=None), (1, CHANNELS, 3, 4)),
    Case(nn.BatchNorm2d(CHANNELS, affine=False), (1, CHANNELS, 3, 4)),
    Case(nn.BatchNorm2d(CHANNELS, track_running_stats=False), (1, CHANNELS, 3, 4)),
    Case(BatchNormAct2d(CHANNELS), (1, CHANNELS, 3, 4)),
    Case(BatchNormAct2d(CHANNELS), (1, CHANNELS, 3, 4), torch.bfloat16),
    Case(nn.BatchNorm2d(CHANNELS), (1, CHANNELS, 3, 4), torch.float16),
    Case(nn.BatchNorm1d(CHANNELS), (1, CHANNELS)),
    Case(nn.BatchNorm1d(CHANNELS), (6, CHANNELS)),  # LeViT's, a row for each patch
    Case(nn.BatchNorm1d(CHANNELS), (1, CHANNELS, 7)),
)


class Tower(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image.flatten(0, 1)).unflatten(0, image.shape[:2])


def by_groups(tower: Tower, x: torch.Tensor, size: int, sums: list[torch.Tensor]) -> torch.Tensor:
    """Torch's layer on each group by itself; adds the group's moments to `sums`."""
    outputs = []
    for group in x.split(size):
        outputs.append(tower(image=group))
        rows = group.detach().flatten(0, 1).transpose(0, 1).flatten(1)  # [C, n]
        sums[0] += rows.mean(1)
        sums[1] += rows.var(1)
    return torch.cat(outputs)


def compare(case: Case, size: int, rank: int, world: int) -> None:
    torch.manual_seed(3)
    exact = Tower(copy.deepcopy(case.layer)).double()
    for parameter in exact.parameters():
        nn.init.normal_(parameter, mean=1)
    ours = copy.deepcopy(exact).float()
    keep_statistics_fp32(ours)
    group_batchnorm(ours, size)
    ours.to(case.dtype)
    exact.load_state_dict({name: value.double() for name, value in ours.state_dict().items()})
    norms, statistics = running_norms(exact), RunningStatistics(ours)
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for number in range(2):
        statistics.save()
        before = [norm.running_mean.clone() for norm in norms] + [norm.running_var.clone() for norm in norms]
        sums = [torch.zeros(CHANNELS, dtype=torch.float64) for _ in range(2)]
        for _ in range(VIEWS):
            # A mean far from 0, where the difference of squares would cancel in fp32
            x, weight = torch.randn(2, BATCH, *case.shape, dtype=torch.float64).to(case.dtype)
            x = x if case.dtype == torch.float16 else x + 8
            theirs, mine = x.double().requires_grad_(), x[own].clone().requires_grad_()
            ours.zero_grad()
            exact.zero_grad()
            y = by_groups(exact, theirs, size, sums)
            (y * weight).sum().backward()
            with torch.no_grad(), statistics_frozen(running_norms(ours)):
                first = ours(image=mine)
            found = ours(image=mine)
            assert torch.equal(first, found)
            (found * weight[own]).sum().backward()
            pairs = [(found, y[own]), (mine.grad, theirs.grad[own])]
            pairs += [(sum_over_ranks(p.grad.float()), q.grad) for p, q in zip(ours.parameters(), exact.parameters())]
            for got, wanted in pairs:
                error = float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
                assert error < case.limit * (4 if got is mine.grad else 1), (case, size, world, error)
        if not norms:
            continue
        ours_norm, exact_norm = running_norms(ours)[0], norms[0]
        assert torch.equal(ours_norm.running_mean.double(), before[0]), "statistics move in average() alone"
        statistics.average()
        share = 1 / (number + 1) if exact_norm.momentum is None else exact_norm.momentum
        exact_norm.num_batches_tracked.fill_(number + 1)
        for name, old, total in zip(("running_mean", "running_var"), before, sums):
            buffer = getattr(exact_norm, name)
            buffer.copy_(old.lerp(total / (VIEWS * BATCH / size), share))
            torch.testing.assert_close(getattr(ours_norm, name).double(), buffer, rtol=2e-6, atol=1e-6)
            buffer.copy_(getattr(ours_norm, name))
        assert ours_norm.num_batches_tracked == number + 1
        bits = [buffer.numpy().tobytes() for buffer in ours.buffers()]
        assert all_equal(b"".join(bits)), "statistics differ between ranks"


def main() -> None:
    with joined_ranks("cpu") as dist_env:
        rank, world = dist_env.rank, dist_env.world_size
        share, done = BATCH // world, 0
        for case in CASES:
            # Of two values a channel the normalised ones are 1 and -1: the gradient is rounding alone
            for size in (2, 4, 8, 16) if case.shape != (1, CHANNELS) else (8, 16):
                if share % size == 0 or size % share == 0:
                    compare(case, size, rank, world)
                    done += 1
        print(done)


main()
