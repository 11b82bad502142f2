"""Compute the logits of a batch tile by tile, with their exponential sums and gradients, in plain torch.

A tile of logits is s_ij = row_factor_i * column_factor_j * (x_i . y_j) + bias, in fp32 whatever the features' dtype;
the factors are exp(t) / |x_i| and 1 / |y_j|, or 0 for a row that is not valid. The losses use four sweeps over the
tiles: `exponential_sums` and `softmax_gradients` (InfoNCE), `sigmoid_sweep`, and `largest_logits` (accuracy).

All sweeps exclude own pairs (i, first + i), whose logit is -inf here: the losses add them in closed form, because the
gradient p - 1 of an own pair cancels as training succeeds.

Shapes: b rows of this rank, N columns of all ranks, D features. Nothing here is collective.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from clipdist.errors import UserError

Shift = float | tuple[torch.Tensor, torch.Tensor]
# exp(s - shift) neither overflows nor vanishes in fp32 while |s - shift| stays below this.
SAFE_EXPONENT = 70.0


@dataclass(frozen=True)
class Tile:
    """Number of rows and columns of logits in memory at one time."""

    rows: int
    columns: int


def inverse_temperature(temperature: float) -> float:
    """Return 1 / temperature, by which cosines are multiplied.

    Raises:
        UserError: exp(s) would leave what fp32 holds.
    """
    if not temperature * SAFE_EXPONENT >= 1:
        raise UserError(f"temperature={temperature}: must be at least {1 / SAFE_EXPONENT:.4f}")
    return 1 / temperature


def choose_tile(device: torch.device, tile: Tile | None = None) -> Tile:
    """Return `tile`, or by default one that fits the CPU's cache with its features, or a small part of GPU memory."""
    return tile or _default_tile(device.type, device.index or 0)


@lru_cache
def _default_tile(kind: str, index: int) -> Tile:
    if kind == "cuda":
        # Tiles go through device memory here; large ones amortise the launches. At most 1/256 of the memory.
        elements = torch.cuda.get_device_properties(index).total_memory // (256 * 4 * 2)
        side = 1 << (max(elements, 1 << 20).bit_length() - 1) // 2
        return Tile(min(side, 8192), min(side, 8192))
    # On 2 cores of an EPYC with 32 MiB of L3 cache, times of 256 x 256 to 4096 x 512 differ by less than 20 %.
    cache = 0
    if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        cache = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    return Tile(1024, 512) if cache >= 8 << 20 else Tile(512, 256)


@dataclass(frozen=True)
class Logits:
    """A matrix of logits [b, N], described by its factors and computed in tiles.

    Attributes:
        x, y: unnormalised features [b, D] and [N, D], any float dtype.
        row_factor, column_factor: fp32 [b], [N].
        bias: a Python float.
        first: the own pair of row i is column first + i.
        tile: size of the part in memory at one time.
    """

    x: torch.Tensor
    y: torch.Tensor
    row_factor: torch.Tensor
    column_factor: torch.Tensor
    bias: float
    first: int
    tile: Tile

    def sweep(self) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Iterate over the tiles.

        Yields:
            rows, columns, row_factor * x fp32 [R, D], column_factor * y fp32 [C, D], and logits fp32 [R, C], -inf for
            own pairs; the last two are overwritten by the next tile.
        """
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
    """Sum exp(s - shift) along rows and along columns.

    Args:
        shift: one number for all logits, or fp32 ([b], [N]): the largest logit of every row and every column over valid
            candidates. (A logit that is not valid may be larger; it is clamped, because 0 * inf is nan.)
        row_valid, column_valid: fp32 [b], [N], 1 or 0: the weight of a row in the column sums, and vice versa.

    Returns:
        row sums fp32 [b], column sums fp32 [N].
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
    """Recompute the tiles and return the gradients of InfoNCE, with P = softmax over rows + softmax over columns.

    Args:
        shift: see exponential_sums.
        row_inverse, column_inverse: fp32 [b], [N]: 1 / the sums of exp(s - shift), own pairs included; 0 where not
            valid.

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
    """Compute the parts of the sigmoid loss and its gradients that depend on all logits, in one sweep.

    Args:
        row_valid, column_valid: fp32 [b], [N], 1 or 0.

    Returns:
        float64 scalars: sum of softplus(s) and sum of sigmoid(s) over valid rows and columns;
        fp32 [b, D]: sum_j sigmoid(s_ij) column_factor_j y_j; fp32 [N, D]: sum_i sigmoid(s_ij) row_factor_i x_i.
    """
    x_grad, y_grad = _zeros(logits)
    softplus_sum = torch.zeros((), dtype=torch.float64, device=x_grad.device)
    sigmoid_sum = torch.zeros_like(softplus_sum)
    for row, column, left, right, s in logits.sweep():
        softplus = torch.mv(F.softplus(s), column_valid[column])
        p = s.sigmoid_()
        sigmoid = torch.mv(p, column_valid[column])
        weights = row_valid[row].double()
        softplus_sum += weights.dot(softplus.double())
        sigmoid_sum += weights.dot(sigmoid.double())
        x_grad[row].addmm_(p, right)
        y_grad[column].addmm_(p.T, left)
    return softplus_sum, sigmoid_sum, x_grad, y_grad


def largest_logits(
    logits: Logits, row_valid: torch.Tensor, column_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest logit of every row and column over its valid negatives, and its position; -inf: there is none.

    Returns:
        fp32 [b], int64 [b] (columns), fp32 [N], int64 [N] (rows of this rank).
    """
    row_max = torch.full_like(row_valid, -torch.inf)
    column_max = torch.full_like(column_valid, -torch.inf)
    row_argmax = torch.zeros_like(row_max, dtype=torch.int64)
    column_argmax = torch.zeros_like(column_max, dtype=torch.int64)
    no_row, no_column = (row_valid == 0)[:, None], (column_valid == 0)[None, :]
    for row, column, _, _, s in logits.sweep():
        s.masked_fill_(no_row[row] | no_column[:, column], -torch.inf)
        for dim, part, maximum, argmax, start in (
            (1, row, row_max, row_argmax, column.start),
            (0, column, column_max, column_argmax, row.start),
        ):
            value, index = s.max(dim=dim)
            larger = value > maximum[part]
            maximum[part] = torch.where(larger, value, maximum[part])
            argmax[part] = torch.where(larger, index + start, argmax[part])
    return row_max, row_argmax, column_max, column_argmax


def _zeros(logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Return zeros of the shapes of x and y, fp32."""
    return (
        torch.zeros_like(logits.x, dtype=torch.float32, memory_format=torch.contiguous_format),
        torch.zeros_like(logits.y, dtype=torch.float32, memory_format=torch.contiguous_format),
    )
