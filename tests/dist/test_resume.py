"""A run that is interrupted and goes on ends as the undisturbed one: bit for bit in fp32 on the CPU."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from dist.launch import run_ranks, train
from safetensors.torch import save_file

from clipdist import config
from clipdist.checkpoint.format import newest_checkpoint, read_manifest
from clipdist.checkpoint.reader import CheckpointReader
from clipdist.config import load_config
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.load import load_model, load_trained
from tools import export

STEPS = 8  # two epochs of 70 // 16 = 4 steps
RESNET = "configs/models/tiny_rn.json"  # running statistics must survive, too
VIT = "configs/models/tiny_vit.json"
STAGED = {
    "model__name": VIT,
    "train__stages": "[{share: 0.5, image_size: 16, tokens: 8, patch_dropout: 0.5}, {share: 0.5}]",
}


def words(shards: Path, root: Path, name: str, **settings: object) -> list[str]:
    given = {
        "run.root": root,
        "run.name": name,
        "data.train": shards / "train",
        "data.val": "",
        "model.name": RESNET,
        "engine.zero_stage": 2,
        "train.steps": STEPS,
        "train.save_every": 3,
        "train.ema": 0.9,
        **{key.replace("__", "."): value for key, value in settings.items()},
    }
    return ["--config", "configs/tiny.yaml", *(f"{key}={value}" for key, value in given.items())]


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [(record["step"], record["loss"]) for record in records if record["type"] == "train"]
    assert len({step for step, _ in train}) == len(train)  # no step is told twice
    return dict(train)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(newest_checkpoint(run))
    assert reader.manifest.step == STEPS
    return {name: reader.read_full(name) for name in reader.names()}


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    ours, theirs = tensors(run), tensors(other)
    assert ours.keys() == theirs.keys()
    assert {name.partition("/")[0] for name in ours} - {"buffer"} == {"param", "exp_avg", "exp_avg_sq", "ema"}
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def write_weights(file: Path, model: str, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(build_model(config.Model(name=model)).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def from_start(tmp_path_factory) -> dict[str, object]:
    """Settings of a run that is also distilled from its start: CLIP, and a teacher that is in no checkpoint."""
    file = write_weights(tmp_path_factory.mktemp("start") / "start.safetensors", RESNET, 3)
    return {"model__weights": file, "objectives__distill": "{weight: 3}"}


@pytest.fixture(scope="module")
def undisturbed(shards, from_start, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks("training.py", 2, "none", "0", *words(shards, root, "whole", **from_start))
    return root / "whole"


def test_after_a_signal(shards, undisturbed, from_start, tmp_path):
    out = run_ranks("training.py", 2, "sigterm", "4", *words(shards, tmp_path, "run", **from_start), expect=75)
    assert "go on with" in out
    assert newest_checkpoint(tmp_path / "run").name == "step-00000004"
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run", **from_start))
    assert_same(tmp_path / "run", undisturbed)


def test_after_a_kill(shards, undisturbed, from_start, tmp_path):
    run_ranks("training.py", 2, "kill", "5", *words(shards, tmp_path, "run", **from_start), expect=9)
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    out = run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run", **from_start))
    assert "step-00000003" in out
    assert_same(tmp_path / "run", undisturbed)


def test_a_run_is_distilled_from_its_start_alone(shards, undisturbed, from_start, tmp_path):
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    terms = [record for record in map(json.loads, lines) if record["type"] == "train"]
    assert len(terms) == STEPS
    for record in terms:
        assert record["loss"] == pytest.approx(record["loss/clip"] + 3 * record["loss/distill"], rel=1e-5)
    shutil.copytree(undisturbed, tmp_path / "run")
    other = from_start | {"model__weights": write_weights(tmp_path / "other.safetensors", RESNET, 4)}
    ended = train(1, *words(shards, tmp_path, "run", **other, train__steps=STEPS + 1)[2:])
    assert ended.returncode == 2
    told = "objectives.distill.teacher=start: not the teacher that the checkpoint was trained with"
    assert re.fullmatch(f"error: {re.escape(told)}.*\n", ended.stderr), ended.stderr


def adapted_text(folder: Path) -> dict[str, object]:
    """A whole image tower and LoRA on the text tower, from weights that are made here."""
    torch.manual_seed(3)
    save_file(build_model(config.Model(name=VIT)).state_dict(), folder / "base.safetensors")
    lora = "{rank: 2, towers: text}"
    return {"model__name": VIT, "model__weights": folder / "base.safetensors", "model__lora": lora}


@pytest.fixture(scope="module")
def moved(shards, tmp_path_factory) -> Path:
    """A folder with "run", which went on twice with other ranks and stages, and "whole", which was not disturbed."""
    root = tmp_path_factory.mktemp("moved")
    lora = adapted_text(root)
    run_ranks("training.py", 2, "none", "0", *words(shards, root, "whole", **lora))
    run_ranks("training.py", 2, "kill", "4", *words(shards, root, "run", **lora), expect=9)
    run_ranks("training.py", 1, "kill", "7", *words(shards, root, "run", **lora, engine__zero_stage=0), expect=9)
    out = run_ranks("training.py", 4, "none", "0", *words(shards, root, "run", **lora, engine__zero_stage=3))
    assert "step-00000006" in out
    return root


def test_another_number_of_ranks_and_another_stage_go_on(moved):
    """Without BatchNorm the curve is that of the undisturbed run up to rounding."""
    lines = (moved / "run" / "metrics.jsonl").read_text().splitlines()
    restarts = [record["world"] for record in map(json.loads, lines) if record.get("event") == "restart"]
    assert restarts == [1, 4]
    ours, theirs = losses(moved / "run"), losses(moved / "whole")
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = tensors(moved / "run"), tensors(moved / "whole")
    averages = [name for name in theirs if name.startswith("ema/")]
    assert averages
    assert {"param/" + name.removeprefix("ema/") for name in averages} == {n for n in theirs if n.startswith("param/")}
    for name in averages:
        assert not torch.equal(ours[name], ours["param/" + name.removeprefix("ema/")]), name
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_of_lora_holds_what_trains_and_tools_merge_it(moved, monkeypatch):
    run, base = moved / "run", load_model(VIT, str(moved / "base.safetensors")).model
    saved = [name.removeprefix("param/") for name in tensors(run) if name.startswith("param/")]
    adapters = [name for name in saved if name.startswith("text.")]
    image = {name for name, _ in base.named_parameters() if name.startswith("visual.")}
    assert {*saved} == {*adapters, *image, "logit_scale"}
    assert len(adapters) == 24  # of q, k, v, output and two layers of the MLP, in two blocks
    assert all("lora_" in name for name in adapters)
    assert len(tensors(run)) == 4 * len(saved)  # with their moments and average, and nothing else

    adapted, folder = build_model(load_config(run / "config.yaml").model).eval(), newest_checkpoint(run)
    load_trained(adapted, folder, read_manifest(folder))
    monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--out", str(moved / "out.safetensors")])
    assert export.main() == 0
    merged, exported = load_model(str(run)).model, load_model(VIT, str(moved / "out.safetensors")).model
    assert [*merged.state_dict()] == [*base.state_dict()] == [*exported.state_dict()]
    tokens = torch.randint(1, 500, (4, base.spec.context_length))
    with torch.no_grad():
        adapted, merged, exported, base = (model.encode_text(tokens) for model in (adapted, merged, exported, base))
    assert (adapted - base).norm() > 1e-2 * base.norm()
    assert (adapted - merged).norm() < 1e-5 * base.norm()
    assert torch.equal(merged, exported)
    averaged = load_model(str(run), ema=True).model.encode_text(tokens)
    assert (averaged - base).norm() > 1e-2 * base.norm() < 1e3 * (averaged - merged).norm()


def test_muon_goes_on(shards, tmp_path):
    """To the bit; with other ranks and another stage up to rounding, which the iteration enlarges; not with AdamW."""
    muon = {"model__name": VIT, "optim__name": "muon"}
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "whole", **muon))
    run_ranks("training.py", 2, "kill", "5", *words(shards, tmp_path, "run", **muon), expect=9)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    ended = train(1, *words(shards, tmp_path, "run", **muon | {"optim__name": "adamw"})[2:])
    assert ended.returncode == 2
    told = "step-00000003: holds the moments of optim.name=muon, here adamw; set it back or choose another run.name"
    assert re.fullmatch(f"error: .*{re.escape(told)}\n", ended.stderr), ended.stderr
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run", **muon))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    matrix = "visual.transformer.resblocks.0.attn.in_proj_weight"
    assert {name.partition("/")[0] for name in ours if name.endswith(matrix)} == {"param", "exp_avg", "ema"}
    run_ranks("training.py", 4, "none", "0", *words(shards, tmp_path, "moved", **muon, engine__zero_stage=3))
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert (ours["param/" + matrix] - tensors(tmp_path / "moved")["param/" + matrix]).abs().max() < 1e-4


MOCO = "{head: [24, 12], queue: 40, momentum: 0.9}"
DINO = "{head: [24, 24, 12], prototypes: 20, koleo: 0.1, local_views: 2, local: {size: 16}, momentum: 0.9}"


@pytest.mark.parametrize(
    ("model", "name", "section", "kept"),
    [(RESNET, "moco", MOCO, {"queue", "pointer", "fill"}), (VIT, "dino", DINO, {"centre"})],
)
def test_a_teacher_and_what_objectives_keep_go_on(shards, tmp_path, model, name, section, kept):
    """To the bit; with other ranks and another stage up to rounding; not where the checkpoint lacks the objective."""
    given = {"model__name": model, "train__ema": 0, "objectives": f"{{clip: null, {name}: {section}}}"}
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "whole", **given))
    run_ranks("training.py", 2, "kill", "5", *words(shards, tmp_path, "run", **given), expect=9)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run", **given))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = tensors(tmp_path / "run"), tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [tensor for tensor in ours if not torch.equal(ours[tensor], theirs[tensor])] == []
    assert {tensor for tensor in ours if tensor.startswith("state/")} == {f"state/{name}/{each}" for each in kept}
    assert any(tensor.startswith("ema/heads.") for tensor in ours)
    run_ranks("training.py", 4, "none", "0", *words(shards, tmp_path, "moved", **given, engine__zero_stage=3))
    if model == VIT:  # BatchNorm normalises over a rank's rows
        assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert load_model(str(tmp_path / "moved"), ema=True).model.text is None

    other = given | {"objectives": "{clip: null, simclr: {head: [24, 12]}}", "train__steps": STEPS + 1}
    ended = train(2, *words(shards, tmp_path, "run", **other)[2:])
    told = "made without objectives.simclr: heads, teacher and state are missing; set train.resume_objectives=reset"
    assert ended.returncode == 2
    assert told in ended.stderr
    ended = train(2, *words(shards, tmp_path, "run", **other, train__resume_objectives="reset")[2:])
    assert ended.returncode == 0, ended.stderr
    assert not CheckpointReader(newest_checkpoint(tmp_path / "run")).names("state/")


def test_an_average_is_left_and_begun_anew(undisturbed, shards, tmp_path):
    """A run goes on without train.ema, and then with it again: with the average of that checkpoint's weights."""
    shutil.copytree(undisturbed, tmp_path / "run")
    given = words(shards, tmp_path, "run", train__steps=STEPS + 1, train__ema=0)[2:]
    assert "train.ema 0.9 -> 0.0" in train(2, *given).stdout
    last = newest_checkpoint(tmp_path / "run")
    assert not CheckpointReader(last).names("ema/")
    with pytest.raises(UserError, match=f"{last.name}: holds no moving average"):
        load_model(str(tmp_path / "run"), ema=True)
    ended = train(2, *words(shards, tmp_path, "run", train__steps=STEPS + 2)[2:])
    assert f"train.ema: {last.name} holds no average; it begins with the weights" in ended.stdout
    before, after = CheckpointReader(last), CheckpointReader(newest_checkpoint(tmp_path / "run"))
    for name in (name.removeprefix("param/") for name in before.names("param/")):
        was, now = before.read_full(f"param/{name}"), after.read_full(f"param/{name}")
        momentum = (1 + STEPS + 2) / (10 + STEPS + 2)
        torch.testing.assert_close(after.read_full(f"ema/{name}"), momentum * was + (1 - momentum) * now)
    model = load_model(str(tmp_path / "run"), ema=True).model.state_dict()
    assert after.names("ema/")
    assert all(torch.equal(after.read_full(name), model[name.removeprefix("ema/")]) for name in after.names("ema/"))


