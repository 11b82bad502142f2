"""Layers of towers: how many lie between a parameter and the tower's output, and which have hidden matrices."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from torch import nn

from clipdist.errors import UserError
from clipdist.models.cbow import CBOW
from clipdist.models.lstm import LSTMLayer

# Parameter names of open_clip's and Hugging Face's towers. What is neither is behind the blocks: norm, pooling, head.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layers?|blocks?)\.(\d+)\.")
_STAGE = re.compile(r"^layer(\d+)\.")  # of a ResNet
_BEFORE_BLOCKS = re.compile(
    r"^(?!attnpool)(?:.*\.)?(?:conv[123]|bn[123]|ln_pre|class_embedding|positional_embedding|token_embedding|cls_emb"
    r"|embeddings|embed_tokens|embed_positions|layernorm_embedding|shared)(?:\.|$)"  # attention pooling has positions
)

_OUTPUT = re.compile(r"^(?:proj|text_projection|head|attnpool\.c_proj)(?:\.|$)")  # to the space of both towers
_PIXELS = re.compile(r"(?:^|\.)embeds\.proj$")  # of NaFlexVit: a linear layer that reads pixels
_STACKED = {"qkv": 3, "kv": 2}  # of timm


def layers_behind(model: Any) -> dict[str, int]:
    """Return by parameter name how many layers of its tower follow.

    Of a tower of d blocks: d + 1 for embeddings or stem, d + 1 - k for block k = 1 .. d, 0 for what comes after them. A
    ResNet of open_clip has its stages as blocks, one of timm what timm's group_matcher groups; CBOW has none. 0 for the
    model's scalars.

    Args:
        model: a DualEncoder.

    Raises:
        UserError: a tower that trains is of a kind whose layers are not known.
    """
    behind = {name: 0 for name, _ in model.named_parameters()}  # scalars, norms and projections behind the blocks
    for attribute, tower in model.towers.items():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        numbers = _timm_numbers(tower) if hasattr(tower, "trunk") else _numbers(tower)
        if not numbers:
            kind = type(getattr(tower, "trunk", getattr(tower, "transformer", tower))).__name__
            part = model.part_of(attribute)
            raise UserError(f"optim.layer_decay: the layers of the {part} tower, {kind}, are not known; set it to 1")
        head = max(numbers.values()) + 1
        behind |= {f"{attribute}.{name}": head - number for name, number in numbers.items()}
    return behind


def _numbers(tower: nn.Module) -> dict[str, int]:
    """Return {name: 0 before the blocks, k in block k from 1}; empty if no blocks are known, but for CBOW."""
    numbers, blocks = {}, isinstance(tower, CBOW)
    for name, _ in tower.named_parameters():
        if (found := _STAGE.search(name)) or (found := _BLOCK.search(name)):
            numbers[name] = int(found[1]) + (found.re is _BLOCK)
            blocks = True
        elif _BEFORE_BLOCKS.search(name):
            numbers[name] = 0
    return numbers if blocks else {}


def _timm_numbers(tower: Any) -> dict[str, int]:
    """Return the same of timm's tower in open_clip's adapter, as timm.optim.param_groups_layer_decay has it."""
    from timm.models import group_parameters

    try:
        matcher = tower.trunk.group_matcher(coarse=False)
    except (AttributeError, AssertionError):
        return {}
    named = [*tower.trunk.named_parameters(), ("not matched", None)]
    trunk: Any = SimpleNamespace(named_parameters=lambda: named)
    numbers = group_parameters(trunk, matcher, reverse=True)
    head = numbers["not matched"]  # the group of what is behind the blocks, such as pooling
    return {f"trunk.{name}": number for name, number in numbers.items() if number < head}


def hidden_matrices(model: Any) -> dict[str, int]:
    """Return trained parameters that are matrices between the input and the output of a tower, for Muon.

    Weights of linear layers and of convolutions without groups, but for what reads pixels (three channels) and what
    projects onto the space of both towers. Not LoRA's adapters: of those, only the product of two is a matrix of a
    layer.

    Args:
        model: a DualEncoder.

    Returns:
        by name how many matrices lie one below the other in the parameter: three where it stacks those of q, k and v,
        four of an LSTM's gates.

    Raises:
        UserError: there are none.
    """
    found: dict[str, int] = {}
    for tower, module in model.towers.items():
        for name, layer in module.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(layer, nn.MultiheadAttention) and layer.in_proj_weight is not None:
                found[f"{tower}.{name}.in_proj_weight"] = 3
            if isinstance(layer, LSTMLayer):  # four gates each
                found |= {f"{tower}.{name}.{own}": 4 for own, weight in layer.named_parameters() if weight.ndim == 2}
            filters = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels != 3
            inner = not (_OUTPUT.search(name) or _PIXELS.search(name) or "lora_" in name)
            if (filters or isinstance(layer, nn.Linear)) and inner:
                found[f"{tower}.{name}.weight"] = _STACKED.get(last, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name: stacked for name, stacked in found.items() if name in trained}
    if not found:
        raise UserError("optim.name=muon: no matrix of a hidden layer trains; set optim.name=adamw")
    return found
