"""Adapters without their base: what peft puts on a model of transformers, and the folder that clipdist loads."""

from __future__ import annotations

import json
import math
import runpy
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from unit.test_hugging_face import clip_folder, model_json

from clipdist.checkpoint.format import checkpoint_of, read_manifest
from clipdist.config import Clip, Config, Lora, Model, Objectives
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.interpolate import save_checkpoint
from clipdist.models.load import load_model

TOOL = Path(__file__).parents[2] / "tools" / "export.py"


def lora_run(folder: Path, model: Model, clip: Clip | None = None) -> DualEncoder:
    """Writes a run whose adapters are no longer zero; returns its model, adapters and base apart."""
    torch.manual_seed(Config().train.seed)
    adapted = build_model(model, clip).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1) if ".lora_" in name else parameter.data.mul_(1.1)
    locked = {name for name, value in adapted.named_parameters() if not value.requires_grad}
    trained = {name: value for name, value in adapted.state_dict().items() if name not in locked}
    state = {"model": adapted.spec.to_dict(), "base": asdict(adapted.base)}
    settings = Config(model=model, objectives=Objectives(clip=clip or Clip()))
    save_checkpoint(folder, trained, settings, state, {name for name, _ in adapted.named_buffers()})
    return adapted


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[list[str], dict[str, Any]]:
    arguments, sys.argv = sys.argv, ["export.py", *map(str, words), "--json"]
    try:
        assert runpy.run_path(str(TOOL))["main"]() == 0
    finally:
        sys.argv = arguments
    *lines, record = capsys.readouterr().out.splitlines()
    return lines, json.loads(record)


def loading(lines: list[str]) -> dict[str, Any]:
    """What the printed lines of Python give."""
    space: dict[str, Any] = {}
    exec("\n".join(line.strip() for line in lines if line.startswith("    ")), space)
    return space


@torch.no_grad()
def test_peft_puts_them_on_a_clip_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    clip_folder(base)
    ours = lora_run(tmp_path / "run", Model(name=str(base), weights=str(base), lora=Lora(rank=2)))
    lines, record = run(capsys, tmp_path / "run", "--out", tmp_path / "out", "--format", "peft")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (2, 16, str(base))
    written = load_file(tmp_path / "out/adapter_model.safetensors")
    assert record["parameters"] == sum(value.numel() for value in written.values())
    assert len(written) == 2 * sum(".lora_A." in name for name, _ in ours.named_parameters())

    theirs = loading(lines)["model"].eval()
    assert isinstance(theirs, peft.PeftModel)
    image = torch.rand(2, 3, 32, 32) * 255
    tokens = torch.tensor([[598, 5, 6, 7, 599, 0, 0, 0], [598, 9, 8, 7, 6, 5, 4, 599]])
    found = theirs(input_ids=tokens, pixel_values=(image / 255 - ours.image_mean) / ours.image_std)
    for mine, features in (
        (ours.encode_pixels(image), found.image_embeds),
        (ours.encode_text(tokens), found.text_embeds),
    ):
        assert float((F.normalize(mine) - features).abs().max()) < 1e-5
    assert float(theirs.logit_scale) == pytest.approx(float(ours.logit_scale), abs=1e-5)
    plain = load_model(str(base)).model
    assert float((F.normalize(plain.encode_text(tokens)) - found.text_embeds).abs().max()) > 0.01


@torch.no_grad()
def test_peft_puts_them_on_the_transformer_of_a_text_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=600, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "bert")
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(600)}, unk_token="word1"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="word0").save_pretrained(tmp_path / "bert")
    text: dict[str, Any] = {"hf_model_name": str(tmp_path / "bert"), "hf_tokenizer_name": str(tmp_path / "bert")}
    described = json.loads(Path(model_json(tmp_path)).read_text())
    text |= {"hf_proj_type": "linear", "hf_pooler_type": "mean_pooler", "context_length": 8}
    (tmp_path / "model.json").write_text(json.dumps(described | {"text_cfg": text}))
    ours = lora_run(tmp_path / "run", Model(name=str(tmp_path / "model.json"), lora=Lora(rank=2)))
    lines, _ = run(capsys, tmp_path / "run", "--out", tmp_path / "out", "--format", "peft")
    assert any("left out" in line and "the image tower, the projection" in line for line in lines)
    theirs = loading(lines)["model"].eval()
    tokens = torch.randint(1, 600, (2, 8))
    mine = ours.text.transformer(input_ids=tokens).last_hidden_state
    assert float((theirs(input_ids=tokens).last_hidden_state - mine).abs().max()) < 1e-5
    plain = BertModel.from_pretrained(tmp_path / "bert").eval()
    assert float((plain(input_ids=tokens).last_hidden_state - mine).abs().max()) > 0.01


