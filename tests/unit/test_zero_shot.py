"""Prompts, the classifier made of them, accuracy and calibration, equal calls on all ranks, and the tool."""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from cifar_files import write_cifar10

from clipdist import config
from clipdist.data.bad_sample import BadSample
from clipdist.data.transform import EvalTransform
from clipdist.datasets.cifar import LabelledImages
from clipdist.datasets.labelled import LabelledSet, Split
from clipdist.errors import UserError
from clipdist.evals.embed import WorkShare
from clipdist.evals.features import embed_split
from clipdist.evals.prompts import CIFAR10_TEMPLATES, find_classes, find_templates, write_prompts
from clipdist.evals.zero_shot import (
    calibration_error,
    class_accuracy,
    classify,
    zero_shot_classifier,
    zero_shot_metrics,
    zero_shot_of,
)

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = str(REPOSITORY / "tools/zero_shot.py")
COLOURS = ("red", "green", "blue")
TEMPLATES = ("a photo of a {}.", "the {}")


# Prompts


def test_named_templates_are_the_published_ones() -> None:
    assert len(CIFAR10_TEMPLATES) == len(set(CIFAR10_TEMPLATES)) == 18
    assert {"a photo of a {}.", "a black and white photo of the {}.", "a photo of the big {}."} < set(CIFAR10_TEMPLATES)
    assert find_templates("cifar10") == CIFAR10_TEMPLATES
    imagenet, simple = find_templates("imagenet"), find_templates("simple")
    assert (len(imagenet), len(simple)) == (80, 7)
    assert set(simple) < set(imagenet)
    assert all(template.count("{}") == 1 for template in (*CIFAR10_TEMPLATES, *imagenet))


def test_templates_and_classes_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("\ufeffa {}.\r\n\n  the {}  \n", encoding="utf-8")
    assert find_templates(str(file)) == ("a {}.", "the {}")
    assert find_templates("one {}") == find_templates("one {c}") == find_templates("", ["one {c}"]) == ("one {}",)
    assert find_templates("") == ("a photo of a {}.",)
    file.write_text("sea\nlawn mower\n")
    assert find_classes(str(file), ["a", "b"]) == ("sea", "lawn mower")
    assert find_classes("", ["b", "b"], listed=True) == ("b", "b")  # as CLIP_benchmark's ImageNet has two of them
    assert len(find_classes("imagenet", [str(n) for n in range(1000)])) == 1000
    assert write_prompts(["x{", "y"], ["{} and {}", "a {}"]) == ["x{ and x{", "a x{", "y and y", "a y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no template"), ("a {}\na photo\n", "'a photo' has no {}"), (b"\xff\xfe\x00", "not a text file")],
)
def test_bad_template_files(tmp_path: Path, content: str | bytes, says: str) -> None:
    file = tmp_path / "templates.txt"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=says):
        find_templates(str(file))


def test_bad_templates_and_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither cifar10, imagenet, simple, nor a file"):
        find_templates("cifar")
    with pytest.raises(UserError, match="no such file"):
        find_classes(str(tmp_path / "nothing"), COLOURS)
    file = tmp_path / "names.txt"
    file.write_text("red\ngreen\n")
    with pytest.raises(UserError, match=r"2 class names, but the data has 3 classes \(red"):
        find_classes(str(file), COLOURS)
    file.write_text("red\ngreen\nred\n")
    with pytest.raises(UserError, match="'red' stands for two classes"):
        find_classes(str(file), COLOURS)
    with pytest.raises(UserError, match="a class name is empty"):
        find_classes("", ["a", " "])
    with pytest.raises(UserError, match="got 3 and 0"):
        write_prompts(COLOURS, [])
    with pytest.raises(UserError, match="got 0 and 2"):
        write_prompts([], TEMPLATES)


# A model that knows three colours: its tokens are the letters, its features colours


def tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[ord(letter) for letter in text.ljust(24)[:24]] for text in texts])


class Colours:
    """Encodes a picture as its mean colour, a sentence as the colour in it, and keeps the sizes of what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(
        self, image: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        assert not torch.is_grad_enabled()
        assert (image is None) != (tokens is None)
        if image is not None:
            self.calls.append(("image", len(image)))
            return image.float().mean((2, 3)), None
        assert tokens is not None
        self.calls.append(("text", len(tokens)))
        sentences = ["".join(map(chr, row)) for row in tokens.tolist()]
        features = [[7.0 * len(s.strip()) * (colour in s) for colour in COLOURS] for s in sentences]
        return None, torch.tensor(features) + 0.1 * torch.tensor([[s.startswith("the"), 0, 0] for s in sentences])


def coloured(n: int, seed: int = 0) -> LabelledImages:
    """The label is the brightest channel."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    images = random.integers(0, 80, (n, 3, 32, 32), dtype=np.uint8)
    images[np.arange(n), labels] += 150
    return LabelledImages(images, labels)


