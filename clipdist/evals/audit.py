"""Audit a configuration: compare loss, gradients and features of the engine with those of clipdist.evals.reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdist.config import Config
from clipdist.config.stages import plan_stages
from clipdist.data.batch import IMAGE, MODALITIES, Batch
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.data.members import members_of
from clipdist.data.patches import write_patches
from clipdist.data.transform import EvalTransform, NativeAspect
from clipdist.distributed.collectives import all_gather, all_reduce_max, all_reduce_sum
from clipdist.distributed.rank import DTYPES, DistEnv, resolve_precision
from clipdist.engine.step import Engine
from clipdist.errors import UserError
from clipdist.evals.reference import STEPS, LossAndGradients, Reference, concatenate_normalised
from clipdist.models.build import built_for
from clipdist.models.fewer_patches import allow_stages
from clipdist.models.spec import ModelSpec
from clipdist.objectives.make import make_objectives, prepare_model, reads_image, views_of_run
from clipdist.objectives.objective import Moment, Objective
from clipdist.objectives.teacher import open_teacher

PARTS = ("image", "text", "heads", "temperature", "bias")
IMPL = "clipdist"
# Largest relative L2 error of a part's gradient that passes.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
DENSE_MARGIN = 1.5  # below LOW_LOSS this multiple of the dense fp32 formula's error passes as well
FP16_ATTEMPTS = 24  # steps until the loss scale, halved from 2^16 at each overflow, fits
PartOf = Callable[[str], str]  # name of a parameter -> part of the model


@dataclass(frozen=True)
class AuditRow:
    """Comparison of one part of the model in one step: an implementation's gradient g, the reference's r."""

    step: int  # from 1, as in training logs
    impl: str
    part: str  # image, text, heads, temperature, bias: gradients; loss: values; evaluation: features; and what the
    # step did to the teacher, its statistics, and the state of objectives: their values after it
    norm_ratio: float  # |g| / |r|
    cosine: float
    max_diff: float  # max |g - r| over elements, relative to max |r|
    error: float  # |g - r| / |r|
    limit: float  # of the error
    passed: bool
    reference_norm: float


class Audit:
    """A training engine and its reference, trained on the same batches.

    Args:
        objective: of the engine in place of CLIP's (tests make mistakes in it); None: all as configured.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        micro: rows of a micro-batch.
        locked: names of the frozen towers.
        reported: gradient norms that the engine reported in the last step, divided by those of its gradients, by part.
    """

    def __init__(self, cfg: Config, dist_env: DistEnv, objective: Objective | None = None) -> None:
        self.cfg, self.dist_env = cfg, dist_env
        self.precision = resolve_precision(cfg.train.precision, dist_env.device.type)
        self.micro = cfg.train.micro_batch or cfg.train.global_batch // dist_env.world_size
        torch.manual_seed(cfg.train.seed)
        teacher = open_teacher(cfg, dist_env)
        model = built_for(cfg)
        objectives = make_objectives(cfg.objectives, model.spec.image_size)
        prepare_model(model, objectives)
        model.check_rows(cfg.model.batchnorm_group or self.micro)
        self.spec = model.spec
        if cfg.train.stages:
            stages = plan_stages(cfg.train.stages, 1 << 40, self.spec.image_size, self.spec.context_length)
            allow_stages(model, stages)
        self.locked = [model.part_of(name) for name, tower in model.towers.items() if _frozen(tower)]
        moving = next((each.teacher for each in objectives if each.teacher), None)
        self.reference = Reference(copy.deepcopy(model), cfg, dist_env, DTYPES[self.precision], teacher, moving)
        self.reference.drawn_by = [*objectives]
        self.reference.taught_alone = tuple(name for each in objectives for name in each.taught_alone)
        model.prepare(cfg.engine)
        made = {each.name: each for each in objectives}
        taken = [*({**made, objective.name: objective} if objective else made).values()]
        self.engine = Engine(model.to(dist_env.device), taken, cfg, dist_env, teacher, STEPS)
        self._load_state()
        self.reported: dict[str, float] = {}

    def step(self, batch: Batch, step: int) -> list[AuditRow]:
        """Train one step on a global batch with the engine and the reference, which then loads the engine's weights.

        Collective.

        Args:
            batch: the global batch, on every rank.
            step: from 0.

        Returns:
            on rank 0 a row for every trained part, one for the loss, and one for the features in evaluation mode after
            the step; [] on other ranks.
        """
        measured, scale = self._engine_step(batch, step)
        rows: list[AuditRow] = []
        if self.dist_env.rank == 0:
            reference, dense = self.reference.measure(batch, step, micro=self.micro, scale=scale)
            rows = compare(measured, reference, self.precision, step=step + 1, part_of=self.part_of, dense=dense)
        zero = self.engine.zero
        weights = zero.gather(lambda fragment: fragment.master, list(zero.numel()))
        rows += self._compare_state(batch, weights, step)
        self.reference.load_weights(weights)
        evaluated = self._evaluate(batch)
        if self.dist_env.rank == 0:
            rows.append(
                compare_features(evaluated, self.reference.evaluate(batch, self.micro), self.precision, step + 1)
            )
        self.reference.load_buffers(dict(zero.module.named_buffers()))
        return rows

    def _load_state(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Let the reference have the engine's teacher and state. Return the average and its statistics. Collective."""
        self.reference.state = {name: dict(own) for name, own in self.engine.state.items()}
        if self.reference.moving is None or self.engine.ema is None:
            return {}, {}
        zero, ema = self.engine.zero, self.engine.ema
        average, statistics = zero.gather(ema.read, list(zero.numel(trained_only=True))), dict(ema.buffers)
        self.reference.moving.load(average, statistics)
        return average, statistics

    def _compare_state(self, batch: Batch, weights: dict[str, torch.Tensor], step: int) -> list[AuditRow]:
        """Return rows for what the step did to teacher and state; the reference then has the engine's. Collective."""
        expected = {"state": self.reference.state_after}
        if (moving := self.reference.moving) is not None:
            trained = {name: weights[name] for name in self.engine.zero.numel(trained_only=True)}
            expected["teacher"] = moving.update(trained, Moment(step, STEPS))
            if moving.spec.training:
                expected["teacher statistics"] = moving.statistics()
        average, statistics = self._load_state()
        state = {f"{of}/{name}": tensor for of, own in self.engine.state.items() for name, tensor in own.items()}
        found = {"teacher": average, "teacher statistics": statistics, "state": state}
        if self.dist_env.rank:
            return []
        return [
            compare_values(part, {name: found[part][name] for name in values}, values, self.precision, step + 1)
            for part, values in expected.items()
            if values
        ]

    def part_of(self, parameter: str) -> str:
        """Return the part of the model that a parameter belongs to."""
        return self.reference.model.part_of(parameter)

    def _evaluate(self, batch: Batch) -> torch.Tensor:
        """Return what Reference.evaluate returns, computed by the engine. Collective."""
        found = []
        for piece in batch.split(self.micro):
            image = next(iter(piece.images.values()))
            encoded = self.engine.encode(image, piece.tokens if self.spec.has_text else None)
            found.append([features for features in encoded if features is not None])
        return concatenate_normalised(found)

    def _engine_step(self, batch: Batch, step: int) -> tuple[LossAndGradients, float]:
        """Return the engine's loss and gradients, and the loss scale of its feature gradients (1 but for fp16)."""
        share = len(batch) // self.dist_env.world_size
        own = batch.rows(self.dist_env.rank * share, (self.dist_env.rank + 1) * share).to(self.dist_env.device)
        for _ in range(FP16_ATTEMPTS):
            self.engine.before_update = self._read_gradients
            result = self.engine.train_step(own, step=step, lr=self.cfg.optim.lr, want_norms=True)
            if result.applied or result.skipped:
                break
        loss = float(all_reduce_sum(result.value)) / self.dist_env.world_size
        gradients, scale = self._read
        measured = LossAndGradients(loss, gradients)
        norms = {part: _norm(measured, part, self.part_of) for part in result.grad_norms}
        self.reported = {part: norm / (norms[part] or 1.0) for part, norm in result.grad_norms.items()}
        return measured, scale * self.dist_env.world_size if self.precision == "fp16" else 1.0

    def _read_gradients(self) -> None:
        """Store the full gradients and their loss scale, between backward pass and update."""
        zero, scale = self.engine.zero, self.engine.zero.loss_scale
        names = list(zero.numel(trained_only=True))
        self._read = zero.gather(lambda piece: zero.gradient(piece).float() / scale, names), scale

    def notes(self) -> list[str]:
        """Return notes on inherent differences from one process on the whole batch; complete after the first step."""
        batch, world, m = self.cfg.train.global_batch, self.dist_env.world_size, self.micro
        notes = []
        if world == 1:
            notes.append("one rank: nothing is distributed; --ranks N audits more")
        norms = [module for module in self.reference.model.modules() if isinstance(module, _BatchNorm)]
        if group := self.cfg.model.batchnorm_group:
            notes.append(
                f"BatchNorm normalises over groups of {group} rows of the global batch, whatever the ranks and"
                " micro-batches; the reference runs the image tower on each by itself"
            )
        elif any(module.training for module in norms) and m < batch:
            notes.append(
                f"BatchNorm normalises over a rank's micro-batch (m={m} of {batch} batch), and so does the reference;"
                " its running statistics are averaged over ranks"
            )
        if self.reference.draws_random_numbers:
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
    measured: LossAndGradients,
    reference: LossAndGradients,
    precision: str,
    *,
    step: int,
    part_of: PartOf,
    impl: str = IMPL,
    dense: LossAndGradients | None = None,
) -> list[AuditRow]:
    """Return a row for every part with trained parameters, and one for the loss.

    Args:
        impl: name of the implementation that gave `measured`.
        dense: the result of the dense fp32 formula, if the loss is below LOW_LOSS.
    """
    parts = [part for part in PARTS if any(part_of(name) == part for name in reference.gradients)]
    rows = []
    for part in (*parts, "loss"):
        norm_ratio, cosine, max_diff, error, norm = _distance(measured, reference, part, part_of)
        limit = LIMITS[precision]
        if dense is not None:
            limit = max(limit, DENSE_MARGIN * _distance(dense, reference, part, part_of)[3])
        rows.append(AuditRow(step, impl, part, norm_ratio, cosine, max_diff, error, limit, error <= limit, norm))
    return rows


