"""tools/bench/checkpoint.py: what it answers. No time is asserted."""

from __future__ import annotations


def test_saving_and_starting_are_measured(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    out = tmp_path / "bench.md"
    line = "checkpoint --models configs/models/tiny_rn.json --batch 4 --saves 2 --steps 2 --json"
    ended = bench(line, "--out", out)
    (result,) = ended.record["models"]
    saves = result["saves"]
    assert len(saves["plain_s"]) == 4
    assert len(saves["in_loop_s"]) == len(saves["gone_s"]) == 2
    assert len(saves["beside_s"]) >= 2
    assert result["checkpoint_bytes"] > 3 * 4 * result["parameters"]  # weights and two moments
    assert result["fresh"]["verify"] == result["fresh"]["restore"] == 0
    assert all(seconds > 0 for seconds in result["resumed"].values())
    assert "| tiny_rn, " in out.read_text()
    assert not list(tmp_path.glob("bench-*"))  # the checkpoints are gone
