"""Weights from files: OpenAI's TorchScript form, state dicts, refusals; and the way out: export to open_clip, and a
checkpoint loaded back."""

from __future__ import annotations

import argparse
import json
import pickle
import runpy
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipdist.checkpoint import writer as checkpoint
from clipdist.config import Clip, Model, load_config, to_yaml
from clipdist.data.tokens import make_tokenizer
from clipdist.errors import UserError
from clipdist.models import spec as spec_module
from clipdist.models import weights as weights_module
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.export import export_model
from clipdist.models.load import load_model
from clipdist.models.spec import resolve_spec
from clipdist.models.weight_facts import is_torchscript
from clipdist.models.weights import load_weights, openai_hashes

VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 2}
README = Path(__file__).parents[2] / "README.md"
TOOL = Path(__file__).parents[2] / "tools" / "export.py"


def description(vision: dict | None = None, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 16, "vision_cfg": vision or VIT, "text_cfg": TEXT, **more}


def model_json(folder: Path, vision: dict | None = None, name: str = "mini", **more: Any) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(description(vision, **more)))
    return str(path)


def source_model(vision: dict | None = None, **more: Any) -> torch.nn.Module:
    torch.manual_seed(3)
    model = open_clip.CLIP(**description(vision), **more)
    for parameter in model.parameters():  # larger than the initial values: GELU and QuickGELU must come apart
        parameter.data.mul_(1.5)
    return model.eval()


def openai_archive(path: Path, vision: dict) -> torch.nn.Module:
    """Writes a TorchScript archive like OpenAI's (fp16, three numbers among the tensors); returns its fp32 twin."""
    source: Any = source_model(vision, quick_gelu=True, cast_dtype=torch.float16)
    open_clip.convert_weights_to_fp16(source)
    del source._buffers["attn_mask"]
    source.attn_mask = torch.full((8, 8), float("-inf")).triu_(1)
    for name, value in (("input_resolution", 32), ("context_length", 8), ("vocab_size", 600)):
        vars(source).pop(name, None)
        source.register_buffer(name, torch.tensor(value))
    example = (torch.zeros(1, 3, 32, 32, dtype=torch.float16), torch.zeros(1, 8, dtype=torch.int64))
    traced = torch.jit.trace_module(source, {"forward": example}, strict=False, check_trace=False)
    traced.save(str(path))
    twin = source_model(vision, quick_gelu=True)
    facts = ("input_resolution", "context_length", "vocab_size")
    twin.load_state_dict({k: v.float() for k, v in source.state_dict().items() if k not in facts})
    return twin


def inputs(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 598, (3, 8), generator=generator)
    tokens[:, -1] = 599
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator), tokens


@torch.no_grad()
def differences(model: DualEncoder, other: Any) -> tuple[float, float]:
    """Largest differences of normalised image and text features to those of an open_clip model."""
    image, tokens = inputs(model.spec.image_size)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.spec.image_mean, model.spec.image_std))
    model.eval()
    mine = [torch.nn.functional.normalize(x) for x in (model.encode_image(image), model.encode_text(tokens))]
    theirs = (
        other.encode_image((image / 255 - mean) / std, normalize=True),
        other.encode_text(tokens, normalize=True),
    )
    return float((mine[0] - theirs[0]).abs().max()), float((mine[1] - theirs[1]).abs().max())


