"""Distillation beside open_clip's loss, its teacher's outputs, and teachers that do not fit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss
from safetensors.torch import save_file

from clipdist import config
from clipdist.config import Config, Distill, Objectives, load_config
from clipdist.data.batch import CAPTION, EMPTY, IMAGE, Batch, pair_batch
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.estimate import full_table, make_estimate
from clipdist.losses.distillation import distill_logits
from clipdist.losses.tiles import Tile
from clipdist.models.build import build_model
from clipdist.objectives.distill import DistillObjective
from clipdist.objectives.teacher import Teacher, check_teacher, open_teacher

VIT = "configs/models/tiny_vit.json"
RESNET = "configs/models/tiny_rn.json"
WIDER = "tests/dist/vit_wider.json"  # 48 features, images of 40 pixels, pixel statistics of its own
ONE = DistEnv(0, 1, 0, torch.device("cpu"))


def write_weights(folder: Path, model: str, seed: int = 0, **settings: object) -> str:
    torch.manual_seed(seed)
    built = build_model(config.Model(name=model))
    with torch.no_grad():
        for name, value in settings.items():
            getattr(built, name).fill_(value)
    file = folder / f"{Path(model).stem}-{seed}.safetensors"
    save_file(built.state_dict(), file)
    return str(file)


def taught(teacher: str, *words: str) -> Config:
    distil = f"objectives.distill.teacher={teacher}"
    return load_config(None, [f"model.name={VIT}", "train.global_batch=6", distil, *words])


def drawn_batch(rows: int = 6, side: int = 32) -> Batch:
    draw = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(1, 500, (rows, 16), generator=draw)
    return pair_batch(image, tokens, torch.ones(rows, dtype=torch.bool), torch.arange(rows))


def draw_features(rows: int = 50) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of a student with 33 features and a teacher with 21, whose pairs are somewhat near to one another."""
    draw = torch.Generator().manual_seed(1)
    sides = []
    for width in (33, 21):
        images = torch.randn(rows, width, generator=draw)
        sides.append([images, images + 2 * torch.randn(rows, width, generator=draw)])
    return sides[0], sides[1]


@pytest.mark.parametrize(("t", "teacher_t"), [(2.659, 3.2), (math.log(100), math.log(100)), (0.5, 4.9)])
def test_value_and_gradients_are_those_of_open_clip(t: float, teacher_t: float) -> None:
    """open_clip's value is the cross-entropy: the teacher's entropy more."""
    student, teacher = draw_features()
    for valid in (torch.ones(50, dtype=torch.bool), torch.rand(50, generator=torch.Generator().manual_seed(2)) > 0.3):
        found = [x.clone().requires_grad_() for x in [*student, torch.tensor([t])]]
        value, _ = distill_logits(*found, *teacher, teacher_t, valid=valid, tile=Tile(16, 24))
        value.backward()

        exact = [x.double().requires_grad_() for x in [*student, torch.tensor([t])]]
        own, theirs = ([F.normalize(x[valid].double(), dim=1) for x in side] for side in (exact[:2], teacher))
        scale = math.exp(teacher_t)
        cross_entropy = DistillClipLoss()(*own, exact[2].exp(), *theirs, scale)[1]
        s = scale * theirs[0] @ theirs[1].T
        entropies = [-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (s, s.T)]
        cross_entropy.backward()
        expected = float(cross_entropy.detach() - sum(entropies).detach() / 2)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
        for ours, reference in zip(found, exact):
            assert (ours.grad.double() - reference.grad).norm() < 1e-5 * reference.grad.norm()


def test_a_student_that_agrees_with_the_teacher_has_no_loss_and_no_gradient() -> None:
    student, _ = draw_features()
    leaves = [x.clone().requires_grad_() for x in [*student, torch.tensor([3.0])]]
    value, _ = distill_logits(*leaves, *student, 3.0)
    value.backward()
    assert float(value.detach()) == 0
    assert max(float(leaf.grad.abs().max()) for leaf in leaves) == 0


