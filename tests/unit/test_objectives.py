"""Objectives on views of an image: schedules, what they declare, and settings that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipdist.config import load_config
from clipdist.distributed.rank import DistEnv
from clipdist.errors import UserError
from clipdist.evals.audit import open_batches
from clipdist.models.build import build_model
from clipdist.models.heads import PrototypeHead, mlp
from clipdist.models.spec import resolve_spec
from clipdist.objectives.make import make_objectives, prepare_model
from clipdist.objectives.objective import Moment, Objective

VIT = "configs/models/tiny_vit.json"
STEPS = 1000


def objective(section: str) -> Objective:
    config = load_config(None, ["objectives.clip=null", f"objectives.{section}"])
    return make_objectives(config.objectives, 32)[0]


def momenta(section: str) -> list[float]:
    teacher = objective(section).teacher
    assert teacher
    return [teacher.momentum(Moment(step, STEPS)) for step in range(STEPS + 1)]


@pytest.mark.parametrize("section", ["byol={}", "dino={}", "moco={queue: 0, predictor: [4096, 128], momentum: 0.99}"])
def test_a_momentum_rises_to_one_at_the_end_and_not_before(section):
    values = momenta(section)
    assert values == sorted(values)
    assert values[0] < 0.9961
    assert values[STEPS // 2] == pytest.approx((values[0] + 1) / 2)  # half a cosine
    assert values[-2] < 1 == values[-1]


def test_the_momentum_of_a_queues_teacher_is_constant():
    assert set(momenta("moco={}")) == {0.999}


def test_dino_warms_its_teacher_up_by_the_step():
    at = [Moment(step, STEPS).ramp([0.04, 0.07], 100) for step in (0, 50, 100, 900)]
    assert at == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert Moment(0, STEPS).ramp([0.04, 0.07], 0) == 0.07


def test_what_a_model_sees_and_what_its_teacher_alone():
    moco, byol, dino = objective("moco={}"), objective("byol={}"), objective("dino={local_views: 3}")
    assert moco.teacher.views == moco.taught_alone == ("moco/1",)
    assert byol.teacher.views == ("byol/0", "byol/1")
    assert not byol.taught_alone
    assert dino.teacher.views == ("dino/0", "dino/1")
    assert [view.size for view in dino.views] == [32, 32, 96, 96, 96]
    blurs = [view.augmentation.blur for view in byol.views]
    assert (blurs, [view.augmentation.solarise for view in byol.views]) == ([1.0, 0.1], [0.0, 0.2])
    assert dino.teacher.training is False  # BatchNorm by running statistics
    assert byol.teacher.training is moco.teacher.training is True


def test_only_the_prototypes_are_held():
    """Those of the model's own head: a frozen layer that is another one would not show in the loss."""
    dino = "{frozen_steps: 5, prototypes: 8, ibot: {prototypes: 9}}"
    config = load_config(None, [f"model.name={VIT}", f"objectives={{clip: null, dino: {dino}}}"])
    model = build_model(config.model, with_text=False)
    objectives = make_objectives(config.objectives, model.spec.image_size)
    prepare_model(model, objectives)
    held = {**objectives[0].held, **objectives[1].held}
    assert held == {"heads.dino.last_layer.weight": 5, "heads.dino.patches.last_layer.weight": 5}
    assert dict(model.named_parameters()).keys() >= held.keys()
    assert model.heads["dino"].last_layer.weight.shape == (8, 256)


def test_prototypes_are_unit_vectors():
    head = PrototypeHead([6, 8, 4], 5, free_norm=False)
    hidden = torch.randn(3, 6)
    bottleneck = torch.nn.functional.normalize(head.projector(hidden), dim=1)
    prototypes = head.last_layer.weight / head.last_layer.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(hidden), bottleneck @ prototypes.T)
    free = PrototypeHead([6, 8, 4], 5, free_norm=True)
    assert {name for name, _ in free.named_parameters()} - {name for name, _ in head.named_parameters()} == {
        "last_layer.norm"
    }


