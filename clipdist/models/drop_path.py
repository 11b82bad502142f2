"""Drop residual branches of samples (stochastic depth, Huang et al., arXiv:1603.09382), and compute those kept alone.

A branch of a block adds to the kept samples of a batch what it makes of them, divided by the share that is kept, as
DINOv2 computes it (Oquab et al., arXiv:2304.07193, section 5). Which samples are kept is a function of (seed, step,
sample, view, block, branch): neither of ranks nor of micro-batches.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipdist.data.order import sample_uniforms
from clipdist.distributed.rank import moved
from clipdist.errors import UserError
from clipdist.models.towers import mix_in

Branch = Callable[[Tensor], Tensor]
BRANCHES = 2  # of a block: attention and MLP


class DropPathBlock(nn.Module):
    """Mixin of a block of a ViT: computes each branch for the samples that keep it.

    Attributes:
        kept: rows that keep each branch, int64 [n], and the factor of what it adds; None: all rows, as they are.
        recomputes: whether activations are computed again in the backward pass.
    """

    kept: list[tuple[Tensor, float]] | None = None
    recomputes = False

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Run the block on x [b, n, w]."""
        whole = super().forward
        kept = self.kept  # of this pass, also when it is run again

        def run(x: Tensor) -> Tensor:
            return whole(x, *args, **options) if kept is None else self._run(x, kept)

        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def _run(self, x: Tensor, kept: list[tuple[Tensor, float]]) -> Tensor:
        for branch, (rows, factor) in zip(self.branches(), kept):
            x = x.index_add(0, rows, branch(x.index_select(0, rows)) * factor)
        return x

    def branches(self: Any) -> tuple[Branch, Branch]:
        """Return the residual branches."""
        if hasattr(self, "ln_1"):  # open_clip's
            return lambda x: self.ls_1(self.attention(self.ln_1(x))), lambda x: self.ls_2(self.mlp(self.ln_2(x)))
        return lambda x: self.ls1(self.attn(self.norm1(x))), lambda x: self.ls2(self.mlp(self.norm2(x)))


def allow_drop_path(tower: Any, rate: float) -> None:
    """Let the blocks of an image tower drop branches, in place.

    Args:
        rate: for the message.

    Raises:
        UserError: its blocks are of another kind, or drop branches by themselves.
    """
    from open_clip.transformer import ResidualAttentionBlock
    from timm.models.vision_transformer import Block

    trunk = getattr(tower, "trunk", tower)
    blocks = [module for module in trunk.modules() if type(module) in (ResidualAttentionBlock, Block)]
    drops = any(getattr(module, "drop_prob", 0) for module in trunk.modules())
    if drops or not blocks:
        why = "drops branches by its description (timm_drop_path)" if drops else "has no blocks of a known ViT"
        raise UserError(f"model.drop_path={rate}: {type(trunk).__name__} {why}; set it to 0")
    for block in blocks:
        mix_in(DropPathBlock, block)


def drop_path_blocks(tower: nn.Module) -> list[DropPathBlock]:
    """Return the blocks that allow_drop_path has changed."""
    return [module for module in tower.modules() if isinstance(module, DropPathBlock)]


def draw_kept(
    blocks: int, rate: float, seed: int, step: int, sample_id: Tensor, views: Iterable[str]
) -> dict[str, Tensor]:
    """Return which samples keep which branches, bool [b, blocks, BRANCHES] by view, on the CPU.

    Args:
        sample_id: int64 [b], on the CPU.
    """
    ids, kept = sample_id.numpy(), {}
    for view in views:
        key = (seed * 1_000_003 + zlib.crc32(view.encode())) % 2**63
        uniforms = sample_uniforms(key, np.full(len(ids), step), ids, blocks * BRANCHES)
        kept[view] = torch.from_numpy(uniforms >= rate).view(-1, blocks, BRANCHES)
    return kept


@contextmanager
def branches_kept(tower: nn.Module, kept: Tensor, rate: float) -> Iterator[None]:
    """Let the rows of a batch keep these branches alone inside the context.

    Where no row keeps one, it is computed for the first row and added 0 times: with ZeRO-3 all ranks gather alike.

    Args:
        kept: bool [b, blocks, BRANCHES], on the CPU.
    """
    blocks = drop_path_blocks(tower)
    factors = (kept.any(0) / (1 - rate)).tolist()
    kept = kept.clone()
    kept[0] |= ~kept.any(0)
    places = kept.permute(1, 2, 0).nonzero()[:, 2]
    rows = moved(places, next(tower.parameters()).device).split(kept.sum(0).flatten().tolist())
    for number, block in enumerate(blocks):
        block.kept = [*zip(rows[BRANCHES * number : BRANCHES * (number + 1)], factors[number])]
    try:
        yield
    finally:
        for block in blocks:
            block.kept = None


def recompute_blocks(tower: nn.Module) -> bool:
    """Let blocks keep their inputs alone for the backward pass. Return whether the tower has blocks for it."""
    blocks = drop_path_blocks(tower)
    for block in blocks:
        block.recomputes = True
    return bool(blocks)
