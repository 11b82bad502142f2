"""CIFAR-10's layout read safely and written; the linear layer on frozen features; the probe tool."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipdist import config
from clipdist.data.cifar import FOLDER, LabelledImages, read_cifar10, write_cifar10
from clipdist.errors import UserError
from clipdist.evals import probe
from clipdist.evals.probe import L2_GRID, extract_features, fit_probe, pixel_features, weights_checksum

REPOSITORY = Path(__file__).resolve().parents[2]
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
        data = read_cifar10(path)
        assert same(data.train, labelled(23, 0))
        assert same(data.test, labelled(7, 1))
        assert data.classes == NAMES
        assert (data.train.images.dtype, data.train.labels.dtype) == (np.uint8, np.int64)


def test_what_is_written_is_the_official_form(written: Path) -> None:
    """Protocol 2 with Python 2's strings: readers that ask for encoding="bytes" and "latin1" both find their keys."""
    opcodes = [(code.name, value) for code, value, _ in pickletools.genops((written / "data_batch_2").read_bytes())]
    assert opcodes[0] == ("PROTO", 2)
    assert {"SHORT_BINSTRING", "BINSTRING"} <= {name for name, _ in opcodes}
    assert not {"BINUNICODE", "SHORT_BINBYTES", "BINBYTES"} & {name for name, _ in opcodes}
    globals_ = {value for name, value in opcodes if name == "GLOBAL"}
    assert globals_ == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_archive_is_read_in_place(written: Path, tmp_path: Path, mode: Any) -> None:
    archive = tmp_path / "copy" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, mode) as tar:
        tar.add(written, FOLDER)
    for path in (archive, archive.parent):
        assert same(read_cifar10(path).train, labelled(23, 0))
    assert [entry.name for entry in archive.parent.iterdir()] == [archive.name]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_truncated_archive(written: Path, tmp_path: Path, mode: Any) -> None:
    archive = tmp_path / "part.tar.gz"
    with tarfile.open(archive, mode) as tar:
        tar.add(written, FOLDER)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    with pytest.raises(UserError, match=r"part\.tar\.gz: damaged or truncated archive"):
        read_cifar10(archive)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("key", [str, str.encode])
def test_copies_in_other_protocols(written: Path, protocol: int, key) -> None:
    part = labelled(5, 3)
    batch = {key("data"): part.images.reshape(5, -1), key("labels"): part.labels.tolist(), key("filenames"): [key("x")]}
    (written / "data_batch_10").write_bytes(pickle.dumps(batch, protocol=protocol))
    train = read_cifar10(written).train
    assert len(train) == 28
    assert np.array_equal(train.images[23:], part.images)  # batch 10 comes after 3, not after 1
    assert np.array_equal(train.labels[23:], part.labels)


def test_batches_may_be_missing(written: Path) -> None:
    (written / "data_batch_1").unlink()
    (written / "batches.meta").unlink()
    data = read_cifar10(written)
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
        read_cifar10(written)
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
        read_cifar10(written)


