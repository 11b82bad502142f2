"""The effective rank against singular values, and the distance by cosine near 0."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipdist.losses.cosine import cosine_distance
from clipdist.losses.global_batch import NonFiniteFeatures
from clipdist.losses.spread import effective_rank


def draw(n=200, d=16):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [torch.ones(16), 0.5 ** torch.arange(16)])
def test_effective_rank_is_that_of_the_singular_values(scale):
    features, valid = scale * draw(), torch.arange(200) % 5 > 0
    values = torch.linalg.svdvals(features[valid].double())
    shares = values / values.sum()
    expected = float((-(shares * shares.log()).sum()).exp())
    assert effective_rank(features, valid=valid) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(100 * features, valid=valid) == pytest.approx(expected, rel=1e-6)


def test_effective_rank_shows_a_collapse():
    assert effective_rank(draw()) > 15
    assert effective_rank(torch.ones(200, 16)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(1 + 1e-4 * draw()) < 1.02  # to one point, and noise
    assert effective_rank(draw(d=3) @ torch.eye(16)[:3]) == pytest.approx(3, abs=0.05)  # to three directions
    assert effective_rank(torch.eye(16)) == pytest.approx(16)
    assert effective_rank(torch.zeros(4, 16)) == 0


def test_effective_rank_of_features_that_are_not_finite():
    with pytest.raises(NonFiniteFeatures, match=r"rank 0: 1 rows of the features$"):
        effective_rank(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))


def test_the_distance_by_cosine_loses_nothing_near_0():
    x, noise = draw(), 1e-5 * draw().flip(0)
    exact = 1 - F.cosine_similarity(x.double(), (x + noise).double())
    found = cosine_distance(x, x + noise)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=0)
    assert (1 - F.cosine_similarity(x, x + noise) - exact).abs().max() > 1e-8 > found.max()
    torch.testing.assert_close(cosine_distance(x, x.flip(0)), 1 - F.cosine_similarity(x, x.flip(0)))
    assert cosine_distance(x[:0], x[:0]).shape == (0,)
