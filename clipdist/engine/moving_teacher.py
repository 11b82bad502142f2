"""A teacher that follows the weights: their moving average in the precision of the run, and what it gives for a batch.

At ZeRO stages 0 to 2 every rank has a whole copy of the image tower and the heads, which follows the average after each
step. At stage 3 the model itself computes with its shards of the average, so that the teacher is gathered by blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from clipdist.data.batch import Batch
from clipdist.distributed.collectives import all_reduce_sum, rank_and_world
from clipdist.distributed.rank import moved
from clipdist.engine.ema import Ema
from clipdist.engine.zero import GATHERED, Zero
from clipdist.models.dual_encoder import PATCHES
from clipdist.models.grouped_norms import GroupedBatchNorm, interleaved, inverse
from clipdist.models.norms import running_norms, statistics_of_views
from clipdist.objectives.objective import COUNTS, TEACHER, Moment, TeacherSpec

Forward = Callable[..., dict[str, Tensor]]


class MovingTeacher:
    """The teacher of an objective. Nothing of it changes but in `update`, which follows a step that was taken.

    Args:
        module: a copy of the model for stages 0 to 2: see `copy_for_teacher`; None at stage 3.
        rows: of one forward pass.
        group: model.batchnorm_group.
    """

    def __init__(
        self, spec: TeacherSpec, zero: Zero, ema: Ema, module: nn.Module | None, rows: int, group: int = 0
    ) -> None:
        self.spec = spec
        self._zero, self._ema, self._rows = zero, ema, rows
        self._group = group if spec.shuffled else 0
        self._module = module
        of = zero.module if module is None else module
        self._norms = [norm for norm in running_norms(of) if norm.training]  # not those of a locked tower
        trained = {name: norm for name, norm in of.named_modules() if norm in self._norms}
        self._grouped = {name: norm for name, norm in trained.items() if isinstance(norm, GroupedBatchNorm)}
        self._statistics: dict[str, Tensor] = {}  # running statistics after the last pass
        self._moments: dict[str, Tensor] = {}  # of the groups of the last pass, by layer
        self.refresh()

    @torch.no_grad()
    def __call__(self, batch: Batch, noise: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return its outputs [b, ...] for its views of all rows, by TEACHER and the view's name. Collective.

        Args:
            noise: masks of views, bool [b, n]: of those it also returns what it gives for the masked patches, and their
                number in each row. See Objective.given.
        """
        found: list[dict[str, Tensor]] = []
        masks = {view: noise[view] for view in self.spec.views if view in noise}
        with self._running() as (module, forward):
            buffers, norms = dict(module.named_buffers()), self._norms if self.spec.training else []
            with statistics_of_views(module, norms) if norms else nullcontext(), self._summing_moments():
                for number, piece in enumerate(batch.split(self._rows)):
                    images = {view: piece.images[view] for view in self.spec.views}
                    order = None
                    if self._group:
                        order = moved(interleaved(len(piece), self._group), piece.images[self.spec.views[0]].device)
                        images = {view: pixels[order] for view, pixels in images.items()}
                    own = {view: mask.split(self._rows)[number] for view, mask in masks.items()}
                    outputs = forward(teaching=True, noise=own, **images)
                    back = slice(None) if order is None else inverse(order)
                    found.append({view: outputs[view][back] for view in self.spec.views})
                    found[-1] |= {f"{PATCHES}/{view}": outputs[f"{PATCHES}/{view}"] for view in masks}
            if norms and not self._grouped:
                self._statistics = {name: buffers[name].float().clone() for name in self._ema.buffers}
        counts = {f"{TEACHER}{PATCHES}/{view}{COUNTS}": mask.sum(1) for view, mask in masks.items()}
        return counts | {TEACHER + name: torch.cat([one[name] for one in found]) for name in found[0]}

    @contextmanager
    def _summing_moments(self) -> Iterator[None]:
        """Let BatchNorm over groups sum its moments here, not where the student's are."""
        norms: dict[str, Any] = self._grouped if self.spec.training else {}
        own = {name: norm.moments for name, norm in norms.items()}
        for norm in norms.values():
            norm.moments = torch.zeros(3, norm.num_features, device=norm.running_mean.device)
        yield
        for name, norm in norms.items():
            self._moments[name], norm.moments = norm.moments, own[name]

    @contextmanager
    def _running(self) -> Iterator[tuple[nn.Module, Forward]]:
        """Yield the module with the teacher's weights and statistics, in its mode, and its forward pass. Collective."""
        if self._module is not None:
            for name, buffer in self._module.named_buffers():
                if name in self._ema.buffers:
                    buffer.copy_(self._ema.buffers[name])
            self._set_mode(self._module)
            yield self._module, self._module
            return
        module = self._zero.module
        counts = [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]
        before = [count.clone() for count in counts]
        with self._ema.in_use():
            self._zero.train(False)
            self._set_mode(module)
            try:
                yield module, self._zero.forward
            finally:
                self._zero.train()
                for count, value in zip(counts, before):
                    count.copy_(value)

    def _set_mode(self, module: nn.Module) -> None:
        module.eval()
        for norm in self._norms if self.spec.training else ():
            norm.train()

    @torch.no_grad()
    def update(self, at: Moment) -> None:
        """Follow the weights after a step that the optimiser has taken. Collective."""
        self._move_statistics()
        self._ema.update(self.spec.momentum(at))
        self.refresh()

    def _move_statistics(self) -> None:
        """Move running statistics of the teacher's own to those of the last pass. Collective."""
        world = rank_and_world()[1]
        if self._statistics:
            flat = torch.cat([value.view(-1) for value in self._statistics.values()])
            mean = all_reduce_sum(flat) / world if world > 1 else flat
            for (name, value), part in zip(
                self._statistics.items(), mean.split([value.numel() for value in self._statistics.values()])
            ):
                self._ema.buffers[name].copy_(part.view_as(value))
        if self._moments:
            totals = all_reduce_sum(torch.cat([table.flatten() for table in self._moments.values()]))
            sizes = [table.numel() for table in self._moments.values()]
            for (name, norm), total in zip(self._grouped.items(), totals.split(sizes)):
                mean, var, groups = total.view(3, -1)
                for moment, new in (("running_mean", mean), ("running_var", var)):
                    running = self._ema.buffers[f"{name}.{moment}"]
                    newer = running.lerp(new / groups, norm.momentum or 0.1)
                    running.copy_(torch.where(groups > 0, newer, running))  # a predictor is not the teacher's

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the average into the teacher's weights, in the precision of the run. Collective."""
        if self._module is None:
            return
        weights = dict(self._module.named_parameters())
        if self._zero.stage == 0:
            for fragment in self._zero.fragments():
                if fragment.trained and fragment.name in weights:
                    weights[fragment.name].copy_(self._ema.read(fragment).view(fragment.shape))
            return
        names = [name for name in self._zero.numel(trained_only=True) if name in weights]
        for first in range(0, len(names), GATHERED):
            for name, whole in self._zero.gather(self._ema.read, names[first : first + GATHERED]).items():
                weights[name].copy_(whole.view_as(weights[name]))


def copy_for_teacher(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model without its text tower, without gradients, in a precision."""
    return copy.deepcopy(model, {id(model.text): None}).requires_grad_(False).to(dtype)
