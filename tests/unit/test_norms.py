"""Running statistics move once a step, however many micro-batches pass and however often."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipdist.models.norms import running_norms, statistics_frozen, statistics_updated_once
from clipdist.models.towers import BatchNormFp32Statistics, keep_statistics_fp32


def make(momentum: float | None) -> nn.Module:
    """Two layers of the class that towers have."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    )
    keep_statistics_fp32(model)
    assert type(model[1]) is BatchNormFp32Statistics
    model(torch.randn(4, 3, 8, 8))  # statistics that are not the first ones
    return model


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_move_once_by_the_mean_of_the_micro_batches(momentum):
    model, pieces = make(momentum), torch.randn(8, 3, 8, 8).split(2)
    norms = running_norms(model)
    before = [norm.running_mean.clone() for norm in norms]
    inputs = [[], []]
    for i, norm in enumerate(norms):
        norm.register_forward_pre_hook(lambda _, x, i=i: inputs[i].append(x[0].detach()))
    with statistics_updated_once(norms):
        for piece in pieces:
            model(piece)
    for i, norm in enumerate(norms):
        share = 1 / 2 if momentum is None else momentum  # the second batch of a plain mean
        means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs[i]])
        torch.testing.assert_close(norm.running_mean, before[i].lerp(means.mean(0), share))
        variances = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs[i]])
        assert torch.isfinite(variances).all()
        assert norm.num_batches_tracked == 2
        assert norm.momentum == momentum


def test_one_micro_batch_is_what_torch_does():
    ours, theirs, piece = make(0.1), make(0.1), torch.randn(4, 3, 8, 8)
    with statistics_updated_once(running_norms(ours)):
        ours(piece)
    theirs(piece)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_statistics_can_be_held_still_and_locked_layers_stay():
    model = make(0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with statistics_frozen(running_norms(model)):
        out = model(torch.randn(4, 3, 8, 8))
    assert out.mean().abs() < 1e-5  # normalised by the batch nevertheless
    model[1].eval()
    with statistics_updated_once(running_norms(model)):
        model(torch.randn(4, 3, 8, 8))
    after = model.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(after["2.running_mean"], before["2.running_mean"])