def test_features_are_compared_by_their_cosine() -> None:
    student, other = draw_features()
    teacher = [x @ torch.randn(21, 33, generator=torch.Generator().manual_seed(4)) for x in other]
    outputs = {IMAGE: student[0], "text": student[1], "teacher/image": teacher[0], "teacher/text": teacher[1]}
    valid = torch.arange(50) % 3 > 0
    batch = replace(drawn_batch(50), valid={"image": valid, "text": valid})
    term = DistillObjective(Distill()).loss(outputs, batch)
    cosines = [F.cosine_similarity(x, y)[valid] for x, y in zip(student, teacher)]
    assert float((term.sum / term.count).detach()) == pytest.approx(
        1 - float(sum(c.mean() for c in cosines)) / 2, rel=1e-5
    )

    # Of several texts of an image their mean counts, places without a text do not.
    roles = torch.tensor([[CAPTION, CAPTION], [CAPTION, EMPTY]], dtype=torch.uint8).repeat(25, 1)
    places = {name: torch.stack([outputs[name], outputs[name].roll(1, 0)], dim=1) for name in ("text", "teacher/text")}
    term = DistillObjective(Distill()).loss(outputs | places, replace(batch, roles=roles))
    second = torch.where(roles[:, 1] == CAPTION, F.cosine_similarity(*places.values(), dim=2)[:, 1], 0)
    texts = (F.cosine_similarity(*places.values(), dim=2)[:, 0] + second) / (roles == CAPTION).sum(1)
    assert float((term.sum / term.count).detach()) == pytest.approx(
        1 - float(cosines[0].mean() + texts[valid].mean()) / 2, rel=1e-5
    )


def test_the_teacher_sees_the_crop_of_the_student_as_its_own_transform_asks(tmp_path: Path) -> None:
    """Its image size, mean and deviation; in evaluation mode, in pieces of a micro-batch."""
    file = write_weights(tmp_path, WIDER, logit_scale=3.5)
    words = ["objectives.distill.target=logits", "train.micro_batch=4"]
    state = torch.get_rng_state()
    teacher = open_teacher(taught(f"{WIDER}:{file}", *words), ONE)
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher is not None
    batch = drawn_batch()
    outputs = teacher(batch)
    assert outputs["teacher/logit_scale"].tolist() == [3.5]

    model = build_model(config.Model(name=WIDER, weights=file)).eval()
    pixels = F.interpolate(batch.images[IMAGE].float(), (40, 40), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]))
    with torch.no_grad():
        image = model.visual((pixels.round().clamp(0, 255) / 255 - mean) / std)
        text = model.encode_text(batch.tokens)
    torch.testing.assert_close(outputs["teacher/image"], image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["teacher/text"], text, rtol=1e-5, atol=1e-5)
    assert not any(value.requires_grad for value in outputs.values())


def test_the_teacher_is_in_evaluation_mode_and_its_statistics_stand_still(tmp_path: Path) -> None:
    file = write_weights(tmp_path, RESNET)
    teacher = open_teacher(taught(f"{RESNET}:{file}"), ONE)
    assert teacher is not None
    batch = drawn_batch()
    whole, again = teacher(batch), teacher(batch.rows(0, 2))
    torch.testing.assert_close(again["teacher/image"], whole["teacher/image"][:2], rtol=1e-5, atol=1e-6)
    built = build_model(config.Model(name=RESNET, weights=file)).eval()
    with torch.no_grad():
        image = built.encode_image(batch.images[IMAGE])
    torch.testing.assert_close(whole["teacher/image"], image, rtol=1e-5, atol=1e-6)


def test_the_start_of_a_model_with_adapters_is_its_base(tmp_path: Path) -> None:
    file = write_weights(tmp_path, VIT)
    cfg = taught("start", f"model.weights={file}", "model.lora.rank=2")
    teacher, batch = open_teacher(cfg, ONE), drawn_batch()
    assert teacher is not None
    base = build_model(config.Model(name=VIT, weights=file)).eval()
    with torch.no_grad():
        assert torch.allclose(teacher(batch)["teacher/text"], base.encode_text(batch.tokens), atol=1e-5)


def test_the_teacher_of_a_checkpoint_is_checked(tmp_path: Path) -> None:
    file, other = write_weights(tmp_path, VIT), write_weights(tmp_path, VIT, seed=1)
    first = open_teacher(taught("start", f"model.weights={file}"), ONE)
    assert isinstance(first, Teacher)
    same = taught("start", f"model.weights={file}")
    assert open_teacher(same, ONE, first.record).record == first.record  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"teacher=start: not the teacher that the checkpoint was trained with"):
        open_teacher(taught("start", f"model.weights={other}"), ONE, first.record)
    named = open_teacher(taught(f"{VIT}:{other}"), ONE, first.record)  # another setting, not another file
    assert named is not None
    with pytest.raises(UserError, match=r"distill\.teacher=start: model\.weights=gone\.safetensors"):
        open_teacher(taught("start", "model.weights=gone.safetensors"), ONE)


