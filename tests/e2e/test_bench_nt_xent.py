"""The benchmark of NT-Xent as users call it: its row, and bad input."""

from __future__ import annotations

import importlib.util


def test_a_row_of_time_memory_and_error(bench, tmp_path):
    ended = bench("nt_xent --samples 64 --d 16 --repeats 2 --impl clipdist --json", "--out", tmp_path / "table.md")
    (row,) = ended.record["rows"]
    assert row["impl"] == "clipdist nt_xent"
    assert len(row["times_s"]) == 2
    assert row["time_s"] > 0
    assert row["cpu_s"] > 0
    assert row["extra_bytes"] is None or row["extra_bytes"] > 0
    assert row["grad_error"] < 2e-6
    assert (tmp_path / "table.md").read_text().strip() in ended.stdout
    assert "128 views, d=16" in ended.text


def test_bad_input_is_told_before_anything_starts(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lightly" else find(name))
    assert "lightly: is not installed" in refused("nt_xent", "--impl", "lightly")
    assert "--temperature 0.001: must be at least 0.0142857" in refused("nt_xent", "--temperature", "0.001")
