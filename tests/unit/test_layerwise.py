"""LARS, LAMB and SGD on one process beside torch's SGD and the papers' formulas, at the edges; and the weight decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clipdist import config
from clipdist.engine import layerwise
from clipdist.engine.fragment import Fragment
from clipdist.engine.layerwise import Lamb, Sgd
from clipdist.engine.optim import make_optimizer, parameter_groups, weight_decay
from clipdist.engine.tensor_norms import TensorNorms
from clipdist.models.build import build_model


def attached(optimizer: Sgd | Lamb, weights: dict[str, nn.Parameter]) -> Sgd | Lamb:
    whole = [(name, w, tuple(w.shape), 0, w.numel(), w, 0, True, (0, w.numel())) for name, w in weights.items()]
    optimizer.attach(TensorNorms((Fragment(*fields) for fields in whole), weights))
    return optimizer


def test_sgd_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.full((4, 3), 0.5)) for _ in range(2))
    optimizer = Sgd([{"params": [ours], "weight_decay": 0.1, "decays": True}], lr=0.3, momentum=0.8)
    expected = torch.optim.SGD([theirs], lr=0.3, momentum=0.8, weight_decay=0.1)
    for _ in range(3):
        ours.grad = torch.randn(4, 3)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_tensor_of_zeros_and_one_without_a_gradient(name: str) -> None:
    """They move as if the ratio were 1, and nothing becomes nan; only LAMB decays what has a gradient of zeros."""
    weights = {"zeros": nn.Parameter(torch.zeros(2, 2)), "still": nn.Parameter(torch.ones(2, 2))}
    group = {"params": [*weights.values()], "weight_decay": 0.5, "decays": True}
    settings = {"momentum": 0.9} if name == "lars" else {"betas": (0.9, 0.98), "eps": 1e-6}
    made = Sgd([group], 1e-3, lr=0.1, **settings) if name == "lars" else Lamb([group], lr=0.1, **settings)
    optimizer = attached(made, weights)
    weights["zeros"].grad, weights["still"].grad = torch.full((2, 2), 2.0), torch.zeros(2, 2)
    optimizer.step()
    moved = -0.2 if name == "lars" else -0.1
    torch.testing.assert_close(weights["zeros"].data, torch.full((2, 2), moved))
    torch.testing.assert_close(weights["still"].data, torch.full((2, 2), 1.0 if name == "lars" else 0.9))


def test_lamb_computes_its_updates_in_chunks(monkeypatch) -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(5, 7), torch.randn(5, 7)
    found = []
    for chunk in (4, 1 << 20):
        monkeypatch.setattr(layerwise, "CHUNK", chunk)
        weights = {"w": nn.Parameter(start.clone())}
        group = {"params": [weights["w"]], "weight_decay": 0.1, "decays": True}
        optimizer = attached(Lamb([group], lr=0.1, betas=(0.9, 0.98), eps=1e-6), weights)
        weights["w"].grad = gradient.clone()
        optimizer.step()
        found.append(weights["w"].detach())
    assert torch.equal(*found)
    update = gradient.sign() + 0.1 * start
    torch.testing.assert_close(found[0], start - 0.1 * update * start.norm() / update.norm(), rtol=1e-4, atol=1e-5)


def test_groups_are_told_apart_by_what_is_held() -> None:
    model = build_model(config.Model(name="configs/models/tiny_vit.json"))
    name = "text.text_projection"
    groups = parameter_groups(model, config.Optim(), held={name: 7})
    (held,) = [group for group in groups if group["held"]]
    assert [*held["params"]] == [model.get_parameter(name)]
    assert (held["held"], held["decays"]) == (7, True)
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    assert all(group["decays"] == (group["weight_decay"] > 0) for group in groups)
    with pytest.raises(ValueError, match=r"no parameter text\.last_layer$"):
        parameter_groups(model, config.Optim(), held={"text.last_layer": 7})
    optimizer = make_optimizer(model, config.Optim(name="lars", beta1=0.7), cpu_offload=False)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.7}


def test_weight_decay_follows_half_a_cosine() -> None:
    assert weight_decay(config.Optim(weight_decay=0.3), 5, 10) == 0.3
    cfg = config.Optim(weight_decay=0.04, weight_decay_end=0.4)
    found = [weight_decay(cfg, step, 10) for step in (0, 5, 10, 11)]
    assert found == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert weight_decay(cfg, 1, 10) == pytest.approx(0.4 - 0.18 * (1 + math.cos(math.pi / 10)))
    assert weight_decay(config.Optim(weight_decay=0.1, weight_decay_end=0.0), 10, 10) == 0
