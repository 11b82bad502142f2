"""Every starting point beside the library that it comes from: pixels, token ids, features, and the way back.

`-s` prints the table that docs/data.md shows.
"""

from __future__ import annotations

import copy
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from unit.test_decode import encoded, picture
from unit.test_hugging_face import clip_folder
from unit.test_weights import description, model_json, openai_archive, run_folder, source_model

from clipdist.config import Clip, Data, Model
from clipdist.data.decode import eval_image
from clipdist.data.members import Members
from clipdist.data.tokens import make_tokenizer
from clipdist.data.transform import RESIZE_MODES
from clipdist.errors import UserError
from clipdist.evals.features import features_path
from clipdist.evals.locked import LockedTowers
from clipdist.models.build import build_model
from clipdist.models.export import export_hugging_face, export_model
from clipdist.models.hugging_face import read_description
from clipdist.models.load import load_model
from clipdist.models.open_clip_files import models_of
from clipdist.models.program_export import export_programs
from clipdist.models.siglip_export import export_siglip
from clipdist.models.spec import resolve_spec
from clipdist.models.weights import _check_fit

SENTENCES = ["A dog's 2 puppies RUN!", "the man in a blue shirt", "two cats sleep on the red sofa " * 20]
SIGLIP = {"hidden_size": 32, "intermediate_size": 70, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDES = [(61, 45), (32, 50), (190, 77)]


@dataclass
class Source:
    """What the source library makes of images, sentences and normalised pixels; None: it has none of its own."""

    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor] | None
    preprocess: Callable[[Image.Image], Tensor] | None
    tokenize: Callable[[list[str]], Tensor] | None = None


def of_open_clip(model: Any, **pixels: Any) -> Source:
    preprocess = image_transform_v2(PreprocessCfg(size=32, **pixels), is_train=False)
    return Source(model.encode_image, model.encode_text, preprocess)


def of_transformers(model: Any, folder: Path, length: int, lower: bool = False) -> Source:
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def tokenize(texts: list[str]) -> Tensor:
        texts = [text.lower() for text in texts] if lower else texts
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(texts, **options).input_ids

    return Source(
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda ids: model.get_text_features(input_ids=ids).pooler_output,
        lambda image: processor(image, return_tensors="pt").pixel_values[0],
        tokenize,
    )


# open_clip and OpenAI


def tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> tuple[Model, Source]:
    """A tag of open_clip's, whose entry says how pixels are prepared; the file is what the hub would give."""
    source = source_model(quick_gelu=facts.get("quick_gelu", False))
    save_file(source.state_dict(), tmp_path / "open_clip_model.safetensors")
    entry = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD, **facts}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: entry)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda facts: str(tmp_path / "open_clip_model.safetensors"))
    pixels = {key: value for key, value in facts.items() if key != "quick_gelu"}
    return Model(name=model_json(tmp_path), weights="tag"), of_open_clip(source, **pixels)


def tag_of_clipa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Source]:
    imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return tag(tmp_path, monkeypatch, **imagenet, interpolation="bilinear", resize_mode="squash")


def tag_of_metaclip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Source]:
    return tag(tmp_path, monkeypatch, quick_gelu=True)


def open_clip_file(tmp_path: Path, prefix: str = "") -> tuple[Model, Source]:
    source = source_model()
    torch.save({"state_dict": {prefix + name: value for name, value in source.state_dict().items()}}, tmp_path / "w.pt")
    return Model(name=model_json(tmp_path), weights=str(tmp_path / "w.pt")), of_open_clip(source)


def open_clip_module_file(tmp_path: Path) -> tuple[Model, Source]:
    return open_clip_file(tmp_path, "module.")


def open_clip_hub_folder(tmp_path: Path) -> tuple[Model, Source]:
    source = source_model()
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "longest", "fill_color": 120}
    hub = {"model_cfg": description(), "preprocess_cfg": {**pixels, "interpolation": "bicubic", "size": [32, 32]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(hub))
    save_file(source.state_dict(), tmp_path / "open_clip_model.safetensors")
    name, file = (str(tmp_path / name) for name in ("open_clip_config.json", "open_clip_model.safetensors"))
    return Model(name=name, weights=file), of_open_clip(source, **pixels)


def openai_file(tmp_path: Path) -> tuple[Model, Source]:
    twin = openai_archive(tmp_path / "ViT.pt", description()["vision_cfg"])
    return Model(name=model_json(tmp_path), weights=str(tmp_path / "ViT.pt"), trust_weights=True), of_open_clip(twin)


# Hugging Face


def clip_model_folder(tmp_path: Path, **changes: Any) -> tuple[Model, Source]:
    """CLIP's processor with an enlarged image before the crop, as some folders have it."""
    model = clip_folder(tmp_path, **changes)
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**sizes).save_pretrained(tmp_path)
    return Model(name=str(tmp_path), weights=str(tmp_path)), of_transformers(model, tmp_path, 8)


