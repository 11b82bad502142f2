"""CIFAR-10's layout read safely; the linear layer on frozen features, its label fractions; the tool."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cifar_files import write_cifar10
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from clipdist import config
from clipdist.data.tokens import NoTokenizer
from clipdist.data.transform import EvalTransform
from clipdist.datasets.cifar import FOLDER, LabelledImages, read_cifar
from clipdist.datasets.labelled import LabelledSet, Split, open_labelled
from clipdist.distributed.rank import DistEnv
from clipdist.errors import Fault, UserError
from clipdist.evals import probe
from clipdist.evals.embed import Encode, WorkShare
from clipdist.evals.features import embed_set, features_path, frozen_encoder, pixel_encoder, random_twin
from clipdist.evals.fractions import MOST_SEEDS, interval, label_fraction
from clipdist.evals.knn import knn_of
from clipdist.evals.probe import (
    LR_GRID,
    fit_probe,
    probe_of,
    require_unchanged,
)
from clipdist.evals.validation import Validation
from clipdist.models import load
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.weights import weights_checksum

REPOSITORY = Path(__file__).resolve().parents[2]
PENALTIES = [10.0 ** (place / 8) for place in range(-48, 49)]  # the paper's 96 steps
NAMES = ("circle", "square", "star")


def labelled(n: int, seed: int) -> LabelledImages:
    random = np.random.default_rng(seed)
    return LabelledImages(random.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), random.integers(0, 3, n))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path, labelled(23, 0), labelled(7, 1), NAMES, batches=3)


def same(one: LabelledImages, other: LabelledImages) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


# The layout


def test_round_trip(written: Path) -> None:
    for path in (written, written.parent):
        data = read_cifar(path)
        assert same(data.train, labelled(23, 0))
        assert same(data.test, labelled(7, 1))
        assert data.classes == NAMES
        assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int64)


def test_the_official_form_is_read(written: Path) -> None:
    """Protocol 2 from Python 2: strings are of its own kind, an array's bytes among them."""

    def string(value: bytes) -> bytes:
        return pickle.BINSTRING + len(value).to_bytes(4, "little") + value

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
    dtype = (
        b"cnumpy\ndtype\n("
        + string(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + string(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    images = labelled(2, 5).images
    array += b"(K\x01(K\x02M\x00\x0ct" + dtype + b"\x89" + string(images.tobytes()) + b"tb"
    batch = b"\x80\x02}(" + string(b"labels") + b"](K\x02K\x00e" + string(b"data") + array + b"u."
    assert pickle.loads(batch, encoding="bytes")[b"data"].shape == (2, 3072)
    (written / "test_batch").write_bytes(batch)
    test = read_cifar(written).test
    assert np.array_equal(test.images, images)
    assert test.labels.tolist() == [2, 0]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_archive_is_read_in_place(written: Path, tmp_path: Path, mode: Any) -> None:
    archive = tmp_path / "copy" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, mode) as tar:
        tar.add(written, FOLDER)
    for path in (archive, archive.parent):
        assert same(read_cifar(path).train, labelled(23, 0))
    assert [entry.name for entry in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archive(written: Path, tmp_path: Path, mode: Any) -> None:
    archive = tmp_path / "part.tar.gz"
    with tarfile.open(archive, mode) as tar:
        tar.add(written, FOLDER)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(UserError, match=r"part\.tar\.gz: damaged or truncated archive"):
        read_cifar(archive)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("key", [str, str.encode])
def test_copies_in_other_protocols(written: Path, protocol: int, key) -> None:
    part = labelled(5, 3)
    batch = {key("data"): part.images.reshape(5, -1), key("labels"): part.labels.tolist(), key("filenames"): [key("x")]}
    (written / "data_batch_10").write_bytes(pickle.dumps(batch, protocol=protocol))
    train = read_cifar(written).train
    assert len(train) == 28
    assert np.array_equal(train.images[23:], part.images)  # batch 10 comes after 3, not after 1
    assert np.array_equal(train.labels[23:], part.labels)


def test_batches_may_be_missing(written: Path) -> None:
    (written / "data_batch_1").unlink()
    (written / "batches.meta").unlink()
    data = read_cifar(written)
    assert np.array_equal(data.train.images, labelled(23, 0).images[8:])
    assert data.classes == tuple("0123456789")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_runs_code_is_refused(written: Path, tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "it-ran"
    (written / "test_batch").write_bytes(pickle.dumps({"data": Bomb(marker), "labels": [1]}, protocol=protocol))
    with pytest.raises(UserError, match=r"test_batch: .*refused posix\.mkdir"):
        read_cifar(written)
    assert not marker.exists()


def good_batch() -> dict:
    return {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "test_batch: damaged, truncated"),
        (b"version https://git-lfs.github.com/spec/v1", "test_batch: damaged, truncated"),
        (pickle.dumps([1, 2], 2), "expected a dictionary"),
        (pickle.dumps({b"data": good_batch()[b"data"]}, 2), "not a CIFAR-10 batch"),
        (pickle.dumps(good_batch() | {b"data": np.zeros((2, 9), np.uint8)}, 2), "expected|not uint8"),
        (pickle.dumps(good_batch() | {b"data": np.zeros((2, 3072), np.float32)}, 2), "not a CIFAR-10 batch"),
        (pickle.dumps(good_batch() | {b"data": np.array([[None] * 3072] * 2)}, 2), "not a CIFAR-10 batch"),
        (pickle.dumps(good_batch() | {b"labels": [0]}, 2), "integer labels"),
        (pickle.dumps(good_batch() | {b"labels": [0, 9]}, 2), "labels 0 to 9, but 3 class names"),
        (pickle.dumps(good_batch(), 2)[:-900], "test_batch: damaged, truncated"),
    ],
)
def test_damaged_batches(written: Path, content: bytes, says: str) -> None:
    (written / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_cifar(written)


def test_no_data_there(tmp_path: Path, written: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_cifar(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        read_cifar(tmp_path / "empty")
    (written / "test_batch").unlink()
    with pytest.raises(UserError, match="holds no test_batch"):
        read_cifar(written)


# The layer


def clusters(n: int, seed: int, noise: float, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, dim, generator=generator), labels


def test_separable_features_are_learned_and_noise_is_not() -> None:
    train, labels = clusters(300, 0, noise=0.5)
    test, test_labels = clusters(200, 1, noise=0.5)
    good = fit_probe(train, labels, test, test_labels, NAMES)
    assert good.accuracy > 97
    generator = torch.Generator().manual_seed(7)
    nothing, nothing_test = torch.randn(300, 12, generator=generator), torch.randn(200, 12, generator=generator)
    noise = fit_probe(nothing, labels, nothing_test, test_labels, NAMES)
    assert 15 < noise.accuracy < 55
    assert good.l2 in PENALTIES
    assert noise.l2 in PENALTIES
    share = {name: (test_labels == label).double().mean().item() for label, name in enumerate(NAMES)}
    assert sum(good.per_class[name] * share[name] for name in NAMES) == pytest.approx(good.accuracy)


def test_result_does_not_depend_on_the_origin_or_chance() -> None:
    train, labels = clusters(200, 0, noise=2.0)
    test, test_labels = clusters(100, 1, noise=2.0)
    first = fit_probe(train, labels, test, test_labels, NAMES)
    torch.manual_seed(123)
    again = fit_probe(train, labels, test, test_labels, NAMES)
    assert torch.equal(first.predictions, again.predictions)
    scaled = fit_probe(train * 10 + 7, labels, test * 10 + 7, test_labels, NAMES)  # nothing is standardised
    assert (scaled.l2, scaled.accuracy) == (pytest.approx(first.l2 * 100), pytest.approx(first.accuracy, abs=1))
    assert 40 < first.accuracy < 99


@pytest.mark.parametrize("width", [6, 12, 240])
@pytest.mark.parametrize("l2", [1000.0, 10.0, 0.1])
def test_fit_is_the_optimum(l2: float, width: int) -> None:
    """The gradient of sum of cross-entropies + l2 / 2 * |W|^2, by hand in float64, vanishes where L-BFGS stopped."""
    features, labels = clusters(150, 0, noise=2.0)
    features = 3 * features * torch.linspace(0.1, 2, 12) + 5
    features = features[:, :width] if width < 12 else torch.cat([features] * (width // 12), 1)
    data = probe._rotated(features, labels)
    layer = probe._fit_lbfgs(data, l2, probe._zero_layer(data.features, 3))
    inputs = torch.cat([torch.zeros(1, width), torch.eye(width)])  # the layer and what precedes it are one affine map
    answers = probe._scores(layer, data.transform(inputs)).double()
    bias, weight = answers[0], (answers[1:] - answers[0]).T
    raw = features.double()
    error = (raw @ weight.T + bias).softmax(1) - F.one_hot(labels, 3)
    gradient = error.T @ raw + l2 * weight
    assert gradient.abs().max() < 3e-4 * raw.abs().sum(0).max()
    assert error.mean(0).abs().max() < 1e-4
    assert weight.abs().max() > 1e-3


@pytest.mark.parametrize("best", [48, 31, 16, 0, -5, -48])
def test_the_penalty_is_searched_as_in_the_paper(best: int) -> None:
    """7 penalties from 1e6 to 1e-6, then the interval around the best is halved until there are 8 steps per decade."""
    tried: list[float] = []

    def score(l2: float) -> tuple[float, float]:
        tried.append(l2)
        return 1 - abs(8 * math.log10(l2) - best) / 100, 1.0

    assert probe._search_l2(score) == pytest.approx(10 ** (best / 8))
    assert tried[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])
    assert len(tried) <= probe.L2_FITS
    assert all(any(l2 == pytest.approx(penalty) for penalty in PENALTIES) for l2 in tried)


def test_weak_penalties_are_not_tried_where_they_are_worse_already() -> None:
    tried: list[float] = []

    def score(l2: float) -> tuple[float, float]:
        tried.append(l2)
        return (0.5, 3.0) if l2 < 1 else (0.1, 2.3) if l2 > 100 else (0.9, 1.0)

    assert 1 <= probe._search_l2(score) <= 100
    assert min(tried) > 1e-4


def test_the_held_out_part_chooses_a_penalty_that_generalises() -> None:
    """A third of the training labels are wrong: without a penalty the layer learns them by heart."""
    generator = torch.Generator().manual_seed(5)
    (train, labels), (test, test_labels) = clusters(300, 0, noise=1.0), clusters(500, 1, noise=1.0)
    train = torch.cat([train, torch.randn(300, 150, generator=generator)], 1)
    test = torch.cat([test, torch.randn(500, 150, generator=generator)], 1)
    wrong = torch.rand(300, generator=generator) < 1 / 3
    labels = torch.where(wrong, (labels + 1) % 3, labels)
    chosen = fit_probe(train, labels, test, test_labels, NAMES)
    data = probe._rotated(train, labels)
    weakest = probe._fit_lbfgs(data, PENALTIES[16], probe._zero_layer(data.features, 3))
    by_heart = 100 * (probe._scores(weakest, data.transform(test)).argmax(1) == test_labels).double().mean()
    assert (probe._scores(weakest, data.features).argmax(1) == labels).all()
    assert chosen.l2 is not None
    assert chosen.l2 > 1
    assert chosen.accuracy > by_heart + 5


def test_the_search_passes_penalties_that_are_far_too_strong() -> None:
    """At the strong end every penalty gives nearly the loss of a guess, slightly up or down: no reason to stop."""
    train, labels = clusters(300, 0, noise=0.01, dim=2)
    angle = 40 * train[:, :1]
    train = torch.cat([angle.sin(), angle.cos(), 0.1 * train[:, 1:]], 1)
    l2 = fit_probe(train, labels, train, labels, NAMES).l2
    assert l2 is not None
    assert l2 < 1e-2


def test_a_single_class_is_always_right() -> None:
    features = clusters(30, 0, noise=1.0)[0]
    assert fit_probe(features, torch.zeros(30).long(), features, torch.zeros(30).long(), ("dog",)).accuracy == 100


def test_a_constant_feature_is_harmless() -> None:
    train, labels = clusters(90, 0, noise=0.5)
    test, test_labels = clusters(50, 1, noise=0.5)
    dead, alive = torch.full((90, 2), 0.3), torch.full((50, 2), 0.3)
    result = fit_probe(torch.cat([train, dead], 1), labels, torch.cat([test, alive], 1), test_labels, NAMES)
    assert result.accuracy > 95


def test_features_that_are_not_finite() -> None:
    train, labels = clusters(9, 0, noise=1.0)
    train[2, 3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        fit_probe(train, labels, train, labels, NAMES)


def test_sgd_comes_near_the_optimum() -> None:
    train, labels = clusters(400, 0, noise=1.0)
    test, test_labels = clusters(400, 1, noise=1.0)
    sgd = fit_probe(train, labels, test, test_labels, NAMES, solver="sgd", epochs=20)
    exact = fit_probe(train, labels, test, test_labels, NAMES)
    assert sgd.lr in LR_GRID
    assert sgd.l2 is None
    assert exact.lr is None
    assert sgd.accuracy == pytest.approx(exact.accuracy, abs=3)
    assert exact.accuracy > 80
    again = fit_probe(train, labels, test, test_labels, NAMES, solver="sgd", epochs=20)
    assert torch.equal(sgd.scores, again.scores)
    other = fit_probe(train, labels, test, test_labels, NAMES, solver="sgd", epochs=20, seed=1)
    assert not torch.equal(sgd.scores, other.scores)


def test_top5_counts_the_five_likeliest() -> None:
    names = tuple("abcdefgh")
    scores = torch.arange(8.0).repeat(8, 1)  # every picture: h likeliest, then g, f, e, d
    result = probe.Probe(scores, torch.arange(8), names)
    assert (result.accuracy, result.top5) == (12.5, 62.5)
    assert result.per_class == {name: 100.0 * (name == "h") for name in names}
    assert probe.Probe(torch.zeros(2, 3), torch.tensor([0, 2]), NAMES).top5 == 100


# Label fractions


def test_a_fraction_takes_its_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [200, 100, 50])
    chosen = label_fraction(labels, 10, seed=0, classes=NAMES)
    assert np.bincount(labels[chosen]).tolist() == [20, 10, 5]
    assert len(set(chosen.tolist())) == 35
    assert np.array_equal(chosen, label_fraction(torch.from_numpy(labels), 10, 0, NAMES))
    assert not np.array_equal(chosen, label_fraction(labels, 10, 1, NAMES))
    assert np.array_equal(label_fraction(labels, 100, 5, NAMES), np.arange(350))


def test_a_fraction_that_leaves_a_class_empty_says_what_would_do() -> None:
    labels = np.repeat([0, 1, 2], [200, 100, 20])
    with pytest.raises(
        UserError, match=r"fractions 1: leaves class star without pictures \(it has 20\); give at least 2.5"
    ):
        label_fraction(labels, 1, 0, NAMES)
    assert np.bincount(labels[label_fraction(labels, 2.5, 0, NAMES)]).tolist() == [5, 3, 1]
    for percent in (0, -1, 101, float("nan")):
        with pytest.raises(UserError, match="above 0, at most 100"):
            label_fraction(labels, percent, 0, NAMES)


def test_interval_by_students_t() -> None:
    """Values of a textbook: 1, 2, 3 have the mean 2, s = 1, and t(0.975; 2) = 4.303."""
    result = interval([1.0, 2.0, 3.0])
    assert (result["mean"], result["seeds"]) == (2, 3)
    assert result["low"] == pytest.approx(2 - 4.303 / 3**0.5)
    assert result["high"] == pytest.approx(2 + 4.303 / 3**0.5)
    assert interval([5.0]) == {"mean": 5.0, "low": None, "high": None, "seeds": 1}
    interval(range(MOST_SEEDS))


# The frozen tower


VIT = {"image_size": 16, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TIMM = {"timm_model_name": "resnet10t", "timm_model_pretrained": False, "timm_proj": "linear", "image_size": 32}
TIMM_MLP = TIMM | {"timm_proj": "mlp"}
TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}


def tiny(folder: Path, vision: dict, seed: int = 0, embed_dim: int = 12) -> DualEncoder:
    path = folder / "mini.json"
    path.write_text(json.dumps({"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": TEXT}))
    torch.manual_seed(seed)
    return build_model(config.Model(name=str(path))).eval()


def labelled_set(tmp_path: Path) -> LabelledSet:
    """Two batches of 30 and 18 pictures; the label is the brightest channel."""
    return open_labelled(write_cifar10(tmp_path, coloured(30, 0), coloured(18, 1), NAMES, batches=1))


def coloured(n: int, seed: int) -> LabelledImages:
    part = labelled(n, seed)
    labels = np.arange(n) % 3
    images = part.images // 3
    images[np.arange(n), labels] += 100
    return LabelledImages(images, labels)


def encoded(encode: Encode, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        image, _ = encode(pixels, None)
    assert image is not None
    return image


@pytest.mark.parametrize(
    ("vision", "width"), [(VIT, 24), (RESNET, 256), (TIMM, 512), (TIMM_MLP, 512)], ids=["vit", "rn", "timm", "mlp"]
)
def test_features_before_the_projection_give_those_after_it(tmp_path: Path, vision: dict, width: int) -> None:
    model = tiny(tmp_path, vision)
    names = list(model.state_dict())
    before = weights_checksum(model)
    size = vision["image_size"]
    pixels = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tower = encoded(frozen_encoder(model, "cpu", "tower"), pixels)
    projected = encoded(frozen_encoder(model, "cpu", "projected"), pixels)
    assert tower.shape == (3, width)
    assert projected.shape == (3, 12)
    visual: Any = model.visual
    match vision:
        case {"patch_size": _}:
            by_hand = tower @ visual.proj
        case {"width": _}:
            by_hand = visual.attnpool.c_proj(tower)
        case _:
            by_hand = visual.head(tower)
    assert torch.allclose(F.normalize(by_hand, dim=1), projected, atol=1e-6)
    assert list(model.state_dict()) == names
    assert weights_checksum(model) == before
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_tower_without_a_projection_gives_its_output_as_it_is(tmp_path: Path) -> None:
    model = tiny(tmp_path, TIMM | {"timm_proj": "none"}, embed_dim=512)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tower = encoded(frozen_encoder(model, "cpu", "tower"), pixels)
    assert torch.equal(F.normalize(tower, dim=1), encoded(frozen_encoder(model, "cpu", "projected"), pixels))
    assert tower.norm(dim=1).min() > 1.1
    model.visual = nn.Sequential()
    with pytest.raises(UserError, match="Sequential has no projection that is known; take --features projected"):
        frozen_encoder(model, "cpu", "tower")


@pytest.mark.parametrize("name", ["visual.proj", "visual.conv1.weight", "text.positional_embedding", "logit_scale"])
def test_checksum_sees_every_weight(tmp_path: Path, name: str) -> None:
    model = tiny(tmp_path, VIT)
    before = weights_checksum(model)
    model.state_dict()[name].view(-1)[0] += 1
    with pytest.raises(Fault, match="weights changed"):
        require_unchanged(model, before)
    model.state_dict()[name].view(-1)[0] -= 1


def test_checksum_sees_batchnorms_statistics(tmp_path: Path) -> None:
    model = tiny(tmp_path, RESNET)
    before = weights_checksum(model)
    require_unchanged(model, before)
    frozen_encoder(model, "cpu", "projected")  # evaluation mode: a pass moves nothing
    model(image=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    require_unchanged(model, before)
    model.train()(image=torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(Fault, match="weights changed"):
        require_unchanged(model, before)


def test_a_random_twin_is_another_model_and_always_the_same(tmp_path: Path) -> None:
    model = tiny(tmp_path, VIT, seed=5)
    state = torch.get_rng_state()
    one, other = random_twin(model), random_twin(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_checksum(one) == weights_checksum(other) != weights_checksum(model)
    assert one.state_dict().keys() == model.state_dict().keys()


def test_pixels_are_a_baseline() -> None:
    pixels = torch.from_numpy(labelled(3, 0).images)
    features = encoded(pixel_encoder, pixels)
    assert torch.equal(features, pixels.reshape(3, 3072).float() / 255)


def test_features_are_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, model = labelled_set(tmp_path), tiny(tmp_path, VIT)
    calls: list[int] = []
    frozen = frozen_encoder(model, "cpu", "projected")

    def encode(image: torch.Tensor | None, tokens: torch.Tensor | None) -> Any:
        calls.append(1)
        return frozen(image, tokens)

    cache = features_path(tmp_path / "cache", model, data, "projected")
    assert cache is not None
    first = embed_set(encode, data, EvalTransform(16), WorkShare(batch=8), cache)
    assert len(calls) == 4 + 3
    assert (first.train.image.shape, first.test.image.shape) == ((30, 12), (18, 12))
    assert torch.allclose(first.train.image.norm(dim=1), torch.ones(30))
    again = embed_set(encode, data, EvalTransform(16), WorkShare(batch=8), cache)
    assert len(calls) == 7
    assert torch.equal(again.train.image, first.train.image)
    assert torch.equal(again.test.labels, torch.arange(18) % 3)
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]
    cache.write_bytes(cache.read_bytes()[:100])  # a damaged file is computed anew
    assert torch.equal(
        embed_set(encode, data, EvalTransform(16), WorkShare(batch=8), cache).test.image, first.test.image
    )
    assert len(calls) == 14
    save_file(load_file(cache), cache)  # as older versions wrote it: no format in its head
    embed_set(encode, data, EvalTransform(16), WorkShare(batch=8), cache)
    assert len(calls) == 21
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("made again") for line in lines if str(cache) in line] == [True, True]
    assert "no format" in lines[-1]


def test_other_weights_data_or_features_are_another_file(tmp_path: Path) -> None:
    data = labelled_set(tmp_path)
    more = open_labelled(write_cifar10(tmp_path / "more", coloured(30, 0), coloured(18, 2), NAMES))
    keys = {
        features_path(tmp_path, tiny(tmp_path, VIT, seed), of, kind)
        for seed in (0, 1)
        for of in (data, more)
        for kind in ("projected", "tower")
    }
    assert len(keys) == 8
    assert (
        features_path(tmp_path, tiny(tmp_path, VIT), replace(data, test=replace(data.test, digest="")), "tower") is None
    )


# As an evaluator


def test_probe_of_an_encoder_on_its_own(tmp_path: Path) -> None:
    data = labelled_set(tmp_path)
    result = probe_of(pixel_encoder, data, EvalTransform(8), WorkShare(batch=8))
    assert set(result) == {"accuracy", "top5", "l2"}
    assert result["accuracy"] > 90
    with pytest.raises(UserError, match="needs training pictures"):
        probe_of(pixel_encoder, replace(data, train=None), EvalTransform(8))


class Pixels:
    """Pixels as features, for Validation; notes how many threads decode, and whether the fit shows signs of life."""

    threads = signs = 0

    def encode(self, image: torch.Tensor | None, tokens: torch.Tensor | None) -> Any:
        decoding = [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
        self.threads = max(self.threads, len(decoding))
        texts = None if tokens is None else torch.ones(len(tokens), 3 * 8 * 8)
        return (None if image is None else pixel_encoder(image, None)[0]), texts

    def encode_hidden(self, image: torch.Tensor) -> torch.Tensor:
        return self.encode(image, None)[0]

    def logit_scale(self) -> float:
        return 1.0

    def progress(self) -> None:
        self.signs += 1


def test_validation_decodes_in_the_threads_of_the_data_and_its_probe_shows_signs_of_life(tmp_path: Path) -> None:
    labelled_set(tmp_path)
    cfg = config.Eval(labelled=str(tmp_path / FOLDER), probe=True, knn=True, batch=8)
    alone = DistEnv(0, 1, 0, torch.device("cpu"))
    model = Pixels()
    found = Validation(
        cfg, config.Data(threads=5), None, lambda texts: torch.ones(len(texts), 4), EvalTransform(8), alone
    ).run(model)
    assert found.values["probe/accuracy"] > 90
    assert found.values["knn_20"] > 90
    assert model.threads == 5
    assert model.signs > 50
    no_text = Validation(cfg, config.Data(), None, NoTokenizer(), EvalTransform(8), alone, has_text=False).run(model)
    assert {name.partition("/")[0] for name in no_text.values} == {"knn_20", "knn_200", "probe"}
    with pytest.raises(UserError, match=r"^eval\.knn: needs eval\.labelled with training pictures$"):
        Validation(config.Eval(knn=True), config.Data(), None, NoTokenizer(), EvalTransform(8), alone)
    cfg = config.Eval(labelled=cfg.labelled)
    with pytest.raises(UserError, match=r"^eval\.labelled=.*: measures nothing, .* set eval\.knn=true or"):
        Validation(cfg, config.Data(), None, NoTokenizer(), EvalTransform(8), alone, has_text=False)


def probe_on(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        data = open_labelled(f"{folder}/cifar-10-batches-py")
        share = WorkShare(rank, 2, batch=8)
        probe.BEAT_S, signs = 0.0, list[int]()
        result = probe_of(pixel_encoder, data, EvalTransform(8), share, lambda: signs.append(1))
        assert len(signs) > 50, "a rank that fits, or waits for the fit, shows no sign of life"
        cached = [
            embed_set(pixel_encoder, data, EvalTransform(8), share, Path(folder) / "f.safetensors") for _ in range(2)
        ]
        counts = [len(features.train.image) for features in cached]
        neighbours = knn_of(pixel_encoder, data, EvalTransform(8), share)
        Path(f"{folder}/{rank}.json").write_text(json.dumps([result, counts, neighbours]))
    finally:
        dist.destroy_process_group()


def test_two_ranks_share_the_pictures(tmp_path: Path) -> None:
    data = labelled_set(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(probe_on, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = WorkShare(batch=8)
    neighbours = knn_of(pixel_encoder, data, EvalTransform(8), alone)
    assert first == [probe_of(pixel_encoder, data, EvalTransform(8), alone), [30, 30], neighbours]
    assert second == [{}, [30, 0], neighbours]  # where the cache answers, only rank 0 has features


# The tool


def run_tool(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["probe", *options])
    runpy.run_path(str(REPOSITORY / "tools/probe_cifar10.py"))["main"]()


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_cifar10(tmp_path, coloured(60, 0), coloured(40, 1), NAMES, batches=1)
    model = tiny(tmp_path, VIT, seed=5)
    run = tmp_path / "run"
    monkeypatch.setattr(load, "load_model", lambda *_, **__: load.LoadedModel(model, None, "tiny", run, 3))  # type: ignore[arg-type]
    options = ("tiny", "--data", str(data), "--device", "cpu", "--json", "--fractions", "20,100", "--seeds", "2")
    run_tool(monkeypatch, *options, "--finetune", "--epochs", "2")
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert (record["train"], record["test"], record["features"], record["step"]) == (60, 40, 24, 3)
    assert record["protocol"] == (
        "features before the projection, L-BFGS, L2 penalty by accuracy on a held-out fifth (Radford et al. 2021, A.3)"
    )
    assert f"protocol: {record['protocol']}" in lines
    assert record["accuracy"] > 80
    assert record["baseline_pixels"] > 90
    assert record["baseline_random"] > 50
    assert record["top5"] == 100
    assert record["chance"] == pytest.approx(100 / 3)
    assert record["l2"] in PENALTIES
    assert record["published"] is None
    assert record["checksum"] == weights_checksum(model)
    assert set(record["per_class"]) == set(NAMES)
    for kind in ("fractions", "finetune"):
        assert [(row["percent"], row["pictures"], row["seeds"]) for row in record[kind]] == [(20, 12, 2), (100, 60, 2)]
        assert all(row["low"] <= row["mean"] <= row["high"] for row in record[kind])
    assert record["fractions"][1]["mean"] == pytest.approx(record["accuracy"], abs=10)
    table = "\n".join(lines[:-1])
    assert all(name in table for name in (*NAMES, "all classes", "chance", "nothing but the last layer moved"))
    with Image.open(run / "probe_confusion.png") as picture:
        assert picture.width > 100
    assert len(list((run / "features").iterdir())) == 2  # the model's, and its random twin's


@pytest.mark.parametrize(
    ("train", "weights", "features", "solver", "shown"),
    [
        (50_000, "openai", "tower", "lbfgs", True),
        (4000, "openai", "tower", "lbfgs", False),
        (50_000, "", "tower", "lbfgs", False),
        (50_000, "openai", "projected", "lbfgs", False),
        (50_000, "openai", "tower", "sgd", False),
    ],
)
def test_published_figure_is_of_openais_rn50_on_all_of_cifar10(
    train: int, weights: str, features: str, solver: str, shown: bool
) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/probe_cifar10.py"))
    split = Split(np.zeros(train, np.int64), lambda row: np.zeros((1, 1, 3), np.uint8))
    data = LabelledSet("CIFAR-10", NAMES, split, replace(split, labels=np.zeros(10_000, np.int64)))
    args = argparse.Namespace(model="RN50", weights=weights, features=features, solver=solver)
    found = tool["published_accuracy"](args, data)
    assert found == (("RN50", 88.7) if shown else None)


def test_published_figure_of_a_file_goes_by_its_hash(tmp_path: Path) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/probe_cifar10.py"))
    file = tmp_path / "RN50.pt"
    file.write_bytes(b"weights")
    split = Split(np.zeros(50_000, np.int64), lambda row: np.zeros((1, 1, 3), np.uint8))
    data = LabelledSet("CIFAR-10", NAMES, split, replace(split, labels=np.zeros(10_000, np.int64)))
    args = argparse.Namespace(model="RN50", weights=str(file), features="tower", solver="lbfgs")
    assert tool["published_accuracy"](args, data) is None
    tool["PUBLISHED"][hashlib.sha256(b"weights").hexdigest()] = ("RN50", 88.7)
    assert tool["published_accuracy"](args, data) == ("RN50", 88.7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--fractions", "1"], "leaves class circle without pictures"),
        (["--weights", "openai", "--fractions", "100", "--data", "DATA/nothing"], "no such file or folder"),
        (["--data", "DATA/test_only"], "no training pictures"),
        (["--data", "DATA/gap"], "class star has no training pictures"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], says: str) -> None:
    data = write_cifar10(tmp_path, coloured(12, 0), coloured(6, 1), NAMES, batches=1)
    (tmp_path / "test_only" / "a").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test_only" / "a" / "0.png")
    (tmp_path / "gap").mkdir()
    two = coloured(6, 0)
    write_cifar10(tmp_path / "gap", LabelledImages(two.images, two.labels % 2), coloured(6, 1), NAMES, batches=1)
    options = [option.replace("DATA", str(tmp_path)) for option in options]
    with pytest.raises(UserError, match=says):
        run_tool(monkeypatch, "RN50", "--data", str(data), *options)


def test_tool_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    tool = str(REPOSITORY / "tools/probe_cifar10.py")
    command = [sys.executable, tool, "RN50", "--data", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
