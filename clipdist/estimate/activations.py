"""Measure the bytes that a model needs beside its weights during a forward and a backward pass.

The real model runs on torch's meta device, whose tensors have shapes and no memory, while every storage that an
operation makes is counted from its allocation to its release. A tower that does not run there (code that reads values),
or otherwise than on a real device (an LSTM), runs on the CPU with two rows and with three instead, and the result is
extrapolated linearly.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipdist.config import Config
from clipdist.config.stages import PlannedStage, plan_stages
from clipdist.data.batch import IMAGE
from clipdist.data.patches import full_images
from clipdist.distributed.rank import DTYPES
from clipdist.errors import UserError
from clipdist.models import grouped_norms
from clipdist.models.build import assemble
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.fewer_patches import allow_stages, kept_of, patches_of
from clipdist.models.packed_images import Packing
from clipdist.models.spec import ModelSpec, check_stages_fit, resolve_run_spec
from clipdist.models.towers import group_batchnorm
from clipdist.objectives.make import make_objectives, prepare_model, reads_image
from clipdist.objectives.objective import Objective


@dataclass(frozen=True)
class Activations:
    """Bytes of one forward and backward pass, weights and the batch itself left out.

    Attributes:
        saved: what is alive when the forward pass has ended and the backward pass begins.
        peak: the most at any time, gradients of weights left out once they are complete.
        peak_with_gradients: the most at any time when these gradients stay where they are.
        measured_on: "meta", or "cpu" where two small real runs were needed.
    """

    saved: int
    peak: int
    peak_with_gradients: int
    measured_on: str


class StorageCounter(TorchDispatchMode):
    """Count the bytes of all storages that operations make, while they are allocated.

    Attributes:
        now, peak, peak_with_gradients: as in Activations; `now` includes gradients.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.gradients = self.peak = self.peak_with_gradients = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}  # the caller keeps them alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def complete(self, parameter: torch.Tensor) -> None:
        """Count a parameter's gradient, which is complete, among the gradients."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        weakref.finalize(storage, self._end, key, size)
        self.now += size
        self.peak = max(self.peak, self.now - self.gradients)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def fused_attention() -> Iterator[None]:
    """Run attention on meta tensors as devices compute it: the matrix of attention weights is not kept.

    F.scaled_dot_product_attention itself is replaced: a TorchFunctionMode would not see the call inside of torch's own
    multi-head attention.
    """
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


@contextmanager
def alone_in_group() -> Iterator[None]:
    """Run BatchNorm over groups of several ranks with nothing sent: the moments are this rank's."""
    real = grouped_norms.mean_over_ranks
    grouped_norms.mean_over_ranks = lambda values, ranks: values
    try:
        yield
    finally:
        grouped_norms.mean_over_ranks = real


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | Packing | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if isinstance(attn_mask, Packing):
        return attn_mask.attention(_fused_attention, query, key, value)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    # The CPU's kernel stands for all. CUDA's keep the same: queries, keys, values, the output and one sum a row.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]


def meta_model(config: Config) -> tuple[DualEncoder, ModelSpec]:
    """Build the configured model, heads, locks and checkpointing included, on the meta device: no weights are drawn.

    Raises:
        UserError: as clipdist.models.build.build_model, and clipdist.objectives.make.prepare_model.
    """
    spec = resolve_run_spec(config)
    check_stages_fit(config.train.stages, spec)
    try:
        with torch.device("meta"):
            model = assemble(spec, config.objectives.clip, tower_weights=False)
    except UserError:  # some towers read values while they are built
        model = assemble(spec, config.objectives.clip, tower_weights=False).to("meta")
    model.check_sizes()
    try:
        with torch.device("meta"):
            return _prepared(model, config), spec
    except (RuntimeError, NotImplementedError):  # or while their width is measured
        return _real_model(config, spec).to("meta"), spec


def meta_teacher(spec: ModelSpec) -> DualEncoder:
    """Build a teacher of this description on the meta device."""
    try:
        with torch.device("meta"):
            return assemble(spec, None, tower_weights=False)
    except UserError:  # some towers read values while they are built
        return assemble(spec, None, tower_weights=False).to("meta")


def forward_peak(model: DualEncoder, batch: int, texts: int = 1, views: Mapping[str, int] | None = None) -> int:
    """Return the peak bytes of a forward pass without gradients on the meta device; 0 for a tower that reads values.

    Args:
        views: sides in pixels, by name, of those that a teacher sees; None: images and texts, as the model has them.
    """
    if views is None:
        inputs = _inputs(model, batch, {IMAGE: model.spec.image_size}, texts, model.spec.context_length)
    else:
        inputs = _inputs(model, batch, views, 0, 0)
    counter = StorageCounter([*model.parameters(), *model.buffers(), *inputs.values()])
    try:
        with torch.no_grad(), fused_attention(), counter:
            model.eval()(**inputs, teaching=views is not None)
    except (RuntimeError, NotImplementedError):  # torch's, for reading the values of a meta tensor
        return 0
    return counter.peak


def _prepared(model: DualEncoder, config: Config) -> DualEncoder:
    if config.train.stages:
        allow_stages(model, stages_of(config, model.spec))
    model.lock_towers(config.model)
    prepare_model(model, make_objectives(config.objectives, model.spec.image_size))
    if config.engine.activation_checkpointing:
        model.set_activation_checkpointing()
    return model


