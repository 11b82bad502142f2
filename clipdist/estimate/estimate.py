"""Estimate what a run will need, and refuse it where it cannot fit into memory."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch

import clipdist.estimate.memory as memory
from clipdist.config import Config
from clipdist.config.batches import check_ranks, launched_ranks, total_steps
from clipdist.config.stages import plan_stages
from clipdist.data.catalog import Catalog
from clipdist.distributed.rank import DTYPES
from clipdist.engine.zero import GATHERED
from clipdist.errors import UserError
from clipdist.estimate.activations import (
    Activations,
    forward_peak,
    measure,
    meta_model,
    meta_teacher,
    sides_of,
    stages_of,
)
from clipdist.estimate.memory import ModelSizes, RankMemory, StepLayout, by_stage
from clipdist.estimate.rate import expected_rate
from clipdist.estimate.remedies import remedies
from clipdist.estimate.traffic import wire_bytes
from clipdist.estimate.views import normalised_channels, taught_sides, viewed_objectives
from clipdist.losses.tiles import Tile, choose_tile
from clipdist.losses.wire import reduced_bytes
from clipdist.models.dual_encoder import HEADS, DualEncoder
from clipdist.models.layers import hidden_matrices, layers_behind
from clipdist.objectives.make import make_objectives
from clipdist.objectives.teacher import check_teacher

TOLERANCE = 1.15  # a run is refused above this share of the device: the prediction may be wrong by as much
GPU_TILE = Tile(8192, 8192)  # the largest that a GPU uses
GB = 1e9


def make_estimate(
    config: Config, catalog: Catalog | None = None, *, world: int | None = None, model: MeasuredModel | None = None
) -> Estimate:
    """Estimate a run without data, without a GPU and without drawing weights, in seconds.

    Args:
        catalog: of the training data, for steps and epochs; None: as far as the configuration alone tells.
        world: ranks; None: launch.nodes x launch.gpus (one with launch.cluster=debug).
        model: measured before, for another configuration of the same model.

    Raises:
        UserError: the model cannot be built, the batch cannot be divided, or a stage has no step.
    """
    world = world or launched_ranks(config.launch)
    check_ranks(config, world)
    train = config.train
    per_epoch = len(catalog) // train.global_batch if catalog is not None else 0
    known = catalog is not None or train.steps or train.samples
    device = _device(config)
    rate, rate_source = expected_rate(config)
    measured, steps = model or MeasuredModel(config), total_steps(train, per_epoch) if known else None
    if steps is not None:  # refuses a stage without a step
        plan_stages(train.stages, steps, measured.spec.image_size, measured.spec.context_length)
    limit, limit_source = _device_bytes(config, device)
    return Estimate(
        config=config,
        world=world,
        device=device,
        # bf16 stands for fp16, which takes as many bytes, on a GPU without bf16
        precision={"cpu": "fp32", "cuda": "bf16"}[device] if train.precision == "auto" else train.precision,
        steps=steps,
        steps_per_epoch=per_epoch or None,
        rate=rate,
        rate_source=rate_source,
        limit=limit,
        limit_source=limit_source,
        model=measured,
    )


@dataclass(frozen=True)
class Estimate:
    """What a run will need. Bytes throughout; of one rank unless said otherwise.

    Attributes:
        device: cpu or cuda.  precision: fp32, bf16 or fp16.
        steps, steps_per_epoch: None where the data are not known.
        rate: samples a second of the whole job; 0 where not known.
        limit: memory of the device; None where not known.
    """

    config: Config
    world: int
    device: str
    precision: str
    steps: int | None
    steps_per_epoch: int | None
    rate: float
    rate_source: str
    limit: int | None
    limit_source: str
    model: MeasuredModel

    @cached_property
    def layout(self) -> StepLayout:
        train, engine = self.config.train, self.config.engine
        zero = engine.deepspeed.get("zero_optimization") or {}
        share = train.global_batch // self.world
        return StepLayout(
            stage=engine.zero_stage,
            world=self.world,
            share=share,
            micro=train.micro_batch or share,
            itemsize=4 if self.precision == "fp32" else 2,
            bfloat16=self.precision == "bf16",
            bucket=int(zero.get("reduce_bucket_size", memory.BUCKET)),
            cpu=self.device == "cpu",
            offload=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
            ema=train.ema > 0 or self.sizes.taught > 0,
        )

    @property
    def sizes(self) -> ModelSizes:
        return self.model.sizes

    @property
    def rows(self) -> str:
        """What a batch is made of."""
        return "pairs" if self.config.objectives.read_text else "images"

    @cached_property
    def activations(self) -> Activations:
        return self.model.activations(self.config, self.layout.micro, self.precision)

    @cached_property
    def stages(self) -> dict[int, RankMemory]:
        """Memory of a rank under each ZeRO stage."""
        teacher = self.model.teacher
        rest = {
            memory.TEACHER: teacher.elements * self.layout.itemsize if teacher else 0,
            memory.STATE: self._objective_bytes,
            memory.FEATURES: self._feature_bytes(),
            memory.TILES: self._tile_bytes(),
            memory.BATCH: self._batch_bytes(),
            memory.OVERHEAD: memory.TOKENIZER if self.layout.cpu and self.config.objectives.read_text else 0,
        }
        taught = self.model.taught_peak(self.config, self.layout.micro, self.precision)
        if teacher:
            taught = teacher.forward_peak(self.layout.micro, self.precision, self.config.data.planned_texts)
        return by_stage(self.sizes, self.layout, self.activations, rest, taught)

    @property
    def memory(self) -> RankMemory:
        """Memory of a rank under the configured stage."""
        return self.stages[self.layout.stage]

    @property
    def total(self) -> int:
        """What has to fit the device; on a CPU the loader's batches and a checkpoint are in the same memory."""
        return self.memory.total + (sum(self.host.values()) if self.device == "cpu" else 0)

    @cached_property
    def host(self) -> dict[str, int]:
        """The host's memory for one rank, by name."""
        average = ", average of weights" if self.layout.ema else ""
        return {
            "batches ahead": self.config.data.prefetch * self._batch_bytes(),
            "a checkpoint while it is written": self._state_bytes() // self.world,
            **({f"masters and moments{average}": self.memory.offloaded} if self.memory.offloaded else {}),
        }

    @cached_property
    def wire(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by collective."""
        clip = self.config.objectives.clip
        texts, taught = self.config.data.planned_texts, self._taught_width
        views = {
            f"{viewed.objective.name}: outputs, sums": viewed.wire_bytes(self.world, self.layout.share, self.precision)
            for viewed in self.model.viewed
        }
        group = self.config.model.batchnorm_group
        if group > self.layout.share:  # float64 sums of every group, forward and backward
            sums = self.config.train.global_batch // group * 2 * 8 * self.model.normalised
            views["BatchNorm over groups: all-reduce of moments"] = reduced_bytes(self.world, sums)
        return wire_bytes(
            self.sizes, self.layout, clip.loss if clip else "", self.precision, self._narrower, texts, taught, views
        )

    @property
    def _narrower(self) -> tuple[int, ...]:
        """The widths that have a loss of their own, beside that of all features."""
        clip = self.config.objectives.clip
        return clip.nested_widths(self.sizes.width)[:-1] if clip else ()

    @property
    def _taught_width(self) -> int:
        """The width of a teacher whose logits are distilled; 0: none are."""
        distill, teacher = self.config.objectives.distill, self.model.teacher
        return teacher.width if distill and teacher and distill.target == "logits" else 0

    @property
    def samples(self) -> int | None:
        return None if self.steps is None else self.steps * self.config.train.global_batch

    @property
    def epochs(self) -> float | None:
        return self.steps / self.steps_per_epoch if self.steps and self.steps_per_epoch else None

    @property
    def seconds(self) -> float | None:
        """Time of training alone, without validation, checkpoints and start-up."""
        return self.samples / self.rate if self.samples and self.rate else None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a whole checkpoint, over all ranks: fp32 weights, moments, an average, and objectives' state."""
        return self._state_bytes() + self.sizes.buffer_bytes

    @property
    def save_every(self) -> int | None:
        """Steps between checkpoints; None: once an epoch of unknown length."""
        return self.config.train.save_every or self.steps_per_epoch

    @property
    def checkpoints_kept(self) -> int | None:
        """The most checkpoints at one time, the one being written included; None without a number of steps."""
        train, guard = self.config.train, self.config.guard
        if train.keep_every and self.steps is None:
            return None
        regular = self.steps // train.keep_every if train.keep_every and self.steps else 0
        back = 2 if guard.patience and (self.save_every or guard.window) < guard.window else 0  # see RetentionPolicy
        return train.keep + regular + bool(train.keep_best) + back + 1

    def _state_bytes(self) -> int:
        locked = 0 if self.config.model.lora else self.sizes.locked
        kept = 1 + self.sizes.moments + self.layout.ema
        saved = 4 * (self.sizes.trained * kept - self.sizes.matrices + locked)
        return saved + self._objective_bytes

    @property
    def _objective_bytes(self) -> int:
        """What objectives keep between steps."""
        return sum(viewed.state_bytes for viewed in self.model.viewed)

    def _batch_bytes(self) -> int:
        stages = stages_of(self.config, self.model.spec)
        side, length = max(stage.image_size for stage in stages), max(stage.tokens for stage in stages)
        sides = sides_of(self.model.objectives, side).values()
        pixels = sum(math.prod(replace(self.model.spec.transform, size=side).shape) for side in sides)
        texts = self.config.data.planned_texts if self.config.objectives.read_text else 0
        return self.layout.share * (pixels + 8 * length * texts + 17)

    def _feature_bytes(self) -> int:
        layout = self.layout
        views = (
            viewed.feature_bytes(layout.share, layout.micro, self.world, layout.itemsize)
            for viewed in self.model.viewed
        )
        return sum(views) + (self._pair_bytes() if self.config.objectives.read_text else 0)

    def _pair_bytes(self) -> int:
        """Features of images and texts over the batch, and their gradients."""
        share, batch = self.layout.share, self.config.train.global_batch
        width, size = self.sizes.width, self.layout.itemsize
        texts = self.config.data.planned_texts
        sides, all_texts = 1 + texts, batch * texts
        taught, teacher = self._taught_width, self.model.teacher
        # And their fp32 gradients.
        features = sides * share * width * size + share * width * 4 + all_texts * (width * 4 + 16)
        if taught:  # the gradients of the first of two losses over the batch, and log-sum-exps
            features += 2 * share * width * 4 + 3 * 16 * (share + batch)
        if teacher:
            features += sides * share * teacher.width * size
        if taught and self.world > 1:
            features += batch * taught * size
        if texts > 1:
            features += 4 * texts * share * width * 4  # sums over the texts and images of groups
        if self.world > 1:
            features += 3 * all_texts * width * size  # all ranks' text features; their gradients as sent and received
        # Of every narrower width: copies of both sides, and their fp32 gradients until the backward pass.
        narrow = sum(self._narrower)
        features += sides * share * narrow * (size + 4)
        if self.layout.pieces > 1:
            features += sides * share * width * 4  # the feature gradients that micro-batches wait for
        return features

    def _tile_bytes(self) -> int:
        """The logits that exist at one time, and the features beside them."""
        layout = self.layout
        tile = choose_tile(torch.device("cpu"), GPU_TILE if self.device == "cuda" else None)
        views = (viewed.tile_bytes(tile, layout.share, layout.micro, self.world) for viewed in self.model.viewed)
        return max([self._pair_tile_bytes(), *views])

    def _pair_tile_bytes(self) -> int:
        """Those of images and texts; a fused kernel has none in memory."""
        texts, clip, taught = self.config.data.planned_texts, self.config.objectives.clip, self._taught_width
        fused = self.device == "cuda" and texts == 1 and clip is not None and clip.implementation != "tiles"
        if (fused or clip is None) and not taught:
            return 0
        tile = choose_tile(torch.device("cpu"), GPU_TILE if self.device == "cuda" else None)
        rows, columns = min(tile.rows, self.layout.share), min(tile.columns, self.config.train.global_batch * texts)
        if taught:  # logits of both models, the two softmaxes of each, and which pairs are valid
            return rows * columns * 25 + 4 * (rows + columns) * (self.sizes.width + taught)
        return 4 * (rows * columns + (rows + columns) * self.sizes.width)

    def refuse(self) -> None:
        """Refuse a run that needs over 15 % more memory than the device has.

        Raises:
            UserError: it does; names settings that fit.
        """
        if self.limit is None or self.total <= self.limit * TOLERANCE:
            return
        where = f"{'a rank' if self.device == 'cpu' else 'a GPU'} needs about {self.total / GB:.1f} GB"
        raise UserError(
            f"{where} and has {self.limit / GB:.1f} GB ({self.limit_source}), at model.name={self.config.model.name},"
            f" engine.zero_stage={self.layout.stage}, {self.layout.micro} {self.rows} a forward pass;"
            f" {self._what_fits(self.limit)}"
        )

    def _what_fits(self, limit: int) -> str:
        for changed, words in remedies(self.config, self.world, self.device):
            world = self.world // self.config.launch.nodes * changed.launch.nodes
            with suppress(UserError):  # a micro-batch too small for BatchNorm
                found = make_estimate(changed, world=world, model=self.model)
                if found.total <= limit:
                    return f"set {' '.join(words)}: {found.total / GB:.1f} GB"
        return "nothing that was tried makes it fit, more nodes included: take a smaller model or more memory"


class MeasuredModel:
    """A model's sizes and activations, kept for configurations that differ in batch, stage or checkpointing alone.

    Attributes:
        teacher: the frozen one of the configuration, if it has one.
        objectives: of the configuration.  viewed: those on views of an image.
        normalised: channels of BatchNorm in training, of all views, passes forward and backward and a teacher's.
    """

    def __init__(self, config: Config) -> None:
        self.teacher = MeasuredTeacher(config) if config.objectives.distill else None
        self._activations: dict[tuple[bool, int, str], Activations] = {}
        model, self.spec = meta_model(config)
        self.objectives = make_objectives(config.objectives, self.spec.image_size)
        self.viewed = viewed_objectives(self.objectives, model)
        if config.optim.layer_decay < 1:
            layers_behind(model)  # refuses what training would
        self._by_checkpointing: dict[bool, DualEncoder] = {config.engine.activation_checkpointing: model}
        hidden = hidden_matrices(model) if config.optim.name == "muon" else {}  # refuses the same
        numbers = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]
        moving = any(objective.teacher for objective in self.objectives)
        copied = [(n, trained) for name, n, trained in numbers if moving and not name.startswith("text.")]
        followed = [n for n, trained in copied if trained]
        self.sizes = ModelSizes(
            trained=sum(n for _, n, trained in numbers if trained),
            locked=sum(n for _, n, trained in numbers if not trained),
            small=sum(n for _, n, _ in numbers if n < memory.PERSISTENT),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
            width=self.spec.embed_dim,
            matrices=sum(n for name, n, _ in numbers if name in hidden),
            moments=1 if config.optim.name in ("lars", "sgd") else 2,
            taught=sum(n for n, _ in copied),
            taught_trained=sum(followed),
            gathered=max([0, *(sum(followed[at : at + GATHERED]) for at in range(0, len(followed), GATHERED))]),
        )
        self.normalised = normalised_channels(self.objectives, model)
        self.counts = {
            "image": sum(n for name, n, _ in numbers if name.startswith("visual.")),
            "text": sum(n for name, n, _ in numbers if name.startswith("text.")),
            "heads": sum(n for name, n, _ in numbers if name.startswith(HEADS)),
            "all": self.sizes.all,
        }

    def activations(self, config: Config, micro: int, precision: str) -> Activations:
        checkpointing = config.engine.activation_checkpointing
        key = (checkpointing, micro, precision)
        if key not in self._activations:
            if checkpointing not in self._by_checkpointing:
                self._by_checkpointing[checkpointing] = meta_model(config)[0]
            self._activations[key] = measure(config, self._by_checkpointing[checkpointing], micro, precision)
        return self._activations[key]

    def taught_peak(self, config: Config, micro: int, precision: str) -> int:
        """Return the bytes of the activations of a pass of a teacher that follows the weights; 0: there is none."""
        sides = taught_sides(self.objectives, sides_of(self.objectives, self.spec.image_size))
        if not sides:
            return 0
        model = self._by_checkpointing[config.engine.activation_checkpointing]
        return forward_peak(model.to(DTYPES[precision]), micro, views=sides)