def compare_values(
    part: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], precision: str, step: int
) -> AuditRow:
    """Return the row of tensors that a step has changed."""
    g, r = (torch.cat([values[name].double().view(-1) for name in expected]) for values in (found, expected))
    return _row_of(part, g, r, precision, step)


def compare_features(measured: torch.Tensor, reference: torch.Tensor, precision: str, step: int) -> AuditRow:
    """Return the row "evaluation" of normalised features [rows, D]."""
    return _row_of("evaluation", measured, reference, precision, step)


def _row_of(part: str, measured: torch.Tensor, reference: torch.Tensor, precision: str, step: int) -> AuditRow:
    difference, norm = measured - reference, float(reference.norm())
    error = float(difference.norm()) / norm
    cosine = float((measured * reference).sum() / (measured.norm() * norm))
    max_diff, limit = float(difference.abs().max() / reference.abs().max()), LIMITS[precision]
    norm_ratio = float(measured.norm()) / norm
    return AuditRow(step, IMPL, part, norm_ratio, cosine, max_diff, error, limit, error <= limit, norm)


def _distance(
    measured: LossAndGradients, reference: LossAndGradients, part: str, part_of: PartOf
) -> tuple[float, float, float, float, float]:
    """Return norm_ratio, cosine, max_diff, error and reference_norm of AuditRow. A missing gradient counts as zero."""
    gg = rr = gr = dd = max_difference = max_reference = 0.0
    for name, r in _tensors(reference, part, part_of).items():
        r = r.double()
        g = _tensors(measured, part, part_of).get(name, torch.zeros_like(r)).to(r.device).double()
        difference = g - r
        gg, rr, gr = gg + float(g @ g), rr + float(r @ r), gr + float(g @ r)
        dd += float(difference @ difference)
        max_difference = max(max_difference, float(difference.abs().max()))
        max_reference = max(max_reference, float(r.abs().max()))
    if rr == 0:
        equal = gg == 0
        return (1.0, 1.0, 0.0, 0.0, 0.0) if equal else (math.inf, 0.0, math.inf, math.inf, 0.0)
    cosine = gr / math.sqrt(gg * rr) if gg else 0.0
    return math.sqrt(gg / rr), cosine, max_difference / max_reference, math.sqrt(dd / rr), math.sqrt(rr)