def changed(folder: Path, **text: int) -> str:
    described = json.loads(Path(VIT).read_text())
    described["text_cfg"] |= text
    file = folder / f"{'-'.join(text)}.json"
    file.write_text(json.dumps(described))
    return str(file)


def test_a_teacher_that_does_not_fit_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    file, student = write_weights(tmp_path, WIDER), config.Model(name=VIT)
    for teacher, told in (
        (f"{WIDER}:{file}", r"has 48 features, .*tiny_vit.json has 32; set objectives\.distill\.target=logits"),
        (f"{changed(tmp_path, context_length=8)}:{file}", r"takes 8 tokens of a text, .*tiny_vit.json takes 16"),
        (f"{changed(tmp_path, vocab_size=1024)}:{file}", r"has another tokenizer than .*tiny_vit.json"),
        ("ViT-B-33:openai", r"ViT-B-33"),
        ("ViT-B-32:nobody", r"nobody"),
        ("ViT-B-32", r"a model without weights; write NAME:WEIGHTS"),
        ("runs/missing", r"no such run or checkpoint folder"),
        (f"{VIT}:{tmp_path}/missing.safetensors", r"no such file"),
    ):
        with pytest.raises(UserError, match=rf"^objectives\.distill\.teacher=.*{told}") as refused:
            check_teacher(Distill(teacher=teacher), student)
        assert "\n" not in str(refused.value)
    assert check_teacher(Distill(teacher=f"{WIDER}:{file}", target="logits"), student).embed_dim == 48


def test_a_teacher_whose_weights_do_not_fit_is_refused(tmp_path: Path) -> None:
    file = write_weights(tmp_path, RESNET)
    with pytest.raises(UserError, match=r"^objectives\.distill\.teacher=.*does not fit"):
        open_teacher(taught(f"{VIT}:{file}"), ONE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["objectives.distill={}"], r"teacher=start: must come with model\.weights"),
        (["objectives.distill.teacher=''"], r"teacher='': must be start, NAME:WEIGHTS"),
        (["objectives.distill.teacher=x:y", "objectives.distill.weight=0"], r"weight=0\.0: must be above 0"),
        (["objectives.distill={}", "objectives.distill.weight=-1"], r"weight=-1\.0: must be above 0"),
        (["objectives.distill={}", "model.weights=x", "objectives.clip=null"], r"teacher=start: must be another model"),
        (
            ["objectives.distill={teacher: 'x:y', target: logits}", "data.caption=all"],
            r"target=logits: must be features with data\.caption=all",
        ),
        (
            ["objectives.distill.teacher=x:y", "data.cache_features=true", "model.lock_text=true"],
            r"teacher=x:y: must be start with data\.cache_features",
        ),
        (["objectives.distill.target=both"], r"objectives\.distill\.target"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, words)


def test_a_recipe_may_distil_alone(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("objectives:\n  distill:\n    teacher: ViT-L-14:openai\n    target: logits\n")
    assert load_config(recipe).objectives == Objectives(distill=Distill(1.0, "ViT-L-14:openai", "logits"))


def test_the_plan_counts_the_teacher(tmp_path: Path) -> None:
    words = [f"model.name={VIT}", "train.global_batch=16", "train.steps=1", "device=cpu"]
    file = write_weights(tmp_path, WIDER)
    distil = [f"objectives.distill={{teacher: '{WIDER}:{file}', target: logits}}"]
    plain, distilled, alone = (
        make_estimate(load_config(None, [*words, *more]), world=2)
        for more in ([], distil, [*distil, "objectives.clip=null"])
    )
    teacher = build_model(config.Model(name=WIDER))
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*teacher.parameters(), *teacher.buffers()])
    for found in (distilled, alone):
        assert found.memory.parts["teacher"] == pytest.approx(weights, rel=1e-6)
        assert found.total > plain.total + weights
        assert "  teacher  " in full_table(found)
    assert "  teacher  " not in full_table(plain)
    assert sum(distilled.wire.values()) > sum(alone.wire.values())
    assert sum(distilled.wire.values()) > sum(plain.wire.values())
