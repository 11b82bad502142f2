"""Compiled blocks: which they are, their names and copies, and a machine without a compiler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._inductor import cpp_builder

from clipdist import config
from clipdist.errors import UserError
from clipdist.models.build import build_model
from clipdist.models.compiled import compile_blocks, why_not


@pytest.mark.parametrize(("name", "image", "text"), [("vit", 2, 2), ("rn", 4, 2), ("cbow", 2, 0), ("lstm", 2, 0)])
def test_blocks_are_found_and_weights_keep_their_names(name, image, text):
    model = build_model(config.Model(name=f"configs/models/tiny_{name}.json"))
    names = list(model.state_dict())
    assert [compile_blocks(model.visual), compile_blocks(model.text)] == [image, text]
    assert list(model.state_dict()) == names == list(copy.deepcopy(model).state_dict())


def test_every_forward_function_of_a_block_is_the_compiled_one(monkeypatch):
    """Also where activations are checkpointed, which takes the block's forward for its own."""
    calls = []

    def compile_(function, **_):
        return lambda *args, **named: calls.append(type(args[0]).__name__) or function(*args, **named)

    monkeypatch.setattr(torch, "compile", compile_)
    model = build_model(config.Model(name="configs/models/tiny_rn.json"))
    model.prepare(config.Engine(compile=True, activation_checkpointing=True))
    tokens = torch.ones(4, model.spec.context_length, dtype=torch.int64)
    outputs = model(image=torch.zeros(4, 3, 32, 32, dtype=torch.uint8), tokens=tokens)
    assert sorted(calls) == ["Bottleneck"] * 4 + ["ResidualAttentionBlock"] * 2
    (outputs["image"].sum() + outputs["text"].sum()).backward()
    assert len(calls) == 12  # recomputed


def test_a_model_without_known_blocks_is_refused():
    model = build_model(config.Model(name="configs/models/tiny_cbow.json"))
    model.visual = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"engine\.compile=true: no blocks are known"):
        model.prepare(config.Engine(compile=True))


def test_without_a_compiler_the_reason_is_told(monkeypatch):
    def missing():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "No working C++ compiler" in why_not(torch.device("cpu"))
