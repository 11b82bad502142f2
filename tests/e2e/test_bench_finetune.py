"""tools/bench/finetune.py on a tiny model: its table, that a second call measures nothing again, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from wds_sets import write_sets

MODEL = Path(__file__).parents[2] / "configs/models/tiny_vit.json"


@pytest.fixture(scope="module")
def sets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of labelled images, colours/."""
    folder = tmp_path_factory.mktemp("sets")
    write_sets(folder)
    return folder / "colours"


def test_ways_are_measured_once(bench, shards: Path, sets: Path, tmp_path: Path) -> None:
    few = "finetune --ways lit --samples 16 --batch 16 --templates simple --json"
    words = [shards, "--keep", sets, "--model", MODEL, "--work", tmp_path / "work", "--out", tmp_path / "bench.md"]
    (row,) = bench(few, *words).record["rows"]
    assert row["trained"] > 0
    assert min(row["cpu_s"], row["wall_s"], row["peak_bytes"]) > 0
    assert all(0 <= row[name] <= 100 for name in ("t2i_r1", "i2t_r10", "zero_shot", "probe"))
    text = (tmp_path / "bench.md").read_text()
    assert "| LiT: image tower locked |" in text
    assert "- command: " in text
    ended = bench(few, *words)
    assert ended.record["rows"] == [row]
    assert "clipdist/train.py" not in ended.stderr


def test_bad_input_is_told(refused, shards: Path, sets: Path, tmp_path: Path) -> None:
    assert "--train" in refused("finetune", tmp_path, "--keep", sets)
    assert "--keep" in refused("finetune", shards, "--keep", shards / "val")
