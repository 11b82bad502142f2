"""The loss benchmark as users call it: its rows, the bytes that it measures, and bad input."""

from __future__ import annotations

import pytest

from clipdist.losses.wire import clipdist_bytes, open_clip_bytes

KEYS = {"impl", "op", "n", "d", "dtype", "world", "time_s", "extra_bytes", "grad_error", "wire_bytes"}


@pytest.fixture(scope="module")
def result(bench, tmp_path_factory):
    """A small run over one and two ranks, and the folder that --out wrote."""
    out = tmp_path_factory.mktemp("bench")
    line = "loss --n 256 --d 128 --world 1 2 --impl tiles open_clip --repeats 2 --device cpu --json"
    return bench(line, "--out", out), out


def test_a_row_for_every_implementation_and_world(result):
    rows = result[0].record["rows"]
    names = [("infonce", "clipdist tiles"), ("infonce", "open_clip ClipLoss")]
    names += [("sigmoid", "clipdist tiles"), ("sigmoid", "open_clip SigLipLoss")]
    assert [(row["world"], row["op"], row["impl"]) for row in rows] == [(w, *name) for w in (1, 2) for name in names]
    for row in rows:
        assert set(row) == KEYS
        assert (row["n"], row["d"], row["dtype"]) == (256, 128, "fp32")
        assert row["time_s"] > 0
        assert row["extra_bytes"] >= 0


def test_gradients_are_those_of_float64_on_the_whole_batch(result):
    for row in result[0].record["rows"]:
        assert row["grad_error"] < 2e-6, row


def test_measured_bytes_are_the_models(result):
    """Within the frames of the transport, which a small batch shows most."""
    for row in result[0].record["rows"]:
        if row["world"] == 1:
            assert row["wire_bytes"] is None
        else:
            model = open_clip_bytes if row["impl"].startswith("open_clip") else clipdist_bytes
            assert row["wire_bytes"] == pytest.approx(model(row["op"], 2, 128, 128, "fp32"), rel=0.04), row


def test_out_holds_the_table(result):
    ended, out = result
    assert (out / "table.md").read_text().strip() in ended.stdout
    assert "python tools/bench/loss.py --n 256" in ended.text
    assert "| sigmoid | open_clip SigLipLoss | 2 |" in ended.text
    assert "| infonce | 64 | 4 |" in ended.text  # the model reaches beyond what ran


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--n", "0"], "--n 0: must be at least 1"),
        (["--n", "many"], "invalid int value"),
        (["--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--n", "256", "--world", "3"], "each must divide n=256"),
        (["--device", "cpu", "--impl", "kernel"], "needs a CUDA device"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("loss", *words)
