"""BatchNorm over groups: which groups fit, MoCo's shuffle, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clipdist import config
from clipdist.config import load_config
from clipdist.config.batches import check_interleaved, check_ranks
from clipdist.errors import UserError
from clipdist.estimate.estimate import make_estimate
from clipdist.models.build import build_model
from clipdist.models.grouped_norms import interleaved, inverse
from clipdist.models.norms import RunningStatistics
from clipdist.models.towers import group_batchnorm

RESNET = "configs/models/tiny_rn.json"


def configured(group: int, batch: int, micro: int = 0) -> config.Config:
    sizes = [f"train.global_batch={batch}", f"train.micro_batch={micro}", f"model.batchnorm_group={group}"]
    return load_config(None, [f"model.name={RESNET}", "device=cpu", *sizes])


@pytest.mark.parametrize(
    ("group", "batch", "micro", "fits_on"),
    [(4, 16, 0, {1, 2, 4, 8, 16}), (8, 16, 0, {1, 2, 4, 8, 16}), (4, 16, 4, {1, 2, 4}), (2, 12, 0, {1, 2, 3, 6, 12})],
)
def test_a_group_divides_a_ranks_rows_or_is_a_multiple_of_them(group, batch, micro, fits_on):
    cfg = configured(group, batch, micro)
    for world in fits_on:
        check_ranks(cfg, world)


def test_groups_that_no_rank_can_hold_are_refused_with_those_that_fit():
    with pytest.raises(
        UserError, match=r"^model.batchnorm_group=4: neither .* 6 pairs .* 2 ranks.* one of 2, 3, 6, 12$"
    ):
        check_ranks(configured(4, 12), 2)


@pytest.mark.parametrize(
    ("group", "micro", "told"),
    [
        (1, 0, "must be 0, or at least 2 rows"),
        (-2, 0, "must be 0, or at least 2 rows"),
        (3, 0, "must divide train.global_batch=16"),
        (8, 4, "must divide train.micro_batch=4"),
    ],
)
def test_groups_that_are_no_whole_ones_are_refused(group, micro, told):
    with pytest.raises(UserError, match=f"^model.batchnorm_group={group}: {told}$"):
        configured(group, 16, micro)


def test_a_model_without_batchnorm_that_trains_is_refused():
    told = "^model.batchnorm_group=4: the model trains no BatchNorm; set it to 0$"
    for model in (config.Model(name="configs/models/tiny_vit.json"), config.Model(name=RESNET, lock_image=True)):
        with pytest.raises(UserError, match=told):
            group_batchnorm(build_model(model), 4)


def test_a_plan_of_one_pair_a_rank_has_groups_over_ranks():
    assert make_estimate(configured(4, 4), world=4).total > 0
    with pytest.raises(UserError, match="one pair in a forward pass leaves BatchNorm"):
        _ = make_estimate(configured(0, 4), world=4).total


def test_a_plans_remedies_keep_whole_groups():
    small = load_config(None, ["launch.device_gb=0.0125"])
    cfg = configured(16, 256)
    limited = config.Config(
        model=cfg.model, train=cfg.train, objectives=cfg.objectives, launch=small.launch, device="cpu"
    )
    with pytest.raises(UserError) as refusal:
        make_estimate(limited, world=1).refuse()
    words = str(refusal.value).replace(":", " ").replace(",", " ").split()
    sizes = [int(word.partition("=")[2]) for word in words if word.startswith("train.micro_batch=")]
    assert all(size % 16 == 0 for size in sizes)


def test_copies_have_groups_of_their_own():
    torch.manual_seed(0)
    model = build_model(config.Model(name=RESNET)).train()
    group_batchnorm(model, 2)
    twin = copy.deepcopy(model)
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    half = twin(image=image[:4])["image"]
    torch.testing.assert_close(model(image=image)["image"][:4], half)
    assert {layer.groups.rows for layer in twin.modules() if isinstance(layer, nn.BatchNorm2d)} == {4}
    statistics = RunningStatistics(twin)
    statistics.save()
    twin(image=image)
    statistics.average()
    first = next(layer for layer in twin.modules() if isinstance(layer, nn.BatchNorm2d))
    assert first.num_batches_tracked == 1
    assert next(layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)).num_batches_tracked == 0


def test_rows_that_are_no_whole_groups_are_named():
    model = build_model(config.Model(name=RESNET)).train()
    group_batchnorm(model, 4)
    with pytest.raises(UserError, match=r"^model.batchnorm_group=4: a BatchNorm2d has 6 rows for 6 pairs"):
        model(image=torch.zeros(6, 3, 32, 32, dtype=torch.uint8))


# MoCo's shuffle


@pytest.mark.parametrize("group", [2, 4, 8])
def test_every_group_of_keys_is_half_of_two_groups_of_queries(group):
    rows = 6 * group
    order = interleaved(rows, group)
    assert torch.equal(torch.arange(rows)[order][inverse(order)], torch.arange(rows))
    for number, keys in enumerate(order.split(group)):
        first = number // 2 * 2  # of the block's two groups of queries
        assert sorted(keys // group) == [first] * (group // 2) + [first + 1] * (group // 2)
    # The same for every split into whole blocks
    for start in range(0, rows, 2 * group):
        assert torch.equal(order[start : start + 2 * group], start + interleaved(2 * group, group))


def test_rows_that_are_no_whole_blocks_are_refused():
    for rows, group in ((12, 4), (6, 3), (2, 1)):
        with pytest.raises(ValueError, match="no blocks of two groups"):
            interleaved(rows, group)
    check_interleaved(configured(4, 16), 2)
    for cfg, told in (
        (configured(4, 16, 4), "4 pairs of a forward pass hold no whole number; set it to one of 2$"),
        (configured(16, 16), "8 pairs of a forward pass hold no whole number; set it to one of 2, 4$"),
        (
            configured(0, 16, 2),
            "2 pairs of a forward pass .* set it to 2, and let each rank take a multiple of 4 pairs$",
        ),
    ):
        with pytest.raises(UserError, match=told):
            check_interleaved(cfg, 2)
