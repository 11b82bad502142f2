"""The proof of exactness in a user's own setting: loss, gradients and the evaluated model beside those of a reference
(clipdist.evals.reference)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch, pairs
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.distributed.collectives import all_gather, all_reduce_sum
from clipdist.distributed.rank import DistEnv, resolve_precision
from clipdist.engine.step import Engine
from clipdist.engine.zero import Fragment, Zero
from clipdist.errors import UserError
from clipdist.evals.reference import Measured, Reference, stacked
from clipdist.models.dual_encoder import build_model
from clipdist.models.spec import ModelSpec
from clipdist.objectives.clip import ClipObjective
from clipdist.objectives.objective import Objective

PARTS = ("image", "text", "temperature", "bias")
IMPL = "clipdist"
# Relative L2 error of a part's gradient that still passes.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
DENSE_MARGIN = 1.5  # where the loss is so low that fp32 ends: a multiple of the dense fp32 code's own error passes, too
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_ATTEMPTS = 24  # steps that may overflow before the loss scale fits: it halves from 2^16
PartOf = Callable[[str], str]  # a parameter's part of the model


@dataclass(frozen=True)
class Row:
    """One part of the model in one step: an implementation's gradient g beside the reference's r."""

    step: int  # as training logs it, from 1
    impl: str
    part: str  # image, text, temperature, bias; loss, where g and r are the values; evaluation, where they are features
    norm_ratio: float  # |g| / |r|
    cosine: float
    max_diff: float  # largest |g - r| of an element, relative to the largest |r|
    error: float  # |g - r| / |r|
    limit: float  # of the error
    passed: bool
    reference_norm: float


def made_whole(zero: Zero, read: Callable[[Fragment], torch.Tensor], trained_only: bool) -> dict[str, torch.Tensor]:
    """fp32 [numel] of every parameter, the same on all ranks, from the elements that each rank holds.

    Args:
        read: a fragment's elements, 1-D.
    """
    sizes = zero.numel(trained_only)
    flat = torch.zeros(sum(sizes.values()), device=zero.device)
    whole = dict(zip(sizes, flat.split(list(sizes.values()))))
    for fragment in zero.fragments():
        if fragment.name in whole:
            start, stop = fragment.own
            whole[fragment.name][start:stop] = read(fragment)[start - fragment.start : stop - fragment.start]
    return dict(zip(sizes, all_reduce_sum(flat).split(list(sizes.values()))))


class Audit:
    """A training engine and its reference, side by side.

    Args:
        objective: what the engine trains; None: the configuration's own CLIP.
    Attributes:
        precision: fp32, bf16 or fp16.  micro: m.
        reported: the engine's own gradient norms of the last step, relative to those of the gradients that were read.
    """

    def __init__(self, cfg: Config, dist_env: DistEnv, objective: Objective | None = None) -> None:
        self.cfg, self.dist_env = cfg, dist_env
        self.precision = resolve_precision(cfg.train.precision, dist_env.device.type)
        self.micro = cfg.train.micro_batch or cfg.train.global_batch // dist_env.world_size
        torch.manual_seed(cfg.train.seed)
        model = build_model(cfg.model, cfg.clip)
        self.spec = model.spec
        self.locked = [part for part, tower in (("image", model.visual), ("text", model.text)) if _frozen(tower)]
        self.reference = Reference(copy.deepcopy(model), cfg, dist_env, DTYPES[self.precision])
        if cfg.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        objectives = (objective or ClipObjective(cfg.clip),)
        self.engine = Engine(model.to(dist_env.device), objectives, cfg, dist_env)
        self.reported: dict[str, float] = {}

    def step(self, batch: Batch, step: int) -> list[Row]:
        """One training step on a global batch, and the same by the reference, which then takes the weights over.

        Returns:
            on rank 0 a row for every part that is trained, one for the loss, and one for what the model then gives in
            evaluation mode, running statistics included; elsewhere nothing.
        """
        ours, scale = self._engine_step(batch, step)
        rows: list[Row] = []
        if self.dist_env.rank == 0:
            theirs, dense = self.reference.measure(batch, step, micro=self.micro, scale=scale)
            rows = compare(ours, theirs, self.precision, step=step + 1, part_of=self.part_of, dense=dense)
        zero = self.engine.zero
        self.reference.take_over(made_whole(zero, lambda fragment: fragment.master.float(), trained_only=False))
        evaluated = self._evaluate(batch)
        if self.dist_env.rank == 0:
            rows.append(
                compare_features(evaluated, self.reference.evaluate(batch, self.micro), self.precision, step + 1)
            )
        self.reference.take_over_buffers(dict(zero.module.named_buffers()))
        return rows

    def part_of(self, parameter: str) -> str:
        return self.reference.model.part_of(parameter)

    def _evaluate(self, batch: Batch) -> torch.Tensor:
        """As Reference.evaluate, by the engine. Collective."""
        encoded = (self.engine.encode(piece.images[IMAGE], piece.tokens) for piece in batch.split(self.micro))
        return stacked([(image, text) for image, text in encoded if image is not None and text is not None])

    def _engine_step(self, batch: Batch, step: int) -> tuple[Measured, float]:
        """The engine's loss and gradients; and the factor that brought the feature gradients through fp16."""
        share = len(batch) // self.dist_env.world_size
        mine = batch.rows(self.dist_env.rank * share, (self.dist_env.rank + 1) * share).to(self.dist_env.device)
        for _ in range(FP16_ATTEMPTS):
            self.engine.before_update = self._read_gradients
            result = self.engine.train_step(mine, step=step, lr=self.cfg.optim.lr, want_norms=True)
            if result.applied or result.skipped:
                break
        loss = float(all_reduce_sum(result.value)) / self.dist_env.world_size
        gradients, scale = self._read
        measured = Measured(loss, gradients)
        norms = {part: _norm(measured, part, self.part_of) for part in result.grad_norms}
        self.reported = {part: norm / (norms[part] or 1.0) for part, norm in result.grad_norms.items()}
        return measured, scale * self.dist_env.world_size if self.precision == "fp16" else 1.0

    def _read_gradients(self) -> None:
        """Between backward and update: the gradients, whole, and the loss scale that they carried."""
        zero, scale = self.engine.zero, self.engine.zero.loss_scale
        self._read = made_whole(zero, lambda piece: zero.gradient(piece).float() / scale, trained_only=True), scale

    def notes(self) -> list[str]:
        """What differs from one process on the whole batch by nature, or is left out. Known after the first step."""
        batch, world, m = self.cfg.train.global_batch, self.dist_env.world_size, self.micro
        notes = []
        if world == 1:
            notes.append("one rank: nothing is distributed; --ranks N audits more")
        norms = [module for module in self.reference.model.modules() if isinstance(module, _BatchNorm)]
        if any(module.training for module in norms) and m < batch:
            notes.append(
                f"BatchNorm normalises over a rank's micro-batch (m={m} of {batch} batch), and so does the reference;"
                " its running statistics are averaged over ranks"
            )
        if self.reference.draws:
            notes.append(
                "dropout: its random numbers are a function of (seed, step, rank, micro-batch); the reference draws"
                " the same, other rank counts or micro-batches draw others"
            )
        if self.precision != "fp32":
            notes.append(
                f"{self.precision}: the reference's towers run in {self.precision}, too; its temperature, bias and loss"
                " are float64"
            )
        notes += [f"the {part} tower is locked: no gradient to compare" for part in self.locked]
        return notes

    def close(self) -> None:
        self.engine.close()