class MeasuredTeacher:
    """A teacher's sizes.

    Attributes:
        elements: of its parameters and buffers.  width: of its features.

    Raises:
        UserError: there is none of that name, or it does not fit the model.
    """

    def __init__(self, config: Config) -> None:
        assert config.objectives.distill is not None
        spec = check_teacher(config.objectives.distill, config.model)
        self._model = meta_teacher(spec)
        tensors = [*self._model.parameters(), *self._model.buffers()]
        self.elements, self.width = sum(tensor.numel() for tensor in tensors), spec.embed_dim

    def forward_peak(self, micro: int, precision: str, texts: int) -> int:
        """Return the bytes of the activations of its forward pass."""
        return forward_peak(self._model.to(DTYPES[precision]), micro, texts)


def _device(config: Config) -> str:
    """Return the device of the job, which need not be this machine's: a Slurm job gets GPUs unless it says cpu."""
    if config.device != "auto":
        return config.device
    return "cuda" if config.launch.cluster == "slurm" or torch.cuda.is_available() else "cpu"


def _device_bytes(config: Config, device: str) -> tuple[int | None, str]:
    launch = config.launch
    if launch.device_gb:
        return int(launch.device_gb * GB), "launch.device_gb"
    if device == "cpu" and launch.mem_gb:
        return int(launch.mem_gb * GB / launch.gpus), "launch.mem_gb"
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's GPU"
    return None, "not known"
