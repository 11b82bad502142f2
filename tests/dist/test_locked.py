"""Training on the features of locked towers that were computed once, beside training that runs the towers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import records
from dist.launch import train
from pairs import write_pairs
from safetensors.torch import save_file

from clipdist import config
from clipdist.errors import exit_code
from clipdist.evals.locked import LockedTowers
from clipdist.models.build import build_model
from tools import eval_retrieval

TOWERS = {
    "LiT": ("configs/models/tiny_vit.json", ["model.lock_image=true", "objectives.distill={weight: 10}"]),
    "projections": ("model.json", ["model.lock_image=true", "model.lock_text=true", "data.caption=all"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with a damaged picture, and the JSON of a model with pre-trained towers' form."""
    folder = tmp_path_factory.mktemp("locked")
    write_pairs(folder / "train", 70, bad={5: b"junk"})
    write_pairs(folder / "val", 20)
    _write_model(folder)
    return folder


def _write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, PreTrainedTokenizerFast

    words = "a red green blue grey square at the left right top bottom of field with".split()  # noqa: SIM905
    numbers = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    start = ("[UNK]", numbers["[UNK]"])  # as BERT's, so that no text is all padding
    backend.post_processor = processors.TemplateProcessing(single="[UNK] $A", special_tokens=[start])
    bert = folder / "bert"
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(bert)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(numbers), pad_token_id=0, **sizes).save_pretrained(bert)
    timm = {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}
    text = {
        "hf_model_name": "bert",
        "hf_model_pretrained": False,
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    (folder / "model.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": timm, "text_cfg": text}))


@pytest.mark.parametrize("towers", TOWERS)
def test_kept_features_train_as_the_towers_do(
    towers: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, locks = TOWERS[towers]
    model = str(folder / model) if model == "model.json" else model
    words = [f"data.train={folder / 'train'}", f"data.val={folder / 'val'}", "data.crop_scale_min=1", "train.steps=6"]
    if towers == "LiT":  # distilled from the start, whose image tower is the locked one
        torch.manual_seed(1)
        save_file(build_model(config.Model(name=model)).state_dict(), folder / "start.safetensors")
        words += [f"model.weights={folder / 'start.safetensors'}"]
    words += [f"model.name={model}", *locks, "data.max_bad_share=0.2", f"run.root={folder}", f"data.cache={folder}"]
    cached = ["data.cache_features=true"]
    ways = {
        "towers": (1, []),
        "kept": (1, cached),
        "reused": (2, [*cached, "train.micro_batch=4", "engine.zero_stage=2"]),
    }
    for way, (world, more) in ways.items():
        ended = train(world, *words, *more, f"run.name={towers}_{way}")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        computed = ended.stdout.count("features of the locked image tower")
        assert computed == (2 if way == "kept" else 0), ended.stdout  # the training shards, the validation shards
    curves = {way: [r["loss"] for r in records(folder / f"{towers}_{way}", "train")] for way in ways}
    assert len(curves["towers"]) == 6
    if towers == "LiT":
        terms = [record["loss/distill"] for record in records(folder / "LiT_reused", "train")]
        assert terms[0] < 1e-9  # in the first step the model is the teacher
        assert min(terms[1:]) > 1e-7
    for way in ("kept", "reused"):
        assert curves[way] == pytest.approx(curves["towers"], rel=1e-5)
        last, wanted = (records(folder / f"{towers}_{name}", "val")[-1] for name in (way, "towers"))
        assert all(last[name] == wanted[name] for name in last if name.startswith(("t2i", "i2t")))
    _evaluate_kept(folder, f"{towers}_kept", wanted["t2i_r1"], monkeypatch, capsys)
    bad = [record["key"] for record in records(folder / f"{towers}_kept", "event") if record["event"] == "bad_sample"]
    assert set(bad) <= {"000000005"}


def _evaluate_kept(folder: Path, run: str, t2i_r1: float, monkeypatch, capsys) -> None:
    """tools/eval_retrieval.py takes the features that training kept, and measures what validation measured."""
    monkeypatch.setattr(sys, "argv", ["eval_retrieval.py", str(folder / run), str(folder / "val"), "--json"])
    monkeypatch.setattr(LockedTowers, "_compute", lambda self, name, features, shards: shards and pytest.fail(name))
    assert exit_code(eval_retrieval.main) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["t2i_r1"] == t2i_r1


def test_what_cannot_be_kept_is_refused(folder: Path) -> None:
    words = [f"data.train={folder / 'train'}", f"run.root={folder}", "run.name=refused", "data.cache_features=true"]
    for more, line in {
        (): "data.cache_features=True: must come with model.lock_image=true or model.lock_text=true",
        ("model.lock_image=true",): "data.crop_scale_min=0.9: must be 1 with data.cache_features and model.lock_image",
        ("model.lock_image=true", "data.crop_scale_min=1", "data.flip=0.5"): "data.flip=0.5: must be 0 with",
    }.items():
        ended = train(1, *words, *more)
        assert ended.returncode == 2
        assert line in ended.stderr, ended.stderr
