"""Two models on the same queries: intervals of the difference, beside a bootstrap that is written out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from clipdist.evals.compare import Compared, interval_of_mean
from clipdist.evals.retrieval import Ranks, bootstrap_intervals, paired_intervals, retrieval_ranks, summarise


def ranks(noise: float, images: int = 200, seed: int = 0) -> Ranks:
    """Retrieval of images by two captions each, both at a distance that grows with `noise`."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randn(images, 8, generator=random)
    rows = torch.arange(images).repeat_interleave(2)
    return retrieval_ranks(image, image[rows] + noise * torch.randn(2 * images, 8, generator=random), rows)


def test_a_model_beside_itself_has_no_difference() -> None:
    same = paired_intervals(ranks(1.0), ranks(1.0))
    assert set(same.values()) == {(0.0, 0.0)}


def test_the_interval_of_a_difference_is_that_of_a_bootstrap_over_images() -> None:
    before, after = ranks(1.2), ranks(1.0)
    low, high = paired_intervals(before, after)["t2i_r1"]
    change = (after.text == 1).double() - (before.text == 1).double()
    by_image = 100 * change.view(-1, 2).mean(1).numpy()
    draws = np.random.default_rng(0).integers(200, size=(1000, 200))
    expected = np.percentile(by_image[draws].mean(1), (2.5, 97.5))
    assert (low, high) == pytest.approx(tuple(expected))
    assert low < summarise(after)["t2i_r1"] - summarise(before)["t2i_r1"] < high


def test_pairing_narrows_the_interval() -> None:
    before, after = ranks(1.0), ranks(0.95)
    single = bootstrap_intervals([before])["i2t_r5"]
    paired = paired_intervals(before, after)["i2t_r5"]
    assert paired[1] - paired[0] < single[1] - single[0]


def test_other_captions_are_refused() -> None:
    other = dataclasses.replace(ranks(1.0), text_image=torch.arange(400) % 200)
    with pytest.raises(ValueError, match="other captions"):
        paired_intervals(ranks(1.0), other)


def test_the_interval_of_an_accuracy_covers_its_mean_95_times_of_100() -> None:
    random, covered = np.random.default_rng(1), 0
    for seed in range(400):
        change = random.choice([-1, 0, 1], size=150, p=[0.1, 0.6, 0.3])
        low, high = interval_of_mean(change, 500, seed, 95)
        covered += low <= 20 <= high
    assert 0.91 < covered / 400 < 0.98


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.1, 2.0, "better"), (-3.0, -0.1, "worse"), (-1.0, 2.0, "")])
def test_a_difference_counts_where_its_interval_leaves_out_zero(low: float, high: float, verdict: str) -> None:
    found = Compared("held out", "t2i_r1", 1.0, 1.0, low, high)
    assert found.record()["verdict"] == found.verdict == verdict
