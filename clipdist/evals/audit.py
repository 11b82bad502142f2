"""The proof of exactness in a user's own setting: a configuration and batches in; loss and gradients beside those of a
reference out.

The reference is one process on the whole global batch: it runs each rank's micro-batches with that rank's and
micro-batch's random state and BatchNorm grouping, from the same weights, concatenates the features, applies the dense
formula in float64 and averages over the valid rows. Its towers run in the training's own precision: audited is the
distribution and the loss, not the rounding of a tower's products. It shares no code with clipdist/loss.

B pairs of the global batch, b = B / W rows of a rank, m rows of a micro-batch, D features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipdist import config
from clipdist.config import Config
from clipdist.data.catalog import Catalog, fetcher_of
from clipdist.distributed.collectives import all_gather, all_reduce_sum
from clipdist.distributed.rank import DistEnv, resolve_precision
from clipdist.engine.step import Engine, seed_step
from clipdist.engine.zero import Fragment, fragments, gradient, loss_scale, part_of
from clipdist.errors import UserError
from clipdist.losses.make import LossFunction, make_loss
from clipdist.models.dual_encoder import DualEncoder, build_model
from clipdist.models.spec import ModelSpec

PARTS = ("image", "text", "temperature", "bias")
IMPL = "clipdist"
# Relative L2 error of a part's gradient that still passes.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-2}
# Below this loss the relative error of any fp32 code grows: a multiple of the dense fp32 code's own error passes, too.
LOW_LOSS, DENSE_MARGIN = 0.1, 1.5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP16_ATTEMPTS = 24  # steps that may overflow before the loss scale fits: it halves from 2^16
SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Pairs:
    """Rows of a global batch. All tensors on the CPU."""

    image: torch.Tensor  # uint8 [B, 3, H, W]
    tokens: torch.Tensor  # int64 [B, L]
    valid: torch.Tensor  # bool [B]
    group_id: torch.Tensor | None  # int64 [B]; None: every pair is a group of its own

    def rows(self, start: int, stop: int) -> Pairs:
        group_id = None if self.group_id is None else self.group_id[start:stop]
        return Pairs(self.image[start:stop], self.tokens[start:stop], self.valid[start:stop], group_id)

    def all_valid(self) -> Pairs:
        """The same pairs as code sees them that knows neither bad rows nor equal captions."""
        return Pairs(self.image, self.tokens, torch.ones_like(self.valid), None)


@dataclass(frozen=True)
class Measured:
    """The global loss and the gradients of the trained parameters by name, flat, before clipping."""

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One part of the model in one step: an implementation's gradient g beside the reference's r."""

    step: int  # as training logs it, from 1
    impl: str
    part: str  # image, text, temperature, bias; or loss, where g and r are the values
    norm_ratio: float  # |g| / |r|
    cosine: float
    max_diff: float  # largest |g - r| of an element, relative to the largest |r|
    error: float  # |g - r| / |r|
    limit: float  # of the error
    passed: bool
    reference_norm: float


# The formulas


def dense_loss(
    cfg: config.Loss,
    images: torch.Tensor,
    texts: torch.Tensor,
    t: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
) -> torch.Tensor:
    """The global loss on the whole batch, all logits at once, in the dtype of its inputs.

    Args:
        images, texts: [B, D], not normalised.  t, bias: [1]; the logits are exp(t) * cosine (+ bias).
    """
    valid = pairs.valid.to(images.device)
    group_id = torch.arange(len(valid)) if pairs.group_id is None else pairs.group_id
    group_id = group_id.to(images.device)[valid]
    images = (images / images.norm(dim=1, keepdim=True))[valid]
    texts = (texts / texts.norm(dim=1, keepdim=True))[valid]
    logits = t.exp() * images @ texts.T
    same = (group_id[:, None] == group_id[None, :]).to(logits.dtype)
    if cfg.name == "sigmoid":
        assert bias is not None
        return _sigmoid(logits + bias, same, cfg.label_smoothing)
    return _info_nce(logits, same, cfg.label_smoothing)


