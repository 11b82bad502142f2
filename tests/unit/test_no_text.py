"""Models without a text tower: what they are, which tools take them, and that the others refuse in one line."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from wds_sets import ROOT, write_run, write_sets

import clipdist
from clipdist.config import Distill, Engine, Lora, Model, Optim
from clipdist.data.tokens import make_tokenizer
from clipdist.engine.optim import parameter_groups
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import export_model
from clipdist.models.image_export import export_image_tower
from clipdist.models.interpolate import save_run
from clipdist.models.layers import hidden_matrices, layers_behind
from clipdist.models.load import load_model
from clipdist.models.lora import base_of, merge_adapters
from clipdist.models.spec import ModelSpec, resolve_spec
from clipdist.objectives.teacher import check_teacher

TINY = str(ROOT / "configs/models/tiny_vit.json")
MODELS = ("tiny_vit", "tiny_rn", "rn10_cbow")  # open_clip's ViT and ResNet, timm's


def images(side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def drawn(name: str = TINY, with_text: bool = False, **settings: Any) -> DualEncoder:
    torch.manual_seed(5)
    return build_model(Model(name=name, **settings), with_text=with_text).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs a and b without, c with a text tower; sets; an image."""
    folder = tmp_path_factory.mktemp("no_text")
    write_sets(folder)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_run(folder / name, build_model(Model(name=TINY), with_text=False), {})
    write_run(folder / "c", 2)
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "red.png")
    return folder


def run(tool: str, *words: object) -> None:
    arguments, sys.argv = sys.argv, [tool, *map(str, words)]
    try:
        main = runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]
        main()
    finally:
        sys.argv = arguments


# The model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_is_the_image_tower_of_the_same_draw_without_its_projection(name: str) -> None:
    path = str(ROOT / f"configs/models/{name}.json")
    model, whole = drawn(path), drawn(path, with_text=True)
    assert model.text is None
    assert model.scalars == ()
    assert not model.spec.has_text
    assert model.spec.model == whole.spec.model
    assert ModelSpec.from_dict(json.loads(json.dumps(model.spec.to_dict()))) == model.spec
    assert {key.partition(".")[0] for key in model.state_dict()} == {"visual"}
    pixels = images(model.spec.image_size)
    found = model(image=pixels, hidden=pixels)
    assert found.keys() == {"image", "hidden"}
    for features in found.values():
        assert torch.equal(features, whole.encode_hidden(pixels))
    assert not torch.equal(whole(hidden=pixels)["hidden"][:, :8], whole.encode_image(pixels)[:, :8])
    with pytest.raises(UserError, match=r"tiny_vit|tiny_rn|rn10_cbow.*: the model has no text tower$"):
        model.encode_text(torch.zeros(1, 4, dtype=torch.int64))
    assert make_tokenizer(model.spec)(["a", "b"]).shape == (2, 0)


def test_a_description_may_have_no_text_tower(tmp_path: Path) -> None:
    described = json.loads(Path(TINY).read_text())
    del described["text_cfg"]
    path = tmp_path / "image.json"
    path.write_text(json.dumps(described))
    assert not resolve_spec(Model(name=str(path)), with_text=None).has_text
    model = build_model(Model(name=str(path)), with_text=None)
    assert isinstance(model.visual, nn.Module)
    with pytest.raises(UserError, match=r"image\.json: has no text_cfg, and a text tower is needed; describe one"):
        resolve_spec(Model(name=str(path)))
    described["text_cfg"] = 3
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"'text_cfg' is missing or of the wrong type"):
        resolve_spec(Model(name=str(path)), with_text=None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"word_vectors": "v.txt"}, r"word_vectors=v\.txt"),
        ({"lock_text": True}, "lock_text=true"),
        ({"text_unlocked_layers": 2}, "text_unlocked_layers=2"),
        ({"lora": Lora(towers="text")}, r"lora\.towers=text"),
    ],
)
def test_settings_of_a_text_tower_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.{named}: the model has no text tower; leave it out$"):
        resolve_spec(Model(name=TINY, **settings), with_text=False)


