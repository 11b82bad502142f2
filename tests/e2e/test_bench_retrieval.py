"""tools/bench/retrieval.py at small sizes: the same recalls as open_clip, exact ranks, memory that the tile bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clipdist.evals.retrieval import TIE, retrieval_ranks
from tools.bench import retrieval


def test_bench(bench, tmp_path, shards):
    out = tmp_path / "deep/table.md"
    sizes = "--pictures 700 --width 128 --large 1500 6000 --repeats 1"
    line = f"retrieval {sizes} --embed configs/models/tiny_vit.json"
    ended = bench(line, shards / "val", "--out", out, "--json")
    record = ended.record
    assert record["recall_difference"] < 1e-6
    assert 5 < record["t2i_r1"] < 95  # the case says something
    assert (record["checked"], record["checked_equal"] + record["checked_near_tie"]) == (500, 500)
    assert record["checked_equal"] > 490
    assert record["extra_bytes"] < 1500 * 6000 * 4  # no matrix of all scores
    assert (record["embed_pictures"], record["embed_batches"]) == (20, 2)
    assert record["pass_rate_percent"] > 0
    text = out.read_text()
    assert text.strip() in ended.stdout
    for told in ("R@K are the same", "- commit: ", "- hardware: ", f"clipdist / open_clip: {record['time_ratio']:.3f}"):
        assert told in text


def test_a_wrong_rank_is_found():
    pairs = retrieval.draw_features(40, 90, 16)
    ranks = retrieval_ranks(pairs.image, pairs.text, pairs.text_image)
    assert sum(retrieval.check_ranks(pairs, ranks, TIE)) == retrieval.CHECKED
    for wrong in (replace(ranks, image=ranks.image + 1), replace(ranks, text=ranks.text.roll(1))):
        with pytest.raises(RuntimeError, match="where float64 counts"):
            retrieval.check_ranks(pairs, wrong, TIE)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pictures", "0"], "--pictures 0: must be at least 1"),
        (["--large", "20", "10"], "a caption for every picture"),
        (["--embed", "runs/demo"], "name shards too"),
    ],
)
def test_bad_input(refused, words, says):
    assert says in refused("retrieval", *words)
