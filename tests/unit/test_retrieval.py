"""Ranks in tiles against brute force and open_clip's own metrics; ties, bad features, memory, the tool."""

from __future__ import annotations

import dataclasses
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
from clipdist.evals.protocols import PROTOCOLS
from clipdist.evals.retrieval import (
    bootstrap_intervals,
    mean_metrics,
    retrieval_metrics,
    retrieval_ranks,
    summarise,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def noisy_pairs(n: int, captions: int, noise: float, dim: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n + captions)
    image = torch.randn(n, dim, generator=generator) * 7
    text_image = torch.arange(n).repeat_interleave(captions)[torch.randperm(n * captions, generator=generator)]
    return image, image[text_image] + noise * torch.randn(n * captions, dim, generator=generator), text_image


def brute_force(image: torch.Tensor, text: torch.Tensor, text_image: torch.Tensor) -> tuple[list, list, list]:
    """Ranks of both directions and AP@10 of image to text, by the definition, in float64, one query at a time."""
    scores = (F.normalize(text.double(), dim=1) @ F.normalize(image.double(), dim=1).T).numpy()
    own = text_image.numpy()
    text_ranks = []
    for caption, row in enumerate(scores):
        rivals = np.delete(row, own[caption])
        text_ranks.append(1 + int((rivals >= row[own[caption]]).sum()))
    image_ranks, precisions = [], []
    for picture in range(len(image)):
        mine = own == picture
        if mine.any():
            image_ranks.append(1 + int((scores[~mine, picture] >= scores[mine, picture].max()).sum()))
            relevant = mine[np.argsort(-scores[:, picture])][:10]
            at = np.arange(1, len(relevant) + 1)
            precisions.append(float((relevant * relevant.cumsum() / at).sum() / min(mine.sum(), 10)))
    return text_ranks, image_ranks, precisions


def found(image: torch.Tensor, text: torch.Tensor, text_image: torch.Tensor) -> tuple[list, list, list]:
    ranks = retrieval_ranks(image, text, text_image)
    return ranks.text.tolist(), ranks.image.tolist(), pytest.approx(ranks.image_ap.tolist())


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
    text_ranks, image_ranks, precisions = brute_force(image, text, text_image)
    assert found(image, text, text_image) == (text_ranks, image_ranks, precisions)
    assert len(set(text_ranks)) > 3
    assert len(set(image_ranks)) > 1
    assert len(set(precisions)) > 5


def test_uneven_captions_and_pictures_without_any() -> None:
    image, text, text_image = noisy_pairs(20, 4, noise=8.0)
    keep = (text_image != 3) & (text_image != 19)
    keep[text_image.eq(5).nonzero()[0]] = False
    text, text_image = text[keep], text_image[keep]
    ranks = retrieval_ranks(image, text, text_image)
    assert len(ranks.text) == 77 - 6
    assert len(ranks.image) == 18  # pictures 3 and 19 are candidates, not queries
    assert (~ranks.captioned).nonzero().flatten().tolist() == [3, 19]
    assert found(image, text, text_image) == brute_force(image, text, text_image)
    metrics = retrieval_metrics(image, text, text_image)
    assert (metrics["candidates"], metrics["captions"], metrics["chance"]) == (20, 71, 5.0)


def test_more_captions_than_the_first_ten_hold() -> None:
    image, text, text_image = noisy_pairs(6, 14, noise=9.0)
    assert found(image, text, text_image) == brute_force(image, text, text_image)
    near = text[text_image == 0] * 0 + image[0]  # all fourteen captions of picture 0 are the picture itself
    text[text_image == 0] = near
    assert retrieval_ranks(image, text, text_image).image_ap[0] == 1


def test_the_table() -> None:
    image, text, text_image = noisy_pairs(40, 2, noise=20.0)
    text_ranks, image_ranks, precisions = map(np.array, brute_force(image, text, text_image))
    metrics = retrieval_metrics(image, text, text_image)
    assert metrics["t2i_map10"] == pytest.approx(100 * np.where(text_ranks <= 10, 1 / text_ranks, 0).mean())
    assert metrics["i2t_map10"] == pytest.approx(100 * precisions.mean())
    recalls = [100 * (ranks <= k).mean() for ranks in (text_ranks, image_ranks) for k in (1, 5, 10)]
    assert metrics["rsum"] == pytest.approx(sum(recalls))
    assert metrics["i2t_mean_rank"] == pytest.approx(image_ranks.mean())
    assert 0 < metrics["i2t_map10"] < metrics["i2t_r10"] < 100


def test_intervals_draw_pictures_with_all_their_captions() -> None:
    image, text, text_image = noisy_pairs(60, 3, noise=24.0)
    keep = torch.rand(180, generator=torch.Generator().manual_seed(0)) > 0.3
    ranks = retrieval_ranks(image, text[keep], text_image[keep])
    intervals = bootstrap_intervals([ranks], resamples=4000, seed=1)
    hits, owner = (ranks.text <= 5).double().numpy(), ranks.text_image.numpy()
    random = np.random.default_rng(0)
    captioned = np.unique(owner)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate(
            [np.flatnonzero(owner == picture) for picture in random.choice(captioned, len(captioned))]
        )
        drawn.append(100 * hits[rows].mean())
    assert intervals["t2i_r5"] == pytest.approx(np.percentile(drawn, (2.5, 97.5)), abs=1.0)
    metrics = summarise(ranks)
    assert set(metrics) - set(intervals) == {
        "t2i_median_rank", "i2t_median_rank", "candidates", "captions", "chance"
    }  # fmt: skip
    assert all(low < metrics[name] < high for name, (low, high) in intervals.items())
    wide = bootstrap_intervals([ranks], resamples=4000, seed=1, level=99)["rsum"]
    assert wide[0] < intervals["rsum"][0] < intervals["rsum"][1] < wide[1]


def test_intervals_are_seeded_and_bounded_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = retrieval_ranks(*noisy_pairs(30, 2, noise=16.0))
    at_once = bootstrap_intervals([ranks], 50, seed=3)
    assert at_once != bootstrap_intervals([ranks], 50, seed=4)
    monkeypatch.setattr(retrieval, "RESAMPLES_AT_ONCE", 200)
    in_parts = bootstrap_intervals([ranks], 50, seed=3)
    assert all(in_parts[name] == pytest.approx(at_once[name]) for name in at_once)


def test_folds_are_averaged() -> None:
    folds = [retrieval_ranks(*noisy_pairs(n, 2, noise=16.0)) for n in (20, 30)]
    tables = [summarise(fold) for fold in folds]
    mean = mean_metrics(folds)
    assert all(mean[name] == pytest.approx((tables[0][name] + tables[1][name]) / 2) for name in mean)
    both = bootstrap_intervals(folds, 300)["rsum"]
    assert both[0] < mean["rsum"] < both[1]
    alone = bootstrap_intervals(folds[:1], 300)["rsum"]
    assert both[1] - both[0] < alone[1] - alone[0]


def test_a_collapsed_model_scores_nothing() -> None:
    same = torch.ones(300, 64)
    metrics = retrieval_metrics(same, same, torch.arange(300))
    assert all(metrics[f"{way}_r{k}"] == 0 for way in ("t2i", "i2t") for k in (1, 5, 10))
    assert metrics["t2i_median_rank"] == metrics["i2t_mean_rank"] == 300
    zero = retrieval_metrics(torch.zeros(30, 8), torch.zeros(30, 8), torch.arange(30))
    assert zero["t2i_r10"] == 0


def test_a_tie_counts_against() -> None:
    image = torch.eye(4)[[0, 0, 1, 2]]  # pictures 0 and 1 are the same
    ranks = retrieval_ranks(image, torch.eye(4)[[0, 1, 2]], torch.tensor([0, 2, 3]))
    assert ranks.text.tolist() == [2, 1, 1]
    assert ranks.image.tolist() == [1, 1, 1]


def test_a_repeated_caption_of_the_same_picture_is_no_rival() -> None:
    text = torch.eye(3)[[0, 0, 1]]
    assert retrieval_ranks(torch.eye(3)[[0, 1]], text, torch.tensor([0, 0, 1])).image.tolist() == [1, 1]
    assert retrieval_ranks(torch.eye(3)[[0, 1]], text, torch.tensor([0, 1, 1])).image.tolist() == [2, 1]


def test_memory_is_bounded_by_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watchdog(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(retrieval, "TILE", 32)
    image, text, text_image = noisy_pairs(300, 3, noise=1.0, dim=4)
    with Watchdog():
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
    from clipdist.models import load
    from clipdist.models.build import build_model

    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json")))
    loaded = load.LoadedModel(model.eval(), make_tokenizer(model.spec), "tiny", run_dir=None, step=None)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(sys, "argv", ["eval_retrieval.py", *arguments])
    runpy.run_path(str(REPOSITORY / "tools/eval_retrieval.py"))["main"]()


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "00000.tar", [[f"picture {row}", f"number {row}"] for row in range(12)] + [[]])
    run_tool(monkeypatch, "tiny", str(tmp_path), "--device", "cpu", "--batch", "5", "--json", "--widths", "16", "32")
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert (record["candidates"], record["captions"], record["left_out"]) == (12, 24, {"missing caption": 1})
    assert record["t2i_r10"] >= 100 * 3 / 12 - 1e-9  # of 12 candidates, an untied rank is rarely above 10
    assert "left out, missing caption: 1 (000000012)" in captured.err
    assert "captions are json:captions\n" in captured.out
    assert record["caption_sources"] == {"json:captions": 12}
    assert record["rsum_low"] <= record["rsum"] <= record["rsum_high"]
    assert "tiny; the first 16 of 32 features: 12 pictures" in captured.out
    assert (record["widths"], record["width_16/captions"]) == ([16], 24)
    assert record["width_16/t2i_mean_rank"] != record["t2i_mean_rank"]
    for shown in (f"{record['i2t_r5']:14.2f}", f"{record['t2i_r5_low']:.2f}-{record['t2i_r5_high']:.2f}"):
        assert shown in captured.out


def test_tool_without_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "00000.tar", [[], []])
    with pytest.raises(
        UserError, match=r"of 2 samples looked at none has a caption .*; name them: --caption-members json:FIELD"
    ):
        run_tool(monkeypatch, "tiny", str(tmp_path), "--device", "cpu")


