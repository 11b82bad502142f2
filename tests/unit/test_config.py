"""Recipes and overrides: what is read, what is refused in which words, and that every recipe of the project holds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clipdist import train
from clipdist.config import DEFAULT_RECIPE, Augment, Clip, Config, flat, load_config, to_dict, to_yaml
from clipdist.config.checks import check_augment
from clipdist.errors import UserError
from launch.arguments import read_arguments

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def refused(overrides: list[str], path: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_without_recipe_and_overrides_the_defaults_stand():
    assert load_config() == Config()


def test_overrides_win_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path):
    path = recipe(tmp_path, "optim: {lr: 1e-3, warmup_steps: 7}\ntrain: {epochs: 3}\n")
    config = load_config(path, ["optim.lr=2e-3", "train.epochs=4", "train.epochs=5"])
    assert config.optim.lr == 2e-3
    assert config.optim.warmup_steps == 7
    assert config.train.epochs == 5
    assert config.optim.beta2 == Config().optim.beta2


def test_values_have_the_types_of_their_fields(tmp_path):
    config = load_config(recipe(tmp_path, "optim: {lr: 1e-3}\n"), ["engine.activation_checkpointing=true"])
    assert isinstance(config.optim.lr, float)  # a plain YAML parser reads 1e-3 as a string
    assert config.engine.activation_checkpointing is True
    assert isinstance(config.train, type(Config().train))


@pytest.mark.parametrize(
    ("wrong", "must"),
    [
        ({"crop_scale": [0.4, 0.05]}, "be a range within"),
        ({"crop_scale": [0.0, 1.0]}, "be a range within"),
        ({"crop_scale": [0.5]}, "be a range within"),
        ({"crop_scale": [0.5, 1.5]}, "be a range within"),
        ({"jitter": [0.4, 0.4, 0.4]}, "be four amounts"),
        ({"jitter": [0.4, 0.4, 0.4, 0.6]}, "be four amounts"),
        ({"blur": 1.1}, "lie in"),
        ({"solarise": -0.1}, "lie in"),
        ({"flip": math.nan}, "lie in"),
        ({"size": -224}, "be 0"),
    ],
)
def test_augmentations_out_of_range_are_named(wrong: dict, must: str):
    check_augment("objectives.simclr.views[1]", Augment())
    check_augment("objectives.simclr.views[1]", Augment(jitter=[0.8, 0.8, 0.8, 0.2], blur=1.0, solarise=0.2, size=96))
    with pytest.raises(UserError, match=rf"^objectives\.simclr\.views\[1\]\.{next(iter(wrong))}=.*: must {must}"):
        check_augment("objectives.simclr.views[1]", Augment(**wrong))


@pytest.mark.parametrize("word", ["data.train=DIR/a", "data.train=[DIR/a]"])
def test_one_shard_folder_may_stand_for_a_list(word):
    assert load_config(None, [word]).data.train == ["DIR/a"]


def test_an_empty_value_empties_a_list(tmp_path):
    assert load_config(recipe(tmp_path, "data: {val: [a, b]}\n"), ["data.val=[]"]).data.val == []


def test_a_scalar_in_a_recipe_may_stand_for_a_list(tmp_path):
    assert load_config(recipe(tmp_path, "data:\n  train: DIR/{00000..00002}.tar\n")).data.train == [
        "DIR/{00000..00002}.tar"
    ]


def test_compiled_towers_at_stage_3_are_refused():
    with pytest.raises(UserError, match=r"^engine\.zero_stage=3: must be 0, 1 or 2 with engine\.compile"):
        load_config(None, ["engine.compile=true", "engine.zero_stage=3"])


def test_deepspeed_settings_pass_through():
    config = load_config(None, ["engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"])
    assert config.engine.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("optim.lrr=1", ["the command line", "lrr", "Did you mean", "lr"]),
        ("optimm.lr=1", ["optimm", "Did you mean", "optim"]),
        ("lr=1e-3", ["the command line: lr", "Did you mean: optim.lr?"]),
        ("seed=1", ["Did you mean: data.seed, train.seed?"]),
        ("optim.global_batch=8", ["Did you mean: train.global_batch?"]),
        ("global_bach=8", ["Did you mean: train.global_batch?"]),
        ("configs/tiny.yaml", ["a recipe is named by --config configs/tiny.yaml"]),
        ("train.epochs=many", ["train.epochs", "many"]),
        ("train.epochs=1.5", ["train.epochs", "1.5"]),
        ("train.precision=fp8", ["train.precision", "fp8"]),
        ("train=3", ["the command line", "Train", "3"]),
        ("optim.lr", ["optim.lr", "section.key=value"]),
        ("=3", ["section.key=value"]),
        ("data.train=[a", ["data.train=[a"]),
        ("run.name=", ["run.name"]),
        ("run.name=a/b", ["run.name", "plain name"]),
        ("optim.lr=0", ["optim.lr=0", "above 0"]),
        ("optim.min_lr=1", ["optim.min_lr=1", "not exceed"]),
        ("train.global_batch=0", ["train.global_batch=0"]),
        ("train.steps=-1", ["train.steps=-1", "negative"]),
        ("data.caption=1", ["data.caption=1", "from 2 on"]),
        ("data.caption=every", ["data.caption=every", "random, first, all"]),
        ("data.negatives=-1", ["data.negatives=-1", "negative"]),
        ("data.negative_members=[neg]", ["data.negative_members=['neg']", "come with data.negatives"]),
        ("data.crop_scale_min=0", ["data.crop_scale_min=0"]),
        ("data.max_bad_share=2", ["data.max_bad_share=2"]),
        ("data.caption_members=[txt,'json:']", ["data.caption_members", "suffixes such as txt"]),
        ("data.image_members=a/b", ["data.image_members", "suffixes such as jpg"]),
        ("data.streams=3", ["data.streams=3", "divide train.global_batch"]),
        ("objectives.clip.logit_scale_max=5", ["objectives.clip.logit_scale_max=5", "ln 100"]),
        ("objectives.clip.widths=[64,32]", ["objectives.clip.widths=[64, 32]", "ascending"]),
        ("objectives.clip.widths=[0]", ["objectives.clip.widths=[0]", "ascending"]),
        ("model.text_unlocked_layers=-1", ["model.text_unlocked_layers=-1", "negative"]),
        ("model.image_unlocked_groups=2", ["model.image_unlocked_groups=2", "model.lock_image=true"]),
        ("model.text_unlocked_layers=1", ["model.text_unlocked_layers=1", "model.lock_text=true"]),
        ("model.trust_weights=true", ["model.trust_weights=true", "model.weights"]),
        ("model={biases_only: true, lora: {}}", ["model.biases_only", "without model.lora"]),
        ("model={biases_only: true, lock_text: true, lock_image: true}", ["model.biases_only", "not locked"]),
        ("model.lora.rank=0", ["model.lora.rank=0", "at least 1"]),
        ("model.lora.alpha=0", ["model.lora.alpha=0", "above 0"]),
        ("model={lora: {towers: text}, lock_text: true}", ["model.lock_text=True", "model.lora"]),
        ("train.keep_best=t2i_r1", ["train.keep_best=t2i_r1", "data.val or eval.labelled"]),
        ("launch.gpus=0", ["launch.gpus=0"]),
        ("engine.deepspeed.gradient_accumulation_steps=2", ["gradient_accumulation_steps", "train.micro_batch"]),
        ("engine.deepspeed.bf16.enabled=true", ["engine.deepspeed.bf16", "train.precision"]),
        ("engine.deepspeed.gradient_clipping=1", ["gradient_clipping", "optim.grad_clip"]),
        ("engine.deepspeed.zero_optimization.stage=2", ["zero_optimization.stage", "engine.zero_stage"]),
        ("engine.deepspeed.zero_optimization.offload_optimizer.device=nvme", ["nvme", "cpu"]),
        ("engine.deepspeed.zero_optimization.offload_optimizer=cpu", ["offload_optimizer=cpu", "table"]),
        ("engine.deepspeed.zero_optimization.offload_param.device=cpu", ["engine.zero_stage=1", "offload_param"]),
        ("optim.name=lion", ["optim.name", "lion", "muon", "adamw"]),
        ("optim.beta1=1.5", ["optim.beta1=1.5"]),
        ("optim.eps=-1", ["optim.eps=-1"]),
        ("optim.weight_decay_end=-1", ["optim.weight_decay_end=-1", "not be negative"]),
        ("optim={clip_each: -1, grad_clip: 0}", ["optim.clip_each=-1", "not be negative"]),
        ("optim.clip_each=3", ["optim.clip_each=3", "optim.grad_clip=0"]),
        ("train.seed=-1", ["train.seed=-1"]),
        ("run.name=..", ["run.name"]),
    ],
)
def test_bad_overrides_are_refused_by_name(word, parts):
    message = refused([word])
    assert all(part in message for part in parts), message


def test_no_other_optimizer_nor_clipping_by_tensor_with_offloading():
    more = "engine.deepspeed.zero_optimization.offload_optimizer.device=cpu"
    for name in ("lars", "lamb", "sgd"):
        assert refused([f"optim.name={name}", more]).startswith(f"optim.name={name}: must be adamw with ")
    message = refused(["optim={clip_each: 3, grad_clip: 0}", more])
    assert message.startswith("optim.clip_each=3.0: must be 0 with offload_optimizer of engine.deepspeed")


@pytest.mark.parametrize(
    "word", ["zero_optimization.offload_optimizer.device=cpu", "zero_optimization.offload_param.device=cpu", "biases"]
)
def test_muon_is_refused_where_it_has_no_matrices_on_the_device(word):
    more = "model.biases_only=true" if word == "biases" else f"engine.deepspeed.{word}"
    message = refused(["optim.name=muon", "engine.zero_stage=3", more])
    assert message.startswith("optim.name=muon: must be adamw with ")
    assert more.split(".")[-2 if "device" in more else -1].split("=")[0] in message


def test_a_bad_recipe_is_named(tmp_path):
    path = recipe(tmp_path, "train:\n  epoch: 3\n")
    message = refused([], path)
    assert str(path) in message
    assert "epochs" in message


@pytest.mark.parametrize(("text", "key"), [("optim:\n  lr: ???\n", "optim.lr"), ("objectives: ???\n", "objectives")])
def test_a_value_left_open_is_asked_for(tmp_path, text, key):
    assert refused([], recipe(tmp_path, text)).startswith(f"{key}: still ???")


def test_a_value_left_open_in_the_recipe_is_given_on_the_command_line(tmp_path):
    assert load_config(recipe(tmp_path, "optim:\n  lr: ???\n"), ["optim.lr=0.25"]).optim.lr == 0.25


def test_a_recipe_that_is_no_yaml_is_named(tmp_path):
    path = recipe(tmp_path, "train: [1, 2\noptim: }\n")
    assert str(path) in refused([], path)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("tiny.yaml", "; did you mean --config configs/tiny.yaml?"),
        ("configs/tiny.yml", "; did you mean --config configs/tiny.yaml?"),
        ("absent.yaml", "; configs holds byol_rn50.yaml, cc3m_vitb16.yaml, "),
        ("DIR/absent.yaml", "; DIR holds recipe.yaml"),
        ("DIR/recip.yaml", "; did you mean --config DIR/recipe.yaml?"),
    ],
)
def test_a_missing_recipe_names_those_that_may_be_meant(tmp_path, given, hint):
    recipe(tmp_path, "")
    (tmp_path / ".pre-commit-config.yaml").touch()
    path = given.replace("DIR", str(tmp_path))
    message = refused([], Path(path))
    assert message.startswith(f"--config {path}: no such file{hint.replace('DIR', str(tmp_path))}")
    assert ".pre-commit" not in message


def test_an_empty_recipe_is_the_defaults(tmp_path):
    assert load_config(recipe(tmp_path, "# nothing\n")) == Config()


def test_the_resolved_yaml_reads_back_as_the_same_configuration(tmp_path):
    config = load_config(None, ["optim.lr=3e-5", "data.train=[a,b]", "engine.deepspeed.wall_clock_breakdown=true"])
    assert load_config(recipe(tmp_path, to_yaml(config))) == config
    assert flat(config)["optim.lr"] == to_dict(config)["optim"]["lr"] == 3e-5


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().train.epochs = 2  # type: ignore[misc]


def test_the_temperature_starts_and_ends_as_in_the_clip_paper():
    clip = Config().objectives.clip
    assert math.exp(clip.first_log_scale) == pytest.approx(1 / 0.07)
    assert math.exp(Clip(loss="sigmoid").first_log_scale) == pytest.approx(10)
    assert math.exp(clip.logit_scale_max) == pytest.approx(100)


def test_configuration_needs_no_torch():
    program = "import sys, clipdist.config, clipdist.run_plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_project_has_its_recipes():
    flickr8k = {f"flickr8k_{name}" for name in ("rn50", "rn10", "vit_tiny", "pretrained", "finetune_openai")}
    images = {"simclr_rn50", "mocov2_rn50", "mocov3_vits16", "byol_rn50", "dino_vits16", "slip_vitb16", "dinov2_vitl14"}
    assert flickr8k | images | {"tiny", "cc3m_vitb16", "web_vitl14"} <= {path.stem for path in RECIPES}
    assert ROOT / DEFAULT_RECIPE in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_holds(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    from clipdist.models.spec import resolve_spec

    config = load_config(path)
    assert config.run.name == path.stem
    ranks = config.launch.nodes * config.launch.gpus
    assert config.train.global_batch % ranks == 0
    if not config.model.name.startswith("data/"):  # tools/prepare_pretrained.py makes it
        assert resolve_spec(config.model, config.objectives.read_text).embed_dim > 0
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert "R@K" in " ".join(header)


@pytest.mark.parametrize(
    ("recipe", "words", "clip"),
    [
        ({}, [], Clip()),
        ({}, ["objectives.clip.loss=sigmoid"], Clip(loss="sigmoid")),
        ({"objectives": {"clip": {"label_smoothing": 0.1}}}, [], Clip(label_smoothing=0.1)),
        ({"objectives": {}}, ["objectives.clip.weight=2"], Clip(weight=2.0)),
    ],
)
def test_objectives_are_clip_unless_they_are_listed(tmp_path, recipe, words, clip):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    assert load_config(path, words).objectives.clip == clip


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ({"objectives": {}}, [], "objectives: none is set"),
        ({}, ["objectives.clip=null"], "objectives: none is set"),
        ({"objectives": {"vicreg": {}}}, [], "objectives.vicreg"),
        ({}, ["objectives.clip.weight=0"], "objectives.clip.weight=0.0: must be above 0"),
        ({"loss": {"name": "sigmoid"}}, [], "loss.name is objectives.clip.loss now"),
        ({"loss": {}}, [], "the section loss is objectives.clip now"),
        ({}, ["loss.group_positives=false"], "loss.group_positives is objectives.clip.group_positives now"),
        ({}, ["loss.tile_rows=8"], "loss.tile_rows is gone: the size of the tiles is chosen"),
        ({}, ["data.patience_s=3"], "data.patience_s is data.retry_s now"),
        ({"loss": {"name": "sigmoid", "tile_rows": 0}}, [], "objectives.clip.loss now; write that. loss.tile_rows is"),
        ({}, ["data.train.0=x"], "the command line: Cannot merge"),
        ({}, ["optim.lr={a"], "the value is not YAML"),
        ([1, 2], [], "must hold sections of settings"),
    ],
)
def test_objectives_and_keys_of_earlier_versions_that_are_refused(tmp_path, recipe, words, told):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with pytest.raises(UserError) as refused:
        load_config(path, words)
    assert told in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_the_configuration_of_an_earlier_versions_run_is_read(tmp_path):
    path = tmp_path / "config.yaml"
    old = {"name": "sigmoid", "group_positives": False, "tile_rows": 0, "implementation": "compiled"}
    path.write_text(json.dumps({"loss": old, "data": {"patience_s": 7.0}, "train": {"steps": 3}}))
    with pytest.raises(UserError, match=r"loss\.name is objectives\.clip\.loss now"):
        load_config(path)
    (tmp_path / "metrics.jsonl").touch()
    config = load_config(path)
    assert config.objectives.clip == Clip(loss="sigmoid", group_positives=False)
    assert (config.data.retry_s, config.train.steps) == (7.0, 3)


@pytest.mark.parametrize("main", [train.main, read_arguments], ids=["train", "submit"])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--lr 1e-3", "--lr: no such option; settings are words without dashes: optim.lr=1e-3"),
        ("run.name=x --lr=1e-3", "optim.lr=1e-3"),
        ("--optim.lr 1e-3", "without dashes: optim.lr=1e-3"),
        ("--global-batch 64", "train.global_batch=64"),
        ("--global-bach", "train.global_batch=VALUE"),
        ("--lr run.name=x", "optim.lr=VALUE"),
        ("--xyzzy 3", "section.key=value, such as optim.lr=1e-3"),
    ],
)
def test_an_option_is_answered_with_the_setting(main, words, told, monkeypatch):
    monkeypatch.setattr(train, "die_with_launcher", lambda: None)
    with pytest.raises(UserError, match=re.escape(told)) as ended:
        main(words.split())
    assert "\n" not in str(ended.value)
