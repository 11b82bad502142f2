"""The logits of a batch, one tile at a time: their exponential sums and gradients. No matrix is kept.

A tile of logits is s_ij = row_factor_i * column_factor_j * (x_i . y_j) + bias, in fp32 whatever the features' dtype;
the factors hold exp(t) / |x_i| and 1 / |y_j|, or 0 for a row that is not valid. Four sweeps over the tiles are all that
the losses need: `exponential_sums` and `softmax_gradients` (InfoNCE), `sigmoid_sweep`, and `best` (accuracy).

A row's own pair is left out of all of them (its logit is -inf here): the losses add it in closed form. Were it among
the others, its weight p - 1 would be a difference of two numbers near 1 as soon as training succeeds.

b rows of this rank, N columns of all ranks, D features. Everything here is local; collectives are the callers'.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

Shift = float | tuple[torch.Tensor, torch.Tensor]
# exp(s - shift) neither overflows nor vanishes in fp32 while |s - shift| stays below this.
SAFE_EXPONENT = 70.0


@dataclass(frozen=True)
class Tile:
    """Rows and columns of logits that exist at one time."""

    rows: int
    columns: int


def choose_tile(device: torch.device, tile: Tile | None = None) -> Tile:
    """The tile given, or one for the device: with its features it fits the cache, or a sliver of a GPU's memory."""
    return tile or _default_tile(device.type, device.index or 0)


@lru_cache
def _default_tile(kind: str, index: int) -> Tile:
    if kind == "cuda":
        # Tiles go through device memory here; large ones amortise the launches. At most 1/256 of the memory.
        elements = torch.cuda.get_device_properties(index).total_memory // (256 * 4 * 2)
        side = 1 << (max(elements, 1 << 20).bit_length() - 1) // 2
        return Tile(min(side, 8192), min(side, 8192))
    # On 2 cores of an EPYC with 32 MiB of third-level cache all of 256 x 256 to 4096 x 512 are within 20 %.
    cache = 0
    if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    return Tile(1024, 512) if cache >= 8 << 20 else Tile(512, 256)


@dataclass(frozen=True)
class Logits:
    """What the tiles are computed from.

    Attributes:
        x, y: raw features [b, D] and [N, D], any float dtype.
        row_factor, column_factor: fp32 [b], [N].
        bias: a Python float.
        first: the own pair of row i is column first + i.
        tile: how much exists at one time.
    """

    x: torch.Tensor
    y: torch.Tensor
    row_factor: torch.Tensor
    column_factor: torch.Tensor
    bias: float
    first: int
    tile: Tile

    def sweep(self) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Tile by tile: rows, columns, scaled rows [R, D], scaled columns [C, D], logits [R, C] (overwritten next)."""
        (b, width), n = self.x.shape, self.y.shape[0]
        rows, columns = min(self.tile.rows, b), min(self.tile.columns, n)
        buffer = self.x.new_empty(rows * columns, dtype=torch.float32)
        right = self.x.new_empty(columns, width, dtype=torch.float32)
        for i in range(0, b, rows):
            row = slice(i, min(i + rows, b))
            left = self.x[row].float() * self.row_factor[row, None]
            for j in range(0, n, columns):
                column = slice(j, min(j + columns, n))
                scaled = right[: column.stop - column.start]
                torch.mul(self.y[column], self.column_factor[column, None], out=scaled)
                logits = buffer[: len(left) * len(scaled)].view(len(left), len(scaled))
                torch.mm(left, scaled.T, out=logits)
                if self.bias:
                    logits += self.bias
                offset = row.start + self.first - column.start
                if -len(left) < offset < len(scaled):
                    logits.diagonal(offset).fill_(-torch.inf)
                yield row, column, left, scaled, logits


def exponential_sums(
    logits: Logits,
    shift: Shift,
    row_valid: torch.Tensor,
    column_valid: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of exp(s - shift) along rows and along columns, from the same tile.

    Args:
        shift: one number for all, or fp32 ([b], [N]): the largest logit of every row and every column, over valid
            partners. (One that is not valid may lie above it, and must weigh nothing, not nothing times infinity.)
        row_valid, column_valid: fp32 [b], [N], 1 or 0: the weight of a row in the columns' sums, and vice versa.

    Returns:
        fp32 [b] and [N].
    """
    row_sums = torch.zeros_like(row_valid, dtype=torch.float64)
    column_sums = torch.zeros_like(column_valid, dtype=torch.float64)
    for row, column, _, _, s in logits.sweep():
        if isinstance(shift, tuple):
            along_rows = torch.mv((s - shift[0][row, None]).clamp_(max=0).exp_(), column_valid[column])
            along_columns = torch.mv(s.sub_(shift[1][None, column]).clamp_(max=0).exp_().T, row_valid[row])
        else:
            e = (s.sub_(shift) if shift else s).exp_()
            along_rows, along_columns = torch.mv(e, column_valid[column]), torch.mv(e.T, row_valid[row])
        row_sums[row] += along_rows
        column_sums[column] += along_columns
    return row_sums.float(), column_sums.float()


