"""One rank of the losses alone: features split over ranks against one process, and what happens to bad input."""

from __future__ import annotations

import random
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from self_supervised import (
    bad_features_are_named_on_every_rank,
    losses_are_those_of_one_process,
    nt_xent_sends_what_the_model_says,
    queues_and_centres_are_those_of_one_process,
    wrong_losses_are_found_out,
)

from clipdist.errors import UserError
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.infonce import batch_accuracy, info_nce
from clipdist.losses.several_texts import contrast_texts, texts_accuracy
from clipdist.losses.sigmoid import sigmoid_loss
from clipdist.losses.tiles import Tile

LOSSES = (info_nce, sigmoid_loss)


class Alone:
    """Makes the losses see a world of one rank: the reference runs in the same processes."""

    def __enter__(self):
        self.initialised = dist.is_initialized
        dist.is_initialized = lambda: False

    def __exit__(self, *_):
        dist.is_initialized = self.initialised


def run(function, inputs, rows, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value, _ = function(leaves[0][rows], leaves[1][rows], *leaves[2:], **options)
    value.backward()
    return [value.detach(), *(torch.zeros(1) if x.grad is None else x.grad for x in leaves)]


def splitting_changes_nothing(rank: int, world: int) -> None:
    """Random sizes, masks, groups, scales and dtypes, the same on every rank."""
    draw = random.Random(3)
    for case in range(24):
        share, width = draw.randint(1, 20), draw.randint(2, 40)
        n, function = share * world, LOSSES[case % 2]
        generator = torch.Generator().manual_seed(case)
        dtype = torch.float32 if case % 5 else torch.bfloat16
        images = torch.randn(n, width, generator=generator).to(dtype)
        texts = (images + draw.choice([0.1, 1, 10]) * torch.randn(n, width, generator=generator)).to(dtype)
        inputs = (images, texts, torch.tensor([draw.uniform(0, 4.6)]), torch.tensor([draw.uniform(-10, 0)]))
        valid = torch.rand(n, generator=generator) > draw.choice([0.0, 0.3])
        group = torch.randint(0, draw.choice([3, 10 * n]), (n,), generator=generator)
        options = {"label_smoothing": draw.choice([0.0, 0.1]), "tile": Tile(draw.randint(1, 30), draw.randint(1, 30))}
        rows = slice(rank * share, (rank + 1) * share)
        own = {"valid": valid[rows], "group_id": group[rows]} if case % 3 else {}
        whole = {"valid": valid, "group_id": group} if case % 3 else {}
        found = run(function, inputs, rows, **own, **options)
        with Alone():
            exact = run(function, inputs, slice(None), **whole, **options)
            hits = batch_accuracy(images, texts, **whole)
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        for place, (ours, theirs) in enumerate(zip(found, exact)):
            dist.all_reduce(ours := ours.float())
            error = float((ours / world - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-6))
            assert error < limit, (case, function.__name__, place, error)
        split = batch_accuracy(images[rows], texts[rows], **own)
        for name, count in split.items():
            dist.all_reduce(count)
            assert abs(float(count) - float(hits[name])) <= (0 if dtype == torch.float32 else 1), (case, name)


def _on_first_texts(function, own: slice):
    return lambda images, texts, *scalars, **options: function(images, texts[:, own], *scalars, **options)


def ranks_may_have_different_numbers_of_texts(rank: int, world: int) -> None:
    """Texts of an image: one more on each rank; negatives, empty places, and texts of several images among them."""
    share, width = 5, 12
    n = share * world
    generator = torch.Generator().manual_seed(world)
    images, texts = torch.randn(n, width, generator=generator), torch.randn(n, world + 1, width, generator=generator)
    captions, candidates = torch.rand(2, n, world + 1, generator=generator) > 0.4
    captions[:, 0] = True
    candidates = (candidates | captions) & (torch.arange(world + 1) < 2 + torch.arange(n)[:, None] // share)
    captions &= candidates
    inputs = (images, texts, torch.tensor([2.0]), torch.tensor([-3.0]))
    group = torch.randint(0, 2 * n, (n, world + 1), generator=generator)
    valid = torch.rand(n, generator=generator) > 0.2
    rows, own = slice(rank * share, (rank + 1) * share), slice(0, rank + 2)
    for loss, groups in (("infonce", group), ("infonce", None), ("sigmoid", group)):
        function = partial(contrast_texts, loss=loss, label_smoothing=0.1)
        of_texts = {"captions": captions, "candidates": candidates, "group_id": groups}
        whole = {**of_texts, "valid": valid}
        split = {name: None if part is None else part[rows, own] for name, part in of_texts.items()}
        split["valid"] = valid[rows]
        found = run(_on_first_texts(function, own), inputs, rows, **split)
        with Alone():
            exact = run(function, inputs, slice(None), **whole)
            hits = texts_accuracy(images, texts, **whole)
        for place, (ours, theirs) in enumerate(zip(found, exact)):
            dist.all_reduce(ours)
            error = float((ours / world - theirs).norm() / theirs.norm().clamp(min=1e-6))
            assert error < 1e-5, (loss, place, error)
        for name, count in texts_accuracy(images[rows], texts[rows, own], **split).items():
            dist.all_reduce(count)
            assert count == hits[name], (loss, name)


def bad_input_is_named_on_every_rank(rank: int, world: int) -> None:
    t, bias = torch.zeros(1), torch.zeros(1)
    for function in LOSSES:
        features = torch.ones(4 + rank, 8)
        with pytest.raises(UserError, match="rank 0: 4 x 8, rank 1: 5 x 8"):
            function(features, features, t, bias)
        features = torch.ones(4, 8)
        texts = features.clone()
        if rank == world - 1:
            texts[1] = torch.nan
        with pytest.raises(NonFiniteFeatures) as found:
            function(features, texts, t, bias)
        assert found.value.where == [(world - 1, "text", 1)]


def main() -> None:
    world = int(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    splitting_changes_nothing(rank, world)
    ranks_may_have_different_numbers_of_texts(rank, world)
    bad_input_is_named_on_every_rank(rank, world)
    losses_are_those_of_one_process(rank, world, run, Alone)
    wrong_losses_are_found_out(rank, world, run, Alone)
    nt_xent_sends_what_the_model_says(rank, world)
    queues_and_centres_are_those_of_one_process(rank, world, Alone)
    bad_features_are_named_on_every_rank(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