# OpenAI's files


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("vision", [VIT, RESNET], ids=["vit", "resnet"])
def test_openai_archive_needs_trust_and_gets_quick_gelu(vision: dict, tmp_path: Path) -> None:
    file = tmp_path / "mini.pt"
    twin = openai_archive(file, vision)
    name = model_json(tmp_path, vision)
    assert is_torchscript(file)
    with pytest.raises(UserError, match=r"whose SHA-256 [0-9a-f]{12}\.\.\. is not one of OpenAI's"):
        build_model(Model(name=name, weights=str(file)))
    model = build_model(Model(name=name, weights=str(file), trust_weights=True))
    assert model.spec.quick_gelu
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.logit_scale.shape == (1,)
    assert max(differences(model, twin)) < 1e-6
    wrong = build_model(Model(name=name))  # the same weights with GELU: the silent error that this prevents
    assert not wrong.spec.quick_gelu
    load_weights(wrong, str(file), trust=True)
    assert differences(wrong, twin)[1] > 1e-3


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_known_hash_needs_no_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mini.pt"
    twin = openai_archive(file, VIT)
    known = weights_module._sha256(file)
    monkeypatch.setattr(weights_module, "openai_hashes", lambda: {known})
    model = build_model(Model(name=model_json(tmp_path), weights=str(file)))
    assert max(differences(model, twin)) < 1e-6


def test_hashes_of_openai_are_sha256_and_include_rn50() -> None:
    hashes = openai_hashes()
    assert len(hashes) == 9
    assert all(len(digest) == 64 and int(digest, 16) for digest in hashes)
    assert "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762" in hashes


# State dicts


SETTINGS = argparse.Namespace(lr=0.1, out=Path("runs"), best=np.float64(31.5))
FILES = {  # the prefix of all names, the entry that holds the tensors, and what is beside it
    "plain": ("", "", {}),
    "training": ("module.", "state_dict", {"epoch": 3, "name": "x", "optimizer": {"lr": 0.1}}),
    "compiled": ("_orig_mod.", "", {}),
    "compiled, distributed": ("module._orig_mod.", "state_dict", {"args": SETTINGS}),
    "distributed, compiled": ("_orig_mod.module.", "model_state_dict", {"model": "ViT"}),
    "Lightning": ("model.", "state_dict", {"hyper_parameters": SETTINGS, "epoch": 3}),
    "model": ("", "model", {"args": SETTINGS, "best": np.float64(1), "model_ema": {"logit_scale": torch.ones(())}}),
    "DeepSpeed": ("", "module", {"global_steps": 7, "optimizer": None}),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("form", FILES)
def test_state_dicts_of_open_clip_load(
    form: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_model()
    prefix, entry, beside = FILES[form]
    tensors = {prefix + name: value for name, value in source.state_dict().items()}
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({entry: tensors, **beside} if entry else tensors, file)
    model = build_model(Model(name=model_json(tmp_path), weights=str(file)))
    assert not model.spec.quick_gelu
    assert max(differences(model, source)) < 1e-6
    two = "takes 'model' of its state dicts 'model', 'model_ema'" in capsys.readouterr().out
    assert two == (suffix == ".pt" and form == "model")


@pytest.mark.parametrize("form", ["plain", "training", "safetensors"])
def test_openais_tensors_saved_again_get_quick_gelu(form: str, tmp_path: Path) -> None:
    source = source_model(quick_gelu=True)
    facts = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(600)}
    tensors = {**source.state_dict(), **facts}
    file = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors} if form == "training" else tensors, file)
    model = build_model(Model(name=model_json(tmp_path), weights=str(file)))
    assert model.spec.quick_gelu
    assert max(differences(model, source)) < 1e-6


