"""The Triton room of decoder: run on a GPU where there is one, else by the interpreter; and compiled for GPUs not here.

The interpreter multiplies with numpy: that a row is bitwise the same in every batch is tested here for our own
arithmetic around the dot product; on a GPU the same tests cover the matrix units.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.decoder import linear
from m3kernels.decoder.reference import TOLERANCE, make_inputs
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan
from m3kernels.triton_compile import SHARED_LIMIT, TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.decoder._triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BUDGET = json.loads((Path(__file__).parent / "decoder_triton_budget.json").read_text())
CASES = [(target, case) for target in TARGETS for case in BUDGET[target]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # m, n, k
    "one": (1, 1, 1),
    "odd": (3, 37, 129),
    "two_tiles_of_rows": (33, 20, 70),
    "two_tiles_of_outputs": (2, 66, 64),
}


def in_triton(test: Callable[..., None]) -> Callable[..., None]:
    """Forces the Triton room, and marks the test as a GPU test where there is a GPU."""
    forced = pytest.mark.parametrize("backend", ["decoder=triton"], indirect=True)(test)
    return pytest.mark.gpu(forced) if DEVICE == "cuda" else forced


def inputs(m: int, n: int, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight, bias = make_inputs(m, n, k, **options)
    return x.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


@in_triton
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(backend: str, shape: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight, bias = inputs(*SHAPES[shape], dtype=dtype, weight_dtype=weight_dtype, bias=shape != "odd")
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    wide = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    check_error(linear(x, weight, bias), exact, wide.to(dtype), TOLERANCE)


@in_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_in_every_batch(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(40, 70, 90, dtype=dtype, bias=True)
    together = linear(x, weight, bias)
    parts = [linear(x[start : start + m], weight, bias) for start, m in ((0, 1), (1, 2), (3, 33), (36, 4))]
    assert bitwise_equal(together, torch.cat(parts))


@in_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_arguments_is_read_and_every_output_is_written(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(5, 37, 45, dtype=dtype, bias=True)
    expected = linear(x, weight, bias)
    with uninitialized_is_nan():
        y = linear(surrounded_by_nan(x), surrounded_by_nan(weight), surrounded_by_nan(bias))
    assert bitwise_equal(y, expected)


@in_triton
def test_rows_at_any_stride(backend: str) -> None:
    x, weight, _ = inputs(5, 20, 45)
    wide = torch.full((5, 99), torch.nan, device=DEVICE)
    wide[:, 11:56] = x
    assert bitwise_equal(linear(wide[:, 11:56], weight), linear(x, weight))
    assert bitwise_equal(linear(x.T.contiguous().T, weight), linear(x, weight))


@in_triton
@pytest.mark.parametrize(("m", "n"), ((0, 5), (4, 0)))
def test_empty(backend: str, m: int, n: int) -> None:
    assert linear(torch.randn(m, 7, device=DEVICE), torch.randn(n, 7, device=DEVICE)).shape == (m, n)


@in_triton
def test_a_sum_of_nothing_is_the_bias(backend: str) -> None:
    bias = torch.randn(5, device=DEVICE)
    y = linear(torch.empty(3, 0, device=DEVICE), torch.empty(5, 0, device=DEVICE), bias)
    assert torch.equal(y, bias.expand(3, 5))


# -- compiled for GPUs that are not here ------------------------------------------------------------------------------
def run_uninterpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def costs() -> dict[str, dict[str, dict[str, int]]]:
    """{target: {case: cost}}; compiled kernels stay in Triton's cache."""
    result = run_uninterpreted("-m", "m3kernels.triton_compile", "m3kernels.decoder._triton", *TARGETS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_has_a_budget(target: str) -> None:
    assert {case.name for case in _triton.compile_cases(target)} == set(BUDGET[target])


@pytest.mark.parametrize(("target", "case"), CASES)
def test_budget_has_no_spills_and_fits_shared_memory(target: str, case: str) -> None:
    assert BUDGET[target][case]["spills"] == 0
    assert BUDGET[target][case]["shared"] <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", TARGETS)
def test_budget_of_16_bit_operands_has_matrix_instructions(target: str) -> None:
    claimed = {case.name for case in _triton.compile_cases(target) if case.matrix_units}
    assert claimed == {"bf16", "fp16_bias"}
    assert {case for case in claimed if not BUDGET[target][case]["matrix_instructions"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), CASES)
def test_compiles_within_its_budget(costs: dict[str, dict[str, dict[str, int]]], target: str, case: str) -> None:
    cost, budget = costs[target][case], BUDGET[target][case]
    assert cost["spills"] == 0
    assert cost["shared"] <= SHARED_LIMIT[target]
    assert bool(cost["matrix_instructions"]) == bool(budget["matrix_instructions"])
    if triton.__version__ == BUDGET["triton"]:
        assert {name: cost[name] for name in budget if cost[name] > budget[name]} == {}
