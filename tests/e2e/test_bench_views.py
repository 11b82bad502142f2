"""tools/bench/views.py: its answer on drawn images, and bad input."""

from __future__ import annotations

import json

import pytest
from pairs import write_pairs

from tools.bench import views


def test_parts_of_a_recipe_are_timed(monkeypatch, capsys, tmp_path):
    shards = write_pairs(tmp_path / "train", 4)
    words = ["--recipes", "clip", "dino", "--size", "32", "--images", "4", "--rounds", "1", "--json"]
    monkeypatch.setattr("sys.argv", ["tools/bench/views.py", *words, "--", str(shards)])
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # of this process, which tests more
    assert views.main() == 0
    told = capsys.readouterr().out.splitlines()
    record = json.loads(told[-1])["ms"]
    assert set(record) == {"clip", "dino"}
    for times in record.values():
        assert set(times) == {"decode", "crop and resize", "colours", "blur and solarise", "torchvision"}
        assert all(time > 0 for time in times.values())
    assert any(" ".join(line.split()).startswith("| dino | 10 |") for line in told)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere"),
        (["--images", "0"], "--images 0: must lie in"),
        (["--recipes", "simsiam"], "simsiam"),
    ],
)
def test_bad_input_is_told(refused, words, says):
    assert says in refused("views", *words)