def siglip_folder(tmp_path: Path, tokenizer: Any = None, **processor: Any) -> tuple[Model, Source]:
    """A SiglipModel with its processor and a sentencepiece tokenizer that is trained here."""
    tokenizer = tokenizer or sentencepiece_tokenizer(tmp_path / "spiece")
    text = {**SIGLIP, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    torch.manual_seed(0)
    vision = {**SIGLIP, "image_size": 32, "patch_size": 8}
    model = transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, **processor).save_pretrained(tmp_path)
    return Model(name=str(tmp_path), weights=str(tmp_path)), of_transformers(model, tmp_path, 64, bool(processor))


def sentencepiece_tokenizer(prefix: Path) -> Any:
    import sentencepiece

    words = [
        "a dog runs over the grass",
        "two cats sleep on the red sofa",
        "the man in a blue shirt",
        "kites x z q v w",
    ]
    ids = {"pad_id": -1, "bos_id": -1, "eos_id": 1, "unk_id": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    return transformers.SiglipTokenizer(f"{prefix}.model")


def siglip2_folder(tmp_path: Path) -> tuple[Model, Source]:
    """SigLIP 2 of fixed resolution: the same model class, Gemma's tokenizer (case kept), bilinear resizing."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *letters])
    }
    tokenizer = transformers.GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="right")
    return siglip_folder(tmp_path, tokenizer, resample=2)


# timm, and a run


def timm_tower(tmp_path: Path) -> tuple[Model, Source]:
    torch.manual_seed(2)
    trunk = timm.create_model("resnet10t", num_classes=0).eval()
    (tmp_path / "tower").mkdir()
    trunk.pretrained_cfg |= {"crop_pct": 1.0, "interpolation": "bilinear"}
    timm.models.save_for_hf(trunk, tmp_path / "tower", safe_serialization=True)
    tower = {
        "timm_model_name": "local-dir:tower",
        "timm_model_pretrained": True,
        "timm_pool": "avg",
        "timm_proj": "none",
    }
    described = {**description({"image_size": 32, **tower}), "embed_dim": trunk.num_features}
    (tmp_path / "mini.json").write_text(json.dumps(described))
    data = {**timm.data.resolve_model_data_config(trunk), "input_size": (3, 32, 32)}
    return Model(name=str(tmp_path / "mini.json")), Source(trunk, None, timm.data.create_transform(**data))


def run_of_ours(tmp_path: Path) -> tuple[Model, Source]:
    squashed = {"image_resize_mode": "squash", "image_mean": [0.5] * 3, "quick_gelu": True}
    model = build_model(Model(name=model_json(tmp_path, name="first", **squashed))).eval()
    run_folder(tmp_path / "run", model, step=3)
    twin = SimpleNamespace(encode_image=model.visual, encode_text=model.text)
    source = of_open_clip(twin, mean=(0.5,) * 3, resize_mode="squash")
    return Model(name=model_json(tmp_path), weights=str(tmp_path / "run")), source


STARTS: dict[str, tuple[Callable[..., tuple[Model, Source]], str]] = {
    "open_clip tag (CLIPA's pixels)": (tag_of_clipa, "open_clip"),
    "open_clip tag (MetaCLIP)": (tag_of_metaclip, "open_clip"),
    "open_clip file": (open_clip_file, "open_clip"),
    'open_clip file with "module."': (open_clip_module_file, "open_clip"),
    "open_clip hub folder (longest)": (open_clip_hub_folder, "open_clip"),
    "OpenAI file": (openai_file, "open_clip"),
    "Hugging Face CLIP, MetaCLIP": (clip_model_folder, "Hugging Face"),
    "Hugging Face SigLIP": (siglip_folder, "torch.export"),
    "Hugging Face SigLIP 2": (siglip2_folder, ""),
    "timm image tower": (timm_tower, "open_clip"),
    "a run": (run_of_ours, "open_clip"),
}


EXPORTS: dict[str, Any] = {
    "open_clip": export_model,
    "Hugging Face": export_hugging_face,
    "torch.export": export_programs,
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    columns = ["starting point", "pixels", "image features", "text features", "exported to", "features"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    yield rows
    print("\n" + "\n".join(rows))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", STARTS)
@torch.no_grad()
def test_a_starting_point_is_what_its_library_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: list[str]
) -> None:
    make, form = STARTS[name]
    cfg, source = make(tmp_path, monkeypatch) if make in (tag_of_clipa, tag_of_metaclip) else make(tmp_path)
    model = build_model(cfg, Clip()).eval()
    spec = model.spec
    tokenizer = make_tokenizer(spec)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.image_mean, spec.image_std))
    grey, image_error = 0.0, 0.0
    for side in SIDES:
        image = picture(*side)
        ours = eval_image(encoded(image, "PNG"), spec.transform)
        assert source.preprocess is not None
        theirs = source.preprocess(image)
        grey = max(grey, float((ours - (theirs * std + mean) * 255).abs().max()))
        found, wanted = model.encode_image(ours[None]), source.encode_image(((ours / 255 - mean) / std)[None])
        image_error = max(image_error, float((F.normalize(found) - F.normalize(wanted)).abs().max()))
    text_error = 0.0
    ids = tokenizer(SENTENCES)
    if source.tokenize:
        wanted_ids = source.tokenize(SENTENCES)
        assert torch.equal(ids, wanted_ids) or spec.tokenizer["kind"] == "bpe"  # which pads otherwise, after the end
    if source.encode_text:
        text_error = float((F.normalize(model.encode_text(ids)) - F.normalize(source.encode_text(ids))).abs().max())
    file = tmp_path / "out" / ("w.safetensors" if form == "open_clip" else "w")
    back = EXPORTS[form](model, file).error.difference if form else 0.0
    assert grey <= 2.01
    assert max(image_error, text_error, back) <= 1e-5
    cells = [f"{image_error:.0e}", f"{text_error:.0e}" if source.encode_text else "-", form or "-"]
    table.append(f"| {name} | {grey:.0f} | {' | '.join(cells)} | {f'{back:.0e}' if form else '-'} |")


# Refused


@pytest.mark.parametrize("make", [siglip_folder, siglip2_folder])
@torch.no_grad()
def test_a_siglip_folder_goes_back(
    make: Callable[..., tuple[Model, Source]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    _, source = make(tmp_path / "first")
    loaded = load_model(str(tmp_path / "first"))
    monkeypatch.chdir(tmp_path)
    words = ["export.py", "first", "--out", "again", "--format", "hugging_face", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    assert runpy.run_path(str(Path(__file__).parents[2] / "tools/export.py"))["main"]() == 0
    siglip = transformers.SiglipModel.from_pretrained("again").eval()
    once = transformers.SiglipModel.from_pretrained("first").state_dict()
    assert all(torch.equal(value, once[name]) for name, value in siglip.state_dict().items())
    again = of_transformers(siglip, tmp_path / "again", 64, lower=True)
    image = picture(61, 45)
    assert torch.equal(again.preprocess(image), source.preprocess(image))
    assert torch.equal(again.tokenize(SENTENCES), loaded.tokenizer(SENTENCES))
    pixels, ids = torch.rand(2, 3, 32, 32), loaded.tokenizer(SENTENCES)
    for theirs, ours in (
        (again.encode_image(pixels), loaded.model.visual(pixels)),
        (again.encode_text(ids), loaded.model.encode_text(ids)),
    ):
        assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()
    assert "SiglipModel.from_pretrained" in Path("again/README.md").read_text()
    assert {path.name for path in Path("again").iterdir()} >= {"config.json", "preprocessor_config.json"}
    assert torch.equal(load_model("again").model.logit_bias, loaded.model.logit_bias)


def test_towers_that_are_not_siglips_are_refused(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    model = load_model(str(tmp_path)).model
    for text, told in (({"pool_type": "first"}, "text tower"), ({"no_causal_mask": False}, "text tower")):
        other = copy.deepcopy(model)
        other.spec = replace(model.spec, model={**model.spec.model, "text_cfg": model.spec.model["text_cfg"] | text})
        with pytest.raises(UserError, match=f"its {told} is not SigLIP's; take --format"):
            export_siglip(other, tmp_path / "out")
    other = copy.deepcopy(model)
    other.visual.trunk.blocks[0].ls1 = torch.nn.Linear(2, 2)  # more tensors than SigLIP has
    with pytest.raises(UserError, match=r"its towers are not SigLIP's \(.*ls1.* differs\); take --format"):
        export_siglip(other, tmp_path / "out")
    other = copy.deepcopy(model)
    other.spec = replace(model.spec, image_resize_mode="shortest")
    with pytest.raises(UserError, match="SiglipImageProcessor squashes images"):
        export_siglip(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", [24, 48, 64])
@torch.no_grad()
def test_siglip_positions_are_interpolated_as_by_transformers(side: int, tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    described = read_description(tmp_path)
    described["vision_cfg"] |= {"image_size": side}
    (tmp_path / "other.json").write_text(json.dumps(described))
    model = build_model(Model(name=str(tmp_path / "other.json"), weights=str(tmp_path)), Clip(loss="sigmoid")).eval()
    assert model.spec.image_size == side
    theirs = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted = theirs.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
    assert (model.visual(pixels) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_siglip_folders_that_are_refused(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    assert load_model(str(tmp_path)).model.logit_bias is not None  # the sigmoid loss's, which an export may want
    with pytest.raises(UserError, match=r"act_layer.* the model has None; model\.name=.* takes the folder's own descr"):
        build_model(Model(name="ViT-B-16-SigLIP", weights=str(tmp_path)))
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    for changes, told in (
        ({"size": {"height": 48, "width": 48}}, "its images are not squares of 32 pixels"),
        ({"resample": 1}, "resample=1: images cannot be prepared in this way"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, **changes}))
        with pytest.raises(UserError, match=told):
            resolve_spec(Model(name=str(tmp_path)))


@pytest.mark.parametrize(("ids", "told"), [(20, "has 100 ids, the text tower 20"), (256, "has 100 ids, .* 256")])
def test_a_tokenizer_that_belongs_to_other_weights(ids: int, told: str, tmp_path: Path) -> None:
    siglip2_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = ids
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{told}: it does not belong to these weights; name the folder or model that"):
        make_tokenizer(resolve_spec(Model(name=str(tmp_path))))


def test_a_run_under_the_name_of_another_model(tmp_path: Path) -> None:
    first = build_model(Model(name=model_json(tmp_path, name="first")))
    run_folder(tmp_path / "run", first, step=3)
    other = model_json(tmp_path, {**description()["vision_cfg"], "layers": 3}, name="other")
    with pytest.raises(
        UserError, match=r"vision_cfg\.layers is 2 there, the model has 3; take model\.name=.*first\.json"
    ):
        build_model(Model(name=other, weights=str(tmp_path / "run")))
    cleaned = {**description()["text_cfg"], "tokenizer_kwargs": {"clean": "canonicalize"}}
    with pytest.raises(UserError, match=r"another tokenizer .* \(options \{\} instead of .*canonicalize"):
        build_model(Model(name=model_json(tmp_path, text_cfg=cleaned), weights=str(tmp_path / "run")))


def test_weights_of_another_model_name_it(tmp_path: Path) -> None:
    with torch.device("meta"):
        own, other = (open_clip.CustomTextCLIP(**open_clip.get_model_config(f"ViT-B-{patch}")) for patch in (16, 32))
    with pytest.raises(UserError, match=r"model wants .*; take model\.name=ViT-B-32 or ViT-B-32-quickgelu$"):
        _check_fit(own, "ViT-B-16", other.state_dict(), Path("w.pt"))
    with torch.device("meta"):
        resnet = open_clip.CustomTextCLIP(**open_clip.get_model_config("RN50"))
    assert models_of({name: tuple(value.shape) for name, value in resnet.state_dict().items()}) == [
        "RN50",
        "RN50-quickgelu",
    ]


def test_kept_features_are_those_of_one_transform(tmp_path: Path) -> None:
    data: Any = SimpleNamespace(train=None, test=SimpleNamespace(digest="d"))
    keys: set[Any] = set()
    for mode in RESIZE_MODES:
        torch.manual_seed(0)
        model = build_model(Model(name=model_json(tmp_path, image_resize_mode=mode), lock_image=True))
        env: Any = None  # nothing is computed
        locked = LockedTowers(model, make_tokenizer(model.spec), Data(), env)
        keys |= {locked._key("image", Members()), features_path(tmp_path, model, data, "projected")}
    assert len(keys) == 6
