"""What the benchmarks share: turns, tables, worker processes that fail, commands on several ranks."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import pytest

from clipdist.errors import Fault, UserError
from clipdist.monitor import provenance
from tools.bench import harness
from tools.bench.processes import BenchProcesses, repository_environment, run_ranks


class Subject:
    """What a worker process holds."""

    def __init__(self, job: str) -> None:
        self.job = job

    def rank(self) -> tuple[str, str]:
        return self.job, os.environ.get("RANK", "none")

    def refuse(self) -> None:
        raise UserError("bad input")

    def break_down(self) -> None:
        raise ValueError("broken")

    def die(self) -> None:
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(60)


def workers(**settings) -> BenchProcesses:
    return BenchProcesses(multiprocessing.get_context("forkserver"), Subject, "job", **settings)


def test_every_side_has_its_turn_in_each_round_and_warm_up_does_not_count():
    calls: list[str] = []
    rounds: list[int] = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in ("a", "b")}
    results = harness.take_turns(sides, 2, warmup=1, after_round=lambda: rounds.append(len(calls)))
    assert calls == ["b", "a", "a", "b", "b", "a"]  # another one begins each time
    assert results == {"a": [3, 6], "b": [4, 5]}
    assert rounds == [4, 6]


def test_tables_are_markdown_with_aligned_columns():
    lines = harness.markdown_table(["", "seconds"], [["clipdist", "1.5"], ["other", "12.25"]])
    assert lines == [
        "|          | seconds |",
        "|----------|--------:|",
        "| clipdist |     1.5 |",
        "| other    |   12.25 |",
    ]


def test_a_copy_without_repository_or_installed_package_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("CLIPDIST_COMMIT", "1234abc")
    lines = harness.provenance("cpu", 1, "a-package-that-is-not-there")
    assert "- commit: 1234abc" in lines
    assert any("a-package-that-is-not-there not installed" in line for line in lines)


def test_workers_answer_by_rank():
    with workers() as one, workers(world=2) as two:
        assert one.ask("rank") == ("job", "none")
        assert two.ask_all("rank") == [("job", "0"), ("job", "1")]


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        ("refuse", UserError, "bad input"),
        ("break_down", Fault, "ValueError: broken"),
        ("die", Fault, "a process ended, exit code 3"),
    ],
)
def test_what_ends_a_worker_is_told(method, error, says):
    with workers(tracebacks=False) as processes, pytest.raises(UserError) as ended:
        processes.ask(method)
    assert (type(ended.value), str(ended.value)) == (error, says)


def test_a_worker_that_takes_too_long_is_ended():
    with workers() as processes, pytest.raises(Fault, match=r"no answer within 0\.1 s"):
        processes.ask_all("sleep", limit_s=0.1)
    assert not any(process.is_alive() for process in processes.processes)


def test_a_failed_rank_ends_the_others_and_its_words_are_repeated(tmp_path, capfd):
    code = (
        "import os, sys, time; rank = os.environ['RANK']; rank == '0' and time.sleep(60); sys.exit('rank 1 gives up')"
    )
    with pytest.raises(Fault, match="a process of run failed"):
        run_ranks([sys.executable, "-c", code], 2, repository_environment(), tmp_path / "run.log")
    assert "rank 1 gives up" in capfd.readouterr().err