def test_positions_of_a_vit_are_interpolated_as_open_clip_does(tmp_path: Path) -> None:
    torch.save(source_model().state_dict(), tmp_path / "w.pt")
    larger = {**VIT, "image_size": 64}
    model = build_model(Model(name=model_json(tmp_path, larger), weights=str(tmp_path / "w.pt")))
    theirs = open_clip.CLIP(**description(larger))
    open_clip.load_checkpoint(theirs, str(tmp_path / "w.pt"))
    assert max(differences(model, theirs.eval())) < 1e-6


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {**source_model().state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (changed(visual__proj=torch.zeros(16, 8)), r"visual\.proj is \[16, 8\], the model wants \[16, 16\]"),
        (changed(ln_final__weight=None), r"text\.ln_final\.weight is missing \(1 are\)"),
        (changed(visual__extra=torch.zeros(1)), r"visual\.extra is not of this model \(1 such\)"),
        ({}, "holds no state dict"),
        ({"state_dict": 3, "epoch": 2.5}, r"holds no state dict .*, but 'state_dict' \(int\), 'epoch' \(float\)$"),
        ([1], r"holds no state dict .*, but an object of list$"),
        ({"encoder": changed()}, r"holds no state dict .*, but 'encoder' \(OrderedDict|dict\)$"),
        ({"fc.weight": torch.zeros(1)}, r"not one tensor is of this model; the file holds fc\.weight \.\.\.$"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict, complaint: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "w.pt")
    with pytest.raises(UserError, match=complaint):
        build_model(Model(name=model_json(tmp_path), weights=str(tmp_path / "w.pt")))


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", [b"not a model", b"", pickle.dumps(Payload())], ids=["text", "empty", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files_are_refused_and_run_nothing(
    content: bytes, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"not a (state dict that can be read safely|safetensors file)"):
        build_model(Model(name=model_json(tmp_path), weights=str(file)))
    assert not (tmp_path / "ran").exists()


def test_pickled_objects_inside_a_torch_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Payload()}, tmp_path / "w.pt")
    told = r"read safely: it holds objects of builtins\.getattr, pathlib\.Path, which might run code; save"
    with pytest.raises(UserError, match=told):
        build_model(Model(name=model_json(tmp_path), weights="./w.pt"))
    assert not (tmp_path / "ran").exists()


def test_unknown_tags_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its tags are openai, yfcc15m, cc12m"):
        resolve_spec(Model(name="RN50", weights="opena"))
    with pytest.raises(UserError, match="no such file"):
        resolve_spec(Model(name="RN50", weights="RN50.pt"))
    with pytest.raises(UserError, match="it has no tags, name a file"):
        resolve_spec(Model(name=model_json(tmp_path), weights="openai"))


def test_a_download_that_fails_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    model = build_model(Model(name=model_json(tmp_path)))
    object.__setattr__(model, "spec", resolve_spec(Model(name="RN50", weights="openai")))
    with pytest.raises(UserError, match=r"openai: cannot be fetched from timm/resnet50_clip\.openai/: Name or service"):
        load_weights(model, "openai")


# Export and loading back


def trained(name: str, clip: Clip | None = None, **settings: Any) -> DualEncoder:
    torch.manual_seed(7)
    model = build_model(Model(name=name, **settings), clip).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    model.logit_scale.data.fill_(3.25)
    return model


