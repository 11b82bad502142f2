"""Compute the sweeps of clipdist.losses.tiles by fused Triton kernels.

The functions and arguments are those of clipdist.losses.tiles, the reference. Logits stay in registers. The programs of
one launch compute blocks of a super-tile and write, per block,

    sums       partial sums along rows and columns, reduced after the launch in a fixed order instead of by atomics:
               the result is deterministic. They take 1/40 of the memory of weights.
    gradients  the weights, rounded to the features' dtype, which cuBLAS multiplies with the features while they are in
               the L2 cache. Products of half-precision features are exact in fp32; only the weights are rounded.

Own pairs are excluded: that rounding would spoil their weight p - 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from clipdist.losses import tiles
from clipdist.losses.tiles import Logits, Tile

try:
    import triton
    import triton.language as tl
except ImportError:  # then available() is False
    triton = None

# fp16 weights: at most 2 * 2^14 = 32768 is below 65504, and 1e-6 (a million equal candidates) is a normal number.
_FP16_SCALE = 2.0**14
# Super-tiles of columns per launch of the sums' kernel, so that a launch runs longer than it takes to issue. The
# partial sums still take less memory than the weights of one super-tile.
_STRIP = 16


def available(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernels run: Triton, an NVIDIA GPU from Ampere on, fp32, bf16 or fp16, a successful test.

    Args:
        dtype, width: of the features [b, D].
    """
    if triton is None or device.type != "cuda" or torch.version.cuda is None:
        return False
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return agrees_with_tiles(torch.device("cuda", index), dtype, width)