@pytest.mark.parametrize("tool", ["eval_retrieval", "search_images"])
@pytest.mark.parametrize("mark", ["checkpoints/step-00000005/manifest.json", "manifest.json", "config.json"])
def test_swapped_run_and_shards_are_told_apart(tmp_path: Path, tool: str, mark: str, monkeypatch) -> None:
    write_shard(tmp_path / "set/00000.tar", [["a"]])
    (tmp_path / "run" / mark).parent.mkdir(parents=True)
    (tmp_path / "run" / mark).touch()
    words = [str(tmp_path / "set"), str(tmp_path / "run"), *(["a dog"] if tool == "search_images" else [])]
    monkeypatch.setattr(sys, "argv", [tool, *words])
    with pytest.raises(UserError, match=r"SHARDS .*/run: is the folder of a run or model.*; RUN comes first"):
        runpy.run_path(str(REPOSITORY / f"tools/{tool}.py"))["main"]()


def last_json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def small_protocol(monkeypatch: pytest.MonkeyPatch, folds: int) -> None:
    """COCO with 8 pictures."""
    for name in ("coco-5k", "coco-1k-folds"):
        protocol = dataclasses.replace(PROTOCOLS[name], images=8, folds=folds if name == "coco-1k-folds" else 1)
        monkeypatch.setitem(PROTOCOLS, name, protocol)