def _info_nce(logits: torch.Tensor, same: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy of rows and of columns against (1 - e) * uniform over the group + e / N (arXiv:1807.03748)."""
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(logits)
    rows = -(target * logits.log_softmax(1)).sum(1)
    columns = -(target * logits.T.log_softmax(1)).sum(1)
    return (rows.mean() + columns.mean()) / 2


def _sigmoid(logits: torch.Tensor, same: torch.Tensor, smoothing: float) -> torch.Tensor:
    """1/N sum_ij softplus(s_ij) - y_ij s_ij, y = (1 - e) * same + e / 2 (arXiv:2303.15343, algorithm 1)."""
    target = (1 - smoothing) * same + smoothing / 2
    return (F.softplus(logits) - target * logits).sum() / len(logits)


# The reference


class Reference:
    """One process with the whole batch. It keeps one micro-batch in memory at a time, as a rank does.

    Args:
        model: the model before the engine took it, fp32; taken over and cast to `dtype`.
        dist_env: its world gives the ranks whose rows and random states are followed.
        dtype: what the towers compute in.
    """

    def __init__(self, model: DualEncoder, cfg: Config, dist_env: DistEnv, dtype: torch.dtype) -> None:
        self.cfg, self.world, self.device, self.dtype = cfg, dist_env.world_size, dist_env.device, dtype
        self.scalars = {
            name: parameter.detach().to(self.device).clone()
            for name, parameter in model.named_parameters()
            if name in SCALARS
        }
        self.model = model.to(self.device).to(dtype).train()
        self.draws = False  # whether a forward pass has drawn random numbers (dropout and the like)

    @torch.no_grad()
    def take_over(self, weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
        """Goes on from the engine's weights: its fp32 masters, rounded as the engine rounds them for its module."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name].view_as(parameter))
            if name in SCALARS:
                self.scalars[name] = weights[name].clone()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def measure(
        self, pairs: Pairs, step: int, *, micro: int, scale: float = 1.0, loss: config.Loss | None = None
    ) -> tuple[Measured, Measured | None]:
        """Loss and gradients of the global batch, in float64 but for the towers.

        Args:
            micro: m, rows of one forward pass.
            scale: what the feature gradients are multiplied with on their way through the towers (fp16).
            loss: another formula than the configuration's.

        Returns:
            the reference; and where fp32 is near its end (see LOW_LOSS), what the dense formula gives in fp32.
        """
        cfg = loss or self.cfg.loss
        with torch.no_grad():
            cached = [self._features(pairs, step, where) for where in self._places(pairs, micro)]
        images, texts = (torch.cat(side) for side in zip(*cached))
        heads = [self._head(cfg, images, texts, pairs, torch.float64)]
        if self.dtype == torch.float32 and heads[0].loss <= LOW_LOSS:
            heads.append(self._head(cfg, images, texts, pairs, torch.float32))
        for where, before in zip(self._places(pairs, micro), cached):
            features = self._features(pairs, step, where)
            _check_replay(features, before)
            for head in heads:
                self._through_towers(head, features, where[2], scale)
        measured = [Measured(head.loss, head.gradients) for head in heads]
        return measured[0], (measured[1] if len(measured) > 1 else None)

    def _places(self, pairs: Pairs, micro: int) -> Iterator[tuple[int, int, slice]]:
        """Rank, micro-batch and rows of every forward pass, in the order of the global batch."""
        share = len(pairs.valid) // self.world
        for rank in range(self.world):
            for k in range(share // micro):
                start = rank * share + k * micro
                yield rank, k, slice(start, start + micro)

    def _features(self, pairs: Pairs, step: int, where: tuple[int, int, slice]) -> tuple[torch.Tensor, torch.Tensor]:
        rank, k, rows = where
        seed_step(self.cfg.train.seed, step, rank, k)
        before = _random_state(self.device)
        image_features, text_features, *_ = self.model(
            pairs.image[rows].to(self.device), pairs.tokens[rows].to(self.device)
        )
        self.draws = self.draws or not torch.equal(before, _random_state(self.device))
        return image_features, text_features

    def _head(
        self, cfg: config.Loss, images: torch.Tensor, texts: torch.Tensor, pairs: Pairs, dtype: torch.dtype
    ) -> _Head:
        """The formula in `dtype`, and its gradients with respect to what it is given."""
        leaves = {"images": images, "texts": texts, **self.scalars}
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        value = dense_loss(
            cfg, leaves["images"], leaves["texts"], leaves["logit_scale"], leaves.get("logit_bias"), pairs
        )
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True)))
        gradients = {
            name: torch.zeros(parameter.numel(), dtype=torch.float64, device=self.device)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        for name in self.scalars:
            if grads[name] is not None:
                gradients[name] += grads[name].double()
        return _Head(float(value.detach()), grads["images"], grads["texts"], gradients)

    def _through_towers(
        self, head: _Head, features: tuple[torch.Tensor, torch.Tensor], rows: slice, scale: float
    ) -> None:
        """Adds what one micro-batch's share of the feature gradients gives for the towers' parameters."""
        towers = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in SCALARS}
        sides = [(f, g[rows]) for f, g in zip(features, (head.image_grad, head.text_grad)) if f.requires_grad]
        if not sides:
            return
        outputs = [feature for feature, _ in sides]
        weights = [(scale * grad).to(feature.dtype) for feature, grad in sides]
        grads = torch.autograd.grad(outputs, list(towers.values()), weights, allow_unused=True, retain_graph=True)
        for name, grad in zip(towers, grads):
            if grad is not None:
                head.gradients[name] += grad.double().reshape(-1) / scale  # convolutions may have theirs channels last