def _real_model(config: Config, spec: ModelSpec) -> DualEncoder:
    return _prepared(assemble(spec, config.objectives.clip, tower_weights=False), config)


def sides_of(objectives: Sequence[Objective], image_size: int) -> dict[str, int]:
    """Return the sides of all views of an image, in pixels, by name.

    Args:
        image_size: of CLIP's own view, if there is one.
    """
    own = {IMAGE: image_size} if reads_image(objectives) else {}
    return own | {view.name: view.size for objective in objectives for view in objective.views}


def _inputs(
    model: DualEncoder, batch: int, sides: Mapping[str, int], texts: int, length: int
) -> dict[str, torch.Tensor]:
    """Return the inputs of a forward pass on the model's device, zeros; no tokens for a model without a text tower."""
    device = next(model.parameters()).device
    inputs = {
        name: full_images(batch, replace(model.spec.transform, size=side), device) for name, side in sides.items()
    }
    if texts and (model.text is not None or model.decoder is not None):
        inputs["tokens"] = torch.zeros(batch, texts, length, dtype=torch.int64, device=device)
        inputs["tokens"][..., -1:] = 1
    return inputs


def stages_of(config: Config, spec: ModelSpec) -> tuple[PlannedStage, ...]:
    """Return the stages of a run that is long enough for all of them."""
    return plan_stages(config.train.stages, 1 << 40, spec.image_size, spec.context_length)


def measure(config: Config, model: DualEncoder, batch: int, precision: str) -> Activations:
    """Measure one forward and backward pass of `batch` rows, of several stages that which needs the most.

    Args:
        model: as meta_model gives it; it is cast to the precision.
        precision: fp32, bf16 or fp16.

    Raises:
        UserError: BatchNorm cannot be trained with so few rows.
    """
    stages = stages_of(config, model.spec)
    group = config.model.batchnorm_group
    model.check_rows(group or batch, min(stage.image_size for stage in stages))
    batch = max(batch, 2) if group else batch  # of a group that spans ranks one pair may be here
    whole = next(iter(plan_stages([], 1, model.spec.image_size, model.spec.context_length)))
    shapes = {replace(stage, first=0) for stage in stages}
    found = [
        _measure_stage(config, model, batch, precision, stage) for stage in ([whole] if whole in shapes else shapes)
    ]
    return max(found, key=lambda activations: activations.peak)


def _measure_stage(config: Config, model: DualEncoder, batch: int, precision: str, stage: PlannedStage) -> Activations:
    objectives = make_objectives(config.objectives, model.spec.image_size)
    alone = {name for objective in objectives for name in objective.taught_alone}
    sides = {name: side for name, side in sides_of(objectives, stage.image_size).items() if name not in alone}
    texts, group = config.data.planned_texts, config.model.batchnorm_group
    if group:  # in a copy, as the layers then want to know the rows of every pass
        model = copy.deepcopy(model.train())
        group_batchnorm(model, group)
    try:
        with alone_in_group():
            return one_pass(model.to(DTYPES[precision]), batch, texts, stage, sides)
    except (RuntimeError, NotImplementedError):  # torch's, for reading the values of a meta tensor
        real = _real_model(config, model.spec).to(DTYPES[precision])
        two, three = (one_pass(real, rows, texts, stage, sides) for rows in (2, 3))  # of one BatchNorm learns nothing
        saved, peak, peak_with_gradients = (
            getattr(two, name) + (getattr(three, name) - getattr(two, name)) * (batch - 2)
            for name in ("saved", "peak", "peak_with_gradients")
        )
        return Activations(saved, peak, peak_with_gradients, measured_on="cpu")


def one_pass(
    model: DualEncoder,
    batch: int,
    texts: int = 1,
    stage: PlannedStage | None = None,
    views: Mapping[str, int] | None = None,
) -> Activations:
    """Measure as `measure`, on the device that the model is on, with so many texts of an image, all of them padded.

    Args:
        stage: None: images, texts and patches as the model has them.
        views: sides in pixels of those that the model sees, by name; None: CLIP's.
    """
    device = next(model.parameters()).device
    side, length, patches = model.spec.image_size, model.spec.context_length, {}
    if stage is not None:
        side, length = stage.image_size, stage.tokens
        if kept := kept_of(patches_of(model.visual, side), stage.patch_dropout):
            patches = {"patches": torch.arange(kept).expand(batch, -1).to(device)}
    inputs = _inputs(model, batch, {IMAGE: side} if views is None else views, texts, length)
    kind = model.text_kind
    packed = kind == "sequences"
    if packed and device.type == "meta":
        raise NotImplementedError("an LSTM keeps other tensors on a real device")  # 2.7 times as much on a CPU
    model.train()
    model.text_kind = kind if packed else "whole"
    counter = StorageCounter([*model.parameters(), *model.buffers(), *inputs.values()])
    hooks = [p.register_post_accumulate_grad_hook(counter.complete) for p in model.parameters() if p.requires_grad]
    attention: AbstractContextManager[Any] = fused_attention() if device.type == "meta" else nullcontext()
    try:
        with attention, counter:
            outputs = [x for x in model(**inputs, **patches).values() if x.requires_grad]
            saved = counter.now
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        return Activations(saved, counter.peak, counter.peak_with_gradients, device.type)
    finally:
        model.text_kind = kind
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
