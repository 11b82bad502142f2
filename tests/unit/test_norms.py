"""Running statistics move once a step, however many micro-batches pass and however often."""

from __future__ import annotations

import copy
import re

import open_clip.transformer
import pytest
import timm.layers
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdist.models.norms import running_norms, statistics_frozen, statistics_updated_once
from clipdist.models.towers import Fp32Statistics, keep_statistics_fp32


def make(momentum: float | None) -> nn.Module:
    """Two layers of the class that towers have."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum), nn.BatchNorm2d(5, momentum=momentum)
    )
    keep_statistics_fp32(model)
    assert isinstance(model[1], Fp32Statistics)
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
    with statistics_updated_once(norms) as updated:
        for piece in pieces:
            model(piece)
            updated(norms)
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
    with statistics_updated_once(running_norms(ours)) as updated:
        ours(piece)
        updated(running_norms(ours))
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
    with statistics_updated_once(running_norms(model)) as updated:
        model(torch.randn(4, 3, 8, 8))
        updated(running_norms(model))
    after = model.state_dict()
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])
    assert not torch.equal(after["2.running_mean"], before["2.running_mean"])


NORMS = {
    f"{kind.__module__}.{kind.__name__}": kind
    for module in (timm.layers, open_clip.transformer, nn)
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and re.match(r"(?!Conv|Separable|Lazy|Sync|Local|Cross).*Norm(?!Mlp)", kind.__name__)  # no tower has Sync...
    and kind is not open_clip.transformer.LayerNormFp32  # for fp32 weights: built where cast_dtype is given
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_trains_and_evaluates_in_half_precision(name, dtype):
    torch.manual_seed(0)
    layer = nn.Sequential(NORMS[name](*(8, 32) if NORMS[name] is nn.GroupNorm else (32,)))
    channels_last = re.search("(Layer|Rms|RMS|Simple)Norm(?!.*2d)", name)
    shape = (4, 16, 32) if channels_last else (4, 32, 16) if "1d" in name else (4, 32, 4, 4)
    x = torch.randn(*shape, 2) if "3d" in name else torch.randn(shape)
    keep_statistics_fp32(layer)
    half = copy.deepcopy(layer).to(dtype)
    for train in (True, False):
        inputs = x.clone().requires_grad_(), x.to(dtype).requires_grad_()
        expected, found = layer.train(train)(inputs[0]), half.train(train)(inputs[1])
        assert found.dtype == dtype
        for output in (expected, found):
            output.float().sin().sum().backward()
        pairs = [(found, expected), (inputs[1].grad, inputs[0].grad)]
        pairs += [(p.grad, q.grad) for p, q in zip(half.parameters(), layer.parameters()) if q.grad is not None]
        for ours, reference in pairs:
            assert (ours.float() - reference).norm() < 0.1 * reference.norm()
    if isinstance(layer[0], _BatchNorm):
        assert [b.dtype for b in half.buffers()] == [b.dtype for b in layer.buffers()]
        torch.testing.assert_close(half[0].running_mean, layer[0].running_mean, rtol=0.02, atol=0.001)