def test_adapters_are_put_on_no_other_base(shards, moved, tmp_path):
    shutil.copytree(moved / "run", tmp_path / "run")
    folder = newest_checkpoint(tmp_path / "run")
    lora = adapted_text(tmp_path)  # the same weights in another place
    model = build_model(config.Model(name=VIT, weights=str(lora["model__weights"]), lora=config.Lora(2, towers="text")))
    load_trained(model, folder, read_manifest(folder))
    with pytest.raises(
        UserError, match=r"holds adapters on .*base\.safetensors, SHA-256 .*, and model\.lora is not set"
    ):
        load_trained(build_model(config.Model(name=VIT)), folder, read_manifest(folder))
    save_file(build_model(config.Model(name=VIT)).state_dict(), str(lora["model__weights"]))
    ended = train(1, *words(shards, tmp_path, "run", **lora, train__steps=STEPS + 1)[2:])
    assert ended.returncode == 2
    told = "holds adapters on .*base.safetensors, SHA-256 .*, but the base is another now: .*base.safetensors, SHA-256 "
    assert re.fullmatch(f"error: .*{told}.*\n", ended.stderr)
    (moved / "base.safetensors").rename(moved / "elsewhere.safetensors")
    with pytest.raises(
        UserError, match=r"their base cannot be built .*: model\.weights=.*base\.safetensors: no such file"
    ):
        load_model(str(moved / "run"))
    load_model(str(moved / "run"), str(moved / "elsewhere.safetensors"))


