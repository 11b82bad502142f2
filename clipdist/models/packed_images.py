"""Run timm's NaFlexVit on images of any aspect ratio, all their patches behind one another in one sequence, no padding.

Linear layers and norms see the patches of all images at once; each image attends to itself alone, as in NaViT (Dehghani
et al., arXiv:2307.06304), which packs images into rows and masks what lies between them. Here nothing is masked: images
with equally many tokens are neighbours, and one call of attention computes them as a batch. Modules are called once
whatever the images are: at ZeRO stage 3 all ranks must call them equally often.

Shapes: b images, N patches and T tokens of all of them, C channels of a patch's embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdist.data.patches import grids
from clipdist.distributed.rank import moved
from clipdist.errors import UserError
from clipdist.models.towers import mix_in


class Packing:
    """How the tokens of some images lie in one sequence; also stands for the mask of their attention.

    An image's tokens are the tower's prefix (class token, registers), then its patches, row by row.

    Attributes:
        order: of the images in the sequence: ascending by number of tokens, then by grid.
        grids: rows and columns of patches of every image, in that order.
        groups: (images, tokens of each) of every number of tokens, in that order.
    """

    def __init__(self, grids: Sequence[tuple[int, int]], prefix: int) -> None:
        self.prefix = prefix
        self.order = sorted(range(len(grids)), key=lambda image: (grids[image][0] * grids[image][1], grids[image]))
        self.grids = [grids[image] for image in self.order]
        tokens = (prefix + rows * columns for rows, columns in self.grids)
        self.groups = [(len(list(same)), count) for count, same in groupby(tokens)]

    def split(self, sequence: Tensor, per_image: int = 0) -> list[Tensor]:
        """Return the images of every group, [images, tokens, ...], of a sequence [T, ...].

        Args:
            per_image: tokens of each image that the sequence lacks.
        """
        parts = sequence.split([images * (tokens - per_image) for images, tokens in self.groups])
        return [part.unflatten(0, (group[0], -1)) for part, group in zip(parts, self.groups)]

    def padded(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of each image, padded to the most, and which patches are its own.

        Args:
            sequence: [T, C].

        Returns:
            [b, t, C] and bool [b, t - prefix], in the order of the batch.
        """
        lengths = torch.tensor([tokens for images, tokens in self.groups for _ in range(images)])
        place = torch.arange(int(lengths.max()))
        own = place < lengths[:, None]
        index = ((lengths.cumsum(0) - lengths)[:, None] + place).where(own, 0)
        batch_order = torch.tensor(self.order).argsort()
        device = sequence.device
        return sequence[moved(index[batch_order], device)], moved(own[batch_order, self.prefix :], device)

    def attention(self, attend: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> Tensor:
        """Return what `attend` gives for every image by itself.

        Args:
            attend: F.scaled_dot_product_attention, or what stands for it.
            inputs: queries, keys and values, [1, heads, T, c].
        """
        split = [self.split(values[0].transpose(0, 1)) for values in inputs]
        found = [attend(*(values.transpose(1, 2) for values in group), **options) for group in zip(*split)]
        return torch.cat([values.transpose(1, 2).flatten(0, 1) for values in found]).transpose(0, 1)[None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Let F.scaled_dot_product_attention take a Packing as its mask, as it takes torch's CausalBias."""
        given = dict(kwargs or {})
        packing = given.pop("attn_mask", None)
        if func is not F.scaled_dot_product_attention or not isinstance(packing, cls) or len(args) != 3:
            return NotImplemented
        return packing.attention(func, *args, **given)


def pack(buffer: Tensor, prefix: int) -> tuple[Tensor, Packing]:
    """Take the patches of all images out of a buffer (see clipdist.data.patches).

    Args:
        buffer: uint8 [b, 1 + n, 3 * P * P], on the CPU: on a GPU the host waits for it.

    Returns:
        uint8 [N, 3 * P * P], and how they lie.
    """
    packing = Packing(grids(buffer), prefix)
    parts = [buffer[image, 1 : 1 + h * w] for image, (h, w) in zip(packing.order, packing.grids)]
    return torch.cat(parts), packing


def packed_input(patches: Tensor, packing: Packing) -> dict[str, Any]:
    """Return normalised patches [N, 3 * P * P] in the form in which NaFlexVit takes its inputs."""
    return {"patches": patches[None], "patch_coord": packing, "patch_valid": packing, "attn_mask": packing}


def allow_packed_images(tower: Any, name: str, patch: int) -> int:
    """Let an image tower take what `packed_input` gives, in place. Return its number of prefix tokens.

    Args:
        name: of the model, for the message.
        patch: side of the patches that it will get, pixels.

    Raises:
        UserError: it cannot.
    """
    from timm.models.naflexvit import NaFlexVit

    trunk, where = getattr(tower, "trunk", tower), f"model.name={name}, with images at their own aspect ratio"
    if not isinstance(trunk, NaFlexVit):
        raise UserError(f"{where}: {type(trunk).__name__} takes square images alone; take timm's naflexvit")
    embeds = trunk.embeds
    if tuple(embeds.patch_size) != (patch, patch):
        raise UserError(f"{where}: its description has patches of {patch} pixels, the tower of {embeds.patch_size}")
    drops = any(getattr(module, "drop_prob", 0) for module in trunk.modules())
    for unable, what in (
        (trunk.rope is not None, "rotary positions"),
        (trunk.patch_drop is not None, "patch dropout (vision_cfg.patch_dropout)"),
        (drops, "stochastic depth (vision_cfg.timm_drop_path)"),
        (not embeds.is_linear, "embed_proj_type=conv"),
        (embeds.pos_embed_use_grid_sample, "pos_embed_use_grid_sample"),
        (not embeds.channels_last, "patchify_channels_last=false"),
    ):
        if unable:
            raise UserError(f"{where}: not known how with {what}; leave it out, or leave out the budget of patches")
    if not isinstance(trunk, PackedImages):
        mix_in(PackedEmbeds, embeds)
        mix_in(PackedImages, trunk)
    return trunk.num_prefix_tokens


class PackedImages(nn.Module):
    """Mixin of NaFlexVit: pools every image by itself."""

    def forward_head(self: Any, patches: Tensor, pre_logits: bool = False, patch_valid: Any = None) -> Tensor:
        """Return the features of what the blocks gave, of packed images [1, T, C], too."""
        if isinstance(patch_valid, Packing):
            patches, patch_valid = patch_valid.padded(patches[0])
        return super().forward_head(patches, pre_logits, patch_valid)  # type: ignore[misc]


class PackedEmbeds(nn.Module):
    """Mixin of NaFlexEmbeds: also embeds packed patches."""

    def forward(self: Any, x: Tensor, patch_coord: Any = None, patch_valid: Any = None) -> tuple[Tensor, Any]:
        """Return the embeddings [1, T, C] of packed patches [1, N, 3 * P * P], and no grid; or see NaFlexEmbeds."""
        if not isinstance(patch_coord, Packing):
            return super().forward(x, patch_coord=patch_coord, patch_valid=patch_valid)
        x = x[0] if self.norm_input is None else self.norm_input(x[0])
        x = self.norm(self.proj(x))
        if self.pos_embed_type != "none":
            x = x + torch.cat(
                [
                    self.positions(*grid, x.dtype).repeat(len(list(images)), 1)
                    for grid, images in groupby(patch_coord.grids)
                ]
            )
        prefix = [tokens for tokens in (self.cls_token, self.reg_token) if tokens is not None]
        if prefix:
            parts = patch_coord.split(x, patch_coord.prefix)
            start = torch.cat(prefix, dim=1)
            x = torch.cat([torch.cat([start.expand(len(part), -1, -1), part], 1).flatten(0, 1) for part in parts])
        return self.pos_drop(x[None]), None

    def positions(self: Any, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return the position embeddings of a grid, [rows * columns, C], interpolated as timm does, in fp32.

        Products with constant matrices, one for each side: unlike the interpolation's own backward pass they give the
        same bits every time on a GPU.
        """
        longest = max(rows, columns)
        sides = (longest, longest) if self.pos_embed_ar_preserving else (rows, columns)
        if self.pos_embed_type == "factorized":
            tables = self.pos_embed_y[0], self.pos_embed_x[0]
            vertical, horizontal = (
                interpolation(len(table), side, "linear", False, False, table.device)[:kept] @ table.float()
                for table, side, kept in zip(tables, sides, (rows, columns))
            )
            return (vertical[:, None] + horizontal).flatten(0, 1).to(dtype)
        table = self.pos_embed[0]
        how = self.pos_embed_interp_mode, self.pos_embed_antialias, self.pos_embed_align_corners, table.device
        vertical, horizontal = (
            interpolation(own, side, *how)[:kept] for own, side, kept in zip(table.shape[:2], sides, (rows, columns))
        )
        return torch.einsum("yh,xw,hwc->yxc", vertical, horizontal, table.float()).flatten(0, 1).to(dtype)


@lru_cache(maxsize=1024)
def interpolation(
    size: int, side: int, mode: str, antialias: bool, align_corners: bool, device: torch.device
) -> Tensor:
    """Return the matrix [side, size] that interpolates `size` values along a line as F.interpolate does."""
    unit = torch.eye(size, device="cpu")
    if size == side:
        return unit.to(device)
    if mode == "linear":
        return F.interpolate(unit[None], side, mode=mode, align_corners=align_corners)[0].T.contiguous().to(device)
    found = F.interpolate(unit[None, None], (size, side), mode=mode, align_corners=align_corners, antialias=antialias)
    return found[0, 0].T.contiguous().to(device)
