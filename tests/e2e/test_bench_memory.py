"""tools/bench/memory.py: its answer, and that a step in micro-batches takes a fraction of a whole batch's memory."""

from __future__ import annotations

import pytest

from tools.bench.memory import MemoryCell, fits

MICRO, BATCH = 16, 256


def test_memory_does_not_grow_with_the_global_batch(bench, tmp_path):
    out = tmp_path / "memory.md"
    line = f"memory --micro-batch {MICRO} --times 1 {BATCH // MICRO} --precision fp32 --json"
    ended = bench(line, "--out", out)
    rows = {(r["global_batch"], r["micro_batch"]): r for r in ended.record["rows"]}
    assert set(rows) == {(MICRO, MICRO), (BATCH, MICRO), (BATCH, 0)}
    peak = {cell: row["peak_bytes"] for cell, row in rows.items()}
    assert peak[BATCH, MICRO] < peak[BATCH, 0] / 2
    assert peak[BATCH, MICRO] < 4 * peak[MICRO, MICRO]
    assert peak[BATCH, 0] > 4 * peak[MICRO, MICRO]  # it is the activations that are measured
    assert rows[BATCH, MICRO]["feature_bytes"] == 2 * BATCH * 32 * 8  # of 32 features: a float and its gradient each
    assert all(row["time_s"] > 0 and row["precision"] == "fp32" for row in rows.values())
    assert out.read_text().strip() in ended.stdout
    for told in ("commit:", "hardware:", f"| fp32 | {BATCH} |"):
        assert told in ended.text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--times", "0", "4"], "must be at least 1"),
        (["train.micro_batch=4"], "this program sets it itself"),
        (["model.name=nothing"], "nothing"),
        (["optim.lear=1"], "optim.lear"),
        (["--precision", "fp16"], "not on a CPU"),
    ],
)
def test_bad_input_is_told_before_anything_starts(refused, words, says):
    assert says in refused("memory", "device=cpu", *words)


def test_bad_input_is_one_line(bench):
    ended = bench("memory --micro-batch 0")
    assert ended.returncode == 2
    assert ended.stderr == "error: --micro-batch 0 --times 1 4 16 64: must be at least 1\n"


def test_a_whole_batch_that_would_not_fit_is_left_out():
    cell = MemoryCell("fp32", 8, 8, 1 << 24, 0, 1.0)
    assert fits("cpu", cell, 8)
    assert not fits("cpu", cell, 8 << 20)
    assert not fits("cpu", MemoryCell("fp32", 8, 0, None, 0, None), 8)