def test_locks_rates_and_adapters() -> None:
    model = drawn()
    model.prepare(Engine(activation_checkpointing=True))
    assert set(layers_behind(model).values()) == {0, 1, 2, 3}
    assert all(name.startswith("visual.") for name in hidden_matrices(model))
    assert parameter_groups(model, Optim(layer_decay=0.5))
    with pytest.raises(UserError, match=r"^model\.lock_image=true: nothing would be trained"):
        drawn(lock_image=True)
    biases = drawn(biases_only=True)
    assert {name.rpartition(".")[2] for name, p in biases.named_parameters() if p.requires_grad} <= {
        "bias",
        "in_proj_bias",
    }
    adapted, before = drawn(lora=Lora(rank=2)), drawn().encode_image(images())
    assert adapted.base == base_of(drawn(), Model(name=TINY))
    assert any(".lora_" in name for name, _ in adapted.named_parameters())
    merge_adapters(adapted)
    assert torch.allclose(adapted.encode_image(images()), before, atol=1e-6)


@torch.no_grad()
def test_weights_of_a_whole_model_and_of_an_image_tower(tmp_path: Path) -> None:
    whole = drawn(with_text=True)
    export_model(whole, tmp_path / "clip.safetensors")
    model = build_model(Model(name=TINY, weights=str(tmp_path / "clip.safetensors")), with_text=False)
    assert torch.equal(model.eval().encode_image(images()), whole.encode_hidden(images()))
    save_run(tmp_path / "run", model, {})
    with pytest.raises(UserError, match=r"run: has no text tower, and \S+tiny_vit\.json needs the weights of one"):
        build_model(Model(name=TINY, weights=str(tmp_path / "run")))
    again = build_model(Model(name=TINY, weights=str(tmp_path / "run")), with_text=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    export_image_tower(model, tmp_path / "tower.safetensors")
    again = build_model(Model(name=TINY, weights=str(tmp_path / "tower.safetensors")), with_text=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    small = json.loads(Path(TINY).read_text())
    small["vision_cfg"]["width"] = 16
    (tmp_path / "small.json").write_text(json.dumps(small))
    resnet = drawn(
        str(ROOT / "configs/models/tiny_rn.json"), with_text=True
    )  # an identity is in its projection's place
    export_model(resnet, tmp_path / "resnet.safetensors")
    for weights in (tmp_path / "resnet.safetensors", tmp_path / "resnet-run"):
        model = build_model(Model(name=resnet.spec.name, weights=str(weights)), with_text=False).eval()
        assert torch.equal(model.encode_image(images()), resnet.encode_hidden(images()))
        if weights.suffix:
            save_run(tmp_path / "resnet-run", model, {})
    with pytest.raises(UserError, match=r"does not fit .*visual\.class_embedding is \[32\], the model wants \[16\]"):
        build_model(
            Model(name=str(tmp_path / "small.json"), weights=str(tmp_path / "tower.safetensors")), with_text=False
        )


def test_a_checkpoint_is_loaded_and_heads_are_not(made: Path, tmp_path: Path) -> None:
    loaded = load_model(str(made / "a"))
    assert not loaded.model.spec.has_text
    assert loaded.tokenizer.context_length == 0
    model, preprocess, _ = clipdist.load(str(made / "a"))
    assert model.encode_image(preprocess(str(made / "red.png"))[None]).shape == (1, 32)
    model.add_module("heads", nn.ModuleDict({"simclr": nn.Linear(32, 8)}))
    save_run(tmp_path / "headed", model, {})
    again = load_model(str(tmp_path / "headed")).model
    assert again.state_dict().keys() == loaded.model.state_dict().keys()
    build_model(Model(name=TINY, weights=str(tmp_path / "headed")), with_text=False)


# Tools


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ("zero_shot", ["--data", "colours"]),
        ("eval_retrieval", ["pairs/test"]),
        ("search_images", ["pairs/test", "a dog"]),
        ("search_images", ["pairs/test", "red.png", "--index", "faiss"]),
        ("universal_perturbation", ["--data", "colours"]),
        ("eval_suite", ["--suite", "suite.yaml"]),
        ("interpolate", ["b", "--alpha", "0.5", "--target", "pairs/test", "--out", "mixed"]),
        ("interpolate", ["b", "--alpha", "0.5", "--keep", "colours", "--out", "mixed"]),
        ("export", ["--out", "x.safetensors"]),
        ("export", ["--out", "x", "--format", "hugging_face"]),
        ("export", ["--out", "x", "--format", "open_clip_folder"]),
    ],
)
def test_what_needs_a_text_tower_refuses(
    tool: str, words: list[str], made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    there = sorted(made.rglob("*"))
    with pytest.raises(UserError, match=r"^a: has no text tower; needed for [^\n]+$"):
        run(tool, "a", *words)
    assert sorted(made.rglob("*")) == there


def test_fine_tuning_on_pairs_and_distillation_refuse(made: Path) -> None:
    with pytest.raises(UserError, match=r"/a: has no text tower; needed for training on pairs$"):
        run("finetune", made / "colours", "--from", made / "a", "--out", made / "tuned", "--dry-run")
    assert not (made / "tuned").exists()
    with pytest.raises(UserError, match=r"^objectives\.distill\.teacher=\S+/a: has no text tower; needed for dist"):
        check_teacher(Distill(teacher=str(made / "a")), Model(name=TINY))


def test_tools_that_need_images_alone(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record() -> dict[str, Any]:
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    run("probe_cifar10", made / "a", "--data", made / "colours", "--finetune", "--seeds", 1, "--epochs", 1, "--json")
    probed = record()
    assert probed["features"] == 32
    assert probed["finetune"]
    (tmp_path / "suite.yaml").write_text(f"colours: {{data: {made / 'colours'}, task: probe}}\n")
    run("eval_suite", made / "a", "--suite", tmp_path / "suite.yaml", "--json")
    assert record()["models"][0]["results"][0]["accuracy"] == probed["accuracy"]
    run("search_images", made / "a", made / "pairs/test", made / "red.png", "--out", tmp_path / "s.png", "--json")
    assert record()["hits"]
    words = ["--alpha", 0.5, "--keep", made / "colours", "--probe", "--out", tmp_path / "mixed", "--json"]
    run("interpolate", made / "a", made / "b", *words)
    assert not load_model(record()["checkpoint"]).model.spec.has_text
    words = ["--classifier", "probe", "--pictures", 8, "--held-out", 8, "--passes", 1, "--method", "gradient", "--json"]
    run("universal_perturbation", made / "a", "--data", made / "colours", *words)
    assert record()["classifier"] == "probe"
    with pytest.raises(UserError, match=r"different architectures, whose weights cannot be averaged: "):
        run("interpolate", made / "a", made / "c", "--alpha", 0.5, "--out", tmp_path / "other")


@pytest.mark.parametrize("name", [*MODELS, "with_text"])
@torch.no_grad()
def test_an_exported_image_tower_is_that_of_its_library(name: str, tmp_path: Path) -> None:
    path = str(ROOT / f"configs/models/{'tiny_vit' if name == 'with_text' else name}.json")
    model = drawn(path, with_text=name == "with_text")
    export = export_image_tower(model, tmp_path / "tower.safetensors")
    assert export.error.difference < 1e-5
    space: dict[str, Any] = {}
    exec("\n".join(export.lines), space)
    pixels = images(model.spec.image_size)
    normal = (pixels / 255 - model.image_mean) / model.image_std
    assert torch.allclose(space["tower"](normal), model.encode_image(pixels), atol=1e-5)
    assert export.parameters == sum(p.numel() for name, p in model.named_parameters() if name.startswith("visual."))
    half = export_image_tower(model, tmp_path / "half.safetensors", half=True)
    assert 0 < half.error.difference < 1e-2
    with pytest.raises(UserError, match=r"must be a file that ends in \.safetensors$"):
        export_image_tower(model, tmp_path / "tower")


def test_a_program_of_the_image_tower_alone(made: Path, tmp_path: Path) -> None:
    run("export", made / "a", "--out", tmp_path / "a", "--format", "torch_export", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["a.image.pt2"]
    run("export", made / "a", "--out", tmp_path / "t.safetensors", "--format", "image_tower")
