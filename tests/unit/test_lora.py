"""LoRA on every kind of tower: the same features at the start, gradients in every adapter, and after the merge."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from clipdist.config import Config, Lora, Model
from clipdist.errors import UserError
from clipdist.estimate.activations import meta_model
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.lora import merge_adapters

TEXT = {"context_length": 8, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1}
TIMM = {"image_size": 32, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
EFFICIENTNET = TIMM | {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg"}  # depthwise, padded by its size
EVA = TIMM | {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 28, "timm_pool": "token"}  # qkv is not called
TOWERS = {
    "vit": "configs/models/tiny_vit.json",
    "resnet": "configs/models/tiny_rn.json",  # takes its attention pooling's weights, and does not call the layers
    "cbow": "configs/models/tiny_cbow.json",
    "efficientnet": {"vision_cfg": EFFICIENTNET},
    "eva": {"vision_cfg": EVA},
}


@pytest.fixture(params=TOWERS)
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    made = TOWERS[request.param]
    if isinstance(made, str):
        return made
    (tmp_path / "model.json").write_text(json.dumps({"embed_dim": 16, "text_cfg": TEXT, **made}))
    return str(tmp_path / "model.json")


def build(name: str, **settings: object) -> DualEncoder:
    torch.manual_seed(0)
    model = build_model(Model(name=name, **settings))  # type: ignore[arg-type]
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # 0 at the end of a residual branch of open_clip's ResNet
            torch.nn.init.ones_(layer.weight)
    return model


def trained(model: DualEncoder) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_train_and_merge(name: str) -> None:
    plain, model = build(name).eval(), build(name, lora=Lora(rank=2)).eval()
    spec, names = model.spec, trained(model)
    own = {"logit_scale", "visual.head.proj.weight"} & {name for name, _ in plain.named_parameters()}
    assert {name for name in names if "lora_" not in name} == own  # a new projection is not adapted, but trained
    assert {name.partition(".")[0] for name in names} == {"visual", "text", "logit_scale"}
    planned = meta_model(Config(model=Model(name=name, lora=Lora(rank=2))))[0]
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}

    image = torch.randint(0, 256, (2, 3, spec.image_size, spec.image_size), dtype=torch.uint8)
    inputs = {"image": image, "tokens": torch.randint(1, 600, (2, spec.context_length))}
    with torch.no_grad():
        for side, features in plain(**inputs).items():
            torch.testing.assert_close(model(**inputs)[side], features, rtol=1e-5, atol=1e-5)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.05)
    outputs = model.train()(**inputs)
    sum(value.square().sum() for value in outputs.values()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0} == names

    with torch.no_grad():
        adapted = model.eval()(**inputs)
        merge_adapters(model)
        merged, before = model(**inputs), plain(**inputs)
    for side in ("image", "text"):
        assert (adapted[side] - before[side]).norm() > 0.01 * before[side].norm()
        assert (adapted[side] - merged[side]).norm() < 1e-5 * adapted[side].norm()
    assert [*model.state_dict()] == [*plain.state_dict()]
    kinds = ([type(layer).__name__ for layer in each.modules()] for each in (model, plain))
    assert next(kinds) == next(kinds)


@pytest.mark.parametrize(
    ("lora", "adapted"),
    [
        (Lora(targets=["mlp"], towers="text"), {"mlp.c_fc", "mlp.c_proj"}),
        (Lora(targets=["attn.q_proj", "v_proj"], towers="image"), {"attn.q_proj", "attn.v_proj"}),
    ],
)
def test_targets_choose_layers_of_one_tower(lora: Lora, adapted: set[str]) -> None:
    tower, other = ("text.", "visual.") if lora.towers == "text" else ("visual.", "text.")
    plain, names = build(TOWERS["vit"]), trained(build(TOWERS["vit"], lora=lora))
    adapters = {name.partition(".lora_")[0] for name in names if "lora_" in name}
    assert {".".join(name.split(".")[-2:]) for name in adapters} == adapted
    assert all(name.startswith(tower) for name in adapters)
    whole = {name for name, _ in plain.named_parameters() if name.startswith(other)}
    assert whole == {name for name in names if name.startswith(other)}


def test_an_lstm_has_no_adapters() -> None:
    name = "configs/models/tiny_lstm.json"
    for towers in ("both", "text"):
        told = rf"^model\.lora\.towers={towers}: {name} has an LSTM, for which there are no adapters; set it to image$"
        with pytest.raises(UserError, match=told):
            build(name, lora=Lora(towers=towers))
    names = trained(build(name, lora=Lora(towers="image")))
    assert {name for name in names if name.startswith("text.")} == {
        f"text.{name}" for name, _ in build(name).text.named_parameters()
    }


def test_targets_that_match_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (build, lambda name, **settings: meta_model(Config(model=Model(name=name, **settings)))):
        told = (
            r"^model\.lora\.targets=qkv: no layer has such a name, among conv1, q_proj, .* from visual\.conv1 to text\."
        )
        with pytest.raises(UserError, match=told):
            make(TOWERS["vit"], lora=Lora(targets=["mlp", "qkv"]))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"^model\.lora: needs the peft library, .*: pip install .*'\.\[lora\]'$"):
        build(TOWERS["vit"], lora=Lora())
