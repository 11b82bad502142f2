"""Accidents on purpose must tell what went wrong with themselves: a rank's traceback, and a result to parse."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import rehearsal
from rehearsal import Failed

TOOL = Path(__file__).parents[2] / "tests/fault_test.py"


@pytest.fixture
def fault_test(monkeypatch):
    """tests/fault_test.py as a module, without what it sets for its own process."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # comes back after the test
    spec = importlib.util.spec_from_file_location("fault_test", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fault_test", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_a_rank_that_fails_leaves_its_traceback(tmp_path, monkeypatch, capfd):
    def unforeseen(words):
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr(rehearsal, "_train", unforeseen)
    with capfd.disabled():  # the rank's stderr is descriptor 2 again
        ended = rehearsal.attempt([], 1, tmp_path / "log", limit_s=60)
    assert ended.codes == [1]
    assert "Traceback" in ended.log
    assert "ZeroDivisionError: unforeseen" in ended.log


def test_a_failure_ends_in_one_json_object(tmp_path, fault_test, monkeypatch, capsys):
    def fails(*_):
        raise Failed("run-1: exit codes [1, 1]\nthe end of its log")

    monkeypatch.setattr(fault_test, "warm_up", lambda: None)
    monkeypatch.setattr(fault_test, "random_kills", fails)
    monkeypatch.setattr(sys, "argv", ["fault_test.py", "--json", "--keep", os.fspath(tmp_path)])
    assert fault_test.main() == 1
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1]) == {
        "good": False,
        "error": "run-1: exit codes [1, 1]\nthe end of its log",
    }
    assert said.err.startswith("FAIL: run-1")
