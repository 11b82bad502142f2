"""tools/bench/retrieval.py at small sizes: the same recalls as open_clip, exact ranks, memory that the tile bounds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/bench/retrieval.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_bench(tmp_path: Path, shards: Path) -> None:
    out = tmp_path / "deep/table.md"
    sizes = ["--pictures", "700", "--width", "128", "--large", "1500", "6000", "--repeats", "1"]
    ended = run(*sizes, "--embed", "configs/models/tiny_vit.json", str(shards / "val"), "--out", str(out), "--json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    record = json.loads(ended.stdout.splitlines()[-1])
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


def test_a_wrong_rank_is_found() -> None:
    spec = importlib.util.spec_from_file_location("bench_retrieval", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    from clipdist.evals.retrieval import TIE, retrieval_ranks

    pairs = module.draw_pairs(40, 90, 16)
    ranks = retrieval_ranks(pairs.image, pairs.text, pairs.text_image)
    assert sum(module.check_ranks(pairs, ranks, TIE)) == module.CHECKED
    with pytest.raises(RuntimeError, match="where float64 counts"):
        module.check_ranks(pairs, replace(ranks, image=ranks.image + 1), TIE)
    with pytest.raises(RuntimeError, match="where float64 counts"):
        module.check_ranks(pairs, replace(ranks, text=ranks.text.roll(1)), TIE)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--pictures", "0"], "every size must be at least 1"),
        (["--large", "20", "10"], "a caption for every picture"),
        (["--embed", "runs/demo"], "name shards too"),
    ],
)
def test_bad_input(words: list[str], says: str) -> None:
    ended = run(*words)
    assert ended.returncode == 2
    assert says in ended.stderr
