"""Retrieval, and a suite of test sets, on two ranks give the numbers of one process."""

from __future__ import annotations

import json

import pytest
import torch
from dist.launch import run_ranks
from wds_sets import write_run, write_sets

from clipdist.distributed.rank import DistEnv
from clipdist.evals.embed import WorkShare
from clipdist.evals.suite import measure_all, read_suite
from clipdist.models.load import load_model


def test_ranks_share_the_work():
    run_ranks("retrieval.py", 2)


def test_ranks_share_a_suite(tmp_path):
    write_sets(tmp_path)
    write_run(tmp_path / "a", 0)
    run_ranks("suite.py", 2, tmp_path)
    (measured, kept), (_, also_kept) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [each["cached"] for each in measured] == [False] * 3
    assert [each | {"cached": False} for each in kept] == measured
    assert also_kept == kept
    alone = DistEnv(0, 1, 0, torch.device("cpu"))
    sets, loaded = read_suite(tmp_path / "suite.yaml"), load_model(str(tmp_path / "a"))
    for each, one in zip(measured, measure_all(sets, loaded, alone, WorkShare(progress=False), cache=False)):
        numbers = {name: value for name, value in one.items() if isinstance(value, float)}
        assert {name: each[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
