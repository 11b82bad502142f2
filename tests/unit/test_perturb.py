"""DeepFool's closed form, projections, the loop and its ends, noise, and the tool."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cifar_files import write_cifar10
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from clipdist import config
from clipdist.datasets.cifar import LabelledImages
from clipdist.errors import UserError
from clipdist.evals import perturb
from clipdist.evals.perturb import (
    Classify,
    commonest_answer,
    deepfool,
    default_xi,
    feature_classifier,
    fooling_rate,
    noise_like,
    perturbation_image,
    predict,
    probe_classifier,
    project,
    universal_perturbation,
)
from clipdist.evals.probe import fit_probe

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = str(REPOSITORY / "tools/universal_perturbation.py")
SIDE = 6


def affine(classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Classify]:
    """Weights [c, 3 * SIDE * SIDE], biases [c], and the classifier that they make."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, 3 * SIDE * SIDE, generator=generator)
    weight -= weight.mean(1, keepdim=True)  # brightness says nothing
    bias = torch.randn(classes, generator=generator)
    return weight, bias, lambda pixels: pixels.flatten(1) @ weight.T + bias


def pictures(n: int, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(60, 196, (n, 3, side, side), dtype=torch.uint8, generator=generator)


def convolutional(classes: int) -> Classify:
    """Small, smooth, with random weights, and not affine."""
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, stride=2), nn.GELU(), nn.Flatten()
    )
    network.append(nn.Linear(network(torch.zeros(1, 3, 16, 16)).shape[1], classes))
    network.requires_grad_(False).eval()
    return lambda pixels: 10 * network((pixels - 128) / 64)


# DeepFool


@pytest.mark.parametrize("classes", [2, 5])
def test_deepfool_on_an_affine_classifier_is_the_closed_form(classes: int) -> None:
    """The nearest of the hyperplanes between the answer and another class, along its normal, and 2 % beyond."""
    weight, bias, classify = affine(classes)
    for picture in pictures(6).float():
        logits = weight @ picture.flatten() + bias
        answer = int(logits.argmax())
        steps = []
        for other in set(range(classes)) - {answer}:
            normal = weight[other] - weight[answer]
            steps.append((logits[answer] - logits[other]) / normal.square().sum() * normal)
        expected = min(steps, key=torch.Tensor.norm)
        step = deepfool(classify, picture)
        assert step is not None
        assert torch.allclose(step.flatten(), 1.02 * expected, atol=1e-4 * expected.norm().item())
        assert classify((picture + step)[None]).argmax() != answer
        assert classify((picture + 0.98 * step)[None]).argmax() == answer


def test_deepfool_on_a_network_goes_just_beyond_a_boundary() -> None:
    classify = convolutional(10)
    for picture in pictures(5, side=16).float():
        answer = classify(picture[None]).argmax()
        step = deepfool(classify, picture)
        assert step is not None
        assert classify((picture + step)[None]).argmax() != answer
        assert classify((picture + 0.9 * step)[None]).argmax() == answer


def test_deepfool_looks_at_so_many_of_the_likeliest_classes() -> None:
    """Of three boundaries the nearest belongs to the least likely class; with two candidates it is not seen."""
    weight = torch.zeros(3, 3 * SIDE * SIDE)
    weight[1, 0], weight[2, 1] = 1.0, 100.0
    bias = torch.tensor([10.0, 8.0, 0.0])

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1) @ weight.T + bias

    picture = torch.zeros(3, SIDE, SIDE)
    two, three = deepfool(classify, picture, candidates=2), deepfool(classify, picture, candidates=3)
    assert two is not None
    assert three is not None
    assert two.norm().item() == pytest.approx(1.02 * 2)
    assert three.norm().item() == pytest.approx(1.02 * 0.1)


def test_deepfool_gives_up() -> None:
    picture = pictures(1)[0].float()
    flat = torch.tensor([2.0, 1.0])
    assert deepfool(lambda pixels: pixels.sum((1, 2, 3))[:, None] * 0 + flat, picture) is None  # no slope
    assert deepfool(lambda pixels: pixels.sum((1, 2, 3))[:, None], picture) is None  # no other class


def test_deepfool_follows_a_curve_for_as_many_steps_as_it_may() -> None:
    """The other class wins where the first pixel passes 8, by a logarithm, which looks nearer than it is."""

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        first = pixels[:, 0, 0, 0]
        return torch.stack([torch.full_like(first, 8).log(), first.log()], 1)

    picture = torch.ones(3, 4, 4)
    assert deepfool(classify, picture, steps=2) is None
    step = deepfool(classify, picture)
    assert step is not None
    assert 7 < step[0, 0, 0].item() < 7.2
    assert step.norm().item() == pytest.approx(step[0, 0, 0].item())


# The ball


