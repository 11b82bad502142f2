"""The fused kernels against the tiles of plain torch: under Triton's interpreter, and on a GPU where there is one.

Triton decides at import whether it interprets, so that one child process, this very file, computes all cases. It
compiles for GPUs that are not there, too: what the code needs of them is known without one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from clipdist.losses import tiles
from clipdist.losses.tiles import Logits, Tile
from tools.bench.processes import repository_environment

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# By so much, relatively, may rounding to the features' dtype move a weight before it is multiplied.
ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11}
# Logits up to 100 carry an error of some units of 2^-24 * 100 = 6e-6, which exp turns into a relative one.
FP32 = 5e-5


@dataclass(frozen=True)
class Case:
    b: int
    n: int
    width: int
    tile: Tile
    first: int = 0  # the own pair of row 0
    scale: float = 100.0
    bias: float = 0.0
    shift: float = 0.0


CASES = {
    "uneven, one part": Case(37, 53, 130, Tile(4096, 4096), first=8, shift=30.0),
    "many parts": Case(37, 53, 130, Tile(16, 24), first=16, shift=30.0),
    "strips of sums": Case(6, 18, 128, Tile(5, 1), scale=14.0, shift=2.0),
    "bias": Case(33, 70, 192, Tile(64, 32), first=33, scale=10.0, bias=-10.0),
    "shift and bias": Case(5, 34, 33, Tile(3, 34), first=29, scale=50.0, bias=1.5, shift=20.0),
}
# Whether the width of the features is a multiple of a block's, as it is of most models.
TRIALS = {("bf16", 128): True, ("fp32", 72): False}


def draw(case: Case, dtype: torch.dtype, device: str) -> tuple[Logits, torch.Tensor, torch.Tensor]:
    """Features of very different norms, one of none, rows that are not valid, and one candidate nearly equal."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(rows, case.width, generator=generator) for rows in (case.b, case.n))
    y[4] = 2 * x[2] + 0.1 * y[4]
    for features in (x, y):
        features *= 10 ** (4 * torch.rand(len(features), 1, generator=generator) - 2)
        features[3] = 0
    row_valid, column_valid = torch.ones(case.b), torch.ones(case.n)
    row_valid[1::9] = 0
    column_valid[6::7] = 0
    x, y = x.to(dtype).to(device), y.to(dtype).to(device)
    row_valid, column_valid = row_valid.to(device), column_valid.to(device)
    inverse = [1 / f.float().norm(dim=1).clamp(min=1e-12) for f in (x, y)]
    factors = case.scale * inverse[0] * row_valid, inverse[1] * column_valid
    return Logits(x, y, *factors, case.bias, case.first, case.tile), row_valid, column_valid


def masses(logits: Logits, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What rounding errors of a sum of vectors are proportional to: [b] and [N], the sums of the vectors' lengths."""
    lengths = [
        f.double().norm(dim=1) * factor
        for f, factor in ((logits.x, logits.row_factor), (logits.y, logits.column_factor))
    ]
    return weights @ lengths[1], weights.T @ lengths[0]


def dense(logits: Logits) -> torch.Tensor:
    """float64 [b, N]: -inf for own pairs."""
    s = (logits.x.double() @ logits.y.double().T) * logits.row_factor[:, None] * logits.column_factor + logits.bias
    own = torch.arange(len(logits.x), device=s.device)[:, None] + logits.first
    return s.masked_fill(own == torch.arange(len(logits.y), device=s.device), -torch.inf)


def worst(found: torch.Tensor, expected: torch.Tensor, mass: torch.Tensor, factor: torch.Tensor) -> float:
    """The largest error of a row's gradient relative to its mass; a row that is not valid must have none at all."""
    valid = factor > 0
    if found[~valid].any() or found.dtype != torch.float32:
        return float("inf")
    return ((found - expected).norm(dim=1) / mass)[valid].max().item()


def errors(case: Case, dtype: torch.dtype, device: str) -> dict[str, float]:
    from clipdist.losses import kernels

    logits, row_valid, column_valid = draw(case, dtype, device)
    found: dict[str, float] = {}
    expected = tiles.exponential_sums(logits, case.shift, row_valid, column_valid)
    for name, a, b in zip(
        ("row sums", "column sums"), kernels.exponential_sums(logits, case.shift, row_valid, column_valid), expected
    ):
        found[name] = (a / b - 1).abs().max().item() if a.dtype == torch.float32 else float("inf")
    factors = logits.row_factor, logits.column_factor
    s = dense(logits)
    inverse = row_valid / expected[0], column_valid / expected[1]
    p = (s - case.shift).exp() * (inverse[0][:, None] + inverse[1])
    ours = kernels.softmax_gradients(logits, case.shift, *inverse)
    theirs = tiles.softmax_gradients(logits, case.shift, *inverse)
    for name, *row in zip(("softmax x", "softmax y"), ours, theirs, masses(logits, p), factors):
        found[name] = worst(*row)
    *totals, x_grad, y_grad = kernels.sigmoid_sweep(logits, row_valid, column_valid)
    *expected_totals, x_expected, y_expected = tiles.sigmoid_sweep(logits, row_valid, column_valid)
    for name, a, b in zip(("softplus", "sigmoid"), totals, expected_totals):
        found[name] = abs(a / b - 1).item() if a.dtype == torch.float64 else float("inf")
    for name, *row in zip(
        ("sigmoid x", "sigmoid y"),
        (x_grad, y_grad),
        (x_expected, y_expected),
        masses(logits, s.sigmoid()),
        factors,
    ):
        found[name] = worst(*row)
    return found


def check(found: dict[str, float], rounding: float) -> None:
    for name, error in found.items():
        weighted = name.endswith((" x", " y"))
        assert error < FP32 + weighted * rounding, name


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = repository_environment() | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=400)
    if "only 0-dimensional arrays" in child.stderr:
        pytest.skip("this Triton's interpreter does not run with numpy 2.4 or newer")
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_compute_what_the_tiles_do(interpreted, case, dtype):
    # The interpreter cuts digits off where bf16 is to be rounded.
    check(interpreted[f"{case} {dtype}"], ROUNDING[dtype] * (2 if dtype == "bf16" else 1))


