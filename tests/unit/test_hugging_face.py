"""Folders of Hugging Face's CLIP: read as transformers reads them, refused in one line, and the way back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from clipdist.config import Model
from clipdist.errors import UserError
from clipdist.models import clip_model, hugging_face
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.load import load_model
from clipdist.models.spec import ModelSpec, resolve_spec

WIDE = {"hidden_size": 16, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**WIDE, "vocab_size": 600, "max_position_embeddings": 8, "bos_token_id": 598, "eos_token_id": 599}
VISION = {**WIDE, "image_size": 32, "patch_size": 8}
PIXELS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}


def clip_folder(folder: Path, tokenizer: CLIPTokenizer | None = None, shards: str = "1GB", **changes: Any) -> CLIPModel:
    """Writes a random CLIPModel as transformers does; returns it. `changes` go into both towers' configuration."""
    text = {**TEXT, **{key: value for key, value in changes.items() if key not in VISION.keys() - TEXT.keys()}}
    vision = {**VISION, **{key: value for key, value in changes.items() if key not in TEXT.keys() - WIDE.keys()}}
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    for parameter in model.parameters():  # larger than the initial values: GELU and QuickGELU must come apart
        parameter.data.mul_(1.5)
    model.save_pretrained(folder, max_shard_size=shards)
    vocabulary, merges = hugging_face.clip_encoding(600)
    (tokenizer or CLIPTokenizer(vocab=vocabulary, merges=merges)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return model


def model_json(folder: Path, **vision: Any) -> str:
    """The same architecture in open_clip's form."""
    same = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8, "mlp_ratio": 3.5}
    described = {
        "embed_dim": 12,
        "vision_cfg": {**same, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 600, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 3.5},
    }
    path = folder / "same.json"
    path.write_text(json.dumps(described))
    return str(path)


