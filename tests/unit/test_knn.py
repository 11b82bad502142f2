"""Nearest neighbours beside two formulas written anew, ties, blocks; the tool; the effective rank."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from wds_sets import ROOT, write_run, write_sets

from clipdist.errors import UserError
from clipdist.evals import search
from clipdist.evals.knn import knn_classify
from clipdist.evals.search import highest
from clipdist.evals.spread import effective_rank

SETTINGS = [(1, 0.07), (20, 0.07), (200, 0.1), (1000, 0.1)]


def features(n: int, m: int, width: int = 16, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + m)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, width, generator=generator)
    train = centres[labels] + 1.5 * torch.randn(n, width, generator=generator)
    return train, labels, torch.randn(m, width, generator=generator) + centres[torch.arange(m) % classes]


def dense(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int, t: float) -> list[int]:
    """All votes of one test image after the other, in float64."""
    train, test = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (train, test))
    answers = []
    for query in test:
        cosines = train @ query
        near = sorted(range(len(train)), key=lambda row: (-cosines[row], row))[:k]
        votes = [sum(np.exp(cosines[row] / t) for row in near if labels[row] == one) for one in range(classes)]
        answers.append(int(np.argmax(votes)))
    return answers


def as_lightly(bank: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, classes: int, k: int, t: float) -> Any:
    """The steps of lightly's knn_predict: a one-hot matrix weighted and summed over the neighbours."""
    similarity = F.normalize(query, dim=1) @ F.normalize(bank, dim=1).T
    weights, rows = similarity.topk(k, dim=1)
    one_hot = F.one_hot(labels[rows], classes)  # [m, k, classes]
    return (one_hot * (weights / t).exp()[..., None]).sum(1).argsort(dim=1, descending=True)[:, 0]


@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_votes_are_those_of_the_formulas(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TILE_IMAGES", tile)  # blocks smaller than k, and one block
    monkeypatch.setattr("clipdist.evals.knn.CHUNK", 50)
    train, labels, test = features(350, 130)
    found = knn_classify(train, labels, test, 7, SETTINGS)
    for (k, t), predicted in found.items():
        assert predicted.tolist() == dense(train.double().numpy(), labels.numpy(), test.double().numpy(), 7, k, t)
        if k <= len(train):
            assert torch.equal(predicted, as_lightly(train.double(), labels, test.double(), 7, k, t))
    assert not torch.equal(found[1, 0.07], found[20, 0.07])


def test_ties_and_few_images() -> None:
    east, west = torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]])
    train, labels = torch.cat([east] * 5 + [west]), torch.tensor([3, 1, 1, 2, 2, 0])
    found = knn_classify(train, labels, east, 4, [(1, 0.1), (2, 0.1), (3, 0.1), (5, 0.1), (100, 0.1)])
    # of equal images the first is the nearest; of equal votes the lowest class wins
    assert [int(found[k, 0.1]) for k in (1, 2, 3, 5, 100)] == [3, 1, 1, 1, 1]
    assert knn_classify(train, labels, torch.zeros(0, 2), 4, [(1, 0.1)])[1, 0.1].shape == (0,)
    assert int(knn_classify(train, labels, west * 1e-20, 4, [(1, 1e-4)])[1, 1e-4]) == 0  # nothing over- or underflows
    with pytest.raises(UserError, match="not finite"):
        knn_classify(train * float("nan"), labels, east, 4, [(1, 0.1)])


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (40, 1), (40, 7), (40, 39)])
def test_of_equal_scores_the_first_are_taken(n: int, k: int) -> None:
    scores = torch.randint(0, 4, (200, n), generator=torch.Generator().manual_seed(n)).float()
    values, columns = highest(scores, k)
    wanted = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(columns.sort(1).values, wanted.sort(1).values)
    assert torch.equal(values, scores.gather(1, columns))


def test_effective_rank() -> None:
    random = torch.Generator().manual_seed(0)
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.eye(8) * torch.arange(1, 9)) == pytest.approx(8)  # the length does not count
    assert effective_rank(torch.ones(50, 8)) == pytest.approx(1)
    assert effective_rank(torch.zeros(5, 8)) == 0
    rows = torch.randn(200, 6, generator=random)
    values = torch.linalg.svdvals(F.normalize(rows.double(), dim=1))
    shares = values / values.sum()
    assert effective_rank(rows) == pytest.approx(float((-(shares * shares.log()).sum()).exp()))
    collapsed = torch.ones(200, 6) + 0.01 * rows
    assert effective_rank(collapsed.half()) < 1.2


# The tool


def run(tool: str, *words: object) -> None:
    arguments, sys.argv = sys.argv, [tool, *map(str, words), "--device", "cpu", "--json"]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]()
    finally:
        sys.argv = arguments


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sets(tmp_path)
    folder = write_run(tmp_path / "run", 3)
    run("eval_knn", folder, "--data", tmp_path / "colours")
    first = capsys.readouterr()
    record = json.loads(first.out.splitlines()[-1])
    assert "30 training pictures: where more neighbours are asked for, all of them vote" in first.err
    assert json.loads((folder / "results/eval_knn.json").read_text()) == record
    assert record["knn_20"] == record["knn_20_t0.07"] > record["chance"]
    assert (record["train"], record["test"], record["features"]) == (30, 50, 32)
    run("eval_knn", folder, "--data", tmp_path / "colours")  # from the features that are kept
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    (tmp_path / "alone").mkdir()
    (tmp_path / "colours/test").rename(tmp_path / "alone/test")
    (tmp_path / "alone/classnames.txt").write_text((tmp_path / "colours/classnames.txt").read_text())
    with pytest.raises(UserError, match="no training pictures: their labels are what neighbours vote for"):
        run("eval_knn", folder, "--data", tmp_path / "alone")