@pytest.mark.parametrize(
    "more",
    [{}, {"custom_text": True}, {"quick_gelu": True}, {"vision_cfg": RESNET}],
    ids=["clip", "custom", "quick", "rn"],
)
def test_exported_file_is_what_open_clip_loads(more: dict, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = trained(model_json(tmp_path, **more))
    export = export_model(model, tmp_path / "out" / "mini_exported.safetensors", {"step": 12})
    theirs, _, _ = open_clip.create_model_and_transforms(export.name, pretrained=str(export.file))
    assert type(theirs).__name__ == ("CustomTextCLIP" if "custom_text" in more else "CLIP")
    assert theirs.logit_scale.shape == ()
    assert theirs.logit_scale.item() == 3.25
    assert max(differences(model, theirs.eval())) < 1e-5
    assert export.error.difference < 1e-5
    tokenizer = open_clip.SimpleTokenizer(str(export.merges), context_length=8)
    assert torch.equal(tokenizer(["a dog runs"]), make_tokenizer(model.spec)(["a dog runs"]))
    again = build_model(Model(name=str(export.config), weights=str(export.file)))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_the_bias_of_the_sigmoid_loss_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(7)
    loss = Clip(loss="sigmoid", logit_bias_init=-7.5)
    model = build_model(Model(name=model_json(tmp_path)), loss).eval()
    export = export_model(model, tmp_path / "biased.safetensors")
    theirs = open_clip.create_model(export.name, pretrained=str(export.file))
    assert theirs.logit_bias.item() == -7.5
    again = build_model(Model(name=str(export.config), weights=str(export.file)), Clip(loss="sigmoid"))
    assert again.logit_bias is not None
    assert again.logit_bias.tolist() == [-7.5]
    run_folder(tmp_path / "run", model, step=3)
    loaded = load_model(str(tmp_path / "run")).model
    assert loaded.logit_bias is not None
    assert loaded.logit_bias.tolist() == [-7.5]
    # Weights of InfoNCE have no bias: it begins as configured. And InfoNCE leaves a bias out.
    plain = export_model(trained(model_json(tmp_path)), tmp_path / "plain.safetensors")
    fresh = build_model(Model(name=str(plain.config), weights=str(plain.file)), loss)
    assert fresh.logit_bias is not None
    assert fresh.logit_bias.tolist() == [-7.5]
    assert build_model(Model(name=str(export.config), weights=str(export.file))).logit_bias is None


def test_exported_file_remembers_quick_gelu_and_pixels(tmp_path: Path) -> None:
    model = trained(model_json(tmp_path, quick_gelu=True, image_mean=[0.5, 0.5, 0.5], image_std=[0.2, 0.2, 0.2]))
    export = export_model(model, tmp_path / "e.safetensors")
    spec = resolve_spec(Model(name=model_json(tmp_path, name="plain"), weights=str(export.file)))
    assert (spec.quick_gelu, spec.image_mean, spec.image_std) == (True, (0.5,) * 3, (0.2,) * 3)
    assert "image_mean=(0.5, 0.5, 0.5), image_std=(0.2, 0.2, 0.2)" in "\n".join(export.lines)


def test_a_model_that_open_clip_knows_is_exported_under_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(spec_module, "model_config", open_clip.get_model_config)  # with those registered here
    monkeypatch.setattr(spec_module, "model_names", open_clip.list_models)
    open_clip.add_model_config(model_json(tmp_path, name="known-mini"))
    open_clip.add_model_config(model_json(tmp_path, name="known-mini-quickgelu", quick_gelu=True))
    export = export_model(trained("known-mini"), tmp_path / "e.safetensors")
    assert (export.name, export.config) == ("known-mini", None)
    quick = trained("known-mini-quickgelu")
    export = export_model(quick, tmp_path / "q.safetensors")
    forced = build_model(Model(name="known-mini", weights=str(export.file)))
    assert forced.spec.quick_gelu
    assert export_model(forced, tmp_path / "f.safetensors").name == "known-mini-quickgelu"


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    for kind in ("CBOW", "LSTM"):
        with pytest.raises(UserError, match=f"no {kind} text tower"):
            export_model(trained(f"configs/models/tiny_{kind.lower()}.json"), tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_model(trained(model_json(tmp_path)), tmp_path / "e.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_model(trained(model_json(tmp_path)), tmp_path / "file" / "e.safetensors")


def run_folder(folder: Path, model: DualEncoder, step: int) -> Path:
    """A run with one checkpoint, in two parts, as two ranks of ZeRO would write it."""
    target = checkpoint.checkpoint_dir(folder, step)
    parts: list[list[checkpoint.Piece]] = [[], []]
    for name, value in model.named_parameters():
        flat, half = value.detach().flatten().clone(), value.numel() // 2
        for part, start, data in ((0, 0, flat[:half]), (1, half, flat[half:])):
            if data.numel():
                piece = checkpoint.Piece(f"param/{name}", tuple(value.shape), start, data.clone())
                parts[part].append(piece)
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in kept:
            parts[0].append(checkpoint.Piece(f"buffer/{name}", tuple(buffer.shape), 0, buffer.flatten().clone()))
    for rank, pieces in enumerate(parts):
        checkpoint.write_part(target, rank, pieces, attempt="a")
    state = {"model": model.spec.to_dict()}
    manifest = checkpoint.Manifest(step, step, step * 8, world=2, config={"data": {}}, order={}, state=state)
    checkpoint.write_manifest(target, manifest, attempt="a")
    return target


def test_runs_and_checkpoints_load_without_their_json(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    name = model_json(tmp_path, RESNET, quick_gelu=True)
    model = trained(name)
    model.visual.bn1.running_mean.fill_(0.125)  # type: ignore[union-attr,operator]
    run_folder(run, model, step=5)
    later = run_folder(run, trained(name, lock_image=True), step=10)
    Path(name).unlink()
    newest, older = load_model(str(run)), load_model(str(run), step=5)
    assert (newest.step, newest.label, newest.run_dir) == (10, "one, step 10", run)
    assert load_model(str(later)).step == 10
    inside = load_model(str(run / "checkpoints"), step=5)
    assert (inside.label, inside.run_dir) == ("one, step 5", run)
    assert not older.model.training
    assert older.model.spec.quick_gelu
    image, tokens = inputs()
    outputs, others = model(image=image, tokens=tokens), older.model(image=image, tokens=tokens)
    for mine, loaded in zip(outputs.values(), others.values(), strict=True):
        assert torch.equal(mine, loaded)
    assert older.tokenizer(["a dog"]).shape == (1, 8)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 5, 10"):
        load_model(str(run), step=7)
    with pytest.raises(UserError, match="a run has weights of its own"):
        load_model(str(run), weights="openai")


@torch.no_grad()
def test_the_lines_of_the_readme_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = README.read_text().partition("## In Python\n\n")[2].partition("\n\n")[0]
    model = trained(model_json(tmp_path))
    run_folder(tmp_path / "runs" / "demo", model, step=5)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "dog.jpg", format="PNG")
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(textwrap.dedent(lines), space)
    taken = torch.from_numpy(pixels[4:36].copy()).permute(2, 0, 1)[None]  # the centre
    assert torch.equal(space["image"], model.encode_image(taken))
    assert torch.equal(space["text"], model.encode_text(make_tokenizer(model.spec)(["a dog", "a cat"])))
    preprocess, tokenizer = space["preprocess"], space["tokenizer"]
    for same in (Path("dog.jpg"), Path("dog.jpg").read_bytes(), pixels, Image.open("dog.jpg").convert("RGBA")):
        assert torch.equal(preprocess(same)[None], taken)
    assert torch.equal(tokenizer("a dog"), tokenizer(["a dog"]))
    (tmp_path / "cut.jpg").write_bytes(b"no image")
    for name, complaint in (("cut.jpg", "cut.jpg: not an image"), ("x.jpg", "x.jpg: cannot be read")):
        with pytest.raises(UserError, match=complaint):
            preprocess(name)
    with pytest.raises(TypeError, match=r"encode_image takes uint8 \[b, 3, H, W\], not torch\.float32"):
        space["model"].encode_image(taken / 255)


def test_a_fingerprint_changes_with_what_changes_features(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = (trained(model_json(tmp_path)) for _ in range(2))
    second.visual.ln_post.bias.data[0] += 1  # type: ignore[union-attr,index]
    run_folder(run, first, step=5)
    run_folder(run, second, step=10)
    older, newer = load_model(str(run), step=5), load_model(str(run))
    assert older.fingerprint == load_model(str(run), step=5).fingerprint != newer.fingerprint
    assert len(older.fingerprint) == 16
    one, other = export_model(first, tmp_path / "one.safetensors"), export_model(second, tmp_path / "two.safetensors")
    sources = [(str(one.config), str(one.file)), (str(other.config), str(one.file)), (str(one.config), str(other.file))]
    same, renamed, changed = (load_model(name, weights).fingerprint for name, weights in sources)
    assert same == renamed != changed
    assert one.config is not None
    described = json.loads(one.config.read_text())
    one.config.write_text(json.dumps({**described, "quick_gelu": True}))  # no weight, but other features
    assert load_model(*sources[0]).fingerprint != same


def test_sources_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint in it"):
        load_model(str(tmp_path))
    (tmp_path / "0.tar").touch()
    with pytest.raises(UserError, match="holds shards, not a run or model"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="no such run or checkpoint folder"):
        load_model("runs/nowhere")
    with pytest.raises(UserError, match="did you mean RN50"):
        load_model("RN5O")
    with pytest.raises(UserError, match="a model without weights"):
        load_model("RN50")
    with pytest.raises(UserError, match="only a run folder has steps"):
        load_model("RN50", weights="openai", step=3)
    random = load_model("configs/models/tiny_vit.json", allow_random=True)
    assert (random.label, random.run_dir, random.step) == ("tiny_vit (no weights)", None, None)


def test_export_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "run", trained(model_json(tmp_path)), step=5)
    out = tmp_path / "out" / "tool.safetensors"
    main = runpy.run_path(str(TOOL))["main"]
    monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / "run"), "--out", str(out), "--json"])
    assert main() == 0
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    assert record["step"] == 5
    assert record["max_difference"] < 1e-5
    assert f'create_model_and_transforms("tool", pretrained="{out}")' in printed
    assert out.is_file()