@torch.no_grad()
def difference(model: DualEncoder, theirs: CLIPModel, end: int = 599) -> float:
    """Largest difference of normalised features."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(3, 590, (3, 8), generator=generator)
    tokens[:, 5:] = 0
    tokens[range(3), [2, 4, 5]] = end
    mean, std = (torch.tensor(PIXELS[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    found = theirs(input_ids=tokens, pixel_values=(image / 255 - mean) / std)
    model.eval()
    mine = model.encode_image(image), model.encode_text(tokens)
    pairs = ((mine[0], found.image_embeds), (mine[1], found.text_embeds))
    return max(float((F.normalize(a) - F.normalize(b)).abs().max()) for a, b in pairs if a is not None)


@pytest.mark.parametrize(
    "changes",
    [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 0.3}, {"intermediate_size": 57}],
    ids=["quick", "gelu", "argmax", "eps", "ratio"],
)
def test_a_folder_gives_the_features_of_transformers(changes: dict, tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path / "clip", **changes)
    loaded = load_model(str(tmp_path / "clip"))
    assert difference(loaded.model, theirs) < 1e-5
    assert loaded.model.logit_scale.item() == theirs.logit_scale.item()
    spec = loaded.model.spec
    assert spec.quick_gelu == (changes.get("hidden_act") != "gelu")
    assert (spec.image_mean, spec.image_std) == ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    assert (loaded.label, loaded.run_dir, loaded.step) == ("clip (Hugging Face)", None, None)
    ids = loaded.tokenizer(["a dog"])[0]
    found = CLIPTokenizer.from_pretrained(tmp_path / "clip")(["a dog"])["input_ids"][0]
    assert ids[: len(found)].tolist() == found


def test_several_files_and_half_precision(tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path / "clip", shards="20KB")
    assert len(list((tmp_path / "clip").glob("model-*.safetensors"))) > 2
    assert difference(load_model(str(tmp_path / "clip")).model, theirs) < 1e-5
    theirs.half().save_pretrained(tmp_path / "half")
    half = build_model(Model(name=str(tmp_path / "clip"), weights=str(tmp_path / "half")))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    (tmp_path / "clip" / "model-00001-of-00006.safetensors").unlink(missing_ok=True)
    next((tmp_path / "clip").glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"which model\.safetensors\.index\.json names, is missing"):
        load_model(str(tmp_path / "clip"))


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    vocabulary, merges = hugging_face.clip_encoding(600)
    turned = {token: (number + 50) % 600 for token, number in vocabulary.items()}  # the end mark: no longer the highest
    theirs = clip_folder(tmp_path, CLIPTokenizer(vocab=turned, merges=merges), bos_token_id=48, eos_token_id=49)
    loaded = load_model(str(tmp_path))
    assert loaded.model.spec.tokenizer["kind"] == "hf"
    assert difference(loaded.model, theirs, end=49) < 1e-5
    assert loaded.tokenizer(["a dog"])[0, 0] == 48
    assert (loaded.tokenizer(["a dog"])[0] == 49).any()


def test_training_starts_from_a_folder_under_a_name_of_ones_own(tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path / "clip")
    shutil.move(tmp_path / "clip" / "tokenizer.json", tmp_path / "tokenizer.json")  # the weights need none
    cfg = Model(name=model_json(tmp_path), weights=str(tmp_path / "clip"))
    spec = resolve_spec(cfg)
    assert (spec.quick_gelu, spec.image_mean) == (True, (0.5, 0.4, 0.3))
    assert difference(build_model(cfg), theirs) < 1e-5
    with pytest.raises(UserError, match=r"no tokenizer in it .* model\.name=NAME model\.weights=FOLDER"):
        load_model(str(tmp_path / "clip"))
    larger = build_model(Model(name=model_json(tmp_path, image_size=64), weights=str(tmp_path / "clip")))
    assert larger.visual.positional_embedding.shape == (65, 16)


@pytest.mark.parametrize(
    ("vision", "complaint"),
    [
        ({"head_width": 4}, r"vision_config\.num_attention_heads is 2, the model has 4"),  # no shape shows it
        ({"layers": 3}, r"vision_config\.num_hidden_layers is 2, the model has 3"),
        ({"layers": [1, 1, 1, 1]}, "a ResNet image tower"),
        ({"ls_init_value": 0.1}, r"vision_cfg\.ls_init_value=0\.1"),
    ],
)
def test_a_name_that_is_another_model(vision: dict, complaint: str, tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    with pytest.raises(UserError, match=complaint):
        build_model(Model(name=model_json(tmp_path, **vision), weights=str(tmp_path / "clip")))


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "bert"}, "Hugging Face's bert architecture; only clip and siglip are read"),
        ({"model_type": "siglip2"}, "a variable number .NaFlex. is not read; take its weights of a fixed resolution"),
        ({"model_type": "siglip"}, "vision_config.layer_norm_eps must be 1e-06"),
        ({"model_type": None}, "unnamed architecture"),
        ({"text_config": {**TEXT, "hidden_act": "relu"}}, "hidden_act is quick_gelu of the pictures, relu of the text"),
        ({"vision_config": {**VISION, "num_channels": 1}}, "pictures of 1 channels, not 3"),
        ({"vision_config": {**VISION, "num_hidden_layers": 0}}, "num_hidden_layers is 0"),
        ({"vision_config": {**VISION, "num_attention_heads": 0}}, "not a configuration of clip"),
        ({"vision_config": "none"}, "not a configuration of clip"),
        ({"text_config": {**TEXT, "max_position_embeddings": 9}}, r"is \[8, 16\], the model wants \[9, 16\]"),
    ],
)
def test_configurations_that_are_refused(config: dict, complaint: str, tmp_path: Path) -> None:
    clip_folder(tmp_path)
    rewrite(tmp_path / "config.json", **config)
    with pytest.raises(UserError, match=complaint):
        load_model(str(tmp_path))


def test_broken_files_of_a_folder(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    rewrite(tmp_path / "preprocessor_config.json", image_mean=[0.5])
    with pytest.raises(UserError, match="image_mean takes three numbers"):
        load_model(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="no weights in it"):
        load_model(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="does not name this folder's weight files"):
        load_model(str(tmp_path))
    index.unlink()
    with pytest.raises(UserError, match="a file of a Hugging Face model; name its folder"):
        build_model(Model(name=model_json(tmp_path), weights=str(tmp_path / "elsewhere.safetensors")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"a folder without config\.json"):
        resolve_spec(Model(name="ViT-B-32", weights=str(tmp_path)))


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


def test_pickled_weights_are_read_as_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = clip_folder(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    assert difference(load_model("clip").model, theirs) < 1e-5
    torch.save({"x": Payload()}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(UserError, match="read safely"):
        load_model("clip")
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_no_run(tmp_path: Path) -> None:
    clip_folder(tmp_path)
    with pytest.raises(UserError, match="only a run folder has steps"):
        load_model(str(tmp_path), step=3)
    with pytest.raises(UserError, match="a Hugging Face folder has weights of its own"):
        load_model(str(tmp_path), weights="openai")


def test_names_and_shapes_there_and_back(tmp_path: Path) -> None:
    theirs = clip_folder(tmp_path).state_dict()
    there = hugging_face.to_ours(theirs)
    back = hugging_face.to_theirs(there)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.items())
    assert hugging_face.to_ours({"text_model.embeddings.position_ids": torch.arange(8)}) == {}


def test_no_description_for_what_it_cannot_say() -> None:
    def reason(**changes: Any) -> str:
        model = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
        for key, value in changes.items():
            section, _, field = key.partition("__")
            model[section] = {field: value}
        tokenizer = {"kind": "bpe", "vocab_size": 49408, "options": {}}
        return clip_model.inexpressible(ModelSpec("x", 8, 32, 77, (0, 0, 0), (1, 1, 1), tokenizer, model, False))

    assert reason() == ""
    assert reason(vision_cfg__timm_model_name="resnet18") == "timm's image tower resnet18"
    assert reason(text_cfg__hf_model_name="roberta-base") == "the Hugging Face text tower roberta-base"
    assert reason(text_cfg__no_causal_mask=True) == "text_cfg.no_causal_mask=True"
    assert reason(text_cfg__pool_type="last") == "text_cfg.pool_type='last'"
    assert reason(vision_cfg__norm_kwargs={"eps": 1e-6}) == ""
    assert reason(vision_cfg__norm_kwargs={"bias": False}) == "vision_cfg.norm_kwargs={'bias': False}"