def colour_set(n: int = 23, broken: tuple[int, ...] = ()) -> LabelledSet:
    part = coloured(n)

    def read(row: int) -> np.ndarray:
        if row in broken:
            raise BadSample("truncated image")
        return part.images[row].transpose(1, 2, 0)

    return LabelledSet("colours", COLOURS, None, Split(part.labels, read))


def test_classifier_is_the_normalised_mean_of_normalised_prompts() -> None:
    encode = Colours()
    for batch in (1, 4, 64):
        classifier = zero_shot_classifier(encode, tokenizer, COLOURS, TEMPLATES, WorkShare(batch=batch))
        for row, name in enumerate(COLOURS):
            with torch.no_grad():
                features = encode(None, tokenizer([template.replace("{}", name) for template in TEMPLATES]))[1]
            assert features is not None
            expected = F.normalize(F.normalize(features, dim=1).mean(0), dim=0)
            assert torch.allclose(classifier[row], expected, atol=1e-6)
    sizes = [size for tower, size in encode.calls]
    assert set(sizes) == {1, 2, 4, 64}  # 2: this test's own; the classifier's batches are always full


def test_pictures_that_cannot_be_decoded_are_left_out_and_counted() -> None:
    data = colour_set(10, broken=(2, 9))
    found = embed_split(Colours(), data.test, EvalTransform(16), WorkShare(batch=4))
    kept = [0, 1, 3, 4, 5, 6, 7, 8]
    assert found.left_out == 2
    assert found.labels.tolist() == data.test.labels[kept].tolist()
    assert found.image.argmax(1).tolist() == data.test.labels[kept].tolist()
    with pytest.raises(UserError, match="not one of 3 pictures"):
        embed_split(Colours(), colour_set(3, broken=(0, 1, 2)).test, EvalTransform(16))
    with pytest.raises(UserError, match="no pictures"):
        embed_split(Colours(), colour_set(0).test, EvalTransform(16))


def test_a_model_that_knows_the_classes_and_one_that_has_diverged() -> None:
    metrics = zero_shot_of(Colours(), tokenizer, colour_set(), TEMPLATES, EvalTransform(16), 2.0)
    assert (metrics["top1"], metrics["mean_per_class"], metrics["pictures"]) == (100, 100, 23)
    assert metrics["chance"] == pytest.approx(100 / 3)

    def diverged(image: torch.Tensor | None, tokens: torch.Tensor | None):
        return None, torch.full((64, 3), torch.nan)

    with pytest.raises(UserError, match="text features are not finite"):
        zero_shot_of(diverged, tokenizer, colour_set(), TEMPLATES, EvalTransform(16), 2.0)


# Numbers


def test_metrics_by_hand() -> None:
    """Eight classes along the axes; the true class is likeliest, third, fifth and sixth."""
    features = torch.zeros(4, 8)
    order = [[0, 1, 2, 3, 4, 5], [1, 2, 0, 3, 4, 5], [1, 2, 3, 4, 0, 5], [1, 2, 3, 4, 5, 0]]
    for row, ranked in enumerate(order):
        features[row, ranked] = torch.arange(6.0, 0.0, -1.0)
    labels = torch.zeros(4, dtype=torch.int64)
    metrics = zero_shot_metrics(3 * features, labels, torch.eye(8), torch.tensor([1.5]))
    assert (metrics["top1"], metrics["top5"], metrics["mean_per_class"]) == (25, 75, 25)
    answers = classify(features, torch.eye(8), 1.5)
    expected = (np.exp(1.5) * F.normalize(features, dim=1)).softmax(1).amax(1)
    assert torch.allclose(answers.confidence, expected.float())
    assert metrics["ece"] == pytest.approx(100 * abs(expected[0].item() - 0.25), rel=1e-5)  # all in one bin
    assert class_accuracy(torch.tensor([0, 2, 2]), torch.tensor([0, 0, 2]), 4) == {0: 50, 2: 100}