def test_no_data_there(tmp_path: Path, written: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_cifar10(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        read_cifar10(tmp_path / "empty")
    (written / "test_batch").unlink()
    with pytest.raises(UserError, match="holds no test_batch"):
        read_cifar10(written)


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
    assert good.l2 in L2_GRID
    assert noise.l2 in L2_GRID
    share = {name: (test_labels == label).double().mean().item() for label, name in enumerate(NAMES)}
    assert sum(good.per_class[name] * share[name] for name in NAMES) == pytest.approx(good.accuracy)


def test_result_does_not_depend_on_scale_or_chance() -> None:
    train, labels = clusters(200, 0, noise=2.0)
    test, test_labels = clusters(100, 1, noise=2.0)
    first = fit_probe(train, labels, test, test_labels, NAMES)
    torch.manual_seed(123)
    again = fit_probe(train, labels, test, test_labels, NAMES)
    assert torch.equal(first.predictions, again.predictions)
    scaled = fit_probe(train * 1000 + 7, labels, test * 1000 + 7, test_labels, NAMES)
    assert (scaled.l2, scaled.accuracy) == (first.l2, pytest.approx(first.accuracy, abs=1))
    assert 40 < first.accuracy < 99


@pytest.mark.parametrize("l2", [10.0, 0.1, 1e-3])
def test_fit_is_the_optimum(l2: float) -> None:
    """The gradient of the objective, by hand in float64, vanishes where L-BFGS stopped."""
    features, labels = clusters(150, 0, noise=2.0)
    layer = probe._fit(features, labels, l2, probe._zero_layer(features, 3))
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    error = (features.double() @ weight.T + bias).softmax(1) - F.one_hot(labels, 3)
    assert (error.T @ features.double() / 150 + l2 * weight).abs().max() < 1e-4
    assert error.mean(0).abs().max() < 1e-4
    assert weight.abs().max() > 1e-3


def test_the_held_out_part_chooses_a_penalty_that_generalises() -> None:
    """A third of the training labels are wrong: without a penalty the layer learns them by heart."""
    generator = torch.Generator().manual_seed(5)
    (train, labels), (test, test_labels) = clusters(300, 0, noise=1.0), clusters(500, 1, noise=1.0)
    train = torch.cat([train, torch.randn(300, 150, generator=generator)], 1)
    test = torch.cat([test, torch.randn(500, 150, generator=generator)], 1)
    wrong = torch.rand(300, generator=generator) < 1 / 3
    labels = torch.where(wrong, (labels + 1) % 3, labels)
    chosen = fit_probe(train, labels, test, test_labels, NAMES)
    weakest = probe._fit(train, labels, L2_GRID[-1], probe._zero_layer(train, 3))
    by_heart = 100 * (probe._predict(weakest, test) == test_labels).double().mean().item()
    assert (probe._predict(weakest, train) == labels).all()
    assert chosen.l2 > 1e-2
    assert chosen.accuracy > by_heart + 5


def test_the_search_passes_penalties_that_are_far_too_strong() -> None:
    """At the strong end every penalty gives nearly the loss of a guess, slightly up or down: no reason to stop."""
    train, labels = clusters(300, 0, noise=0.01, dim=2)
    angle = 40 * train[:, :1]
    train = torch.cat([angle.sin(), angle.cos(), 0.1 * train[:, 1:]], 1)
    fits: list[None] = []
    l2 = probe._choose_l2(train, labels, 3, lambda: fits.append(None))
    assert l2 < 1e-2
    assert len(fits) > L2_GRID.index(l2)


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


# The frozen tower


class Tower(nn.Module):
    """A DualEncoder's forward on an 8 x 8 input, with BatchNorm, whose buffers a careless pass would move."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(192)
        self.projection = nn.Linear(192, 6)

    def forward(self, image: torch.Tensor, tokens: None) -> tuple[torch.Tensor, None, torch.Tensor]:
        assert image.shape[1:] == (3, 8, 8)
        assert image.dtype == torch.uint8
        return self.projection(self.norm(image.flatten(1) / 255)), None, torch.zeros(1)


def test_features_come_from_a_frozen_tower() -> None:
    torch.manual_seed(0)
    tower = Tower().train()
    before = weights_checksum(tower)
    features = extract_features(tower, labelled(10, 0).images, 8, "cpu", batch=4)
    assert features.shape == (10, 6)
    assert torch.allclose(features.norm(dim=1), torch.ones(10))
    assert weights_checksum(tower) == before
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    one_batch = extract_features(tower, labelled(10, 0).images, 8, "cpu", batch=64)
    assert torch.allclose(features, one_batch, atol=1e-6)


@pytest.mark.parametrize("name", ["projection.weight", "projection.bias", "norm.running_mean", "norm.running_var"])
def test_checksum_sees_every_weight_and_buffer(name: str) -> None:
    tower = Tower()
    before = weights_checksum(tower)
    tower.state_dict()[name].view(-1)[0] += 1
    assert weights_checksum(tower) != before


def test_a_tower_that_changes_is_a_fault() -> None:
    class Restless(Tower):
        def forward(self, image, tokens):
            self.projection.bias.data += 1e-3
            return super().forward(image, tokens)

    with pytest.raises(RuntimeError, match="frozen tower's weights changed"):
        extract_features(Restless(), labelled(4, 0).images, 8, "cpu")


def test_pixels_are_a_baseline() -> None:
    features = pixel_features(labelled(3, 0).images)
    assert features.shape == (3, 3072)
    assert features.min() >= 0
    assert features.max() <= 1


# The tool


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from clipdist.data.tokens import make_tokenizer
    from clipdist.model import load
    from clipdist.model.dual_encoder import build_model

    def coloured(n: int, seed: int) -> LabelledImages:
        """The label is the brightest channel."""
        part = labelled(n, seed)
        images = part.images // 3
        images[np.arange(n), part.labels] += 100
        return LabelledImages(images, part.labels)

    folder = write_cifar10(tmp_path, coloured(60, 0), coloured(40, 1), NAMES, batches=1)
    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json")))
    loaded = load.LoadedModel(model.eval(), make_tokenizer(model.spec), "tiny", run_dir=None, step=None)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    monkeypatch.setattr(sys, "argv", ["probe", "tiny", "--data", str(folder), "--device", "cpu", "--json"])
    runpy.run_path(str(REPOSITORY / "tools/probe_cifar10.py"))["main"]()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert (record["train"], record["test"], record["features"]) == (60, 40, model.spec.embed_dim)
    assert record["accuracy"] > 90
    assert record["baseline_pixels"] > 90
    assert record["chance"] == pytest.approx(100 / 3)
    assert record["l2"] in L2_GRID
    assert set(record["per_class"]) == set(NAMES)
    table = "\n".join(lines[:-1])
    assert all(name in table for name in (*NAMES, "all classes", "chance"))


def test_tool_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    tool = str(REPOSITORY / "tools/probe_cifar10.py")
    command = [sys.executable, tool, "RN50", "--data", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