def softmax_gradients(
    logits: Logits,
    shift: Shift,
    row_inverse: torch.Tensor,
    column_inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiles again, weighted by P = softmax over rows + softmax over columns, against the other side's features.

    Args:
        shift: as for exponential_sums.
        row_inverse, column_inverse: fp32 [b], [N]: 1 / the sums that belong to `shift`, 0 where not valid.

    Returns:
        fp32 [b, D]: sum_j P_ij column_factor_j y_j, and fp32 [N, D]: sum_i P_ij row_factor_i x_i.
    """
    x_grad, y_grad = _zeros(logits)
    for row, column, left, right, s in logits.sweep():
        if isinstance(shift, tuple):
            along_columns = (s - shift[1][None, column]).clamp_(max=0).exp_().mul_(column_inverse[None, column])
            p = s.sub_(shift[0][row, None]).clamp_(max=0).exp_().mul_(row_inverse[row, None]).add_(along_columns)
        else:
            p = (s.sub_(shift) if shift else s).exp_()
            p.mul_(row_inverse[row, None] + column_inverse[None, column])
        x_grad[row].addmm_(p, right)
        y_grad[column].addmm_(p.T, left)
    return x_grad, y_grad


def sigmoid_sweep(
    logits: Logits, row_valid: torch.Tensor, column_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Everything of the sigmoid loss that looks at all pairs, in one sweep.

    Returns:
        float64 scalar: sum of softplus(s) over valid pairs; float64 scalar: sum of sigmoid(s) over them;
        fp32 [b, D]: sum_j sigmoid(s_ij) column_factor_j y_j; fp32 [N, D]: sum_i sigmoid(s_ij) row_factor_i x_i.
    """
    x_grad, y_grad = _zeros(logits)
    total = torch.zeros((), dtype=torch.float64, device=x_grad.device)
    slope = torch.zeros_like(total)
    for row, column, left, right, s in logits.sweep():
        values = torch.mv(F.softplus(s), column_valid[column])
        p = s.sigmoid_()
        slopes = torch.mv(p, column_valid[column])
        weights = row_valid[row].double()
        total += weights.dot(values.double())
        slope += weights.dot(slopes.double())
        x_grad[row].addmm_(p, right)
        y_grad[column].addmm_(p.T, left)
    return total, slope, x_grad, y_grad


def best(
    logits: Logits, row_valid: torch.Tensor, column_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit of every row and column over valid partners but the own, and where it is; -inf: there is none.

    Returns:
        fp32 [b], int64 [b] (columns), fp32 [N], int64 [N] (rows of this rank).
    """
    row_best = torch.full_like(row_valid, -torch.inf)
    column_best = torch.full_like(column_valid, -torch.inf)
    row_at = torch.zeros_like(row_best, dtype=torch.int64)
    column_at = torch.zeros_like(column_best, dtype=torch.int64)
    no_row, no_column = (row_valid == 0)[:, None], (column_valid == 0)[None, :]
    for row, column, _, _, s in logits.sweep():
        s.masked_fill_(no_row[row] | no_column[:, column], -torch.inf)
        for dim, here, most, at, start in (
            (1, row, row_best, row_at, column.start),
            (0, column, column_best, column_at, row.start),
        ):
            value, index = s.max(dim=dim)
            better = value > most[here]
            most[here] = torch.where(better, value, most[here])
            at[here] = torch.where(better, index + start, at[here])
    return row_best, row_at, column_best, column_at


def _zeros(logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros_like(logits.x, dtype=torch.float32, memory_format=torch.contiguous_format),
        torch.zeros_like(logits.y, dtype=torch.float32, memory_format=torch.contiguous_format),
    )
