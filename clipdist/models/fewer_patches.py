"""Let towers take smaller images than they are made for, a choice of their patches, and shorter texts.

Parameters keep their shapes: a table of position embeddings is interpolated in the forward pass (CLIPA, Li et al.,
arXiv:2305.07017), so that checkpoints and exports do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipdist.config.stages import PlannedStage
from clipdist.errors import UserError, brief
from clipdist.models.text_length import allow_shorter
from clipdist.models.towers import mix_in, run_on_shapes


class PositionTable(NamedTuple):
    """A parameter `name` [..., prefix + grid * grid, w]; a position stands for `patch` of the input's sides."""

    name: str
    prefix: int
    grid: int
    patch: int


class OtherGrids(nn.Module):
    """Mixin of a module with a position table: also takes square inputs of another size."""

    table: PositionTable

    def forward(self, x: Tensor) -> Tensor:
        """Run the module with the table interpolated to the grid of x [b, c, h, h]."""
        name, prefix, grid, patch = self.table
        side = x.shape[-1] // patch
        if side == grid:
            return super().forward(x)
        own = self._parameters[name]
        assert own is not None
        # Found before the parameter, which stays where it is: ZeRO stage 3 looks for it while submodules run.
        self.__dict__[name] = resized_positions(own, prefix, grid, side)
        try:
            return super().forward(x)
        finally:
            del self.__dict__[name]


def resized_positions(table: Tensor, prefix: int, grid: int, side: int) -> Tensor:
    """Interpolate position embeddings bicubically, with antialiasing, as open_clip and timm do on loading weights.

    A product with a constant matrix: unlike the interpolation's own backward pass it gives the same bits every time on
    a GPU.

    Args:
        table: [..., prefix + grid * grid, w].

    Returns:
        [..., prefix + side * side, w] in the table's dtype.
    """
    weights = _interpolation(grid, side, table.device)
    resized = (weights @ table[..., prefix:, :].float()).to(table.dtype)
    return torch.cat([table[..., :prefix, :], resized], dim=-2)


@lru_cache(maxsize=16)
def _interpolation(grid: int, side: int, device: torch.device) -> Tensor:
    """Return the matrix [side * side, grid * grid] that interpolates what lies on a grid."""
    unit = torch.eye(grid * grid, device="cpu").view(1, grid * grid, grid, grid)
    resized = F.interpolate(unit, (side, side), mode="bicubic", antialias=True)
    return resized.flatten(2)[0].T.contiguous().to(device)


class PatchChoice(nn.Module):
    """Stands in a tower where patches can be dropped at random, and passes on those that are chosen.

    Attributes:
        chosen: int64 [b, n], patches of every image; None: all.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix  # tokens before the patches, such as the class token
        self.chosen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return [b, prefix + n, w] of x [b, prefix + patches, w]."""
        if self.chosen is None:
            return x
        places = self.chosen[..., None].expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, places)], dim=1)


@contextmanager
def patches_chosen(tower: Any, chosen: Tensor) -> Iterator[None]:
    """Let a tower see these patches alone, int64 [b, n], inside the context."""
    choice = _choice(tower)
    assert choice is not None
    choice.chosen = chosen
    try:
        yield
    finally:
        choice.chosen = None


def _choice(tower: Any) -> PatchChoice | None:
    trunk = getattr(tower, "trunk", tower)
    found = getattr(trunk, "patch_drop", getattr(trunk, "patch_dropout", None))
    return found if isinstance(found, PatchChoice) else None