def test_calibration_error_against_bins_gone_through_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=generator)
    confidence[:3] = torch.tensor([0.0, 1.0, 1 / 3])
    right = torch.rand(500, generator=generator) < confidence.sqrt()
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if low == 0:
            inside |= confidence == 0
        if inside.any():
            gap = right[inside].double().mean() - confidence[inside].double().mean()
            expected += inside.double().mean().item() * abs(gap.item())
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-3)
    assert expected > 0.1
    sure = torch.ones(10)
    assert calibration_error(sure, sure.bool()) == 0
    assert calibration_error(sure, ~sure.bool()) == 1


def test_bad_features_and_labels() -> None:
    labels = torch.tensor([0, 3])
    with pytest.raises(UserError, match="label 3 is unknown: the classes are 0 to 2"):
        zero_shot_metrics(torch.ones(2, 3), labels, torch.eye(3), 0.0)
    with pytest.raises(UserError, match="image features are not finite"):
        zero_shot_metrics(torch.full((2, 3), torch.inf), labels, torch.eye(4), 0.0)
    with pytest.raises(UserError, match="at least one picture"):
        zero_shot_metrics(torch.ones(0, 3), labels[:0], torch.eye(3), 0.0)


# Ranks


def run_rank(rank: int, world: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    encode = Colours()
    data = colour_set(11, broken=(4,))
    metrics = zero_shot_of(encode, tokenizer, data, TEMPLATES, EvalTransform(16), 2.0, WorkShare(rank, world, batch=2))
    (Path(folder) / f"{rank}.json").write_text(json.dumps([metrics, encode.calls]))
    dist.destroy_process_group()


def test_ranks_share_the_work_with_equal_calls_and_agree_with_one_process(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_rank, (2, port, str(tmp_path)), nprocs=2)
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = zero_shot_of(Colours(), tokenizer, colour_set(11, broken=(4,)), TEMPLATES, EvalTransform(16), 2.0)
    for metrics, calls in answers:
        assert metrics == pytest.approx(alone, rel=1e-5)
        assert calls == [["text", 2]] * 2 + [["image", 2]] * 3  # of 6 prompts and 11 pictures


# The tool


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from clipdist.data.tokens import make_tokenizer
    from clipdist.models import load
    from clipdist.models.build import build_model

    folder = write_cifar10(tmp_path, coloured(10, 0), coloured(40, 1), COLOURS, batches=1)
    torch.manual_seed(0)
    model = build_model(config.Model(name=str(REPOSITORY / "configs/models/tiny_vit.json"))).eval()
    loaded = load.LoadedModel(model, make_tokenizer(model.spec), "tiny", run_dir=None, step=None)
    monkeypatch.setattr(load, "load_model", lambda *args, **options: loaded)
    picture = tmp_path / "confusion.png"
    words = ["tiny", "--data", str(folder), "--templates", "cifar10", "--confusion", str(picture), "--json"]
    monkeypatch.setattr(sys, "argv", ["zero_shot", *words, "--device", "cpu"])
    runpy.run_path(TOOL)["main"]()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])

    from clipdist.datasets.labelled import open_labelled
    from clipdist.evals.embed import model_encoder

    encode, data = model_encoder(model, "cpu"), open_labelled(folder)
    expected = zero_shot_of(encode, loaded.tokenizer, data, CIFAR10_TEMPLATES, EvalTransform(32), model.logit_scale)
    assert {name: record[name] for name in expected} == pytest.approx(expected)
    assert (record["pictures"], record["templates"], record["left_out"]) == (40, 18, 0)
    assert set(record["per_class"]) == set(COLOURS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = "\n".join(lines[:-1])
    assert all(word in table for word in (*COLOURS, "top-1", "top-5", "calibration error", "chance"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--classes", "names.txt"], "classes 'names.txt': no such file"),
        (["--confusion", "nowhere/c.png"], "--confusion nowhere/c.png: must be a .png"),
        (["--data", "nothing"], "nothing: no such file"),
    ],
)
def test_tool_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    folder = write_cifar10(tmp_path, coloured(4), coloured(4), COLOURS, batches=1)
    monkeypatch.setattr(sys, "argv", ["zero_shot", "RN50", "--data", str(folder), *words])
    with pytest.raises(UserError, match=says):
        runpy.run_path(TOOL)["main"]()


def test_tool_says_what_is_wrong_in_one_line() -> None:
    command = [sys.executable, TOOL, "RN50", "--data", "x", "--templates", "cifer"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: templates 'cifer': neither")
    assert len(result.stderr.splitlines()) == 1
