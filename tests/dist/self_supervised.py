"""Losses of self-supervised objectives, split over ranks, against one process on the whole batch; and wrong ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.koleo import koleo
from clipdist.losses.momentum_contrast import contrast_batch, empty_queue, enqueue
from clipdist.losses.nt_xent import nt_xent
from clipdist.losses.prototypes import sinkhorn_centre, sum_rows, update_centre
from clipdist.losses.tiles import Tile
from clipdist.losses.wire import nt_xent_bytes, written_bytes

Run = Callable[..., list[torch.Tensor]]  # see losses.run


def errors_over_ranks(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """Relative errors of the mean over ranks of value and gradients."""
    errors = []
    for ours, theirs in zip(found, exact):
        dist.all_reduce(ours := ours.detach().float().clone())
        errors.append(float((ours / dist.get_world_size() - theirs).norm() / theirs.norm().clamp(min=1e-6)))
    return errors


def _koleo(features, _, **options):
    return koleo(features, **options)


def losses_are_those_of_one_process(rank: int, world: int, run: Run, alone: type) -> None:
    """Random sizes, masks and tiles; KoLeo's groups within ranks, over several, and cut by the end of the batch."""
    draw = random.Random(4)
    for case in range(18):
        share, width = draw.randint(2, 12), draw.randint(2, 20)
        n, rows = share * world, slice(rank * share, (rank + 1) * share)
        generator = torch.Generator().manual_seed(case)
        first = torch.randn(n, width, generator=generator)
        inputs = (first, first + torch.randn(n, width, generator=generator))
        valid = torch.rand(n, generator=generator) > draw.choice([0.0, 0.3])
        size = draw.choice([0, 2, share, share + 1, 2 * share, n])
        function = (
            partial(nt_xent, temperature=draw.choice([0.5, 0.05])),
            partial(_koleo, group_size=size),
            partial(contrast_batch, temperature=0.2),
        )[case % 3]
        options = {"tile": Tile(draw.randint(1, 9), draw.randint(1, 9))}
        found = run(function, inputs, rows, valid=valid[rows], **options)
        statistics = function(*(x[rows] for x in inputs), valid=valid[rows])[1]
        with alone():
            exact = run(function, inputs, slice(None), valid=valid, **options)
            whole = function(*inputs, valid=valid)[1]
        assert max(errors_over_ranks(found, exact)) < 1e-5, (case, size)
        for name, count in statistics.items():
            dist.all_reduce(count := count.clone())
            assert count == whole[name], (case, name)


def _wrong_nt_xent(kind: str, temperature: float, first, second, valid=None):
    """The errors that public code has had: the contrast with the gathered views, by autograd."""
    rank, world = dist.get_rank(), dist.get_world_size()
    views = F.normalize(torch.cat([first, second]), dim=1)
    parts = [torch.empty_like(views) for _ in range(world)]
    dist.all_gather(parts, views.detach())
    if kind == "not gathered":
        parts, rank = [views], 0
    elif kind == "gathered, and not summed":
        parts[rank] = views
    s = views @ torch.cat(parts).T / temperature
    s = s.masked_fill(torch.eye(len(views), s.shape[1]).roll(rank * len(views), 1) > 0, -torch.inf)
    target = (torch.arange(len(views)) + len(first)) % len(views) + rank * len(views)
    value = F.cross_entropy(s, target)
    return (value / world if kind == "divided by the ranks" else value), None


def wrong_losses_are_found_out(rank: int, world: int, run: Run, alone: type) -> None:
    share = 8
    rows, generator = slice(rank * share, (rank + 1) * share), torch.Generator().manual_seed(0)
    first = torch.randn(share * world, 12, generator=generator)
    inputs = (first, first + torch.randn(share * world, 12, generator=generator))
    with alone():
        exact = run(partial(nt_xent, temperature=0.2), inputs, slice(None))
    for kind in ("not gathered", "gathered without gradient", "gathered, and not summed", "divided by the ranks"):
        value, *gradients = errors_over_ranks(run(partial(_wrong_nt_xent, kind, 0.2), inputs, rows), exact)
        assert min(gradients) > 1e-2, kind
        assert (value > 1e-2) == (kind in ("not gathered", "divided by the ranks")), (kind, value)


def nt_xent_sends_what_the_model_says(rank: int, world: int) -> None:
    views = torch.randn(2, 64, 128)
    nt_xent(*views, 0.1)  # connects
    before = written_bytes()
    nt_xent(*views, 0.1)
    assert written_bytes() - before == pytest.approx(nt_xent_bytes(world, 64, 128, "fp32"), rel=0.04)


def queues_and_centres_are_those_of_one_process(rank: int, world: int, alone: type) -> None:
    """A queue that the batches do not divide, and its wrong kin; ranks with different numbers of rows of logits."""
    share, width = 3, 5
    rows = slice(rank * share, (rank + 1) * share)
    split = whole = own = empty_queue(4 * world - 1, width)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        keys = torch.randn(share * world, width, generator=generator)
        valid = torch.rand(share * world, generator=generator) > 0.2
        split = enqueue(split, keys[rows], valid=valid[rows])
        with alone():
            whole, own = enqueue(whole, keys, valid=valid), enqueue(own, keys[rows], valid=valid[rows])
        for name in whole:
            assert torch.equal(split[name], whole[name]), (step, name)
    assert not torch.equal(own["queue"], whole["queue"])  # not gathered

    cuts = torch.arange(world).cumsum(0) * 4  # rank r has 4 r rows, rank 0 none
    n, rows = 4 * sum(range(world)), slice(int(cuts[rank]) - 4 * rank, int(cuts[rank]))
    generator = torch.Generator().manual_seed(1)
    logits, valid = torch.randn(n, 9, generator=generator), torch.rand(n, generator=generator) > 0.2
    mine = logits[rows]
    centre = sinkhorn_centre(lambda part: mine[part], valid[rows], 9, 0.1)
    moved = update_centre(torch.zeros(9), sum_rows(mine, valid[rows]), 0.9)
    with alone():
        exact = sinkhorn_centre(lambda part: logits.double()[part], valid, 9, 0.1)
    torch.testing.assert_close(centre, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved, 0.1 * logits[valid].mean(0))
    of_own_rows = mine[valid[rows]].mean(0) if rank else torch.zeros(9)
    dist.all_reduce(of_own_rows)
    if world > 2:
        assert not torch.allclose(0.1 * of_own_rows / (world - 1), moved, rtol=1e-2)  # the mean of the ranks' means


def bad_features_are_named_on_every_rank(rank: int, world: int) -> None:
    features, bad = torch.randn(6, 8), torch.randn(6, 8)
    if rank == world - 1:
        bad[1] = torch.nan
    every = torch.ones(6, dtype=torch.bool)
    for function, name in (
        (lambda: nt_xent(features, bad, 0.1), "the second view"),
        (lambda: koleo(bad), "the features"),
        (lambda: contrast_batch(bad, features, 0.2), "the queries"),
        (lambda: sinkhorn_centre(lambda rows: bad[rows], every, 8, 0.1), "the teacher's logits"),
    ):
        with pytest.raises(NonFiniteFeatures) as found:
            function()
        assert found.value.where == [(world - 1, name, 1)]