def test_tool_saves_and_reuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "set/00000.tar", [[f"picture {row}", f"number {row}"] for row in range(12)] + [[]])
    saved = str(tmp_path / "deep/saved.safetensors")
    run_tool(monkeypatch, "tiny", str(tmp_path / "set"), "--device", "cpu", "--save-embeddings", saved, "--json")
    computed = last_json(capsys)
    run_tool(monkeypatch, "--embeddings", saved, "--device", "cpu", "--json")
    assert last_json(capsys) == computed
    with pytest.raises(UserError, match="--widths 65: the features have 32 numbers"):
        run_tool(monkeypatch, "--embeddings", saved, "--device", "cpu", "--widths", "65")
    with pytest.raises(UserError, match="saved without --protocol"):
        run_tool(monkeypatch, "--embeddings", saved, "--protocol", "coco-5k")


def test_tool_by_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small_protocol(monkeypatch, folds=2)
    write_shard(tmp_path / "set/00000.tar", [[f"{word} {row}" for word in "abcdefg"] for row in range(12)])
    names = [f"{row}.jpg" for row in (11, 3, 5, 0, 1, 9, 8, 7)]
    split, saved = tmp_path / "split.json", str(tmp_path / "saved.safetensors")
    split.write_text(json.dumps({"images": [{"filename": name, "split": "test"} for name in names]}))
    words = ("tiny", str(tmp_path / "set"), "--device", "cpu", "--split-file", str(split), "--resamples", "0", "--json")
    run_tool(monkeypatch, *words, "--protocol", "coco-5k", "--save-embeddings", saved)
    said = capsys.readouterr().out
    record = json.loads(said.splitlines()[-1])
    assert "captions are json:captions, the first 5 of a picture\n" in said
    assert (record["candidates"], record["captions"], record["missing"]) == (8, 8 * 5, 0)
    assert not any(name.endswith("_low") for name in record)
    run_tool(monkeypatch, *words, "--protocol", "coco-1k-folds")
    folds = last_json(capsys)
    assert (folds["candidates"], folds["captions"], folds["folds"]) == (4, 20, 2)
    run_tool(monkeypatch, "--embeddings", saved, "--protocol", "coco-1k-folds", "--resamples", "0", "--json")
    assert last_json(capsys) == folds

    with pytest.raises(UserError, match="saved under --protocol coco-5k"):
        run_tool(monkeypatch, "--embeddings", saved, "--protocol", "flickr8k-1k")


