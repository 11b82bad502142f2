"""Change a whole tower in place: freeze it (LiT), checkpoint its activations, BatchNorm in fp32 and over groups."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clipdist.errors import UserError
from clipdist.models.grouped_norms import GroupedBatchNorm, Groups
from clipdist.models.norms import running_norms, statistics_frozen


def native_size(tower: nn.Module) -> int:
    """Return the side of the images, in pixels, that one of timm's image towers is made for; 0 for other towers."""
    trunk: Any = getattr(tower, "trunk", None)
    return trunk.default_cfg["input_size"][-1] if trunk is not None else 0


def resize(tower: nn.Module, image_size: int) -> None:
    """Let one of timm's towers that has a fixed input size take square images of another size."""
    if native_size(tower) not in (0, image_size) and hasattr(tower.trunk, "set_input_size"):
        tower.set_input_size((image_size, image_size))  # type: ignore[operator]


def text_positions(tower: nn.Module) -> int:
    """Return how many tokens a Hugging Face tower has positions for; 0 for other towers, and where any number fits."""
    limit = getattr(getattr(tower, "config", None), "max_position_embeddings", 0)
    for name, table in tower.named_modules():
        if limit and name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # RoBERTa counts positions from behind the id of padding.
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return limit


def run_on_shapes(tower: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a tower's output for an input of a shape, computed on the meta device with copies of nothing.

    Raises:
        Exception: whatever the tower raises for this input.
    """
    named = (*tower.named_parameters(), *tower.named_buffers())
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in named}
    with torch.no_grad():
        return tuple(functional_call(tower, tensors, torch.ones(shape, dtype=dtype, device="meta")).shape)


def lock(tower: nn.Module, key: str, unlocked: int) -> None:
    """Freeze a tower except its last `unlocked` groups, as the tower defines them.

    Args:
        key: name of the setting, for the message.

    Raises:
        UserError: this kind of tower cannot be unlocked in part, or has so few groups that nothing would be locked.
    """
    trained = _trained(tower)
    try:
        tower.lock(unlocked)  # type: ignore[operator]
        if unlocked and trained <= _trained(tower):
            groups = next(n for n in range(1, unlocked + 1) if _unlocks_all(tower, n))
            raise UserError(
                f"{key}={unlocked}: would lock nothing, for {_kind(tower)} has {groups} groups; set it to at most"
                f" {groups - 1}, or do not lock this tower"
            )
    except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
        raise UserError(f"{key}={unlocked}: {_kind(tower)} cannot be unlocked in part; set it to 0") from error


def lock_weights(tower: nn.Module) -> None:
    """Freeze a tower but its biases (BitFit, Ben Zaken et al., arXiv:2106.10199) and what `lock` leaves to train."""
    lock(tower, "model.biases_only", 0)
    for name, parameter in tower.named_parameters():
        if name.endswith("bias"):  # in_proj_bias, too
            parameter.requires_grad_(True)


def _trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def _unlocks_all(tower: nn.Module, unlocked: int) -> bool:
    tower.requires_grad_(True)
    tower.lock(unlocked)  # type: ignore[operator]
    return all(parameter.requires_grad for parameter in tower.parameters())


def frozen_subtrees(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the largest submodules that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if not parameters:
        return
    if not any(parameter.requires_grad for parameter in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_subtrees(child)


class MeanPooler(nn.Module):
    """The mean of the tokens that are no padding; of a text without any, which open_clip makes nan, the first token."""

    def forward(self, x: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return [b, w] of x.last_hidden_state [b, L, w] and the mask, int64 [b, L]."""
        first = torch.zeros_like(attention_mask)
        first[:, 0] = 1
        mask = torch.where(attention_mask.any(dim=-1, keepdim=True), attention_mask, first)
        return (x.last_hidden_state * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(-1, keepdim=True)


class Projection(NamedTuple):
    """The last layer of a tower: the attribute `name` of `owner`, and what the attribute is to be without it."""

    owner: nn.Module
    name: str
    stand_in: nn.Module | None


def find_projection(tower: Any) -> Projection | None:
    """Return the projection of a tower; None where it has none that is known."""
    if isinstance(getattr(tower, "proj", None), nn.Parameter):  # open_clip's VisionTransformer
        return Projection(tower, "proj", None)
    if hasattr(tower, "transformer") and isinstance(getattr(tower, "proj", None), nn.Module):  # HFTextEncoder
        return Projection(tower, "proj", nn.Identity())
    pool: Any = getattr(tower, "attnpool", None)
    if isinstance(getattr(pool, "c_proj", None), nn.Linear):  # ModifiedResNet takes the layer's weights, never calls it
        weight = pool.c_proj.weight
        width = getattr(weight, "ds_shape", weight.shape)[1]  # ZeRO stage 3 has gathered no weights yet
        same = nn.Linear(width, width, device="meta").to_empty(device=weight.device)  # nothing drawn
        nn.init.eye_(same.weight)
        nn.init.zeros_(same.bias)
        return Projection(pool, "c_proj", same.requires_grad_(False).to(weight.dtype))
    head: Any = getattr(tower, "head", None)  # of open_clip's adapter for timm
    for name in ("proj", "mlp"):
        if isinstance(getattr(head, name, None), nn.Module):
            return Projection(head, name, nn.Identity())
    return None


@contextmanager
def without_projection(tower: nn.Module) -> Iterator[None]:
    """Let the tower give what precedes its projection, where it has one that is known."""
    found = find_projection(tower)
    if found is None:
        yield
        return
    projection = getattr(found.owner, found.name)
    setattr(found.owner, found.name, found.stand_in)
    try:
        yield
    finally:
        setattr(found.owner, found.name, projection)


def remove_projection(tower: nn.Module) -> None:
    """Take the projection off a tower, in place, where it has one that is known."""
    found = find_projection(tower)
    if found is not None:
        setattr(found.owner, found.name, found.stand_in)


def trained_part(tower: nn.Module) -> nn.Module | None:
    """Return what maps the features of a tower's locked part to its output: its projection, or nn.Identity.

    None where more than a projection trains.
    """
    trained = {parameter for parameter in tower.parameters() if parameter.requires_grad}
    if not trained:
        return nn.Identity()
    found = find_projection(tower)
    projection = getattr(found.owner, found.name) if found else None
    if found is None or not isinstance(projection, nn.Module) or not trained <= set(projection.parameters()):
        return None
    return found.owner if isinstance(found.owner, nn.Sequential) else projection  # with the dropout before it


def keep_statistics_fp32(tower: nn.Module) -> None:
    """Keep BatchNorm's running statistics in fp32 when the weights are cast to bf16 or fp16, in layers of any subclass.

    In bf16 a running mean is no longer updated once a batch is within 2 % of it. In fp32 results are bit-identical.
    """
    for module in tower.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats and not isinstance(module, Fp32Statistics):
            mix_in(Fp32Statistics, module)


class Fp32Statistics(nn.Module):
    """Mixin of BatchNorm for low precision: activations in the dtype of the input, running statistics in fp32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the layer with fp32 affine parameters: the kernels require the dtype of the statistics."""
        own = {
            name: parameter
            for name, parameter in self._parameters.items()
            if parameter is not None and parameter.dtype != torch.float32
        }
        for name, parameter in own.items():
            self._parameters[name] = parameter.float()  # type: ignore[assignment]
        try:
            return super().forward(x)
        finally:
            for name, parameter in own.items():
                self._parameters[name] = parameter

    def _apply(self, fn: Any, recurse: bool = True) -> Fp32Statistics:
        with buffers_keep_dtype([(self, "running_mean"), (self, "running_var")]):
            super()._apply(fn, recurse)
        return self


def group_batchnorm(model: nn.Module, size: int) -> None:
    """Let BatchNorm in training normalise over groups of `size` consecutive rows of the global batch, in place.

    Running statistics then move where RunningStatistics of the model is asked to average them, and nowhere else.

    Args:
        model: takes its inputs by name, each with one row for a pair of this rank.
        size: model.batchnorm_group; it fits ranks and micro-batches, see clipdist.config.batches.check_ranks.

    Raises:
        UserError: no BatchNorm trains.
    """
    groups = Groups(size)
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not any(layer.training for layer in layers):
        raise UserError(f"model.batchnorm_group={size}: the model trains no BatchNorm; set it to 0")
    keep_statistics_fp32(model)  # of heads, too
    for layer in layers:
        mix_in(GroupedBatchNorm, layer)
        layer.groups = groups  # type: ignore[assignment]
    model.register_forward_pre_hook(groups.begin, with_kwargs=True)


@contextmanager
def buffers_keep_dtype(buffers: list[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let .to(), .half() ... change the device of these buffers, given by module and name, but not their dtype."""
    before = [getattr(module, name) for module, name in buffers]
    yield
    for (module, name), buffer in zip(buffers, before):
        after = getattr(module, name)
        if after.dtype != buffer.dtype:
            setattr(module, name, buffer.to(after.device))


def checkpoint_image_tower(tower: nn.Module) -> None:
    """Checkpoint the activations of an image tower. The second forward pass does not update BatchNorm's statistics.

    Raises:
        UserError: the tower is of a kind whose blocks are unknown.
    """
    trunk: Any = getattr(tower, "trunk", tower)  # timm's model inside open_clip's adapter, or open_clip's own
    if any(isinstance(module, _BatchNorm) for module in trunk.modules()):
        blocks = _residual_blocks(trunk)
        if not blocks:
            raise _no_checkpointing(trunk)
        for block in blocks:
            mix_in(_Recomputed, block)
        return
    try:
        trunk.set_grad_checkpointing(True)
    except (AssertionError, AttributeError, NotImplementedError) as error:
        raise _no_checkpointing(trunk) from error


def _residual_blocks(trunk: nn.Module) -> list[nn.Module]:
    """Return the blocks of a ResNet's stages layer1, layer2 ..."""
    stages = [child for name, child in trunk.named_children() if re.fullmatch(r"layer\d+", name)]
    return [block for stage in stages for block in stage.children()]


class _Recomputed(nn.Module):
    """Mixin that checkpoints a block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), statistics_frozen(running_norms(self))


def _no_checkpointing(trunk: nn.Module) -> UserError:
    return UserError(
        f"engine.activation_checkpointing=true: not known how for the image tower {_kind(trunk)};"
        " set it to false, or choose a ViT or a ResNet"
    )


def mix_in(mixin: type[nn.Module], module: nn.Module) -> None:
    """Put a mixin before the class of a module, in place: parameter names and deep copies still work."""
    module.__class__ = type(_kind(module), (mixin, type(module)), {})


def _kind(module: nn.Module) -> str:
    return type(module).__name__
