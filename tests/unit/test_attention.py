"""Attention maps beside a plain softmax of queries and keys; towers that have none; the tool."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from wds_sets import ROOT, write_run

from clipdist.config import Model
from clipdist.errors import UserError
from clipdist.evals.attention import attention_maps
from clipdist.models.build import build_model
from clipdist.models.dual_encoder import DualEncoder


def model_of(tmp_path: Path, name: str) -> DualEncoder:
    path = ROOT / "configs/models/tiny_vit.json"
    if name != "open_clip":
        described = json.loads(path.read_text())
        arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "reg_tokens": 2}
        arguments |= {"class_token": False, "global_pool": "avg"} if name == "no_class" else {}
        described["vision_cfg"] = {
            "image_size": 32,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "avg" if name == "no_class" else "token",
            "timm_proj": "linear",
            "timm_model_args": arguments,
        }
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(described))
    torch.manual_seed(2)
    return build_model(Model(name=str(path))).eval()


@pytest.mark.parametrize("name", ["open_clip", "timm"])
@torch.no_grad()
def test_maps_are_the_softmax_of_queries_and_keys(name: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, name)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    tower: Any = getattr(model.visual, "trunk", model.visual)
    block = tower.blocks[-1] if name == "timm" else tower.transformer.resblocks[-1]
    taken: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    model.encode_image(pixels)
    hook.remove()
    x = (block.norm1 if name == "timm" else block.ln_1)(taken[0])
    weight, bias = (
        (block.attn.qkv.weight, block.attn.qkv.bias)
        if name == "timm"
        else (block.attn.in_proj_weight, block.attn.in_proj_bias)
    )
    heads, prefix = (4, 3) if name == "timm" else (2, 1)
    q, k = (F.linear(x, weight, bias)[..., 32 * part : 32 * (part + 1)] for part in (0, 1))
    found = attention_maps(model, pixels)
    assert found.shape == (2, heads, 4, 4)
    for head in range(heads):
        own = slice(head * 32 // heads, (head + 1) * 32 // heads)
        plain = (q[..., own] @ k[..., own].transpose(1, 2) / (32 / heads) ** 0.5).softmax(-1)
        assert torch.allclose(found[:, head].flatten(1), plain[:, 0, prefix:], atol=1e-6)
    assert float(found.std()) > 0


def test_towers_without_class_token_are_refused(tmp_path: Path) -> None:
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"the image tower, VisionTransformer, has no class token"):
        attention_maps(model_of(tmp_path, "no_class"), pixels)
    resnet = build_model(Model(name=str(ROOT / "configs/models/tiny_rn.json")))
    with pytest.raises(UserError, match=r"tiny_rn\.json: the image tower, ModifiedResNet, has no class token"):
        attention_maps(resnet, pixels)


def run(tool: str, *words: object) -> None:
    arguments, sys.argv = sys.argv, [tool, *map(str, words), "--device", "cpu", "--json"]
    try:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"))["main"]()
    finally:
        sys.argv = arguments


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 3)
    for name, size in (("wide", (60, 40)), ("small", (9, 9))):
        Image.effect_noise(size, 80).convert("RGB").save(tmp_path / f"{name}.png")
    run("attention_maps", folder, tmp_path / "wide.png", tmp_path / "small.png")
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["heads"], record["grid"]) == (2, [4, 4])
    sheet = Image.open(folder / "results/attention_maps.png")
    assert sheet.width > 3 * 176
    assert json.loads((folder / "results/attention_maps.json").read_text()) == record
    with pytest.raises(UserError, match=r"gone\.png: no such file$"):
        run("attention_maps", folder, tmp_path / "wide.png", tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: "):
        run("attention_maps", folder, tmp_path / "text.png", "--out", tmp_path / "s.png")
    assert not (tmp_path / "s.png").exists()
