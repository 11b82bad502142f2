"""What a caption decoder reads of an image: the tokens that the image tower has before it pools them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdist.errors import UserError
from clipdist.models.towers import run_on_shapes


def image_tokens(tower: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features [b, D] and the tokens [b, n, w] of an image tower, from one forward pass.

    Tokens are, of open_clip's VisionTransformer, the patches behind the last norm, without the class token, or what
    attentional pooling makes of them; of timm's models the patches without class tokens and registers, or the grid of
    the last feature map; of open_clip's ModifiedResNet the grid before its pooling.

    Args:
        pixels: normalised, [b, 3, H, W].

    Raises:
        UserError: the tower is of another kind.
    """
    from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(tower, VisionTransformer):
        with gives_tokens(tower):
            return tower(pixels)
    caught: list[Tensor] = []
    if isinstance(tower, ModifiedResNet) and isinstance(tower.attnpool, AttentionPool2d):
        hook = tower.attnpool.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        try:
            features = tower(pixels)
        finally:
            hook.remove()
        return features, _of_grid(caught[0])
    trunk: Any = getattr(tower, "trunk", None)
    if callable(getattr(trunk, "forward_head", None)):
        with _caught_before_head(trunk, caught.append):
            features = tower(pixels)
        return features, _timm_tokens(trunk, caught[0])
    raise UserError(f"objectives.caption: {type(tower).__name__} has no tokens that are known; take a ViT or a ResNet")


@contextmanager
def gives_tokens(tower: Any) -> Iterator[None]:
    """Let one of open_clip's transformers return its tokens beside the feature."""
    before, tower.output_tokens = tower.output_tokens, True
    try:
        yield
    finally:
        tower.output_tokens = before


@contextmanager
def _caught_before_head(trunk: Any, catch: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass on what one of timm's models gives to its head."""
    head = trunk.forward_head

    def forward_head(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        catch(x)
        return head(x, *args, **kwargs)

    trunk.forward_head = forward_head
    try:
        yield
    finally:
        del trunk.forward_head


def _timm_tokens(trunk: Any, x: Tensor) -> Tensor:
    if x.ndim == 3:
        return x[:, getattr(trunk, "num_prefix_tokens", 0) :]
    if x.ndim == 4 and getattr(trunk, "output_fmt", "NCHW") != "NHWC":
        return _of_grid(x)
    if x.ndim == 4:
        return x.flatten(1, 2)
    raise UserError(f"objectives.caption: {type(trunk).__name__} has no tokens that are known; take a ViT or a ResNet")


def _of_grid(x: Tensor) -> Tensor:
    """Return [b, h * w, c] of [b, c, h, w]."""
    return x.flatten(2).transpose(1, 2)


class _Tokens(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return image_tokens(self.tower, pixels)[1]


def tokens_shape(tower: nn.Module, image_size: int) -> tuple[int, int]:
    """Return n and w of a tower's tokens. Computed without values, by a tower that takes such inputs.

    Raises:
        UserError: see image_tokens.
    """
    shape, weight = (2, 3, image_size, image_size), next(tower.parameters())
    try:
        _, number, width = run_on_shapes(_Tokens(tower), shape, weight.dtype)
    except (NotImplementedError, RuntimeError):  # the tower reads values
        with torch.no_grad():
            _, number, width = image_tokens(tower.eval(), weight.new_zeros(shape))[1].shape
        tower.train()
    return number, width
