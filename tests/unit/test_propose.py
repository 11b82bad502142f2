"""Proposed recipes: what trains, that they are read back as proposed, that they fit, and starting points by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from wds_sets import ROOT, write_run

from clipdist import config
from clipdist.config import load_config
from clipdist.errors import UserError
from clipdist.estimate import propose as rules
from clipdist.estimate.activations import meta_model
from clipdist.estimate.propose import Setting, TuningData, config_of, propose, recipe_text
from clipdist.models.build import build_model
from clipdist.models.interpolate import save_run
from clipdist.models.load import starting_point

TINY = config.Model(name=str(ROOT / "configs/models/tiny_vit.json"), weights="w.safetensors")


@pytest.fixture
def start(tmp_path: Path) -> config.Model:
    return starting_point(str(write_run(tmp_path / "start", 0)))[0]


def data(images: int, labelled: bool = False) -> TuningData:
    return TuningData(Path("t.index.zip"), Path("h.index.zip"), images, 100, labelled)


def by_key(settings: list[Setting]) -> dict[str, object]:
    return {setting.key: setting.value for setting in settings}


def test_the_recipe_is_read_back_as_it_was_proposed_with_a_reason_in_each_line(
    start: config.Model, tmp_path: Path
) -> None:
    for labelled in (False, True):
        settings = propose(start, "sigmoid", data(300, labelled), tmp_path / "run", "cpu")
        assert all(setting.reason for setting in settings)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(recipe_text("Two\nlines", settings))
        assert load_config(recipe) == config_of(settings)
        found = load_config(recipe)
        assert (found.data.val, found.eval.labelled) == (([], "h.index.zip") if labelled else (["h.index.zip"], ""))
        assert found.clip.loss == "sigmoid"


def test_what_trains_depends_on_images_model_and_machine(start: config.Model, tmp_path: Path, monkeypatch) -> None:
    few = by_key(propose(start, "infonce", data(4000), tmp_path / "run", "cpu"))
    many = by_key(propose(start, "infonce", data(6000), tmp_path / "run", "cpu"))
    assert few["model.lora"] == {"rank": 8}
    assert "model.lora" not in many
    assert few["optim.lr"] > many["optim.lr"]  # type: ignore[operator]
    monkeypatch.setattr(rules, "LARGE_ON_CPU", 1000)
    large = propose(start, "infonce", data(6000), tmp_path / "run", "cpu")
    assert by_key(large)["data.cache_features"] is True
    trained = [name for name, weight in meta_model(config_of(large))[0].named_parameters() if weight.requires_grad]
    assert trained == ["logit_scale", "visual.proj", "text.text_projection"]


@pytest.mark.parametrize(("images", "batch", "epochs"), [(18, 8, 20), (300, 64, 20), (5000, 256, 10), (10**6, 256, 2)])
def test_batch_and_length_follow_the_number_of_images(
    start: config.Model, tmp_path: Path, images: int, batch: int, epochs: int
) -> None:
    found = by_key(propose(start, "infonce", data(images), tmp_path / "run", "cpu"))
    assert (found["train.global_batch"], found["train.epochs"]) == (batch, epochs)


def test_a_batch_that_does_not_fit_is_computed_in_pieces(start: config.Model, tmp_path: Path, monkeypatch) -> None:
    whole = by_key(propose(start, "infonce", data(6000), tmp_path / "run", "cpu"))
    assert "train.micro_batch" not in whole

    class Little:
        available = 145_000_000

    monkeypatch.setattr(rules.psutil, "virtual_memory", Little)
    pieces = by_key(propose(start, "infonce", data(6000), tmp_path / "run", "cpu"))
    assert 1 <= pieces["train.micro_batch"] < 256  # type: ignore[operator]
    Little.available = 10_000_000
    with pytest.raises(UserError, match="does not fit into memory"):
        propose(start, "infonce", data(6000), tmp_path / "run", "cpu")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("ViT-B-32", "a model without weights; write NAME:WEIGHTS"),
        ("runs/none", "no such run, checkpoint or Hugging Face folder"),
        ("ViT-B-33:openai", "did you mean ViT-B-32"),
        ("ViT-B-32:opnai", "neither a file nor a tag of ViT-B-32"),
    ],
)
def test_an_unknown_start_is_told(source: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        starting_point(source)


def test_names_say_the_loss_that_they_were_trained_with() -> None:
    assert starting_point("ViT-B-16-SigLIP:webli") == (config.Model(name="ViT-B-16-SigLIP", weights="webli"), "sigmoid")
    assert starting_point("ViT-B-32:openai")[1] == "infonce"


def test_averaged_weights_say_the_loss_that_they_were_trained_with(tmp_path: Path) -> None:
    model = build_model(config.Model(name=str(ROOT / "configs/models/tiny_vit.json")), config.Clip(loss="sigmoid"))
    save_run(tmp_path / "soup", model, {})
    assert starting_point(str(tmp_path / "soup"))[1] == "sigmoid"
