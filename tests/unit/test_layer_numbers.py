"""Which layer of its tower a parameter belongs to: what optim.layer_decay multiplies its learning rate by."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clipdist import config
from clipdist.engine.optim import parameter_groups
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.layers import layers_behind

TOWERS: dict[str, dict[str, int]] = {
    "configs/models/tiny_vit.json": {
        r"visual\.(class_embedding|positional_embedding|conv1|ln_pre)": 3,
        r"visual\.transformer\.resblocks\.0": 2,
        r"visual\.transformer\.resblocks\.1": 1,
        r"visual\.(ln_post|proj)": 0,
        r"text\.(token|positional)_embedding": 3,
        r"text\.transformer\.resblocks\.0": 2,
        r"text\.transformer\.resblocks\.1": 1,
        r"text\.(ln_final|text_projection)": 0,
        r"logit_scale": 0,
    },
    "configs/models/tiny_rn.json": {
        r"visual\.(conv|bn)[123]": 5,
        **{rf"visual\.layer{stage}": 5 - stage for stage in range(1, 5)},
        r"visual\.attnpool": 0,
    },
    "configs/models/tiny_cbow.json": {r"text\.token_embedding": 1, r"text\.proj": 0},
    "configs/models/tiny_lstm.json": {
        r"text\.token_embedding": 3,
        r"text\.layers\.0\.": 2,
        r"text\.layers\.1\.": 1,
        r"text\.proj": 0,
    },
    "tests/dist/timm_lcnet.json": {  # 13 blocks in six stages
        r"visual\.trunk\.(conv_stem|bn1)": 14,
        r"visual\.trunk\.blocks\.0\.0": 13,
        r"visual\.trunk\.blocks\.5\.1": 1,
        r"visual\.trunk\.(conv_head|classifier)": 0,
    },
}


@pytest.mark.parametrize("name", TOWERS)
def test_layers_behind(name: str) -> None:
    found = layers_behind(build_model(config.Model(name=name)))
    for pattern, layers in TOWERS[name].items():
        own = {number for parameter, number in found.items() if re.match(pattern, parameter)}
        assert own == {layers}, (pattern, own)
    if len(TOWERS[name]) > 8:
        assert all(any(re.match(pattern, parameter) for pattern in TOWERS[name]) for parameter in found)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("BertConfig", {"num_hidden_layers": 2}),
        ("MT5Config", {"num_layers": 2, "d_kv": 8}),
        ("M2M100Config", {"encoder_layers": 2}),
    ],
)
def test_text_towers_of_hugging_face(kind: str, settings: dict[str, int]) -> None:
    import transformers
    from open_clip.hf_model import HFTextEncoder

    sizes = {"vocab_size": 40, "hidden_size": 16, "d_model": 16}
    sizes |= {"num_attention_heads": 2, "encoder_attention_heads": 2, "num_heads": 2, "intermediate_size": 32}
    hf = getattr(transformers, kind)(**sizes, **settings)
    pooling: Any = {"pooler_type": "mean_pooler", "proj_type": "linear", "pretrained": False}
    with torch.device("meta"):
        text = HFTextEncoder("", output_dim=8, config=hf, **pooling)
    if hf.is_encoder_decoder and hasattr(text.transformer, "encoder"):  # as open_clip does it for a named model
        text.transformer = text.transformer.encoder
    found = layers_behind(model_of(text))
    for pattern, layers in {
        r"text\.transformer\.(embeddings|shared|embed_tokens)": 3,
        r"text\.transformer\.(encoder\.)?(layers?|block)\.0\.": 2,
        r"text\.transformer\.(encoder\.)?(layers?|block)\.1\.": 1,
        r"text\.proj": 0,
    }.items():
        assert {n for parameter, n in found.items() if re.match(pattern, parameter)} == {layers}, pattern


def model_of(text: nn.Module) -> Any:
    """A model whose image tower is locked."""
    visual = nn.Linear(2, 2).requires_grad_(False)
    named = [*((f"text.{name}", p) for name, p in text.named_parameters())]
    towers = {"visual": visual, "text": text}
    return SimpleNamespace(towers=towers, named_parameters=lambda: named, part_of=lambda name: name)


@pytest.mark.parametrize("trunk", [False, True])
def test_a_tower_whose_layers_are_not_known_is_refused(trunk: bool) -> None:
    tower = nn.Module()
    tower.add_module("trunk" if trunk else "net", nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match=r"^optim\.layer_decay: the layers of the text tower, \w+, are not known"):
        layers_behind(model_of(tower))
    tower.requires_grad_(False)
    layers_behind(model_of(tower))  # one that does not train has no learning rate


def test_groups_differ_by_rate_and_by_weight_decay() -> None:
    model = build_model(config.Model(name="configs/models/tiny_vit.json"))
    plain = parameter_groups(model, config.Optim())
    assert [(group["weight_decay"], group["lr_scale"]) for group in plain] == [(0.2, 1.0), (0.0, 1.0)]
    groups = parameter_groups(model, config.Optim(layer_decay=0.5))
    assert {(g["weight_decay"], g["lr_scale"]) for g in groups} == {(w, 0.5**n) for w in (0.2, 0.0) for n in range(4)}
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
