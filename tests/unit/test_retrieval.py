"""Ranks in tiles against brute force and open_clip's own metrics; ties, bad features, memory, the tool."""

from __future__ import annotations

import io
import json
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from clipdist import config
from clipdist.errors import UserError
from clipdist.evals import retrieval
from clipdist.evals.retrieval import retrieval_metrics, retrieval_ranks

REPOSITORY = Path(__file__).resolve().parents[2]


def noisy_pairs(n: int, captions: int, noise: float, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + captions)
    image = torch.randn(n, dim, generator=generator) * 7
    text_image = torch.arange(n).repeat_interleave(captions)[torch.randperm(n * captions, generator=generator)]
    return image, image[text_image] + noise * torch.randn(n * captions, dim, generator=generator), text_image


def brute_force(image: torch.Tensor, text: torch.Tensor, text_image: torch.Tensor) -> tuple[list[int], list[int]]:
    """Ranks by the definition, in float64, one query at a time."""
    scores = (F.normalize(text.double(), dim=1) @ F.normalize(image.double(), dim=1).T).numpy()
    own = text_image.numpy()
    text_ranks = []
    for caption, row in enumerate(scores):
        rivals = np.delete(row, own[caption])
        text_ranks.append(1 + int((rivals >= row[own[caption]]).sum()))
    image_ranks = []
    for picture in range(len(image)):
        mine = own == picture
        if mine.any():
            image_ranks.append(1 + int((scores[~mine, picture] >= scores[mine, picture].max()).sum()))
    return text_ranks, image_ranks