def _frozen(tower: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in tower.parameters())


# The comparison


def compare(
    ours: Measured,
    theirs: Measured,
    precision: str,
    *,
    step: int,
    part_of: PartOf,
    impl: str = IMPL,
    dense: Measured | None = None,
) -> list[Row]:
    """One row for every part with trained parameters, and one for the loss.

    Args:
        theirs: the reference.
        dense: the dense fp32 code's result where the loss is so low that its error counts.
    """
    parts = [part for part in PARTS if any(part_of(name) == part for name in theirs.gradients)]
    rows = []
    for part in (*parts, "loss"):
        norm_ratio, cosine, max_diff, error, norm = _distance(ours, theirs, part, part_of)
        limit = LIMITS[precision]
        if dense is not None:
            limit = max(limit, DENSE_MARGIN * _distance(dense, theirs, part, part_of)[3])
        rows.append(Row(step, impl, part, norm_ratio, cosine, max_diff, error, limit, error <= limit, norm))
    return rows


def compare_features(ours: torch.Tensor, theirs: torch.Tensor, precision: str, step: int) -> Row:
    """The row "evaluation", of normalised features [rows, D] on both sides."""
    difference, norm = ours - theirs, float(theirs.norm())
    error, cosine = float(difference.norm()) / norm, float((ours * theirs).sum() / (ours.norm() * norm))
    most, limit = float(difference.abs().max() / theirs.abs().max()), LIMITS[precision]
    return Row(step, IMPL, "evaluation", float(ours.norm()) / norm, cosine, most, error, limit, error <= limit, norm)


