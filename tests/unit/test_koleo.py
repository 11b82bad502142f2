"""KoLeo in one process against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from unit.test_nt_xent import value_and_gradients, worst

from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.koleo import koleo
from clipdist.losses.tiles import Tile

VALID = torch.rand(50, generator=torch.Generator().manual_seed(1)) > 0.2
VALID[20:23] = torch.tensor([True, False, False])  # of a group of three


def dense(features, group_size=0, valid=None, eps=1e-8):
    """The definition on the whole matrix of distances, in the dtype of the features, by autograd."""
    valid = torch.ones(len(features), dtype=torch.bool) if valid is None else valid
    group = torch.arange(len(features)) // (group_size or len(features))
    unit = F.normalize(features, dim=1)
    other = (group[:, None] == group) & valid[:, None] & valid & ~torch.eye(len(features), dtype=torch.bool)
    counted = other.any(1)
    nearest = torch.cdist(unit.detach(), unit.detach()).masked_fill(~other, torch.inf).argmin(1)
    distance = (unit - unit[nearest])[counted].norm(dim=1)
    return -(distance + eps).log().mean()


def draw(b=50, d=9):
    return torch.randn(b, d, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, b)[:, None]


@pytest.mark.parametrize("group_size", [0, 2, 3, 7, 25, 50, 64])
@pytest.mark.parametrize("valid", [None, VALID])
@pytest.mark.parametrize("tile", [Tile(1, 1), Tile(4, 7), None])
def test_value_and_gradient_are_those_of_the_definition(group_size, valid, tile):
    options = {"group_size": group_size, "valid": valid}
    found = value_and_gradients(koleo, [draw()], tile=tile, **options)
    assert worst(found, value_and_gradients(dense, [draw()], torch.float64, **options)) < 3e-6


def test_another_group_size_is_another_loss():
    values = [float(koleo(draw(), group_size=size)[0]) for size in (0, 2, 5, 25)]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-2


def test_the_neighbour_gets_a_gradient_too():
    """Left out, as where neighbours are looked up without gradients, the loss is the same and its gradient another."""

    def without(features):
        unit = F.normalize(features, dim=1)
        nearest = torch.cdist(unit, unit).fill_diagonal_(torch.inf).argmin(1)
        return -((unit - unit.detach()[nearest]).norm(dim=1) + 1e-8).log().mean()

    found = value_and_gradients(koleo, [draw()])
    wrong = value_and_gradients(without, [draw()], torch.float64)
    assert float(found[0]) == pytest.approx(float(wrong[0]), rel=1e-6)
    assert worst(found, wrong) > 0.1


def test_equal_rows_are_finite():
    features = draw()
    features[10] = features[30]
    found = value_and_gradients(koleo, [features])
    assert all(bool(torch.isfinite(x).all()) for x in found)
    assert float(found[0]) == pytest.approx(float(dense(features.double())), rel=1e-6)
    features[11] = 3 * features[31]  # equal but for rounding
    features[40:44] = 0
    assert all(bool(torch.isfinite(x).all()) for x in value_and_gradients(koleo, [features]))
    value, gradient = value_and_gradients(koleo, [torch.ones(6, 4)])
    assert value == pytest.approx(-math.log(1e-8), rel=1e-6)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(("keep", "group_size"), [(0, 0), (1, 0), (50, 1)])
def test_rows_without_a_neighbour_have_no_loss(keep, group_size):
    found = value_and_gradients(koleo, [draw()], valid=torch.arange(50) < keep, group_size=group_size)
    assert max(float(x.abs().max()) for x in found) == 0


def test_features_that_are_not_finite():
    features = draw()
    features[7, 2] = torch.inf
    with pytest.raises(NonFiniteFeatures, match=r"rank 0: 1 rows of the features$"):
        koleo(features)