def _tensors(measured: LossAndGradients, part: str, part_of: PartOf) -> dict[str, torch.Tensor]:
    """Return the gradients of a part by parameter; for "loss" the value."""
    if part == "loss":
        return {"loss": torch.tensor([measured.loss], dtype=torch.float64)}
    return {name: grad for name, grad in measured.gradients.items() if part_of(name) == part}


def _norm(measured: LossAndGradients, part: str, part_of: PartOf) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in _tensors(measured, part, part_of).values()))


# The batches


class BatchSource(Protocol):
    """Global batches for the audit, the same on all ranks.

    Attributes:
        note: describes them to the user.
    """

    note: str

    def batch(self, step: int) -> Batch:
        """Return the next global batch, on the CPU. Collective."""
        ...

    def close(self) -> None: ...


def open_batches(cfg: Config, spec: ModelSpec, dist_env: DistEnv) -> BatchSource:
    """Return batches of the configured training shards, or random ones if these cannot be opened.

    Raises:
        UserError: shards that hold fewer samples than a global batch.
    """
    try:
        if not cfg.data.train:
            raise UserError("data.train is empty")
        catalog = Catalog.open(cfg.data.train, "data.train", fetcher_of(cfg.data), members_of(cfg.data))
    except UserError as error:
        return RandomBatches(cfg, spec, f"drawn random pictures and tokens, because {error}")
    if len(catalog) < cfg.train.global_batch:
        raise UserError(
            f"data.train holds {len(catalog)} samples, fewer than train.global_batch={cfg.train.global_batch};"
            " lower train.global_batch"
        )
    return ShardBatches(cfg, spec, dist_env, catalog)


