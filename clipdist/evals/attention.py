"""Show where an image tower looks: the last block's attention of the class token, head by head.

As DINO publishes it (Caron et al., arXiv:2104.14294, figure 1): the softmax's row of the class token, without the class
token's own share and without register tokens, on the grid of patches.
"""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.evals.sheet import TILE, SheetRow
from clipdist.models.dual_encoder import DualEncoder

COLOURS = "viridis"  # from dark, no attention, to yellow, the map's highest


@torch.no_grad()
def attention_maps(model: DualEncoder, images: Tensor) -> Tensor:
    """Return how much of its attention the class token gives to each patch in the last block, fp32 [b, heads, h, w].

    Each map sums to at most 1: what is missing is the share of the class token itself and of register tokens.

    Args:
        model: in evaluation mode.
        images: uint8 [b, 3, S, S], on the model's device.

    Raises:
        UserError: the image tower has no class token, or attention of a kind that is not known.
    """
    layer, prefix, grid = _last_attention(model)
    given: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        model.encode_hidden(images)
    finally:
        hook.remove()
    weights = _weights(layer, given[0])
    return weights[:, :, 0, prefix:].float().unflatten(2, grid)


def require_attention(model: DualEncoder) -> None:
    """Raise UserError where attention_maps would; costs nothing."""
    _last_attention(model)


def map_row(name: str, pixels: Tensor, maps: Tensor) -> SheetRow:
    """Return the row of a contact sheet: an image as the model sees it, uint8 [3, S, S], and its maps [heads, h, w].

    A map is scaled to its own highest value, which stands below it.
    """
    images = [pixels.permute(1, 2, 0).cpu().numpy(), *(_coloured(one) for one in maps)]
    labels = ["the image", *(f"head {head}, up to {float(one.max()):.3f}" for head, one in enumerate(maps, start=1))]
    return SheetRow(name, images, labels)


def _coloured(values: Tensor) -> np.ndarray:
    """Return uint8 [H, W, 3], a square of one colour for each patch."""
    factor = max(1, TILE // max(values.shape))
    scaled = (values / values.max().clamp(min=1e-12)).cpu().numpy()
    colours = matplotlib.colormaps[COLOURS](scaled)[..., :3]
    return (255 * colours).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)


def _last_attention(model: DualEncoder) -> tuple[nn.Module, int, tuple[int, int]]:
    """Return the last block's attention, how many tokens come before the patches, and the grid of patches."""
    from open_clip.transformer import VisionTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    tower: Any = getattr(model.visual, "trunk", model.visual)
    where = f"{model.spec.name}: the image tower, {type(tower).__name__},"
    if isinstance(tower, VisionTransformer):
        layer, prefix, grid = tower.transformer.resblocks[-1].attn, 1, tower.grid_size
    elif isinstance(tower, TimmViT) and tower.cls_token is not None:
        layer, prefix, grid = tower.blocks[-1].attn, tower.num_prefix_tokens, tower.patch_embed.grid_size
    else:
        raise UserError(f"{where} has no class token whose attention could be shown; ViTs of open_clip and timm have")
    if not (isinstance(layer, nn.MultiheadAttention) or all(hasattr(layer, name) for name in ("qkv", "q_norm"))):
        raise UserError(f"{where} has attention of a kind that is not known, {type(layer).__name__}")
    return layer, prefix, grid


def _weights(layer: Any, x: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), [b, heads, L, L], of an attention layer's input [b, L, w]."""
    if isinstance(layer, nn.MultiheadAttention):
        return layer(x, x, x, need_weights=True, average_attn_weights=False)[1]
    q, k, _ = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return ((layer.q_norm(q) @ layer.k_norm(k).transpose(-2, -1)) * layer.scale).softmax(-1)
