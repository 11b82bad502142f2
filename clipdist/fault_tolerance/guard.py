"""Decide which training steps to skip, and when to roll back to a checkpoint, from global losses and update sizes.

Every rank has its own guard, which sees the same numbers and therefore decides the same. Its state is part of a
checkpoint, so that a resumed run decides as an uninterrupted one. It uses no tensors.

A loss is a spike if it exceeds the median of the last guard.window accepted losses by more than guard.loss_spike
deviations. A deviation is the maximum of
    1.4826 times the median absolute deviation: the standard deviation of normal noise, robust against outliers;
    the distance of the 90 % quantile above the median, over 1.2816: the same for normal noise, and larger if the noise
        is skewed upward, as with small batches late in training;
    LOSS_FLOOR nats and LOSS_SHARE of the median, because the deviation of a plateau is near 0.

An update of a tower is a spike if its size exceeds guard.update_spike times the median of the last ones, or times 1
where that is larger: 1 is what the optimiser's second moments predict (clipdist.engine.gradients).

Spikes are detected once guard.window steps have been accepted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from clipdist import config

LOSS_FLOOR = 0.1  # nats
LOSS_SHARE = 0.02
OVERFLOWS_IN_A_ROW = 20  # more than the halvings of fp16's loss scale, which starts at 2^16


class Guard:
    """Judges the steps of one run in order.

    Args:
        state: the result of state() in the checkpoint that the run resumes from; None: a new run.

    Attributes:
        skipped_total: number of skipped steps of the run, overflows included.
    """

    def __init__(self, cfg: config.Guard, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.cfg = cfg
        self._losses = deque(state.get("losses", []), maxlen=cfg.window)
        self._sizes = {tower: deque(sizes, maxlen=cfg.window) for tower, sizes in state.get("sizes", {}).items()}
        self._skipped_steps = list(state.get("troubled", []))  # of the last window
        self._overflows_in_a_row = int(state.get("overflows", 0))
        self._skipped_in_a_row = int(state.get("in_a_row", 0))
        self.skipped_total = int(state.get("left_out_total", 0))
        self._stage = int(state.get("stage", 0))

    def enter_stage(self, stage: int) -> None:
        """Forget the losses and sizes of other stages (train.stages): those of this one are to be compared alone."""
        if stage != self._stage:
            self._stage = stage
            self._losses.clear()
            self._sizes.clear()

    @property
    def wants_sizes(self) -> bool:
        """Whether judge_updates uses update sizes."""
        return self.cfg.update_spike > 0

    def judge_loss(self, loss: float) -> str:
        """Return the reason to skip a step with this global loss, or ""."""
        if not math.isfinite(loss):
            return f"the loss is not finite: {loss}"
        if not self.cfg.loss_spike or len(self._losses) < self.cfg.window:
            return ""
        centre, deviation = _median_and_deviation(self._losses)
        excess = (loss - centre) / deviation
        if excess <= self.cfg.loss_spike:
            return ""
        return f"the loss {loss:.4g} is {excess:.1f} deviations above {centre:.4g}, the last {self.cfg.window}'s median"

    def judge_updates(self, sizes: dict[str, float]) -> str:
        """Return the reason to skip a step with these update sizes by tower, or "" (also before a window of sizes)."""
        for tower, size in sizes.items():
            before = self._sizes.get(tower, ())
            if not self.cfg.update_spike or len(before) < self.cfg.window:
                continue
            usual = max(1.0, median(before))
            if size > self.cfg.update_spike * usual:
                return (
                    f"the update of the {tower} tower is {size / usual:.1f} times the usual (size {size:.3g}, median of"
                    f" the last {self.cfg.window} {median(before):.3g})"
                )
        return ""

    def accepted(self, step: int, loss: float, sizes: dict[str, float]) -> None:
        """Record that data step `step` has changed the weights."""
        self._losses.append(loss)
        for tower, size in sizes.items():
            self._sizes.setdefault(tower, deque(maxlen=self.cfg.window)).append(size)
        self._overflows_in_a_row = self._skipped_in_a_row = 0
        self._drop_old_steps(step)

    def skipped(self, step: int, reason: str) -> None:
        """Record that data step `step` was skipped."""
        self.skipped_total += 1
        self._skipped_in_a_row += 1
        self._skipped_steps.append(step)
        self._drop_old_steps(step)
        if self.cfg.patience == 0 and self._skipped_in_a_row >= self.cfg.window:
            # Without rollback a level that lasts this long is not a spike: estimate the statistics anew.
            self._losses.clear()
            self._sizes.clear()

    def overflowed(self, step: int, reason: str, scale_is_lowest: bool) -> None:
        """Record that fp16's loss scaler skipped data step `step`; rollbacks count it if the scale cannot adapt."""
        self._overflows_in_a_row += 1
        if scale_is_lowest or self._overflows_in_a_row > OVERFLOWS_IN_A_ROW:
            self.skipped(step, reason)
        else:
            self.skipped_total += 1
            self._drop_old_steps(step)

    @property
    def rollback_start(self) -> int | None:
        """The first skipped data step of the window, if more than guard.patience of its steps were skipped."""
        if self.cfg.patience and len(self._skipped_steps) > self.cfg.patience:
            return self._skipped_steps[0]
        return None

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, from which floats are restored exactly."""
        return {
            "losses": list(self._losses),
            "sizes": {tower: list(sizes) for tower, sizes in self._sizes.items()},
            "troubled": list(self._skipped_steps),
            "overflows": self._overflows_in_a_row,
            "in_a_row": self._skipped_in_a_row,
            "left_out_total": self.skipped_total,
            "stage": self._stage,
        }

    def _drop_old_steps(self, step: int) -> None:
        self._skipped_steps = [other for other in self._skipped_steps if other > step - self.cfg.window]


def _median_and_deviation(losses: Sequence[float]) -> tuple[float, float]:
    """Return the median and the deviation of losses, as the module docstring defines it."""
    centre = median(losses)
    around = 1.4826 * median(abs(loss - centre) for loss in losses)
    above = (sorted(losses)[math.ceil(0.9 * len(losses)) - 1] - centre) / 1.2816
    return centre, max(around, above, LOSS_FLOOR, LOSS_SHARE * abs(centre))
