"""Fine-tuning: it learns what a frozen tower hides, leaves the model as it was, and is a function of its seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.datasets.labelled import LabelledSet, Split
from clipdist.errors import Fault, UserError
from clipdist.evals.embed import encode_images
from clipdist.evals.features import Kind, frozen_encoder
from clipdist.evals.finetune import FinetuneSchedule, finetune, simclr_schedule
from clipdist.evals.probe import Probe
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.weights import weights_checksum

VIT = {"image_size": 16, "layers": 1, "width": 24, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}
NAMES = ("bright", "dark")


def tiny(folder: Path, vision: dict) -> DualEncoder:
    path = folder / "mini.json"
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}))
    torch.manual_seed(0)
    return build_model(config.Model(name=str(path))).eval()


def noisy(n: int, seed: int, bad: int = -1) -> Split:
    """Pictures whose class is whether they are a little brighter or darker than grey."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    pixels = random.integers(80, 176, (n, 16, 16, 3)) + np.where(labels, -12, 12)[:, None, None, None]

    def read(row: int) -> np.ndarray:
        if row == bad:
            raise BadSample("truncated image")
        return pixels[row].astype(np.uint8)

    return Split(labels, read)


def data(bad: int = -1) -> LabelledSet:
    return LabelledSet("noisy", NAMES, noisy(48, 0, bad), noisy(40, 1))


def frozen_features(model: DualEncoder, split: Split, kind: Kind = "projected") -> torch.Tensor:
    size = model.spec.image_size
    pixels = torch.stack([torch.from_numpy(split.read(row).transpose(2, 0, 1)) for row in range(len(split))])
    pixels = torch.nn.functional.interpolate(pixels, (size, size))
    return encode_images(frozen_encoder(model, "cpu", kind), pixels.split(16))


def tuned(
    model: DualEncoder, of: LabelledSet, schedule: FinetuneSchedule, kind: Kind = "projected", **options: int
) -> Probe:
    assert of.train is not None
    frozen = frozen_features(model, of.test, kind)
    return finetune(model, of, range(len(of.train)), frozen, schedule, kind, progress=False, **options)


@pytest.mark.parametrize("kind", ["projected", "tower"])
def test_it_learns_and_leaves_the_model_as_it_was(tmp_path: Path, kind: Kind) -> None:
    model = tiny(tmp_path, VIT)
    before = weights_checksum(model)
    result = tuned(model, data(), FinetuneSchedule(epochs=15, batch=16, lr=0.02), kind)
    assert weights_checksum(model) == before
    assert result.accuracy > 85
    assert result.lr == 0.02
    assert (result.scores.shape, result.labels.tolist()) == ((40, 2), [0, 1] * 20)


def test_the_tower_is_trained_and_not_only_the_layer(tmp_path: Path) -> None:
    """A tower that sees nothing gives all pictures the same features: no layer on them could tell the classes apart."""
    model = tiny(tmp_path, VIT)
    torch.nn.init.zeros_(model.visual.conv1.weight)  # type: ignore[arg-type,union-attr]
    of = data()
    assert torch.allclose(*frozen_features(model, of.test)[:2])
    assert tuned(model, of, FinetuneSchedule(epochs=30, batch=16, lr=0.05)).accuracy > 85


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    model = tiny(tmp_path, VIT)
    schedule = FinetuneSchedule(epochs=2, batch=16, lr=0.02)
    state = torch.get_rng_state()
    first, again = tuned(model, data(), schedule, threads=1), tuned(model, data(), schedule, threads=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.scores, again.scores)
    assert not torch.allclose(first.scores, tuned(model, data(), schedule, seed=1).scores)


def test_batchnorm_and_pictures_that_cannot_be_decoded(tmp_path: Path) -> None:
    model = tiny(tmp_path, RESNET)
    before = weights_checksum(model)
    result = tuned(model, data(bad=3), FinetuneSchedule(epochs=1, batch=16, lr=0.01))
    assert torch.isfinite(result.scores).all()
    assert weights_checksum(model) == before
    of = data()
    nothing = Split(np.zeros(4, np.int64), noisy(4, 0).read)
    hidden = replace(of, train=replace(nothing, read=lambda row: noisy(4, 0, bad=row).read(row)))
    with pytest.raises(UserError, match="at least 2 pictures that can be decoded, of 4"):
        tuned(model, hidden, FinetuneSchedule(1, 4, 0.01))


def test_a_rate_that_diverges_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="learning rate 1e\\+30 has diverged"):
        tuned(tiny(tmp_path, VIT), data(), FinetuneSchedule(2, 16, 1e30))


def test_simclrs_numbers() -> None:
    assert simclr_schedule(1, 256) == FinetuneSchedule(60, 256, 0.05)
    assert simclr_schedule(10, 64) == FinetuneSchedule(30, 64, 0.0125)
    assert simclr_schedule(100, 4096, epochs=5) == FinetuneSchedule(5, 4096, 0.8)
