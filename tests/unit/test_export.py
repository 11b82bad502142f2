"""Exports for transformers, torch.export, ONNX: what others load has the model's features, and nothing half done."""

from __future__ import annotations

import importlib.util
import io
import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from clipdist.config import Clip, Model
from clipdist.data.decode import eval_image
from clipdist.data.tokens import make_tokenizer
from clipdist.data.transform import EvalTransform
from clipdist.errors import UserError
from clipdist.models import onnx_export
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import Exported, export_hugging_face, export_model
from clipdist.models.load import load_model
from clipdist.models.program_export import export_programs

TOOL = Path(__file__).parents[2] / "tools" / "export.py"
VISION = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}


def trained(folder: Path, loss: Clip | None = None, **more: Any) -> DualEncoder:
    path = folder / "mini.json"
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT, **more}))
    torch.manual_seed(7)
    model = build_model(Model(name=str(path)), loss).eval()
    for parameter in model.parameters():  # larger than the initial values: GELU and QuickGELU must come apart
        parameter.data.mul_(1.5)
    model.logit_scale.data.fill_(3.25)
    return model


@pytest.mark.parametrize("more", [{}, {"quick_gelu": True, "image_mean": [0.5, 0.4, 0.3]}], ids=["gelu", "quick"])
@torch.no_grad()
def test_a_picture_and_a_sentence_through_transformers(more: dict, tmp_path: Path) -> None:
    model = trained(tmp_path, text_cfg={**TEXT, "context_length": 16}, **more)
    export = export_hugging_face(model, tmp_path / "out" / "clip")
    assert export.error.difference < 1e-5
    assert export.left_out == ""
    space: dict[str, Any] = {}
    exec("\n".join(export.lines), space)
    theirs, processor = space["model"], space["processor"]
    assert isinstance(theirs, CLIPModel)
    assert isinstance(processor, CLIPProcessor)
    assert float(theirs.logit_scale) == 3.25
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inputs = processor(text=["a dog runs"], images=Image.fromarray(pixels), return_tensors="pt")
    found = theirs.eval()(**inputs)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    image, text = (
        model.encode_image(eval_image(file.getvalue(), EvalTransform(32))[None]),
        make_tokenizer(model.spec)(["a dog runs"]),
    )
    assert float((F.normalize(image) - found.image_embeds).abs().max()) < 1e-5
    assert float((F.normalize(model.encode_text(text)) - found.text_embeds).abs().max()) < 1e-5


def test_a_folder_comes_back_as_it_went(tmp_path: Path) -> None:
    model = trained(tmp_path, quick_gelu=True, image_std=[0.2, 0.3, 0.4])
    export_hugging_face(model, tmp_path / "clip")
    loaded = load_model(str(tmp_path / "clip"))
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in model.state_dict().items())
    assert loaded.tokenizer.fingerprint() == make_tokenizer(model.spec).fingerprint()
    again = build_model(Model(name=model.spec.name, weights=str(tmp_path / "clip")))
    assert again.spec.image_std == (0.2, 0.3, 0.4)
    export_hugging_face(loaded.model, tmp_path / "twice")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "clip" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_a_bias_is_left_out_and_said(tmp_path: Path) -> None:
    export = export_hugging_face(trained(tmp_path, Clip(loss="sigmoid")), tmp_path / "clip")
    assert export.left_out == "logit_bias"
    assert load_model(str(tmp_path / "clip")).model.logit_bias is None


def test_towers_that_transformers_has_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a ResNet image tower, .* take --format open_clip or torch_export"):
        export_hugging_face(trained(tmp_path, vision_cfg=RESNET), tmp_path / "clip")
    cbow = build_model(Model(name="configs/models/tiny_cbow.json"))
    lstm = build_model(Model(name="configs/models/tiny_lstm.json"))
    for model, what in ((cbow, "a CBOW"), (lstm, "an LSTM")):
        with pytest.raises(UserError, match=f"has {what} text tower"):
            export_hugging_face(model, tmp_path / "clip")
    assert not (tmp_path / "clip").exists()