def trial(dtype: torch.dtype, width: int) -> list[bool]:
    """Whether the trial succeeds, and whether its kernels are those for widths that are a multiple of a block's."""
    from clipdist.losses import kernels

    launch, whole = kernels._launch, set[bool]()

    def noted(kernel: Any, part: Any, *arguments: Any) -> None:
        whole.add(part.x.shape[1] % part.blocks.depth == 0)
        launch(kernel, part, *arguments)

    with patch.object(kernels, "_launch", noted):
        return [kernels.agrees_with_tiles(torch.device("cpu"), dtype, width), *whole]


@pytest.mark.parametrize(("trial", "whole"), TRIALS.items())
def test_the_trial_runs_the_kernels_that_the_model_will_run(interpreted, trial, whole):
    assert interpreted[f"trial {trial}"] == [True, whole]


SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # that a block may have: A100; H100 and H200
REGISTERS = 1 << 16  # of a multiprocessor
SPILLED_BYTES = 16  # a thread, of a few values that are kept over the loop


@pytest.mark.parametrize("width", [256, 512, 768, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (90, "bf16"), (90, "fp32")])
@pytest.mark.parametrize("name", ["_sums_kernel", "_softmax_kernel", "_sigmoid_kernel"])
def test_kernels_compiled_for_a_gpu_fit_it(name, arch, dtype, width):
    pytest.importorskip("triton")
    from clipdist.losses import kernels

    columns = 256 if name == "_sums_kernel" else 128
    blocks = kernels._gpu_blocks(DTYPES[dtype], width, columns, SHARED_BYTES[arch])
    shared, registers, stack = resources(name, arch, dtype, blocks, width % blocks.depth == 0, width % 16 == 0)
    assert shared <= SHARED_BYTES[arch]
    assert registers * 32 * blocks.warps <= REGISTERS
    assert stack <= SPILLED_BYTES


@cache
def resources(name: str, arch: int, dtype: str, blocks: Any, whole: bool, aligned: bool) -> tuple[int, int, int]:
    """Compile a kernel as its launch does. Return bytes of shared memory, registers and bytes of stack of a thread.

    The width is no constant of the code: those that are a multiple of a block's depth share it.
    """
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clipdist.losses import kernels

    kernel = getattr(kernels, name)
    constants = {"block_rows": blocks.rows, "block_columns": blocks.columns, "depth": blocks.depth, "whole": whole}
    kinds = dict.fromkeys(("height", "count", "width", "offset", "stride"), "i32")
    kinds |= dict.fromkeys(("bias", "shift", "scale"), "fp32") | dict.fromkeys(("x", "y", "weights"), f"*{dtype}")
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names}
    even = [a for a, kind in signature.items() if kind[0] == "*" or a == "stride" or (a == "width" and aligned)]
    hints = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in even}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=hints)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    compiled = compile_kernel(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        words = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{what}:(\d+)", said)[-1]) for what in ("REG", "STACK"))
    return compiled.metadata.shared, registers, stack


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", [*CASES.values(), Case(700, 1500, 512, Tile(512, 1024), first=300, shift=30.0)], ids=lambda case: str(case)
)
def test_kernels_on_a_gpu_compute_what_the_tiles_do(case, dtype):
    check(errors(case, DTYPES[dtype], "cuda"), ROUNDING[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_a_gpu_pass_their_trial_and_repeat_their_bits(dtype):
    from clipdist.losses import kernels

    assert kernels.available(torch.device("cuda"), DTYPES[dtype], 512)
    logits, row_valid, column_valid = draw(Case(700, 1500, 512, Tile(512, 1024)), DTYPES[dtype], "cuda")
    once, again = (kernels.exponential_sums(logits, 30.0, row_valid, column_valid) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


def test_kernels_are_not_for_the_cpu_nor_for_float64():
    from clipdist.losses import kernels

    assert not kernels.available(torch.device("cpu"), torch.float32, 512)
    assert not kernels.available(torch.device("cuda"), torch.float64, 512)


def test_without_triton_the_module_imports_and_says_that_it_cannot_run():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from clipdist.losses import kernels;"
        "assert not kernels.available(torch.device('cuda'), torch.float32, 512)"
    )
    subprocess.run([sys.executable, "-c", code], env=repository_environment(), check=True, timeout=120)


if __name__ == "__main__":
    torch.set_num_threads(1)
    computed: dict[str, Any] = {
        f"{name} {dtype}": errors(case, DTYPES[dtype], "cpu") for name, case in CASES.items() for dtype in DTYPES
    }
    computed |= {f"trial {dtype, width}": trial(DTYPES[dtype], width) for dtype, width in TRIALS}
    print(json.dumps(computed))