@dataclass(frozen=True)
class _Head:
    """The dense formula's value and gradients: of features [B, D], and of parameters by name as they come in."""

    loss: float
    image_grad: torch.Tensor
    text_grad: torch.Tensor
    gradients: dict[str, torch.Tensor]


def _check_replay(features: tuple[torch.Tensor, torch.Tensor], before: tuple[torch.Tensor, torch.Tensor]) -> None:
    for again, first in zip(features, before):
        if (again.detach() - first).double().norm() > 1e-3 * first.double().norm():
            raise RuntimeError("the model draws random numbers outside torch's generators: no pass can be repeated")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


# The engine


def made_whole(engine: Any, read: Callable[[Fragment], torch.Tensor], trained_only: bool) -> dict[str, torch.Tensor]:
    """fp32 [numel] of every parameter, the same on all ranks, from the elements that each rank holds.

    Args:
        engine: a DeepSpeedEngine.  read: a fragment's elements, 1-D.
    """
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    flat = torch.zeros(sum(sizes.values()), device=engine.device)
    whole = dict(zip(sizes, flat.split(list(sizes.values()))))
    left_out = set()
    for fragment in fragments(engine):
        if trained_only and not fragment.trained:
            left_out.add(fragment.name)
            continue
        start, stop = fragment.own
        piece = read(fragment)[start - fragment.start : stop - fragment.start]
        whole[fragment.name][start:stop] = piece
    summed = all_reduce_sum(flat).split(list(sizes.values()))
    return {name: tensor for name, tensor in zip(sizes, summed) if name not in left_out}