@torch.no_grad()
def test_a_folder_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained(model_json(tmp_path, quick_gelu=True, image_mean=[0.5, 0.4, 0.3]), clip=Clip(loss="sigmoid"))
    run = tmp_path / "run"
    run_folder(run, model, step=5)
    records = [{"type": "val", "step": step, "samples": 8 * step, "t2i_r1": 10.0 * step} for step in (4, 5, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = [f"data.train=[{tmp_path}/flickr8k/train,https://u:secret@host/x.tar?sig=secret]", "data.val=data/val"]
    (run / "config.yaml").write_text(to_yaml(load_config(None, [*words, "train.global_batch=8"])))
    main = runpy.run_path(str(TOOL))["main"]

    def export(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", str(run), "--out", str(tmp_path / "hub"), *arguments])
        assert main() == 0
        return capsys.readouterr().out

    printed = export("--format", "open_clip_folder", "--push-ready", "me/demo", "--dtype", "fp16")
    assert f"not pushed: read {tmp_path}/hub/README.md, fill in its licence, then\n    hf upload me/demo " in printed
    space: dict[str, Any] = {}
    lines = printed.partition("the same for you:\n")[2].partition("not pushed")[0]
    exec(textwrap.dedent(lines), space)
    theirs = space["model"].eval()
    image, _ = inputs()
    preprocess = space["preprocess"].transforms[-1]
    assert list(preprocess.mean) == [0.5, 0.4, 0.3]
    assert float(theirs.logit_bias) == float(model.logit_bias)
    found = theirs.encode_image(preprocess(image / 255)), theirs.encode_text(space["tokenizer"](["A dog's café!"]))
    wanted = model.encode_image(image), model.encode_text(make_tokenizer(model.spec)(["A dog's café!"]))
    for mine, other in zip(wanted, found):
        assert torch.nn.functional.cosine_similarity(mine, other).min() > 0.9999
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: open_clip\n")
    assert "# license: fill in" in card
    assert 'create_model_and_transforms("hf-hub:me/demo")' in card
    assert "- flickr8k/train\n- https://host/x.tar\n" in card
    assert "Measured by the run at step 5 on data/val" in card
    assert "| text to image R@1, % | 50.00 |" in card
    assert "| objective `clip` | infonce, reads image, text |" in card
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert {path.name for path in (tmp_path / "hub").iterdir()} >= {"open_clip_config.json", "tokenizer.json"}
    for arguments, complaint in (
        (("--format", "onnx", "--push-ready", "me/demo"), "needs --format open_clip_folder or hugging_face"),
        (("--format", "hugging_face", "--push-ready", "demo"), "must be a name on the hub, USER/NAME"),
        (("--format", "hugging_face"), "is there already"),
    ):
        with pytest.raises(UserError, match=complaint):
            export(*arguments)
    shutil.rmtree(tmp_path / "hub")
    export("--format", "hugging_face")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'CLIPModel.from_pretrained("hub")' in card
    assert "- flickr8k/train\n" in card
