"""The guard of the numbers: global losses and update sizes in; which steps to leave out, and when to go back, out.

Every rank asks its own guard about the same numbers, so that all decide alike; the guard's state is part of a
checkpoint, so that a run that goes on decides as one that was never interrupted. Nothing here knows of tensors.

A loss is a spike where it lies more than guard.loss_spike deviations above the median of the last guard.window accepted
ones. A deviation is the largest of
    1.4826 times the median distance from that median: the standard deviation of normal noise, whatever outliers do;
    how far the 90 % quantile lies above the median, over 1.2816: the same for normal noise, and larger where the noise
        leans upward, as that of small batches does once most of their pairs are told apart;
    LOSS_FLOOR nats and LOSS_SHARE of the median: on a plateau any batch would be many deviations away.

An update of a tower is a spike where its size is more than guard.update_spike times the median of the last ones, and
that times 1 where they are smaller: 1 is what the optimiser's second moments expect (clipdist.engine.gradients).

Neither is looked for before guard.window steps were accepted.
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
OVERFLOWS_IN_A_ROW = 20  # each halves fp16's scale, which starts at 2^16: by then it is no longer on its way


class Guard:
    """Judges the steps of one run, in their order.

    Args:
        state: what state() gave when the checkpoint was written that the run goes on from; None: a new run.
    """

    def __init__(self, cfg: config.Guard, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.cfg = cfg
        self._losses = deque(state.get("losses", []), maxlen=cfg.window)
        self._sizes = {tower: deque(sizes, maxlen=cfg.window) for tower, sizes in state.get("sizes", {}).items()}
        self._troubled = list(state.get("troubled", []))  # steps left out, those of the last window
        self._overflows = int(state.get("overflows", 0))  # in a row
        self._in_a_row = int(state.get("in_a_row", 0))
        self.left_out_total = int(state.get("left_out_total", 0))

    @property
    def wants_sizes(self) -> bool:
        return self.cfg.update_spike > 0

    def judge_loss(self, loss: float) -> str:
        """Why a step of this global loss is to be left out, or nothing."""
        if not math.isfinite(loss):
            return f"the loss is not finite: {loss}"
        if not self.cfg.loss_spike or len(self._losses) < self.cfg.window:
            return ""
        middle, deviation = _middle_and_deviation(self._losses)
        far = (loss - middle) / deviation
        if far <= self.cfg.loss_spike:
            return ""
        return f"the loss {loss:.4g} is {far:.1f} deviations above {middle:.4g}, the last {self.cfg.window}'s median"

    def judge_updates(self, sizes: dict[str, float]) -> str:
        """The same of the coming update's size, by tower. A tower that has not been seen for a window is not judged."""
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
        """Data step `step` has changed the weights."""
        self._losses.append(loss)
        for tower, size in sizes.items():
            self._sizes.setdefault(tower, deque(maxlen=self.cfg.window)).append(size)
        self._overflows = self._in_a_row = 0
        self._forget(step)

    def left_out(self, step: int, reason: str) -> None:
        """Data step `step` was left out, for `reason`."""
        self.left_out_total += 1
        self._in_a_row += 1
        self._troubled.append(step)
        self._forget(step)
        if self.cfg.patience == 0 and self._in_a_row >= self.cfg.window:
            # Nobody goes back, and what has lasted so long is no spike: what is usual is learned anew.
            self._losses.clear()
            self._sizes.clear()

    def overflowed(self, step: int, reason: str, scale_is_lowest: bool) -> None:
        """fp16's loss scaler left data step `step` out. It does so to find its level: that alone is no trouble."""
        self._overflows += 1
        if scale_is_lowest or self._overflows > OVERFLOWS_IN_A_ROW:
            self.left_out(step, reason)
        else:
            self.left_out_total += 1
            self._forget(step)

    @property
    def trouble(self) -> int | None:
        """The data step that trouble began at, where more than guard.patience of a window's steps were left out."""
        if self.cfg.patience and len(self._troubled) > self.cfg.patience:
            return self._troubled[0]
        return None

    def state(self) -> dict[str, Any]:
        """JSON; floats come back from it to the last bit."""
        return {
            "losses": list(self._losses),
            "sizes": {tower: list(sizes) for tower, sizes in self._sizes.items()},
            "troubled": list(self._troubled),
            "overflows": self._overflows,
            "in_a_row": self._in_a_row,
            "left_out_total": self.left_out_total,
        }

    def _forget(self, step: int) -> None:
        self._troubled = [other for other in self._troubled if other > step - self.cfg.window]


def _middle_and_deviation(losses: Sequence[float]) -> tuple[float, float]:
    """The median, and what a deviation from it is: see the head of this file."""
    middle = median(losses)
    around = 1.4826 * median(abs(loss - middle) for loss in losses)
    above = (sorted(losses)[math.ceil(0.9 * len(losses)) - 1] - middle) / 1.2816
    return middle, max(around, above, LOSS_FLOOR, LOSS_SHARE * abs(middle))
