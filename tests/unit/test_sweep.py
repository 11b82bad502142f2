"""launch/sweep.py: the product of the values, the runs' names, and what is refused."""

from __future__ import annotations

import pytest

from clipdist.errors import UserError
from launch.sweep import SweepPoint, points


def test_every_combination_with_a_name_of_its_own():
    assert [(point.words, point.suffix) for point in points(["optim.lr=1e-4,3e-4", "data.seed=1,2"])] == [
        (("optim.lr=1e-4", "data.seed=1"), "-lr1e-4-seed1"),
        (("optim.lr=1e-4", "data.seed=2"), "-lr1e-4-seed2"),
        (("optim.lr=3e-4", "data.seed=1"), "-lr3e-4-seed1"),
        (("optim.lr=3e-4", "data.seed=2"), "-lr3e-4-seed2"),
    ]


def test_without_a_sweep_there_is_one_run_of_the_plain_name():
    assert points([]) == [SweepPoint((), "")]


def test_equal_last_parts_are_told_apart_and_single_values_stay_out_of_the_name():
    assert points(["data.seed=1,2", "train.seed=3,4", "optim.lr=1"])[0].suffix == "-data.seed1-train.seed3"


def test_values_may_be_lists_and_names_are_fit_for_folders():
    (first, second) = points(["data.val=[a/x,b y],c/d"])
    assert first.words == ("data.val=[a/x,b y]",)
    assert (first.suffix, second.suffix) == ("-vala_x_b_y", "-valc_d")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1e-4,1e-4"], "share a run folder"),
        (["model.name=a/b,a_b"], "share a run folder"),
        (["optim.lr=1,2", "optim.lr=3"], "given twice"),
        (["optim.lr"], "expected section.key=value,value"),
        (["optim.lr=1,,2"], "expected section.key=value,value"),
        (["run.name=a,b"], "those of the whole sweep"),
        (["launch.gpus=1,2"], "those of the whole sweep"),
    ],
)
def test_refused(words, message):
    with pytest.raises(UserError, match=message):
        points(words)