def test_projections() -> None:
    v = torch.tensor([[3.0, -4.0], [0.0, 0.5]])
    assert torch.equal(project(v, 1.0, "inf"), torch.tensor([[1.0, -1.0], [0.0, 0.5]]))
    assert torch.equal(project(v, 9.0, "inf"), v)
    half = project(v, v.norm().item() / 2, "2")
    assert torch.allclose(half, v / 2)
    assert torch.equal(project(v, 9.0, "2"), v)
    assert torch.equal(project(torch.zeros(3), 1.0, "2"), torch.zeros(3))


def test_bounds_of_the_paper() -> None:
    assert (default_xi("inf", 224), default_xi("inf", 32)) == (10, 10)
    assert (default_xi("2", 224), default_xi("2", 112)) == (2000, 1000)


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_noise_has_the_norm_of_v_and_follows_its_seed(norm: perturb.Norm) -> None:
    v = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = noise_like(v, norm, 0)
    order = float("inf") if norm == "inf" else 2.0
    assert torch.linalg.vector_norm(noise, order).item() == pytest.approx(torch.linalg.vector_norm(v, order).item())
    assert torch.equal(noise, noise_like(v, norm, 0))
    assert not torch.equal(noise, noise_like(v, norm, 1))
    assert noise.norm() >= v.norm() * 0.999


# The search


@pytest.mark.parametrize("method", ["deepfool", "gradient"])
@pytest.mark.parametrize("norm", ["2", "inf"])
def test_it_fools_a_network_far_more_than_noise_on_images_it_never_saw(
    method: perturb.Method, norm: perturb.Norm
) -> None:
    classify = convolutional(10)
    xi = default_xi(norm, 16)
    found = universal_perturbation(classify, pictures(60, side=16), xi, norm, method, passes=4, batch=16)
    size = found.v.abs().max() if norm == "inf" else found.v.norm()
    assert 0 < size <= xi * 1.0001
    held_out = pictures(100, seed=9, side=16)
    before = predict(classify, held_out, torch.zeros(3, 16, 16))
    rate = fooling_rate(before, predict(classify, held_out, found.v))
    noise = max(fooling_rate(before, predict(classify, held_out, noise_like(found.v, norm, seed))) for seed in range(5))
    assert rate > 60
    assert rate > 2 * noise


def test_the_loop_ends_above_1_minus_delta_or_after_its_passes() -> None:
    classify, images = convolutional(10), pictures(40, side=16)

    def search(xi: float, delta: float, passes: int) -> perturb.UniversalPerturbation:
        return universal_perturbation(classify, images, xi, delta=delta, passes=passes, batch=16)

    easy = search(40.0, delta=0.5, passes=6)
    assert easy.rates[-1] > 50
    assert len(easy.rates) < 6
    assert all(rate <= 50 for rate in easy.rates[:-1])
    assert len(search(0.01, delta=0.5, passes=3).rates) == 3
    assert len(search(40.0, delta=0.0, passes=2).rates) == 2  # more than 100 % is never reached
    again = search(40.0, delta=0.5, passes=6)
    assert torch.equal(easy.v, again.v)


def one_by_one(
    classify: Classify, images: torch.Tensor, v: torch.Tensor, xi: float, norm: perturb.Norm, order: list[int]
) -> torch.Tensor:
    """One pass of algorithm 1, as it is written down."""
    for row in order:
        x = images[row].float()
        if classify((x + v)[None]).argmax() == classify(x[None]).argmax():
            step = deepfool(classify, x + v)
            v = v if step is None else project(v + step, xi, norm)
    return v


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_asking_about_several_pictures_at_once_changes_nothing(batch: int) -> None:
    classify, images = convolutional(10), pictures(50, side=16).float().byte()
    told: list[int] = []
    found = universal_perturbation(classify, images, 12.0, "inf", passes=1, batch=batch, seed=4, on_images=told.append)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4)).tolist()
    expected = one_by_one(classify, images, torch.zeros(3, 16, 16), 12.0, "inf", order)
    assert torch.allclose(found.v, expected, atol=1e-3)
    assert expected.abs().max() > 1
    assert sum(told) == 50