def exponential_sums(
    logits: Logits, shift: float, row_valid: torch.Tensor, column_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute clipdist.losses.tiles.exponential_sums for one shift.

    Args:
        row_valid, column_valid: fp32 [b], [N].

    Returns:
        fp32 [b] and [N].
    """
    row_sums = torch.zeros_like(row_valid, dtype=torch.float64)
    column_sums = torch.zeros_like(column_valid, dtype=torch.float64)
    size = _super_tile(logits)
    left = logits.x.contiguous(), logits.row_factor
    for columns in _slices(len(logits.y), _STRIP * size.columns):
        right = logits.y[columns].contiguous(), logits.column_factor[columns]
        for rows in _slices(len(logits.x), size.rows):
            part = _make_operands(logits, left, right, rows, columns, _blocks(logits.x, 256))
            row_blocks, column_blocks = part.grid
            along_rows = row_sums.new_empty(column_blocks, len(part.x), dtype=torch.float32)
            along_columns = row_sums.new_empty(row_blocks, len(part.y), dtype=torch.float32)
            _launch(_sums_kernel, part, row_valid[rows], column_valid[columns], along_rows, along_columns, float(shift))
            row_sums[rows] += along_rows.sum(0, dtype=torch.float64)
            column_sums[columns] += along_columns.sum(0, dtype=torch.float64)
    return row_sums.float(), column_sums.float()


def softmax_gradients(
    logits: Logits, shift: float, row_inverse: torch.Tensor, column_inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute clipdist.losses.tiles.softmax_gradients for one shift; rows whose factor is 0 get zeros.

    Args:
        row_inverse, column_inverse: fp32 [b], [N]; with fp16 features no weight of valid rows may exceed 2.

    Returns:
        fp32 [b, D] and [N, D].
    """

    def write_weights(part: _Operands, weights: torch.Tensor) -> None:
        inverses = row_inverse[part.rows], column_inverse[part.columns]
        _launch(_softmax_kernel, part, *inverses, weights, weights.stride(0), float(shift), _scale(logits.x))

    return _weighted_sums(logits, write_weights)


def sigmoid_sweep(
    logits: Logits, row_valid: torch.Tensor, column_valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute clipdist.losses.tiles.sigmoid_sweep; rows whose factor is 0 get zeros.

    Args:
        row_valid, column_valid: fp32 [b], [N].

    Returns:
        float64 scalars sum of softplus(s) and sum of sigmoid(s); fp32 [b, D] and [N, D].
    """
    totals = torch.zeros(2, dtype=torch.float64, device=logits.x.device)

    def write_weights(part: _Operands, weights: torch.Tensor) -> None:
        valid = row_valid[part.rows], column_valid[part.columns]
        partial = weights.new_empty(2, math.prod(part.grid), dtype=torch.float32)
        _launch(_sigmoid_kernel, part, *valid, partial, weights, weights.stride(0), _scale(logits.x))
        totals.add_(partial.sum(1, dtype=torch.float64))

    x_grad, y_grad = _weighted_sums(logits, write_weights)
    return totals[0], totals[1], x_grad, y_grad


@dataclass(frozen=True)
class _Blocks:
    """Block size and launch parameters of one program."""

    rows: int
    columns: int
    depth: int  # features per step
    warps: int
    stages: int


@dataclass(frozen=True)
class _Operands:
    """The operands of one launch: slices of the logits' rows and columns."""

    rows: slice
    columns: slice
    x: torch.Tensor
    y: torch.Tensor
    row_factor: torch.Tensor
    column_factor: torch.Tensor
    bias: float
    offset: int  # the own pair of row i is column i + offset, both counted within the part
    blocks: _Blocks

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks along rows and along columns."""
        return -(-len(self.x) // self.blocks.rows), -(-len(self.y) // self.blocks.columns)


def _weighted_sums(
    logits: Logits, write_weights: Callable[[_Operands, torch.Tensor], None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 [b, D] sum_j P_ij column_factor_j y_j and fp32 [N, D] sum_i P_ij row_factor_i x_i.

    Works super-tile by super-tile. The same weights serve both products: of their two factors one belongs inside the
    sum, the other is divided out of the result in fp32.

    Args:
        write_weights: writes Q_ij = P_ij * row_factor_i * column_factor_j to its second argument, [R, C] in the
            features' dtype.
    """
    x_grad = torch.zeros_like(logits.x, dtype=torch.float32, memory_format=torch.contiguous_format)
    y_grad = torch.zeros_like(logits.y, dtype=torch.float32, memory_format=torch.contiguous_format)
    size = _super_tile(logits)
    # cuBLAS is faster if every row starts at a multiple of 128 bytes.
    scratch = logits.x.new_empty(size.rows, -(-size.columns // 64) * 64)
    scale = _scale(logits.x)
    left = _balanced(logits.x, logits.row_factor)
    for columns in _slices(len(logits.y), size.columns):
        right = _balanced(logits.y[columns], logits.column_factor[columns])
        y_sum = y_grad[columns]
        for rows in _slices(len(logits.x), size.rows):
            part = _make_operands(logits, left, right, rows, columns, _blocks(logits.x, 128))
            weights = scratch[: len(part.x), : len(part.y)]
            write_weights(part, weights)
            _add_product(x_grad[rows], weights, part.y)
            _add_product(y_sum, weights.T, part.x)
        y_sum *= _inverse_factor(right[1], scale)
    x_grad *= _inverse_factor(left[1], scale)
    return x_grad, y_grad


def _balanced(features: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the power of two of each row's factor into its features (fp16 only): factors in [0.5, 1), or 0, remain.

    Weights times factors then stay within fp16's range however much the norms of rows differ. Mantissas do not change.
    bf16 and fp32 have a wider range of exponents and are returned as they are.

    Args:
        features: [rows, D].  factor: fp32 [rows].
    """
    if features.dtype != torch.float16:
        return features.contiguous(), factor
    mantissa = torch.frexp(factor).mantissa
    power = torch.where(factor != 0, factor / mantissa, 1.0)
    return (features * power[:, None]).half(), mantissa


def _scale(features: torch.Tensor) -> float:
    """Return the scale of the weights: 1 but for fp16."""
    return _FP16_SCALE if features.dtype == torch.float16 else 1.0


def _inverse_factor(factor: torch.Tensor, scale: float) -> torch.Tensor:
    """Return 1 / (factor * scale), or 0 for a row that is not valid: fp32 [rows, 1]."""
    return torch.where(factor != 0, factor.reciprocal() / scale, 0.0)[:, None]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Compute total += left @ right, accumulated in fp32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:  # torch has this product of half-precision matrices on GPUs only; Triton's interpreter runs on the CPU
        total.addmm_(left.float(), right.float())


def _super_tile(logits: Logits) -> Tile:
    """Return a super-tile of at most logits.tile, whose weights fit a GPU's L2 cache unless it would then be idle."""
    x, tile = logits.x, logits.tile
    rows, columns = min(tile.rows, len(x)), min(tile.columns, len(logits.y))
    if x.is_cuda:
        device = torch.cuda.get_device_properties(x.device)
        # cuBLAS computes 128 x 256 elements of a product [R, D] on one multiprocessor at a time.
        busy = device.multi_processor_count * 128 * 256 // x.shape[1]
        side = max(math.isqrt(device.L2_cache_size // x.element_size()), min(busy, 8192))
        side = 1 << (side.bit_length() - 1)
        rows = min(rows, side)
        columns = min(columns, max(side, side * side // rows // 256 * 256))
    return Tile(rows, columns)


def _blocks(x: torch.Tensor, columns: int) -> _Blocks:
    """Return the block sizes: fixed instead of auto-tuned, so that every rank and every run sums in the same order.

    Args:
        x: its device and dtype decide.
        columns: of a block; 256 for the sums' kernel, 128 for the others, which use more registers.
    """
    if not x.is_cuda:
        return _Blocks(32, 32, 64, warps=4, stages=1)
    shared_bytes = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    return _gpu_blocks(x.dtype, x.shape[1], columns, shared_bytes)


def _gpu_blocks(dtype: torch.dtype, width: int, columns: int, shared_bytes: int) -> _Blocks:
    """Return the block sizes for features [., width] on a GPU with so much shared memory for a block."""
    if dtype == torch.float32:  # no tensor cores
        return _Blocks(64, 64, 32, warps=4, stages=2)
    # 3 stages of (128 + 256) x 64 halves are 144 KiB, which fits since Hopper; 4 of (128 + 128) x 32 fit everywhere.
    if shared_bytes >= 200 << 10:
        # Masked loads need registers: with 256 columns 464 bytes a thread would spill.
        return _Blocks(128, 128 if width % 64 else columns, 64, warps=8, stages=3)
    return _Blocks(128, 128, 32, warps=8, stages=4)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


Side = tuple[torch.Tensor, torch.Tensor]  # features and their factors


def _make_operands(logits: Logits, left: Side, right: Side, rows: slice, columns: slice, blocks: _Blocks) -> _Operands:
    """Return the operands of one launch; `left` has all rows, `right` already only those of `columns`."""
    (x, row_factor), (y, column_factor) = left, right
    offset = logits.first + rows.start - columns.start
    return _Operands(rows, columns, x[rows], y, row_factor[rows], column_factor, logits.bias, offset, blocks)


def _launch(kernel: Any, part: _Operands, *arguments: Any) -> None:
    blocks, width = part.blocks, part.x.shape[1]
    x, y = part.x, part.y
    if x.dtype == torch.bfloat16 and not x.is_cuda:  # the interpreter would multiply their bits as integers
        x, y = x.float(), y.float()
    with torch.cuda.device_of(x):
        kernel[(math.prod(part.grid),)](
            *(x, y, part.row_factor, part.column_factor),
            *(len(x), len(y), width, part.offset, part.bias),
            *arguments,
            block_rows=blocks.rows,
            block_columns=blocks.columns,
            depth=blocks.depth,
            whole=width % blocks.depth == 0,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,  # the default that Triton 3.10 changes; 3.9 warns of it
        )


@lru_cache
def agrees_with_tiles(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether the kernels compile and agree with the tiles on a small problem; warn once if not.

    Features are as wide as those of the model: other widths compile to other code. Triton needs a C compiler and Python
    headers. Without them training continues on the tiles.
    """
    x, y = (torch.arange(n * width, device=device).square().sin().view(n, width).to(dtype) for n in (150, 300))
    row, column = (torch.full((n,), math.sqrt(1.6 / width), device=device) for n in (150, 300))  # logits up to 0.8
    logits = Logits(x, y, row, column, 0.0, 7, Tile(128, 256))
    try:
        for name, arguments in (
            ("exponential_sums", (1.0, row, column)),
            ("softmax_gradients", (1.0, row, column)),
            ("sigmoid_sweep", (row, column)),
        ):
            for found, expected in zip(globals()[name](logits, *arguments), getattr(tiles, name)(logits, *arguments)):
                worst = float((found - expected).abs().max() / expected.abs().max())
                if not worst < 0.02:
                    raise ArithmeticError(f"{name} is off by {worst:.2g}")
    except Exception as error:  # of Triton, its compilers or the driver: of many types
        reason = str(error).strip().splitlines()[-1:] or [""]
        warnings.warn(f"no fused loss kernels: {type(error).__name__}: {reason[0]}", stacklevel=2)
        return False
    return True


def _kernel(function: Any) -> Any:
    """Compile with Triton, without a specialisation for every value of the sizes and offsets that vary by launch."""
    return triton.jit(function, do_not_specialize=["height", "count", "offset"]) if triton else function


@_kernel
def _block_index(height, count, block_rows: tl.constexpr, block_columns: tl.constexpr):
    """Return this program's row block and column block: 8 row blocks traverse the columns together, for the cache."""
    program = tl.program_id(0)
    row_blocks = tl.cdiv(height, block_rows)
    together = 8 * tl.cdiv(count, block_columns)
    first = program // together * 8
    size = tl.minimum(row_blocks - first, 8)
    return first + program % together % size, program % together // size


@_kernel
def _dot(
    x,
    y,
    row,
    column,
    height,
    count,
    width,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    depth: tl.constexpr,
    whole: tl.constexpr,
):
    """Return x_i . y_j, fp32 [block_rows, block_columns]. Rows past the end wrap around; the callers mask them."""
    feature = tl.arange(0, depth)
    # 64 bits: a million rows of 4096 features exceed 32.
    left = x + (row % height).to(tl.int64)[:, None] * width + feature[None, :]
    right = y + (column % count).to(tl.int64)[None, :] * width + feature[:, None]
    dot = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for start in range(0, width, depth):
        if whole:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=feature[None, :] < width - start, other=0.0)
            b = tl.load(right, mask=feature[:, None] < width - start, other=0.0)
        dot = tl.dot(a, b, dot, input_precision="ieee")
        left += depth
        right += depth
    return dot


@_kernel
def _scaled(dot, row_factor, column_factor, row, column, height, count, offset, bias):
    """Return logits, -inf for own pairs, and products of factors, 0 past the end; fp32 [block_rows, block_columns]."""
    left = tl.load(row_factor + row, mask=row < height, other=0.0)
    right = tl.load(column_factor + column, mask=column < count, other=0.0)
    factor = left[:, None] * right[None, :]
    s = dot * factor + bias
    return tl.where(row[:, None] + offset == column[None, :], float("-inf"), s), factor


@_kernel
def _store(weights, stride, q, row, column, height, count):
    """Store q, rounded, in weights [height, count]."""
    at = weights + row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, q.to(weights.dtype.element_ty), mask=(row[:, None] < height) & (column[None, :] < count))


@_kernel
def _sums_kernel(
    x,
    y,
    row_factor,
    column_factor,
    height,
    count,
    width,
    offset,
    bias,
    row_valid,
    column_valid,
    along_rows,
    along_columns,
    shift,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    depth: tl.constexpr,
    whole: tl.constexpr,
):
    """Sum exp(s - shift) over one block: along_rows [column blocks, height], along_columns [row blocks, count]."""
    row_block, column_block = _block_index(height, count, block_rows, block_columns)
    row = row_block * block_rows + tl.arange(0, block_rows)
    column = column_block * block_columns + tl.arange(0, block_columns)
    dot = _dot(x, y, row, column, height, count, width, block_rows, block_columns, depth, whole)
    s, _ = _scaled(dot, row_factor, column_factor, row, column, height, count, offset, bias)
    e = tl.exp(s - shift)
    row_weight = tl.load(row_valid + row, mask=row < height, other=0.0)
    column_weight = tl.load(column_valid + column, mask=column < count, other=0.0)
    row_sum = tl.sum(e * column_weight[None, :], axis=1)
    column_sum = tl.sum(e * row_weight[:, None], axis=0)
    tl.store(along_rows + column_block.to(tl.int64) * height + row, row_sum, mask=row < height)
    tl.store(along_columns + row_block.to(tl.int64) * count + column, column_sum, mask=column < count)


@_kernel
def _softmax_kernel(
    x,
    y,
    row_factor,
    column_factor,
    height,
    count,
    width,
    offset,
    bias,
    row_inverse,
    column_inverse,
    weights,
    stride,
    shift,
    scale,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    depth: tl.constexpr,
    whole: tl.constexpr,
):
    """Compute weights = scale * factors * exp(s - shift) * (row_inverse + column_inverse)."""
    row_block, column_block = _block_index(height, count, block_rows, block_columns)
    row = row_block * block_rows + tl.arange(0, block_rows)
    column = column_block * block_columns + tl.arange(0, block_columns)
    dot = _dot(x, y, row, column, height, count, width, block_rows, block_columns, depth, whole)
    s, factor = _scaled(dot, row_factor, column_factor, row, column, height, count, offset, bias)
    left = tl.load(row_inverse + row, mask=row < height, other=0.0)
    right = tl.load(column_inverse + column, mask=column < count, other=0.0)
    p = tl.exp(s - shift) * (left[:, None] + right[None, :])
    # p may be inf where a row is not valid, and 0 * inf is nan.
    q = tl.where(factor != 0, p * (factor * scale), 0.0)
    _store(weights, stride, q, row, column, height, count)


@_kernel
def _sigmoid_kernel(
    x,
    y,
    row_factor,
    column_factor,
    height,
    count,
    width,
    offset,
    bias,
    row_valid,
    column_valid,
    partial,
    weights,
    stride,
    scale,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    depth: tl.constexpr,
    whole: tl.constexpr,
):
    """Compute weights = scale * factors * sigmoid(s), and partial [2, programs]: sums of softplus(s) and sigmoid(s)."""
    row_block, column_block = _block_index(height, count, block_rows, block_columns)
    row = row_block * block_rows + tl.arange(0, block_rows)
    column = column_block * block_columns + tl.arange(0, block_columns)
    dot = _dot(x, y, row, column, height, count, width, block_rows, block_columns, depth, whole)
    s, factor = _scaled(dot, row_factor, column_factor, row, column, height, count, offset, bias)
    z = tl.exp(-tl.abs(s))
    sigmoid = tl.where(s >= 0, 1.0, z) / (1.0 + z)
    # log(1 + z) = 2 artanh(z / (2 + z)): log(1 + z) itself is inexact for small z, which most logits have.
    w = z / (2.0 + z)
    v = w * w
    series = 1.0 + v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * (1 / 9 + v * (1 / 11 + v * (1 / 13))))))
    softplus = tl.maximum(s, 0.0) + 2.0 * w * series
    row_weight = tl.load(row_valid + row, mask=row < height, other=0.0)
    column_weight = tl.load(column_valid + column, mask=column < count, other=0.0)
    softplus_sum = tl.sum(tl.sum(softplus * column_weight[None, :], axis=1) * row_weight, axis=0)
    sigmoid_sum = tl.sum(tl.sum(sigmoid * column_weight[None, :], axis=1) * row_weight, axis=0)
    tl.store(partial + tl.program_id(0), softplus_sum)
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), sigmoid_sum)
    _store(weights, stride, sigmoid * (factor * scale), row, column, height, count)
