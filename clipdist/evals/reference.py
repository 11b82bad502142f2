"""Compute the reference loss and gradients of the audit: one process on the whole global batch.

It runs every rank's micro-batches from the same weights, with their random state and BatchNorm grouping, concatenates
the outputs, and applies the dense formulas of clipdist.evals.reference_losses in float64. With model.batchnorm_group it
runs the image tower on each group by itself, which depends on neither ranks nor micro-batches. The towers run in the
precision of the training: the audit measures errors of the distribution and the loss, not the rounding inside a tower.
It shares no code with clipdist/losses, nor with clipdist/models/grouped_norms.py.

Shapes: B rows of the global batch, b = B / W rows of a rank, m rows of a micro-batch, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from clipdist import config
from clipdist.config import Config
from clipdist.data.batch import IMAGE, Batch
from clipdist.distributed.rank import DistEnv
from clipdist.engine.step import seed_step
from clipdist.errors import UserError
from clipdist.evals.reference_losses import FORMULAS, STATES
from clipdist.models.drop_path import drop_path_blocks
from clipdist.models.dual_encoder import DualEncoder
from clipdist.models.towers import mix_in
from clipdist.objectives.objective import Moment, Objective, TeacherSpec
from clipdist.objectives.teacher import Teacher

# Below this loss the relative error of any fp32 implementation grows; the dense formula's is measured for comparison.
LOW_LOSS = 0.1
STEPS = 100  # of a run with the audit's schedules


@dataclass(frozen=True)
class LossAndGradients:
    """The global loss, and the gradients of trained parameters by name, [numel], before clipping."""

    loss: float
    gradients: dict[str, torch.Tensor]


class Reference:
    """A model trained by one process on the whole global batch, with one micro-batch in memory at a time.

    Args:
        model: a copy of the engine's model before training, fp32; modified and cast to `dtype`.
        dist_env: gives the number of ranks to reproduce, and the device.
        dtype: of the towers.
        teacher: of the engine, if it has a frozen one; in evaluation mode a row's outputs are its own.
        moving: of the engine, if it has a teacher that follows the weights.

    Attributes:
        scalars: fp32 values of the model's scalars, [1].
        draws_random_numbers: whether a forward pass has drawn random numbers (dropout).
        state: of the objectives, by objective and name.
        state_after: what the last step should have made of it, float64, by OBJECTIVE/NAME.
        drawn_by: the objectives, for their random numbers.
        taught_alone: names of the views that the model does not see.
    """

    def __init__(
        self,
        model: DualEncoder,
        cfg: Config,
        dist_env: DistEnv,
        dtype: torch.dtype,
        teacher: Teacher | None = None,
        moving: TeacherSpec | None = None,
    ) -> None:
        self.seed, self.world, self.device, self.dtype = cfg.train.seed, dist_env.world_size, dist_env.device, dtype
        self.objectives, self.teacher, self.group = cfg.objectives, teacher, cfg.model.batchnorm_group
        self.scalars = {
            name: parameter.detach().to(self.device).clone()
            for name, parameter in model.named_parameters()
            if name in model.scalars
        }
        self.model = model.to(self.device).to(dtype).train()
        for norm in self.model.modules():
            if self.group and isinstance(norm, nn.BatchNorm2d):  # torch's CPU kernel for channels_last sums inexactly
                norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
                norm.register_forward_hook(lambda _, __, out: out.contiguous(memory_format=torch.channels_last))
        if self.model.decoder is not None:
            self.model.decoder.whole_logits = True
        for block in drop_path_blocks(self.model):
            mix_in(_WholeBranches, block)
        self.moving = _Moving(self.model, moving, self.group) if moving else None
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.state_after: dict[str, torch.Tensor] = {}
        self.drawn_by: list[Objective] = []
        self.taught_alone: tuple[str, ...] = ()
        self.draws_random_numbers = False

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Copy the engine's fp32 master weights [numel], rounded to `dtype` as the engine does."""
        _load(self.model, weights)
        for name in self.scalars:
            self.scalars[name] = weights[name].clone()

    @torch.no_grad()
    def load_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Copy buffers by name."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def measure(
        self, batch: Batch, step: int, *, micro: int, scale: float = 1.0, clip: config.Clip | None = None
    ) -> tuple[LossAndGradients, LossAndGradients | None]:
        """Compute loss and gradients of the global batch, in float64 except for the towers.

        Args:
            batch: the global batch.
            step: from 0; determines dropout.
            micro: m, rows of one forward pass.
            scale: the loss scale of feature gradients in the towers (fp16).
            clip: the only objective, of code without groups of BatchNorm; None: those that are configured.

        Returns:
            the reference, and the result of the dense formula in fp32 if the loss is below LOW_LOSS.

        Raises:
            RuntimeError: the model draws random numbers outside torch's generators.
            UserError: BatchNorm has groups, and the image tower draws random numbers, those of a micro-batch at once.
        """
        cfg = config.Objectives(clip=clip) if clip else self.objectives
        constants, at = self._constants(batch, micro, step), Moment(step, STEPS)
        self.state_after = {}
        for name, formula in STATES.items():
            if (section := getattr(cfg, name)) is not None:
                cast = {key: value.double() if value.is_floating_point() else value for key, value in constants.items()}
                self.state_after |= formula(section, cast, batch)
        passes = [*self._passes(batch, micro, 0 if clip else self.group)]
        with torch.no_grad(), _statistics_updated_once(self.model):
            cached = [self._outputs(batch, step, one) for one in passes]
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        names = dict.fromkeys(name for one in cached for name in one)
        outputs = {name: torch.cat([one[name] for one in cached if name in one]) for name in names}
        terms = [self._terms(cfg, outputs, constants, batch, at, torch.float64)]
        if self.dtype == torch.float32 and terms[0].loss <= LOW_LOSS:
            terms.append(self._terms(cfg, outputs, constants, batch, at, torch.float32))
        seen = dict.fromkeys(names, 0)
        for one, before in zip(passes, cached):
            again = self._outputs(batch, step, one)
            _check_replay(again, before)
            rows = {name: slice(seen[name], seen[name] + len(output)) for name, output in again.items()}
            seen |= {name: own.stop for name, own in rows.items()}
            for each in terms:
                self._through_model(each, again, rows, scale)
        self.load_buffers(buffers)  # the second pass has updated the running statistics again
        measured = [LossAndGradients(each.loss, each.gradients) for each in terms]
        return measured[0], (measured[1] if len(measured) > 1 else None)

    @torch.no_grad()
    def _constants(self, batch: Batch, micro: int, step: int) -> dict[str, torch.Tensor]:
        """Return what is constant in the formulas: of the teachers, the objectives' state, and what they draw.

        What they draw stands under its name, and under noise/NAME.
        """
        noise = self._noise(batch, step)
        taught = self.teacher(batch.to(self.device)) if self.teacher else {}
        if self.moving:
            taught |= self.moving(batch.to(self.device), noise, self.group or micro)
        state = {f"{objective}/{name}": value for objective, own in self.state.items() for name, value in own.items()}
        return taught | state | noise | {f"noise/{view}": own.to(self.device) for view, own in noise.items()}

    def _noise(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        """Return what heads take beside features, for the rows of `batch`."""
        at = Moment(step, STEPS)
        return {name: drawn for each in self.drawn_by for name, drawn in each.noise(batch, at).items()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, micro: int) -> torch.Tensor:
        """Return image and text features in evaluation mode, normalised: float64 [2 B, D]."""
        self.model.eval()
        found = []
        for piece in (piece.to(self.device) for piece in batch.split(micro)):
            texts = {"tokens": piece.tokens} if self.model.text is not None else {}
            outputs = self.model(**{IMAGE: next(iter(piece.images.values()))}, **texts)
            found.append([outputs[name] for name in (IMAGE, "text") if name in outputs])
        self.model.train()
        return concatenate_normalised(found)

    def _passes(self, batch: Batch, micro: int, group: int) -> Iterator[_Pass]:
        """Iterate over all forward passes in the order of the batch: micro-batches; groups, of images alone."""
        share = len(batch) // self.world
        for rank in range(self.world):
            for k in range(share // micro):
                start = rank * share + k * micro
                yield _Pass(slice(start, start + micro), IMAGE if group else "", rank, k)
        for start in range(0, len(batch) if group else 0, group or 1):
            yield _Pass(slice(start, start + group), "tokens")

    def _outputs(self, batch: Batch, step: int, one: _Pass) -> dict[str, torch.Tensor]:
        """Return the model's outputs [m, ...] of one of _passes, with that rank's random state."""
        seed_step(self.seed, step, one.rank, one.micro)
        before = _random_state(self.device)
        own = batch.rows(one.rows.start, one.rows.stop).to(self.device)
        inputs: dict[str, Any] = own.inputs(self.taught_alone)
        if one.without == "tokens":
            inputs.pop("tokens", None)
        elif one.without:
            inputs = {"tokens": inputs["tokens"]} if "tokens" in inputs else {}
        if not inputs:
            return {}
        kept = self.model.draw_kept(self.seed, step, own, [view for view in own.images if view in inputs])
        outputs = self.model(**inputs, noise=self._noise(own, step), kept=kept)
        drawn = not torch.equal(before, _random_state(self.device))
        if drawn and one.without == "tokens":
            raise UserError(
                f"model.batchnorm_group={self.group}: the image tower draws random numbers (dropout, drop path), for a"
                " micro-batch at once: the audit cannot draw them for a group; set them to 0 in the model JSON"
            )
        self.draws_random_numbers = self.draws_random_numbers or drawn
        return {name: output for name, output in outputs.items() if name not in self.scalars}

    def _terms(
        self,
        cfg: config.Objectives,
        outputs: dict[str, torch.Tensor],
        constants: dict[str, torch.Tensor],
        batch: Batch,
        at: Moment,
        dtype: torch.dtype,
    ) -> _Terms:
        """Compute the dense formulas in `dtype`, and their gradients with respect to outputs and scalars."""
        leaves = {**outputs, **self.scalars}
        leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
        cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in constants.items()}
        value = torch.zeros((), dtype=dtype, device=self.device)
        for name, formula in FORMULAS.items():
            section = getattr(cfg, name)
            if section is not None:
                value = value + section.weight * formula(section, leaves, cast, batch, at)
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True)))
        gradients = {
            name: torch.zeros(parameter.numel(), dtype=torch.float64, device=self.device)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        for name in self.scalars:
            if grads[name] is not None:
                gradients[name] += grads[name].double()
        return _Terms(float(value.detach()), {name: grads[name] for name in outputs}, gradients)

    def _through_model(
        self, terms: _Terms, outputs: dict[str, torch.Tensor], rows: dict[str, slice], scale: float
    ) -> None:
        """Propagate the outputs' gradients of one micro-batch; add up the parameters' gradients.

        Args:
            rows: of the micro-batch, by output.
        """
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad and n not in self.scalars}
        sides = [
            (output, gradient[rows[name]])
            for name, output, gradient in ((name, output, terms.outputs[name]) for name, output in outputs.items())
            if output.requires_grad and gradient is not None
        ]
        if not sides:
            return
        weights = [(scale * gradient).to(output.dtype) for output, gradient in sides]
        grads = torch.autograd.grad(
            [output for output, _ in sides], list(trained.values()), weights, allow_unused=True, retain_graph=True
        )
        for name, grad in zip(trained, grads):
            if grad is not None:
                terms.gradients[name] += grad.double().reshape(-1) / scale  # perhaps channels_last: view() rejects it


