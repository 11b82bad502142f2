"""A configuration in; what its run will need out, in figures, as a table, and as a refusal where it cannot fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from clipdist.config import Config
from clipdist.config.checks import check_ranks, total_steps
from clipdist.errors import UserError
from clipdist.estimate.rate import expected_rate
from clipdist.estimate.remedies import remedies

if TYPE_CHECKING:
    from clipdist.data.catalog import Catalog
    from clipdist.estimate.activations import Activations
    from clipdist.estimate.memory import Layout, Memory, Sizes

TOLERANCE = 1.15  # a prediction this far above the device is refused: it may be wrong by as much
GB = 1e9
HALF = {"bf16", "fp16"}


def make_estimate(
    config: Config, catalog: Catalog | None = None, *, world: int | None = None, model: _Models | None = None
) -> Estimate:
    """Estimates a run without data, without a GPU and without drawing weights; takes seconds.

    Args:
        catalog: of the training data, for steps and epochs; None: as far as the configuration alone tells.
        world: ranks; None: launch.nodes x launch.gpus (one with launch.cluster=debug).
        model: measured before for another configuration of the same model.

    Raises:
        UserError: the model cannot be built, or the batch cannot be divided.
    """
    if world is None:
        world = 1 if config.launch.cluster == "debug" else config.launch.nodes * config.launch.gpus
    check_ranks(config, world)
    per_epoch = len(catalog) // config.train.global_batch if catalog is not None else 0
    known = catalog is not None or config.train.steps or config.train.samples
    device = _device(config)
    rate, source = expected_rate(config)
    limit, limit_source = _device_bytes(config, device)
    return Estimate(
        config=config,
        world=world,
        device=device,
        precision=_precision(config, device),
        steps=total_steps(config, per_epoch) if known else None,
        steps_per_epoch=per_epoch or None,
        rate=rate,
        rate_source=source,
        limit=limit,
        limit_source=limit_source,
        models=model or _Models(config),
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
    models: _Models

    @cached_property
    def layout(self) -> Layout:
        from clipdist.estimate.memory import BUCKET, Layout

        train, engine = self.config.train, self.config.engine
        zero = engine.deepspeed.get("zero_optimization") or {}
        share = train.global_batch // self.world
        return Layout(
            stage=engine.zero_stage,
            world=self.world,
            share=share,
            micro=train.micro_batch or share,
            itemsize=2 if self.precision in HALF else 4,
            bfloat16=self.precision == "bf16",
            bucket=int(zero.get("reduce_bucket_size", BUCKET)),
            cpu=self.device == "cpu",
            offload=(zero.get("offload_optimizer") or {}).get("device") == "cpu",
        )

    @cached_property
    def sizes(self) -> Sizes:
        return self.models.sizes

    @cached_property
    def activations(self) -> Activations:
        return self.models.activations(self.config, self.layout.micro, self.precision)

    @cached_property
    def stages(self) -> dict[int, Memory]:
        """Memory of a rank under each ZeRO stage."""
        from clipdist.estimate.memory import by_stage

        return by_stage(self.sizes, self.layout, self.activations, self._rest())

    @property
    def memory(self) -> Memory:
        """Under the configured stage."""
        return self.stages[self.layout.stage]

    @property
    def total(self) -> int:
        """What has to fit the device; on a CPU the loader and a checkpoint live in the same memory."""
        return self.memory.total + (sum(self.host.values()) if self.device == "cpu" else 0)

    @cached_property
    def host(self) -> dict[str, int]:
        """The host's memory for one rank, by name."""
        owned = self.sizes.trained * 12 + self.sizes.locked * 4
        return {
            "batches ahead": self.config.data.prefetch * self._batch_bytes(),
            "a checkpoint while it is written": owned // self.world,
            **({"masters and moments": self.memory.offloaded} if self.memory.offloaded else {}),
        }

    @cached_property
    def wire(self) -> dict[str, float]:
        from clipdist.estimate.traffic import wire_bytes

        return wire_bytes(self.sizes, self.layout, self.config.loss.name, self.precision)

    @property
    def samples(self) -> int | None:
        return None if self.steps is None else self.steps * self.config.train.global_batch

    @property
    def epochs(self) -> float | None:
        return self.steps / self.steps_per_epoch if self.steps and self.steps_per_epoch else None

    @property
    def seconds(self) -> float | None:
        """Of training alone: validation, checkpoints and start-up come on top."""
        return self.samples / self.rate if self.samples and self.rate else None

    @property
    def checkpoint_bytes(self) -> int:
        """Of a whole checkpoint: fp32 weights and two moments, over all ranks."""
        return self.sizes.trained * 12 + self.sizes.locked * 4 + self.sizes.buffer_bytes

    @property
    def save_every(self) -> int | None:
        """Steps between checkpoints; None: once an epoch of unknown length."""
        return self.config.train.save_every or self.steps_per_epoch

    @property
    def checkpoints_kept(self) -> int | None:
        """At most, one that is being written among them; None where the number of steps is not known."""
        train, guard = self.config.train, self.config.guard
        if train.keep_every and self.steps is None:
            return None
        regular = self.steps // train.keep_every if train.keep_every and self.steps else 0
        back = 2 if guard.patience and (self.save_every or guard.window) < guard.window else 0  # see RetentionPolicy
        return train.keep + regular + bool(train.keep_best) + back + 1

    def _batch_bytes(self) -> int:
        side, length = self.models.spec.image_size, self.models.spec.context_length
        return self.layout.share * (3 * side**2 + 8 * length + 17)

    def _rest(self) -> dict[str, int]:
        from clipdist.estimate import memory

        share, batch = self.layout.share, self.config.train.global_batch
        width, size = self.sizes.width, self.layout.itemsize
        features = 2 * share * width * size + share * width * 4 + batch * (width * 4 + 16)  # and their fp32 gradients
        if self.world > 1:
            features += 3 * batch * width * size  # texts of all ranks; what is sent and received of their gradients
        if self.layout.pieces > 1:
            features += 2 * share * width * 4  # the slopes that micro-batches wait for
        return {
            memory.FEATURES: features,
            memory.TILES: self._tile_bytes(),
            memory.BATCH: self._batch_bytes(),
        }

    def _tile_bytes(self) -> int:
        """Of the logits that exist at one time, and the features beside them; a fused kernel has none in memory."""
        if self.device == "cuda" and self.config.loss.implementation in ("auto", "kernel"):
            return 0
        from clipdist.losses.tiles import Tile, choose_tile

        given = Tile(self.config.loss.tile_rows, self.config.loss.tile_columns) if self.config.loss.tile_rows else None
        if given is None and self.device == "cuda":
            given = Tile(8192, 8192)  # the most that a GPU takes
        import torch

        tile = choose_tile(torch.device("cpu"), given)
        rows, columns = min(tile.rows, self.layout.share), min(tile.columns, self.config.train.global_batch)
        return 4 * (rows * columns + (rows + columns) * self.sizes.width)

    # What is told

    def short(self) -> str:
        """Three lines."""
        from clipdist.estimate import table

        return table.short(self)

    def table(self) -> str:
        """Everything, to read."""
        from clipdist.estimate import table

        return table.full(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it; bytes."""
        return {
            "model": self.config.model.name,
            "device": self.device,
            "precision": self.precision,
            "world": self.world,
            "parameters": {**self.models.counts, "trained": self.sizes.trained, "locked": self.sizes.locked},
            "activations": asdict(self.activations),
            "memory": {f"zero_{stage}": {"total": m.total, **asdict(m)} for stage, m in self.stages.items()},
            "zero_stage": self.layout.stage,
            "host": self.host,
            "total": self.total,
            "limit": self.limit,
            "wire": self.wire,
            "global_batch": self.config.train.global_batch,
            "steps": self.steps,
            "samples": self.samples,
            "epochs": self.epochs,
            "samples_per_s": self.rate or None,
            "rate_source": self.rate_source,
            "seconds": self.seconds,
            "checkpoint": self.checkpoint_bytes,
            "checkpoints_kept": self.checkpoints_kept,
        }

    @property
    def fits(self) -> bool:
        """Whether the device holds it, give or take the 15 % that the estimate may be wrong by; True if not known."""
        return self.limit is None or self.total <= self.limit * TOLERANCE

    def refuse(self) -> None:
        """
        Raises:
            UserError: the run needs over 15 % more memory than the device has; names settings that fit.
        """
        if self.fits:
            return
        assert self.limit is not None
        where = f"{'a rank' if self.device == 'cpu' else 'a GPU'} needs about {self.total / GB:.1f} GB"
        raise UserError(
            f"{where} and has {self.limit / GB:.1f} GB ({self.limit_source}), at model.name={self.config.model.name},"
            f" engine.zero_stage={self.layout.stage}, {self.layout.micro} pairs a forward pass; {self._what_fits()}"
        )

    def _what_fits(self) -> str:
        for changed, words in remedies(self.config, self.world, self.device):
            world = self.world // self.config.launch.nodes * changed.launch.nodes
            found = make_estimate(changed, world=world, model=self.models)
            if self.limit is not None and found.total <= self.limit:
                return f"set {' '.join(words)}: {found.total / GB:.1f} GB"
        return "nothing that was tried makes it fit, more nodes included: take a smaller model or more memory"


class _Models:
    """One model as measured: what configurations that differ in batch, stage or checkpointing alone have in common."""

    def __init__(self, config: Config) -> None:
        from clipdist.estimate.activations import meta_model
        from clipdist.estimate.memory import PERSISTENT, Sizes

        self._config, self._known = config, dict[tuple, "Activations"]()
        self._by_checkpointing: dict[bool, Any] = {}
        model, self.spec = meta_model(config)
        self._by_checkpointing[config.engine.activation_checkpointing] = model
        numbers = [(name, p.numel(), p.requires_grad) for name, p in model.named_parameters()]
        self.sizes = Sizes(
            trained=sum(n for _, n, trained in numbers if trained),
            locked=sum(n for _, n, trained in numbers if not trained),
            small=sum(n for _, n, _ in numbers if n < PERSISTENT),
            buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
            width=self.spec.embed_dim,
        )
        self.counts = {
            "image": sum(n for name, n, _ in numbers if name.startswith("visual.")),
            "text": sum(n for name, n, _ in numbers if name.startswith("text.")),
            "all": self.sizes.all,
        }

    def activations(self, config: Config, micro: int, precision: str) -> Activations:
        from clipdist.estimate.activations import measure, meta_model

        checkpointing = config.engine.activation_checkpointing
        key = (checkpointing, micro, precision)
        if key not in self._known:
            if checkpointing not in self._by_checkpointing:
                self._by_checkpointing[checkpointing] = meta_model(config)[0]
            self._known[key] = measure(config, self._by_checkpointing[checkpointing], micro, precision)
        return self._known[key]


def _device(config: Config) -> str:
    """The device of the job, which need not be this machine's: a job of Slurm's goes to GPUs unless it says cpu."""
    if config.device != "auto":
        return config.device
    if config.launch.cluster == "slurm":
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(config: Config, device: str) -> str:
    """auto: fp32 on a CPU; bf16 on a GPU, which fp16 equals in bytes where a GPU has no bf16."""
    if config.train.precision != "auto":
        return config.train.precision
    return "fp32" if device == "cpu" else "bf16"


def _device_bytes(config: Config, device: str) -> tuple[int | None, str]:
    launch = config.launch
    if launch.device_gb:
        return int(launch.device_gb * GB), "launch.device_gb"
    if device == "cpu":
        return (int(launch.mem_gb * GB / launch.gpus), "launch.mem_gb") if launch.mem_gb else (None, "not known")
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "this machine's GPU"
    return None, "not known"