def test_tool_refuses_a_protocol_with_pictures_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_protocol(monkeypatch, folds=2)
    write_shard(tmp_path / "set/00000.tar", [["a", "b"] for _ in range(6)] + [[]])
    split = tmp_path / "split.txt"
    split.write_text("\n".join(f"{row}.jpg" for row in range(8)))
    words = ("tiny", str(tmp_path / "set"), "--device", "cpu", "--split-file", str(split), "--protocol", "coco-5k")
    with pytest.raises(UserError, match=r"1 of the 8 pictures of coco-5k .* \(7\.jpg\)"):
        run_tool(monkeypatch, *words)
    split.write_text("\n".join(f"{row}.jpg" for row in (0, 1, 2, 3, 4, 5, 6, 11)))
    run_tool(monkeypatch, *words, "--allow-missing", "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["missing"] == 2  # one is not there, one has no caption
    assert "NOT the published set: 2 pictures missing" in captured.out
    split.write_text("\n".join(f"{row}.jpg" for row in range(20, 28)))
    with pytest.raises(UserError, match="none of the 8 pictures"):
        run_tool(monkeypatch, *words, "--allow-missing")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tiny"], "name RUN and SHARDS"),
        ([], "name RUN and SHARDS"),
        (["tiny", "set", "--protocol", "coco-5k"], "go together"),
        (["tiny", "set", "--split-file", "x"], "go together"),
        (["tiny", "set", "--allow-missing"], "belongs to --protocol"),
        (["tiny", "set", "--embeddings", "x"], "takes the place of"),
        (["tiny", "set", "--resamples", "-1"], "--resamples -1: must be at least 0"),
    ],
)
def test_tool_with_words_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, *words)
    assert says in capsys.readouterr().err


def test_tool_offers_every_protocol(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        run_tool(monkeypatch, "--help")
    assert f"{{{','.join(PROTOCOLS)}}}" in capsys.readouterr().out


def test_tool_hears_of_a_place_that_cannot_be_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be written there"):
        run_tool(monkeypatch, "tiny", "no such shards", "--save-embeddings", str(tmp_path))