class _WholeBranches(nn.Module):
    """Mixin of a block with drop path: computes branches for all rows, and multiplies those that drop them by 0."""

    def _run(self: Any, x: torch.Tensor, kept: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
        for branch, (rows, factor) in zip(self.branches(), kept):
            scale = torch.zeros(len(x), 1, 1, dtype=x.dtype, device=x.device)
            scale[rows] = factor
            x = x + scale * branch(x)
        return x


class _Moving:
    """A teacher that follows the weights, on the whole global batch.

    Args:
        model: of the student, whose weights it starts from.
        group: model.batchnorm_group.
    """

    def __init__(self, model: DualEncoder, spec: TeacherSpec, group: int) -> None:
        self.spec, self.group = spec, group
        norms = [name for name, norm in model.named_modules() if isinstance(norm, _NormBase) and norm.training]
        self.model = copy.deepcopy(model).eval()
        for name in norms if spec.training else ():
            self.model.get_submodule(name).train()
        self.weights = {name: p.detach().double().view(-1).clone() for name, p in model.named_parameters()}

    def __call__(self, batch: Batch, noise: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
        """Return its outputs for the global batch, so many rows at once, and those for masked patches."""
        order = torch.arange(len(batch))
        if self.spec.shuffled and self.group:  # in each block of two groups: even places, then odd ones
            blocks = order.view(-1, 2 * self.group)
            order = torch.cat([torch.cat([block[::2], block[1::2]]) for block in blocks])
        images = {view: batch.images[view][order] for view in self.spec.views}
        with _statistics_updated_once(self.model):
            found = []
            for start in range(0, len(batch), rows):
                own, drawn = (
                    {view: values[start : start + rows] for view, values in each.items() if view in images}
                    for each in (images, noise)
                )
                found.append(self.model(teaching=True, noise=drawn, **own))
        taught = {f"teacher/{name}": torch.cat([one[name] for one in found]) for name in found[0] if "patches/" in name}
        for view in self.spec.views:
            outputs = torch.cat([one[view] for one in found])
            taught[f"teacher/{view}"] = torch.empty_like(outputs)
            taught[f"teacher/{view}"][order] = outputs
        return taught

    @torch.no_grad()
    def update(self, weights: dict[str, torch.Tensor], at: Moment) -> dict[str, torch.Tensor]:
        """Return what the average of the trained weights becomes after a step that led to `weights`, float64."""
        m = self.spec.momentum(at)
        return {name: m * self.weights[name] + (1 - m) * new.double() for name, new in weights.items()}

    def statistics(self) -> dict[str, torch.Tensor]:
        """Return the running statistics of BatchNorm layers that train, by name."""
        return {
            f"{layer}.{name}": buffer.clone()
            for layer, norm in self.model.named_modules()
            if isinstance(norm, _NormBase) and norm.training
            for name, buffer in norm.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }

    @torch.no_grad()
    def load(self, averages: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> None:
        """Copy the engine's averages [numel], rounded to the dtype of the towers, and its running statistics."""
        self.weights.update({name: average.double() for name, average in averages.items()})
        _load(self.model, averages)
        for name, buffer in self.model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _load(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name].view_as(parameter))


@contextmanager
def _statistics_updated_once(model: nn.Module) -> Iterator[None]:
    """Update BatchNorm's running statistics once, by the mean over the forward passes inside.

    With momentum 1 the buffers hold the statistics of the last pass, which a hook collects.
    """
    norms: list[Any] = [
        norm for norm in model.modules() if isinstance(norm, _NormBase) and norm.training and norm.track_running_stats
    ]
    before = [(norm.momentum, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    collected: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {norm: [] for norm in norms}

    def collect(norm: Any, *_: Any) -> None:
        collected[norm].append((norm.running_mean.double(), norm.running_var.double()))

    hooks = [norm.register_forward_hook(collect) for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    yield
    for norm, hook, count, (momentum, mean, var) in zip(norms, hooks, counts, before):
        hook.remove()
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count + 1)
        share = 1 / (int(count) + 1) if momentum is None else momentum
        for running, old, new in zip((norm.running_mean, norm.running_var), (mean, var), zip(*collected[norm])):
            running.copy_(old.double().lerp(torch.stack(new).mean(0), share))


@dataclass(frozen=True)
class _Terms:
    """Value and gradients of the dense formulas.

    Attributes:
        outputs: gradients of the model's outputs, [B, ...], by name; None: of none of the formulas.
        gradients: of the parameters by name, float64 [numel]; _through_model adds to them.
    """

    loss: float
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Pass:
    """A forward pass: rows of the global batch, the input that is left out, and whose random state it has."""

    rows: slice
    without: str
    rank: int = 0
    micro: int = 0


def _check_replay(outputs: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Raise RuntimeError if a repeated forward pass gave other features."""
    for name, first in before.items():
        if (outputs[name].detach() - first).double().norm() > 1e-3 * first.double().norm():
            raise RuntimeError("the model draws random numbers outside torch's generators: no pass can be repeated")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def concatenate_normalised(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Concatenate and normalise [image, text] features of micro-batches: float64 [rows, D], all images first.

    Of a model without a text tower there are those of images alone.
    """
    return torch.cat([F.normalize(torch.cat(side).double().flatten(0, -2), dim=1) for side in zip(*rows)])