def test_equals_open_clip_on_one_to_one_data(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip_train.train import get_clip_metrics

    monkeypatch.setattr(retrieval, "TILE", 97)
    image, text, text_image = noisy_pairs(400, 1, noise=9.0)
    text = text[text_image.argsort()]  # open_clip wants caption i with picture i
    ours = retrieval_metrics(image, text, torch.arange(400))
    theirs = get_clip_metrics(F.normalize(image, dim=1), F.normalize(text, dim=1), torch.tensor(14.0))
    assert 5 < ours["t2i_r1"] < 95  # the case says something
    for short, long in (("t2i", "text_to_image"), ("i2t", "image_to_text")):
        for k in (1, 5, 10):
            assert ours[f"{short}_r{k}"] == pytest.approx(100 * theirs[f"{long}_R@{k}"])
        assert ours[f"{short}_median_rank"] == theirs[f"{long}_median_rank"]
        assert ours[f"{short}_mean_rank"] == pytest.approx(theirs[f"{long}_mean_rank"])


@pytest.mark.parametrize("tile", [1, 7, 64, 4096])
def test_five_captions_equal_brute_force(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(retrieval, "TILE", tile)
    image, text, text_image = noisy_pairs(23, 5, noise=16.0)
    text_ranks, image_ranks = retrieval_ranks(image, text, text_image)
    assert (text_ranks.tolist(), image_ranks.tolist()) == brute_force(image, text, text_image)
    assert text_ranks.unique().numel() > 3
    assert image_ranks.unique().numel() > 1


def test_uneven_captions_and_pictures_without_any() -> None:
    image, text, text_image = noisy_pairs(20, 4, noise=8.0)
    keep = (text_image != 3) & (text_image != 19)
    keep[text_image.eq(5).nonzero()[0]] = False
    text, text_image = text[keep], text_image[keep]
    text_ranks, image_ranks = retrieval_ranks(image, text, text_image)
    assert len(text_ranks) == 77 - 6
    assert len(image_ranks) == 18  # pictures 3 and 19 are candidates, not queries
    assert (text_ranks.tolist(), image_ranks.tolist()) == brute_force(image, text, text_image)
    metrics = retrieval_metrics(image, text, text_image)
    assert (metrics["candidates"], metrics["captions"], metrics["chance"]) == (20, 71, 5.0)


def test_a_collapsed_model_scores_nothing() -> None:
    same = torch.ones(300, 64)
    metrics = retrieval_metrics(same, same, torch.arange(300))
    assert all(metrics[f"{way}_r{k}"] == 0 for way in ("t2i", "i2t") for k in (1, 5, 10))
    assert metrics["t2i_median_rank"] == metrics["i2t_mean_rank"] == 300
    zero = retrieval_metrics(torch.zeros(30, 8), torch.zeros(30, 8), torch.arange(30))
    assert zero["t2i_r10"] == 0


def test_a_tie_counts_against() -> None:
    image = torch.eye(4)[[0, 0, 1, 2]]  # pictures 0 and 1 are the same
    text_ranks, image_ranks = retrieval_ranks(image, torch.eye(4)[[0, 1, 2]], torch.tensor([0, 2, 3]))
    assert text_ranks.tolist() == [2, 1, 1]
    assert image_ranks.tolist() == [1, 1, 1]


def test_a_repeated_caption_of_the_same_picture_is_no_rival() -> None:
    text = torch.eye(3)[[0, 0, 1]]
    assert retrieval_ranks(torch.eye(3)[[0, 1]], text, torch.tensor([0, 0, 1]))[1].tolist() == [1, 1]
    assert retrieval_ranks(torch.eye(3)[[0, 1]], text, torch.tensor([0, 1, 1]))[1].tolist() == [2, 1]


def test_memory_is_bounded_by_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(retrieval, "TILE", 32)
    image, text, text_image = noisy_pairs(300, 3, noise=1.0, dim=4)
    with Watch():
        retrieval_ranks(image, text, text_image)
    assert 32 * 32 <= largest <= 900 * 4  # the copies of the features, not 300 x 900 scores


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite(bad: float) -> None:
    image, text, text_image = noisy_pairs(5, 2, noise=1.0)
    text[3, 1] = bad
    with pytest.raises(UserError, match="1 of 10 text features are not finite"):
        retrieval_metrics(image, text, text_image)


def test_nothing_to_retrieve() -> None:
    with pytest.raises(UserError, match="captioned pictures"):
        retrieval_metrics(torch.ones(3, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


def write_shard(path: Path, captions: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row, own in enumerate(captions):
            buffer = io.BytesIO()
            Image.new("RGB", (40, 30), (20 * row % 256, 90, 160)).save(buffer, "JPEG")
            record = {"key": f"{row:09d}", "captions": own, "filename": f"{row}.jpg"}
            for kind, data in (("jpg", buffer.getvalue()), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{row:09d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The tool's main, in this process, on a tiny model with random weights under the name `tiny`."""
    from clipdist.data.tokens import make_tokenizer
    from clipdist.model import load
    from clipdist.model.dual_encoder import build_model

    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json")))
    loaded = load.LoadedModel(model.eval(), make_tokenizer(model.spec), "tiny", run_dir=None, step=None)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(sys, "argv", ["eval_retrieval.py", "tiny", *arguments])
    runpy.run_path(str(REPOSITORY / "tools/eval_retrieval.py"))["main"]()


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "00000.tar", [[f"picture {row}", f"number {row}"] for row in range(12)] + [[]])
    run_tool(monkeypatch, str(tmp_path), "--device", "cpu", "--batch", "5", "--json")
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert (record["candidates"], record["captions"], record["left_out"]) == (12, 24, {"missing caption": 1})
    assert record["t2i_r10"] >= 100 * 3 / 12 - 1e-9  # of 12 candidates, an untied rank is rarely above 10
    assert "left out, missing caption: 1 (000000012)" in captured.err
    assert f"{record['i2t_r5']:8.2f}" in captured.out


def test_tool_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "00000.tar", [[], []])
    with pytest.raises(UserError, match="no picture with a caption in 2 samples"):
        run_tool(monkeypatch, str(tmp_path), "--device", "cpu")