class Audit:
    """A training engine and its reference, side by side.

    Args:
        loss: the loss that the engine trains with; None: the configuration's own.
    Attributes:
        precision: fp32, bf16 or fp16.  micro: m.
        reported: the engine's own gradient norms of the last step, relative to those of the gradients that were read.
    """

    def __init__(self, cfg: Config, dist_env: DistEnv, loss: LossFunction | None = None) -> None:
        self.cfg, self.dist_env = cfg, dist_env
        self.precision = resolve_precision(cfg.train.precision, dist_env.device.type)
        self.micro = cfg.train.micro_batch or cfg.train.global_batch // dist_env.world_size
        torch.manual_seed(cfg.train.seed)
        model = build_model(cfg.model, cfg.loss)
        self.spec = model.spec
        self.locked = [part for part, tower in (("image", model.visual), ("text", model.text)) if _frozen(tower)]
        self.reference = Reference(copy.deepcopy(model), cfg, dist_env, DTYPES[self.precision])
        if cfg.engine.activation_checkpointing:
            model.set_activation_checkpointing()
        self.engine = Engine(model.to(dist_env.device), loss or make_loss(cfg.loss), cfg, dist_env)
        self.reported: dict[str, float] = {}

    def step(self, pairs: Pairs, step: int) -> list[Row]:
        """One training step on a global batch, and the same by the reference, which then takes the weights over.

        Returns:
            on rank 0 a row for every part that is trained and one for the loss; elsewhere nothing.
        """
        ours, scale = self._engine_step(pairs, step)
        rows: list[Row] = []
        if self.dist_env.rank == 0:
            theirs, dense = self.reference.measure(pairs, step, micro=self.micro, scale=scale)
            rows = compare(ours, theirs, self.precision, step=step + 1, dense=dense)
        engine = self.engine.engine
        weights = made_whole(engine, lambda fragment: fragment.of(fragment.flat).float(), trained_only=False)
        self.reference.take_over(weights, dict(engine.module.named_buffers()))
        return rows

    def _engine_step(self, pairs: Pairs, step: int) -> tuple[Measured, float]:
        """The engine's loss and gradients; and the factor that brought the feature gradients through fp16."""
        share = len(pairs.valid) // self.dist_env.world_size
        mine = pairs.rows(self.dist_env.rank * share, (self.dist_env.rank + 1) * share)
        on = self.dist_env.device
        group_id = None if mine.group_id is None else mine.group_id.to(on)
        batch = (mine.image.to(on), mine.tokens.to(on), mine.valid.to(on), group_id)
        for _ in range(FP16_ATTEMPTS):
            with _Look(self.engine) as look:
                result = self.engine.train_step(*batch, step=step, lr=self.cfg.optim.lr, want_norms=True)
            if result.applied or result.skipped:
                break
        loss = float(all_reduce_sum(result.value)) / self.dist_env.world_size
        measured = Measured(loss, look.gradients)
        self.reported = {part: norm / (_norm(measured, part) or 1.0) for part, norm in result.grad_norms.items()}
        return measured, look.loss_scale * self.dist_env.world_size if self.precision == "fp16" else 1.0

    def notes(self) -> list[str]:
        """What differs from one process on the whole batch by nature, or is left out. Known after the first step."""
        batch, world, m = self.cfg.train.global_batch, self.dist_env.world_size, self.micro
        notes = []
        if world == 1:
            notes.append("one rank: nothing is distributed; --ranks N audits more")
        norms = [module for module in self.reference.model.modules() if isinstance(module, _BatchNorm)]
        if any(module.training for module in norms) and m < batch:
            notes.append(
                f"BatchNorm normalises over a rank's micro-batch (m={m} of {batch} pairs), and so does the reference;"
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
        self.engine.engine.destroy()


class _Look:
    """Reads an engine's gradients between backward and step: where train_step asks for their norms."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gradients: dict[str, torch.Tensor] = {}
        self.loss_scale = 1.0

    def __enter__(self) -> _Look:
        self._norms = self.engine.grad_norms
        self.engine.grad_norms = self._look  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        del self.engine.grad_norms

    def _look(self) -> dict[str, float]:
        engine = self.engine.engine
        self.loss_scale = loss_scale(engine)
        self.gradients = made_whole(
            engine, lambda fragment: gradient(engine, fragment).float() / self.loss_scale, trained_only=True
        )
        return self._norms()


def _frozen(tower: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in tower.parameters())


# The comparison


def compare(
    ours: Measured,
    theirs: Measured,
    precision: str,
    *,
    step: int,
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
        norm_ratio, cosine, max_diff, error, norm = _distance(ours, theirs, part)
        limit = LIMITS[precision]
        if dense is not None:
            limit = max(limit, DENSE_MARGIN * _distance(dense, theirs, part)[3])
        rows.append(Row(step, impl, part, norm_ratio, cosine, max_diff, error, limit, error <= limit, norm))
    return rows


def _distance(ours: Measured, theirs: Measured, part: str) -> tuple[float, float, float, float, float]:
    """norm_ratio, cosine, max_diff, error, and the reference's norm; see Row. A missing gradient is zero."""
    gg = rr = gr = dd = most = largest = 0.0
    for name, r in _tensors(theirs, part).items():
        r = r.double()
        g = _tensors(ours, part).get(name, torch.zeros_like(r)).to(r.device).double()
        difference = g - r
        gg, rr, gr = gg + float(g @ g), rr + float(r @ r), gr + float(g @ r)
        dd += float(difference @ difference)
        most, largest = max(most, float(difference.abs().max())), max(largest, float(r.abs().max()))
    if rr == 0:  # nothing to learn, and nothing may be learnt
        right = gg == 0
        return (1.0, 1.0, 0.0, 0.0, 0.0) if right else (math.inf, 0.0, math.inf, math.inf, 0.0)
    cosine = gr / math.sqrt(gg * rr) if gg else 0.0
    return math.sqrt(gg / rr), cosine, most / largest, math.sqrt(dd / rr), math.sqrt(rr)


def _tensors(measured: Measured, part: str) -> dict[str, torch.Tensor]:
    if part == "loss":
        return {"loss": torch.tensor([measured.loss], dtype=torch.float64)}
    return {name: grad for name, grad in measured.gradients.items() if part_of(name) == part}


def _norm(measured: Measured, part: str) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in _tensors(measured, part).values()))