def test_predict_rounds_and_clips_where_told_to() -> None:
    seen: list[torch.Tensor] = []

    def classify(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return pixels.flatten(1)[:, :2]

    images = torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    v = torch.full((3, 2, 2), 7.6)
    predict(classify, images, v)
    predict(classify, images, v, eight_bit=True)
    predict(classify, images, -v, eight_bit=True)
    values = [part[:, 0, 0, 0].tolist() for part in seen]
    assert values[0] == pytest.approx([7.6, 107.6, 262.6])
    assert values[1:] == [[8, 108, 255], [0, 92, 247]]


def test_a_probe_behind_a_tower_answers_as_the_probe_does() -> None:
    class Tower(nn.Module):
        def encode_pixels(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :7].float() - 128

    train, test = pictures(80), pictures(30, seed=5)
    labels = train.flatten(1)[:, :3].long().argmax(1)
    features, asked = (Tower().encode_pixels(images) for images in (train, test))
    unit, asked_unit = (torch.nn.functional.normalize(part, dim=1) for part in (features, asked))
    expected = fit_probe(unit, labels, asked_unit, torch.zeros(30, dtype=torch.int64), ("a", "b", "c"))
    classify = probe_classifier(Tower(), features, labels, ("a", "b", "c"), "cpu")
    assert torch.allclose(classify(test.float()), expected.scores, rtol=1e-4, atol=1e-3)
    assert len(expected.predictions.unique()) == 3


def test_bad_input() -> None:
    _, _, classify = affine(3)
    with pytest.raises(UserError, match="at least one picture"):
        universal_perturbation(classify, pictures(0), 10.0)
    with pytest.raises(UserError, match="not finite"):
        universal_perturbation(lambda pixels: classify(pixels) * torch.nan, pictures(2), 10.0)


def test_the_dual_encoder_is_frozen_and_takes_pixels_from_0_to_255() -> None:
    from clipdist.models.build import build_model

    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json")))
    weight, bias = torch.randn(4, model.spec.embed_dim), torch.randn(4)
    classify = feature_classifier(model, weight, bias)
    images = pictures(3, side=32)
    with torch.no_grad():
        features = model.encode_image(images)
    expected = torch.nn.functional.normalize(features, dim=1) @ weight.T + bias
    moved = images.float().requires_grad_()
    logits = classify(moved)
    assert torch.allclose(logits, expected, atol=1e-6)
    assert torch.autograd.grad(logits.sum(), moved)[0].abs().max() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


# What is shown


def test_picture_of_v() -> None:
    v = torch.zeros(3, 20, 20)
    v[0, 0, 0], v[1, 0, 0], v[2, 0, 1] = 5.0, -5.0, 2.5
    picture = perturbation_image(v, side=50)
    assert picture.size == (60, 60)
    pixels = np.asarray(picture)
    assert pixels[2, 2].tolist() == [255, 0, 128]
    assert pixels[0, 3].tolist() == [128, 128, 191]
    assert np.unique(np.asarray(perturbation_image(torch.zeros(3, 4, 4)))).tolist() == [128]


def test_commonest_answer() -> None:
    assert commonest_answer(torch.tensor([2, 0, 2, 2]), ["a", "b", "c"]) == ("c", 75.0)


# The tool


def labelled(n: int, seed: int) -> LabelledImages:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    images = random.integers(0, 100, (n, 3, 32, 32), dtype=np.uint8)
    images[np.arange(n), labels] += 20
    return LabelledImages(images, labels)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return write_cifar10(tmp_path, labelled(60, 0), labelled(40, 1), ("red", "green", "blue"), batches=1)


@pytest.mark.parametrize("classifier", ["zero-shot", "probe"])
def test_tool(
    classifier: str,
    cifar: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from clipdist.data.tokens import make_tokenizer
    from clipdist.models import load
    from clipdist.models.build import build_model

    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json"))).eval()
    loaded = load.LoadedModel(model, make_tokenizer(model.spec), "tiny", run_dir=None, step=None)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    out = tmp_path / "v.png"
    words = ["tiny", "--data", str(cifar), "--classifier", classifier, "--out", str(out), "--json"]
    words += ["--pictures", "30", "--held-out", "25", "--passes", "2", "--xi", "30", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["universal_perturbation", *words])
    runpy.run_path(TOOL)["main"]()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["fooling_rate"] > record["fooling_rate_noise"]
    assert (record["pictures"], record["held_out"], record["xi"], record["norm"]) == (30, 25, 30, "inf")
    assert record["passes"] == len(record["fooling_rate_passes"]) <= 2
    assert record["fooling_rate_train"] == record["fooling_rate_passes"][-1]
    assert record["reached"] == (record["fooling_rate_train"] > 80)
    if classifier == "probe":  # it has learned which channel is brightest
        assert record["accuracy"] > 80 > record["accuracy_perturbed"]
    v = load_file(out.with_suffix(".safetensors"))["v"]
    assert v.shape == (3, 32, 32)
    assert v.abs().max().item() == pytest.approx(record["norm_inf"])
    with Image.open(out) as picture:
        assert picture.width > 6 * 100
    assert "with noise of that norm" in "\n".join(lines)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--delta", "1"], "--delta 1.0: must be at least 0 and below 1"),
        (["--xi", "0"], "--xi 0.0: must be above 0"),
        (["--xi", "nan"], "--xi nan: must be above 0"),
        (["--passes", "0"], "--passes 0: must be at least 1"),
        (["--held-out", "-3"], "--held-out -3: must be at least 1"),
        (["--norm", "1"], "invalid choice"),
        (["--out", "nowhere/v.png"], "--out nowhere/v.png: must be a .png in a folder"),
    ],
)
def test_tool_refuses_settings(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["universal_perturbation", "RN50", "--data", "x", *words])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(TOOL)["main"]()
    assert ending.value.code == 2
    assert says in capsys.readouterr().err


def test_tool_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, TOOL, "RN50", "--data", "x", "--templates", "a photo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: templates 'a photo': neither")
    assert len(result.stderr.splitlines()) == 1