def patches_of(tower: nn.Module, image_size: int) -> int:
    """Return the number of patches of an image of this size; 0 where a tower has none that can be chosen."""
    table = getattr(getattr(tower, "trunk", tower), "table", None)
    return (image_size // table.patch) ** 2 if table and _choice(tower) else 0


def kept_of(patches: int, dropout: float) -> int:
    """Return how many of an image's patches a tower sees; 0: all."""
    return max(1, round(patches * (1 - dropout))) if patches and dropout else 0


def allow_stages(model: Any, stages: Sequence[PlannedStage]) -> None:
    """Let the towers of a dual encoder take the images, patches and texts of all stages, in place.

    Raises:
        UserError: they do not take them.
    """
    _prepare(model.visual)
    if model.text is not None:
        allow_shorter(model.text)
    dtype = next(model.visual.parameters()).dtype
    for number, stage in enumerate(stages):
        where, side = f"train.stages[{number}].", stage.image_size
        features = model.spec.embed_dim if model.spec.has_text else 0
        _check_shape(model.visual, (2, 3, side, side), dtype, features, f"{where}image_size={side}")
        if model.text is not None:
            _check_shape(model.text, (2, stage.tokens), torch.int64, features, f"{where}tokens={stage.tokens}")
        if stage.patch_dropout and not patches_of(model.visual, side):
            raise UserError(
                f"{where}patch_dropout={stage.patch_dropout}: {_kind(model.visual)} has no patches to choose from, or a"
                " patch dropout of its own in the model's description"
            )


def allow_sizes(model: Any, sizes: Mapping[str, int]) -> None:
    """Let the image tower of a dual encoder take images of other sizes, by the setting that asks for them.

    Raises:
        UserError: it does not take one.
    """
    _prepare(model.visual)
    dtype = next(model.visual.parameters()).dtype
    for where, side in sizes.items():
        table = getattr(getattr(model.visual, "trunk", model.visual), "table", None)
        if table and side % table.patch:
            raise UserError(f"{where}={side}: must be a multiple of the model's patches of {table.patch} pixels")
        features = model.spec.embed_dim if model.spec.has_text else 0
        _check_shape(model.visual, (2, 3, side, side), dtype, features, f"{where}={side}")


def _check_shape(tower: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, features: int, where: str) -> None:
    """Raise UserError where a tower does not run on inputs of this shape. One that reads values is not tried.

    Args:
        features: how many it shall give; 0: any number.
    """
    try:
        found = run_on_shapes(tower, shape, dtype)
    except NotImplementedError:
        return
    except Exception as error:  # whatever a tower raises for a size that it does not take
        if "meta" in str(error):
            return
        raise UserError(f"{where}: {_kind(tower)} does not take it: {brief(error)}") from error
    if features and found != (2, features):
        raise UserError(f"{where}: {_kind(tower)} gives {list(found[1:])} instead of {features} features")


def _kind(tower: nn.Module) -> str:
    return type(getattr(tower, "trunk", tower)).__name__


def _prepare(tower: Any) -> None:
    """Put OtherGrids and PatchChoice into towers of known kinds; others keep what they can do."""
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.transformer import VisionTransformer
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    trunk = getattr(tower, "trunk", tower)
    if isinstance(trunk, VisionTransformer):
        _mix_in_table(trunk, PositionTable("positional_embedding", 1, trunk.grid_size[0], trunk.patch_size[0]))
        if isinstance(trunk.patch_dropout, nn.Identity):
            trunk.patch_dropout = PatchChoice(1)
    elif isinstance(trunk, ModifiedResNet) and isinstance(trunk.attnpool, AttentionPool2d):
        positions = len(trunk.attnpool.positional_embedding) - 1
        _mix_in_table(trunk.attnpool, PositionTable("positional_embedding", 1, round(positions**0.5), 1))
    elif isinstance(trunk, TimmViT) and trunk.pos_embed is not None:
        prefix, embed = trunk.num_prefix_tokens, trunk.patch_embed
        embed.strict_img_size = False
        in_table = 0 if trunk.no_embed_class else prefix
        _mix_in_table(trunk, PositionTable("pos_embed", in_table, embed.grid_size[0], embed.patch_size[0]))
        if isinstance(trunk.patch_drop, nn.Identity):
            trunk.patch_drop = PatchChoice(prefix)  # type: ignore[assignment]


def _mix_in_table(module: Any, table: PositionTable) -> None:
    if not isinstance(module, OtherGrids):
        mix_in(OtherGrids, module)
    module.table = table