# The batches


class Source(Protocol):
    """Where global batches come from; the same pairs on all ranks."""

    note: str

    def pairs(self, step: int) -> Pairs: ...

    def close(self) -> None: ...


def open_source(cfg: Config, spec: ModelSpec, dist_env: DistEnv) -> Source:
    """The recipe's training shards through the loader; drawn pairs where there are none.

    Raises:
        UserError: shards that hold fewer samples than a global batch.
    """
    try:
        if not cfg.data.train:
            raise UserError("data.train is empty")
        catalog = Catalog.open(cfg.data.train, "data.train", fetcher_of(cfg.data))
    except UserError as error:
        return DrawnPairs(cfg, spec, f"drawn random pictures and tokens, because {error}")
    if len(catalog) < cfg.train.global_batch:
        raise UserError(
            f"data.train holds {len(catalog)} samples, fewer than train.global_batch={cfg.train.global_batch};"
            " lower train.global_batch"
        )
    return ShardPairs(cfg, spec, dist_env, catalog)


class ShardPairs:
    """Training batches as training reads them: each rank its own rows, then gathered."""

    def __init__(self, cfg: Config, spec: ModelSpec, dist_env: DistEnv, catalog: Catalog) -> None:
        from clipdist.data.loader import open_loader
        from clipdist.data.order import first_order
        from clipdist.data.tokens import make_tokenizer

        self.note = f"training batches of {', '.join(cfg.data.train)}"
        self.groups, self.device = cfg.loss.group_positives, dist_env.device
        self.loader = open_loader(
            catalog,
            first_order(cfg, catalog, dist_env.world_size),
            make_tokenizer(spec),
            cfg.data,
            image_size=spec.image_size,
            rank=dist_env.rank,
            world=dist_env.world_size,
        )

    def pairs(self, step: int) -> Pairs:
        """The next global batch."""
        batch = self.loader.next().to(self.device)
        image, tokens, group_id = (all_gather(x).cpu() for x in (batch.image, batch.tokens, batch.group_id))
        valid = all_gather(batch.valid.to(torch.uint8)).cpu().bool()
        return Pairs(image, tokens, valid, group_id if self.groups else None)

    def close(self) -> None:
        self.loader.close()


class DrawnPairs:
    """Random pixels and tokens: no picture to find, but gradients as good as any to be exact about."""

    def __init__(self, cfg: Config, spec: ModelSpec, note: str = "drawn random pictures and tokens") -> None:
        self.note, self.spec = note, spec
        self.batch, self.seed, self.groups = cfg.train.global_batch, cfg.data.seed, cfg.loss.group_positives

    def pairs(self, step: int) -> Pairs:
        """Global batch number `step`, all of it valid."""
        from clipdist.data.tokens import make_tokenizer

        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        side = self.spec.image_size
        image = torch.randint(0, 256, (self.batch, 3, side, side), dtype=torch.uint8, generator=draw)
        numbers = torch.randint(0, 10_000, (self.batch, 3), generator=draw).tolist()
        # Numbers as captions: every tokeniser takes them, and places its marks where the tower looks for them.
        tokens = make_tokenizer(self.spec)([" ".join(map(str, row)) for row in numbers])
        group_id = torch.arange(self.batch) if self.groups else None
        return Pairs(image, tokens, torch.ones(self.batch, dtype=torch.bool), group_id)

    def close(self) -> None:
        pass