def test_a_head_has_no_activation_behind_its_last_layer():
    kinds = [type(layer).__name__ for layer in mlp([6, 8, 4])]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in mlp([6, 8, 4], last_norm=True)][-1] == "BatchNorm1d"
    assert [type(layer).__name__ for layer in mlp([6, 8, 4], norm=False)] == ["Linear", "ReLU", "Linear"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["moco={queue: 100}"], "objectives.moco.queue=100: must be at least train.global_batch=256"),
        (["moco={queue: 0}"], "objectives.moco.predictor=[]: must end in the head's width, 128"),
        (
            ["moco={predictor: [64, 128]}"],
            "moco.predictor=[64, 128]: must come with objectives.moco.queue=0",
        ),
        (["byol={momentum: 1.5}"], "objectives.byol.momentum=1.5: must lie in [0, 1]"),
        (["byol={head: [64]}"], "objectives.byol.head=[64]: must be the hidden and the output width"),
        (["byol={views: [{}]}"], "objectives.byol.views=a list of 1: must hold 2 views"),
        (["byol={views: [{blur: 2}, {}]}"], "objectives.byol.views[0].blur=2.0: must lie in [0, 1]"),
        (["simclr={temperature: 0.01}"], "objectives.simclr.temperature=0.01: must be at least 1/70"),
        (["simclr={weight: 0}"], "objectives.simclr.weight=0.0: must be above 0"),
        (["dino={teacher_temperature: [0.04]}"], "objectives.dino.teacher_temperature=[0.04]: must be two"),
        (["dino={local: {crop_scale: [0.5, 0.1]}}"], "objectives.dino.local.crop_scale=[0.5, 0.1]: must be a range"),
        (["dino={koleo_group: 1}"], "objectives.dino.koleo_group=1: must be 0, or 2 and more"),
        (["dino={ibot: {mask_ratio: [0.5, 0.1]}}"], "objectives.dino.ibot.mask_ratio=[0.5, 0.1]: must be a range"),
        (["dino={ibot: {masked_images: 0}}"], "objectives.dino.ibot.masked_images=0.0: must lie in (0, 1]"),
        (["dino={ibot: {weight: 0}}"], "objectives.dino.ibot.weight=0.0: must be above 0; objectives.dino.ibot=null"),
        (["vae={size: 24}"], "objectives.vae.size=24: must be 4, 8, 16"),
        (["byol={}", "dino={}"], "objectives.byol and objectives.dino: have a teacher each"),
    ],
)
def test_settings_that_cannot_be_had_are_told_in_one_line(words, told):
    with pytest.raises(UserError) as refused:
        load_config(None, ["objectives.clip=null", *(f"objectives.{word}" for word in words)])
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.ema=0.9", "train.ema=0.9: must be 0 with objectives.byol, whose teacher is the average"),
        ("train.stages=[{share: 1}]", "train.stages=1 stages: must be empty with objectives.byol"),
    ],
)
def test_other_settings_that_do_not_go_with_a_teacher(word, told):
    with pytest.raises(UserError) as refused:
        load_config(None, ["objectives={clip: null, byol: {}}", word])
    assert told in str(refused.value)


def test_the_best_by_the_teacher_can_be_kept():
    words = ["eval.labelled=x", "eval.knn=true", "train.keep_best=ema/knn_20"]
    assert load_config(None, ["objectives={clip: null, byol: {}}", *words]).train.ema == 0
    with pytest.raises(UserError, match=r"train\.keep_best=ema/knn_20: must come with train\.ema"):
        load_config(None, ["objectives={clip: null, simclr: {}}", *words])


@pytest.mark.parametrize("best", ["t2i_r1", "ema/zero_shot/top1", "probe/accuracy"])
def test_the_best_by_what_is_not_measured_without_captions(best):
    words = ["objectives={clip: null, byol: {}}", "data.val=x", "eval.labelled=x", "eval.knn=true"]
    assert load_config(None, [*words, "train.keep_best=effective_rank"])
    with pytest.raises(UserError, match=f"train.keep_best={best}: must be effective_rank .*: no captions are read"):
        load_config(None, [*words, f"train.keep_best={best}"])


def test_a_tower_that_does_not_take_a_views_size_is_named():
    config = load_config(None, [f"model.name={VIT}", "objectives={clip: null, dino: {local: {size: 20}}}"])
    model = build_model(config.model, with_text=False)
    with pytest.raises(UserError, match=r"objectives\.dino\.local\.size=20: "):
        prepare_model(model, make_objectives(config.objectives, model.spec.image_size))


def test_every_small_recipe_is_one_of_an_objective_on_views():
    recipes = sorted(Path("configs/cpu").glob("*.yaml"))
    assert len(recipes) >= 6
    for recipe in recipes:
        assert load_config(recipe, []).objectives.clip is None or "caption" in recipe.read_text()


def test_the_audit_reads_the_views_of_shards(shards):
    words = [f"data.train={shards / 'train'}", "objectives={clip: null, byol: {}}"]
    config = load_config("configs/tiny.yaml", words)
    source = open_batches(config, resolve_spec(config.model, False), DistEnv(0, 1, 0, torch.device("cpu")))
    batch = source.batch(0)
    source.close()
    assert {name: len(images) for name, images in batch.images.items()} == {"byol/0": 16, "byol/1": 16}
    assert batch.tokens.shape == (16, 0)
    assert batch.images["byol/0"].any()