def _distance(ours: Measured, theirs: Measured, part: str, part_of: PartOf) -> tuple[float, float, float, float, float]:
    """norm_ratio, cosine, max_diff, error, and the reference's norm; see Row. A missing gradient is zero."""
    gg = rr = gr = dd = most = largest = 0.0
    for name, r in _tensors(theirs, part, part_of).items():
        r = r.double()
        g = _tensors(ours, part, part_of).get(name, torch.zeros_like(r)).to(r.device).double()
        difference = g - r
        gg, rr, gr = gg + float(g @ g), rr + float(r @ r), gr + float(g @ r)
        dd += float(difference @ difference)
        most, largest = max(most, float(difference.abs().max())), max(largest, float(r.abs().max()))
    if rr == 0:  # nothing to learn, and nothing may be learnt
        right = gg == 0
        return (1.0, 1.0, 0.0, 0.0, 0.0) if right else (math.inf, 0.0, math.inf, math.inf, 0.0)
    cosine = gr / math.sqrt(gg * rr) if gg else 0.0
    return math.sqrt(gg / rr), cosine, most / largest, math.sqrt(dd / rr), math.sqrt(rr)


def _tensors(measured: Measured, part: str, part_of: PartOf) -> dict[str, torch.Tensor]:
    if part == "loss":
        return {"loss": torch.tensor([measured.loss], dtype=torch.float64)}
    return {name: grad for name, grad in measured.gradients.items() if part_of(name) == part}


def _norm(measured: Measured, part: str, part_of: PartOf) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in _tensors(measured, part, part_of).values()))


# The batches


class Source(Protocol):
    """Where global batches come from; the same on all ranks."""

    note: str

    def batch(self, step: int) -> Batch: ...

    def close(self) -> None: ...


def open_source(cfg: Config, spec: ModelSpec, dist_env: DistEnv) -> Source:
    """The recipe's training shards through the loader; drawn batches where there are none.

    Raises:
        UserError: shards that hold fewer samples than a global batch.
    """
    try:
        if not cfg.data.train:
            raise UserError("data.train is empty")
        catalog = Catalog.open(cfg.data.train, "data.train", fetcher_of(cfg.data))
    except UserError as error:
        return DrawnBatches(cfg, spec, f"drawn random pictures and tokens, because {error}")
    if len(catalog) < cfg.train.global_batch:
        raise UserError(
            f"data.train holds {len(catalog)} samples, fewer than train.global_batch={cfg.train.global_batch};"
            " lower train.global_batch"
        )
    return ShardBatches(cfg, spec, dist_env, catalog)


class ShardBatches:
    """Training batches as training reads them: each rank its own rows, then gathered."""

    def __init__(self, cfg: Config, spec: ModelSpec, dist_env: DistEnv, catalog: Catalog) -> None:
        from clipdist.data.loader import image_view, open_loader
        from clipdist.data.order import first_order
        from clipdist.data.tokens import make_tokenizer

        self.note = f"training batches of {', '.join(cfg.data.train)}"
        self.device = dist_env.device
        self.loader = open_loader(
            catalog,
            first_order(cfg, catalog, dist_env.world_size),
            make_tokenizer(spec),
            cfg.data,
            views=[image_view(cfg.data, spec.image_size)],
            rank=dist_env.rank,
            world=dist_env.world_size,
        )

    def batch(self, step: int) -> Batch:
        """The next global batch, on the CPU."""
        return self.loader.next().to(self.device).each(_gathered)

    def close(self) -> None:
        self.loader.close()


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks; NCCL and gloo gather no bool."""
    return all_gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).cpu().to(tensor.dtype)


class DrawnBatches:
    """Random pixels and tokens: no picture to find, but gradients as good as any to be exact about."""

    def __init__(self, cfg: Config, spec: ModelSpec, note: str = "drawn random pictures and tokens") -> None:
        self.note, self.spec, self.rows, self.seed = note, spec, cfg.train.global_batch, cfg.data.seed

    def batch(self, step: int) -> Batch:
        """Global batch number `step`, all of it valid."""
        from clipdist.data.tokens import make_tokenizer

        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        side = self.spec.image_size
        image = torch.randint(0, 256, (self.rows, 3, side, side), dtype=torch.uint8, generator=draw)
        numbers = torch.randint(0, 10_000, (self.rows, 3), generator=draw).tolist()
        # Numbers as captions: every tokeniser takes them, and places its marks where the tower looks for them.
        tokens = make_tokenizer(self.spec)([" ".join(map(str, row)) for row in numbers])
        return pairs(image, tokens, torch.ones(self.rows, dtype=torch.bool), torch.arange(self.rows))

    def close(self) -> None:
        pass