@pytest.fixture(scope="module")
def staged(shards, tmp_path_factory) -> Path:
    """A run whose images grow, whose texts lengthen and whose patches come back after step 4."""
    root = tmp_path_factory.mktemp("staged")
    out = run_ranks("training.py", 2, "none", "0", *words(shards, root, "whole", **STAGED))
    assert "stage 1 of 2, steps 1 to 4: images of 16 pixels, at most 8 tokens, 50 % of the patches dropped" in out
    assert "stage 2 of 2, steps 5 to 8: images of 32 pixels, at most 16 tokens\n" in out
    return root / "whole"


def stages_begun(run: Path) -> list[tuple[int, int, int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "image_size", "tokens", "patch_dropout")
    return [tuple(record[name] for name in names) for record in records if record.get("event") == "stage"]


def test_a_run_goes_on_before_at_and_after_the_border_of_a_stage(shards, staged, tmp_path):
    for step in (3, 4, 5):
        run_ranks("training.py", 2, "sigterm", step, *words(shards, tmp_path, "run", **STAGED), expect=75)
        assert newest_checkpoint(tmp_path / "run").name == f"step-0000000{step}"
    run_ranks("training.py", 2, "none", "0", *words(shards, tmp_path, "run", **STAGED))
    assert_same(tmp_path / "run", staged)
    assert stages_begun(tmp_path / "run") == stages_begun(staged) == [(1, 16, 8, 0.5), (5, 32, 16, 0.0)]


def test_stages_train_the_same_on_other_ranks_and_in_micro_batches(shards, staged, tmp_path):
    other = {"train__micro_batch": 4, "engine__zero_stage": 3}
    run_ranks("training.py", 1, "none", "0", *words(shards, tmp_path, "run", **STAGED, **other))
    assert losses(tmp_path / "run") == pytest.approx(losses(staged), rel=1e-5)


def test_a_stage_that_does_not_fit_ends_a_run_in_one_line(shards, tmp_path):
    stages = {"train__stages": "[{share: 1, image_size: 20}]"}
    ended = train(1, *words(shards, tmp_path, "run", **STAGED | stages)[2:])
    assert ended.returncode == 2
    told = r"train.stages\[0\].image_size=20: must be a multiple of the model's patches of 8: 16 or 24"
    assert re.fullmatch(f"error: {told}\n", ended.stderr), ended.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