@torch.no_grad()
def test_an_adapter_folder_loads_onto_its_base_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, file = "configs/models/tiny_rn.json", tmp_path / "base.safetensors"
    save_file(build_model(Model(name=name)).state_dict(), file)
    model = Model(name=name, weights=str(file), lora=Lora(rank=2, towers="text"), lock_image=True)
    ours = lora_run(tmp_path / "run", model, Clip(loss="sigmoid"))
    lines, record = run(capsys, tmp_path / "run", "--out", tmp_path / "out", "--format", "adapter")
    count = sum(value.numel() for value in ours.parameters() if value.requires_grad)
    assert record["parameters"] == count
    held = read_manifest(checkpoint_of(tmp_path / "out")).tensors
    assert sum(math.prod(entry["shape"]) for name, entry in held.items() if name.startswith("param/")) == count
    tokens = torch.randint(1, 500, (2, ours.spec.context_length))
    loaded = loading(lines)["model"]
    assert float((loaded.encode_text(tokens) - ours.encode_text(tokens)).norm()) < 1e-5
    assert torch.equal(loaded.logit_bias, ours.logit_bias)
    file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"their base cannot be built \(--weights says where"):
        load_model(str(tmp_path / "out"))
    moved = load_model(str(tmp_path / "out"), str(tmp_path / "moved.safetensors")).model
    assert torch.equal(moved.encode_text(tokens), loaded.encode_text(tokens))
    save_file(build_model(Model(name=name)).state_dict(), file)
    with pytest.raises(UserError, match=r"holds adapters on .*base\.safetensors, SHA-256 .*, but the base is another"):
        load_model(str(tmp_path / "out"))


def test_what_peft_cannot_hold_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    clip_folder(base)
    own, name, folder = model_json(tmp_path), str(base), str(base)
    weights = tmp_path / "w.safetensors"
    save_file(build_model(Model(name=own, weights=folder)).state_dict(), weights)
    (tmp_path / "larger").mkdir()
    larger = model_json(tmp_path / "larger", image_size=48)
    lora = Lora(rank=2)
    cases = [
        (Model(name="configs/models/tiny_rn.json", lora=lora), "has a ResNet image tower, .* take --format adapter"),
        (Model(name=name, weights=folder, lora=Lora(rank=2, towers="text")), r"more than adapters trained \(visual\."),
        (Model(name=own, lora=lora), "needs the base of the adapters as a Hugging Face folder: this one was drawn"),
        (Model(name=own, weights=str(weights), lora=lora), r"write it by python .*--format hugging_face, and add"),
        (Model(name=larger, weights=folder, lora=lora), "was trained at 48 pixels, the folder's are 32"),
    ]
    for number, (model, told) in enumerate(cases):
        lora_run(tmp_path / f"run{number}", model)
        with pytest.raises(UserError, match=told) as ended:
            run(capsys, tmp_path / f"run{number}", "--out", tmp_path / "out", "--format", "peft")
        assert "\n" not in str(ended.value)
    made = tmp_path / "made"
    run(capsys, own, "--weights", weights, "--out", made, "--format", "hugging_face")  # as the message says
    run(capsys, tmp_path / "run3", "--out", tmp_path / "out", "--format", "peft", "--weights", made)
    with pytest.raises(UserError, match="is there already"):
        run(capsys, tmp_path / "run3", "--out", tmp_path / "out", "--format", "peft", "--weights", made)
    for form in ("peft", "adapter"):
        with pytest.raises(UserError, match=r"takes a run with adapters|no adapters"):
            run(capsys, own, "--weights", weights, "--out", tmp_path / "no", "--format", form)
