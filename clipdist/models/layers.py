"""Number the layers of towers: how many of a tower's layers lie between a parameter and the tower's output."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from torch import nn

from clipdist.errors import UserError
from clipdist.models.cbow import CBOW

# Parameter names of open_clip's and Hugging Face's towers. What is neither is behind the blocks: norm, pooling, head.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|layers?|blocks?)\.(\d+)\.")
_STAGE = re.compile(r"^layer(\d+)\.")  # of a ResNet
_BEFORE_BLOCKS = re.compile(
    r"^(?!attnpool)(?:.*\.)?(?:conv[123]|bn[123]|ln_pre|class_embedding|positional_embedding|token_embedding|cls_emb"
    r"|embeddings|embed_tokens|embed_positions|layernorm_embedding|shared)(?:\.|$)"  # attention pooling has positions
)


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
    for attribute, part in (("visual", "image"), ("text", "text")):
        tower = getattr(model, attribute)
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            continue
        numbers = _timm_numbers(tower) if hasattr(tower, "trunk") else _numbers(tower)
        if not numbers:
            kind = type(getattr(tower, "trunk", getattr(tower, "transformer", tower))).__name__
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