def test_what_is_in_the_way_stays(tmp_path: Path) -> None:
    model = trained(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "p.text.pt2").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match="is there already"):
            export_hugging_face(model, tmp_path / name)
    with pytest.raises(UserError, match="cannot be written"):
        export_hugging_face(model, tmp_path / "file" / "clip")
    with pytest.raises(UserError, match="cannot be written"):
        export_programs(model, tmp_path / "file" / "p")
    with pytest.raises(UserError, match=r"p\.text\.pt2 is a folder"):
        export_programs(model, tmp_path / "p")
    assert (tmp_path / "full" / "kept").read_text() == "x"
    (tmp_path / "empty").mkdir()
    export_hugging_face(model, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_features_that_differ_leave_nothing_behind(tmp_path: Path) -> None:
    model = trained(tmp_path)
    before = sorted(tmp_path.iterdir())
    model.visual.proj.data[0, 0] = float("nan")  # type: ignore[union-attr,index]
    with pytest.raises(RuntimeError, match="its features differ from the model's by nan"):
        export_hugging_face(model, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, Exported]:
    """Made once: tracing takes seconds."""
    folder = tmp_path_factory.mktemp("programs")
    model = trained(folder)
    return model, export_programs(model, folder / "mini")


@torch.no_grad()
def test_programs_take_batches_of_any_size(programs: tuple[DualEncoder, Exported]) -> None:
    model, export = programs
    assert tuple(file.name for file in export.files) == ("mini.image.pt2", "mini.text.pt2")
    space: dict[str, Any] = {}
    exec("\n".join(export.lines), space)
    for count in (1, 5):
        image = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        tokens = make_tokenizer(model.spec)(["a dog runs"] * count)
        wanted = model.encode_image(image), model.encode_text(tokens)
        torch.testing.assert_close(space["encode_image"](image), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(space["encode_text"](tokens), wanted[1], rtol=1e-5, atol=1e-5)


def test_programs_hold_one_tower_each_and_no_pickle(programs: tuple[DualEncoder, Exported]) -> None:
    _, export = programs
    for file, own, other in zip(export.files, ("visual", "token_embedding"), ("token_embedding", "visual")):
        with zipfile.ZipFile(file) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        weights = next(data for name, data in contents.items() if name.endswith("model_weights_config.json")).decode()
        assert own in weights
        assert other not in weights
        # torch.save writes an archive of its own, plain pickle begins with its protocol
        others = {name: data for name, data in contents.items() if "/weight_" not in name and "/tensor_" not in name}
        assert not [name for name, data in others.items() if data.startswith((b"PK", b"\x80"))]


def test_a_program_is_no_start_of_training(programs: tuple[DualEncoder, Exported]) -> None:
    model, export = programs
    with pytest.raises(UserError, match=r"a torch\.export program .* cannot be trained from"):
        build_model(Model(name=model.spec.name, weights=str(export.file)))


LSTM = {"lstm": {"width": 8, "layers": 2, "bidirectional": True, "vocab_size": 1200, "context_length": 8}}


@pytest.mark.parametrize("text", [{"cbow": {"width": 8, "vocab_size": 600, "context_length": 8}}, LSTM])
def test_a_resnet_and_the_projects_own_text_towers_become_programs(text: dict[str, Any], tmp_path: Path) -> None:
    model = trained(tmp_path, vision_cfg=RESNET, text_cfg=text)
    assert export_programs(model, tmp_path / "rn").error.difference < 1e-5


@pytest.mark.parametrize("text", [{**TEXT, "layers": 1}, LSTM], ids=["clip", "lstm"])
@torch.no_grad()
def test_onnx_files_take_batches_of_any_size(
    text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tmp_path, vision_cfg={**VISION, "layers": 1}, text_cfg=text)
    monkeypatch.setattr(onnx_export, "LARGEST_BYTES", 45_000)  # the text tower's weights go to a file of their own
    export = onnx_export.export_onnx(model, tmp_path / "out" / "mini")
    assert export.error.difference < 1e-5
    names = ["mini.image.onnx", "mini.text.onnx", "mini.text.onnx.data"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [file.name for file in export.files] == names
    assert str(Path.cwd()).encode() not in b"".join(file.read_bytes() for file in export.files)
    space: dict[str, Any] = {}
    exec("\n".join(export.lines), space)
    for count in (1, 5):
        image = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        tokens = make_tokenizer(model.spec)(["a dog runs"] * count)
        for found, wanted in (
            (space["encode_image"](image.numpy()), model.encode_image(image)),
            (space["encode_text"](tokens.numpy()), model.encode_text(tokens)),
        ):
            torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)


def test_weights_in_half_precision(tmp_path: Path) -> None:
    model = trained(tmp_path, quick_gelu=True)
    file = export_model(model, tmp_path / "half.safetensors", half=True)
    folder = export_hugging_face(model, tmp_path / "half", half=True)
    again = build_model(Model(name=model.spec.name, weights=str(file.file))).state_dict()
    for name, value in load_model(str(tmp_path / "half")).model.state_dict().items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, model.state_dict()[name].half().float())
    assert 1e-5 < file.error.difference < 1e-2
    assert folder.error.difference == pytest.approx(file.error.difference, abs=1e-5)
    assert 0.999 < file.error.cosine < 1
    space: dict[str, Any] = {}
    exec("\n".join(folder.lines), space)
    assert space["model"].dtype == torch.float32
    assert file.file.stat().st_size < 0.6 * export_model(model, tmp_path / "whole.safetensors").file.stat().st_size
    model.visual.proj.data[0, 0] = 1e5  # type: ignore[union-attr,index]
    with pytest.raises(UserError, match=r"visual\.proj holds 1e\+05, and fp16 ends at 65504"):
        export_model(model, tmp_path / "half.safetensors", half=True)


def test_int8_by_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path, vision_cfg={**VISION, "layers": 1}, text_cfg={**TEXT, "layers": 1})
    source = export_model(model, tmp_path / "source.safetensors")
    arguments = [str(source.config), "--weights", str(source.file), "--out", str(tmp_path / "mini")]
    main = runpy.run_path(str(TOOL))["main"]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments, "--format", "onnx", "--dtype", "int8", "--json"])
    assert main() == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    assert 1e-4 < record["max_difference"] < 0.1
    assert 0.99 < record["min_cosine"] < 1
    assert f"for the rounding to int8 (lowest cosine {record['min_cosine']:.5f})" in printed
    text = onnx.load(record["files"][1])
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in text.graph.node}
    largest = max(text.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    assert (largest.data_type, list(largest.dims)) == (onnx.TensorProto.UINT8, [600, 16])  # the token embedding
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments, "--dtype", "int8"])
    with pytest.raises(UserError, match="--dtype int8: not with --format open_clip, which has fp32, fp16"):
        main()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments, "--format", "onnx"])
    with pytest.raises(UserError, match=r"--format onnx: needs onnx and .* pip install .* -e '\.\[onnx\]'"):
        main()


def test_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(tmp_path, Clip(loss="sigmoid"))
    source = export_model(model, tmp_path / "source.safetensors")
    out = tmp_path / "clip"
    arguments = [str(source.config), "--weights", str(source.file), "--out", str(out), "--format", "hugging_face"]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments, "--json"])
    assert runpy.run_path(str(TOOL))["main"]() == 0
    printed = capsys.readouterr().out
    assert f'model = CLIPModel.from_pretrained("{out}")' in printed
    record = json.loads(printed.splitlines()[-1])
    assert (record["format"], record["files"], record["step"]) == ("hugging_face", [str(out)], None)
    assert record["max_difference"] < 1e-5