class ShardBatches:
    """Training batches, read by the loader: every rank reads its rows, then they are gathered."""

    def __init__(self, cfg: Config, spec: ModelSpec, dist_env: DistEnv, catalog: Catalog) -> None:
        from clipdist.data.loader import open_loader
        from clipdist.data.order import first_order
        from clipdist.data.tokens import make_tokenizer

        objectives = make_objectives(cfg.objectives, spec.image_size)
        self.note = f"training batches of {', '.join(cfg.data.train)}"
        self.device = dist_env.device
        self.loader = open_loader(
            catalog,
            first_order(cfg, catalog, dist_env.world_size),
            make_tokenizer(spec) if spec.has_text else None,
            cfg.data,
            views=views_of_run(objectives, cfg.data, spec.image_size, spec.transform),
            images_only=any("text" not in objective.modalities for objective in objectives),
            rank=dist_env.rank,
            world=dist_env.world_size,
        )

    def batch(self, step: int) -> Batch:
        """See BatchSource.batch."""
        batch = self.loader.next().to(self.device)
        if batch.roles is not None:
            batch = batch.with_places(int(all_reduce_max(torch.tensor(batch.roles.shape[1], device=self.device))))
        return batch.each(partial(_gathered, device=self.device))

    def close(self) -> None:
        self.loader.close()


def _gathered(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Gather the rows of all ranks, by way of uint8 for bool, which NCCL and gloo do not support."""
    sent = tensor.to(device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
    return all_gather(sent).cpu().to(tensor.dtype)


def random_images(rows: int, transform: EvalTransform, draw: torch.Generator) -> torch.Tensor:
    """Return random images, uint8 [rows, *transform.shape], of random aspect ratios where those are kept."""
    images = torch.randint(0, 256, (rows, *transform.shape), dtype=torch.uint8, generator=draw)
    if isinstance(transform, NativeAspect):
        for row, (height, width) in zip(images, torch.randint(100, 400, (rows, 2), generator=draw).tolist()):
            pixels = torch.randint(0, 256, (3, *transform.resized(height, width)), dtype=torch.uint8, generator=draw)
            write_patches(pixels, row, transform.patch)
    return images


class RandomBatches:
    """Batches of random pixels, in all views that the objectives read, and of random tokens, all valid."""

    def __init__(self, cfg: Config, spec: ModelSpec, note: str = "drawn random pictures and tokens") -> None:
        self.note, self.spec, self.rows, self.seed = note, spec, cfg.train.global_batch, cfg.data.seed
        objectives = make_objectives(cfg.objectives, spec.image_size)
        own = {IMAGE: spec.image_size} if reads_image(objectives) else {}
        self.sides = own | {view.name: view.size for objective in objectives for view in objective.views}

    def batch(self, step: int) -> Batch:
        """Return global batch number `step`."""
        from clipdist.data.tokens import make_tokenizer

        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        images = {
            name: random_images(self.rows, replace(self.spec.transform, size=side), draw)
            for name, side in self.sides.items()
        }
        numbers = torch.randint(0, 10_000, (self.rows, 3), generator=draw).tolist()
        # Random captions instead of random ids: the tokenizer puts the special tokens where the tower expects them.
        tokens = make_tokenizer(self.spec)([" ".join(map(str, row)) for row in numbers])
        valid = dict.fromkeys(MODALITIES, torch.ones(self.rows, dtype=torch.bool))
        return Batch(images, tokens, valid, torch.arange(self.rows), torch.arange(self.rows))

    def close(self) -> None:
        pass
