"""Let an image tower put a token in place of some patches' embeddings, and give what its last norm makes of patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.models.fewer_patches import PatchChoice
from clipdist.models.towers import mix_in

Replace = Callable[[Tensor], Tensor]


class MaskToken(nn.Module):
    """A learned vector in place of the embeddings of masked patches (BEiT, Bao et al., arXiv:2106.08254).

    Args:
        width: w.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return [b, n, w] of embeddings [b, n, w] and a mask, bool [b, n]."""
        return torch.where(mask[..., None], self.token.to(embeddings.dtype), embeddings)


class MaskedEmbedding(nn.Module):
    """Mixin of the module that embeds patches: passes on what `replace` makes of its output, [b, n, w]."""

    replace: Replace | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches of x, [b, w, rows, columns] or [b, n, w]."""
        embedded: Tensor = super().forward(x)
        if self.replace is None:
            return embedded
        if embedded.ndim == 3:
            return self.replace(embedded)
        return self.replace(embedded.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, embedded.shape[2:])


class PatchTokens(nn.Module):
    """Mixin of a ViT: appends its patches' tokens behind the last norm, [b, n, w], to a list."""

    kept: list[Tensor] | None = None

    def _pool(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:  # open_clip's
        pooled, tokens = super()._pool(x)  # type: ignore[misc]
        if self.kept is not None:
            self.kept.append(tokens)
        return pooled, tokens

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:  # timm's
        if self.kept is not None:
            self.kept.append(x[:, self.num_prefix_tokens :])
        return super().forward_head(x, pre_logits)  # type: ignore[misc]


@contextmanager
def patch_tokens(tower: Any, replace: Replace | None = None) -> Iterator[list[Tensor]]:
    """Yield a list that gets the tokens of the patches, [b, n, w], when a tower runs inside the context.

    Only after `allow_masks`.

    Args:
        replace: takes the embeddings of the patches [b, n, w], and returns what the tower has in their place.
    """
    trunk = getattr(tower, "trunk", tower)
    embedding, kept = _embedding(trunk), list[Tensor]()
    trunk.kept, embedding.replace = kept, replace
    try:
        yield kept
    finally:
        trunk.kept, embedding.replace = None, None


def allow_masks(tower: Any, side: int, where: str) -> int:
    """Let a tower mask patches, in place. Return the number of patches along a side of its images.

    Args:
        side: of the images, pixels.
        where: the setting that asks for it, for the message.

    Raises:
        UserError: it is not known how.
    """
    from open_clip.transformer import VisionTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    trunk = getattr(tower, "trunk", tower)
    if isinstance(trunk, VisionTransformer):
        whole, patch = trunk.patch_dropout, trunk.patch_size[0]
        known = trunk.attn_pool is None and isinstance(whole, (nn.Identity, PatchChoice))
    elif isinstance(trunk, TimmViT):
        whole, patch = trunk.patch_drop, trunk.patch_embed.patch_size[0]
        known = trunk.patch_embed.flatten and isinstance(whole, (nn.Identity, PatchChoice))
    else:
        known, patch = False, 1
    if not known:
        raise UserError(
            f"{where}: masks patches, which is known for a ViT of open_clip or timm that pools without attention and"
            f" drops no patches, not for {type(trunk).__name__}; take another model.name, or leave it out"
        )
    if not isinstance(trunk, PatchTokens):
        mix_in(PatchTokens, trunk)
        mix_in(MaskedEmbedding, _embedding(trunk))
    return side // patch


def _embedding(trunk: Any) -> Any:
    return trunk.conv1 if hasattr(trunk, "conv1") else trunk.patch_embed
