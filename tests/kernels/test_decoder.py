"""Products with dense weights on the CPU: values, rows that do not see each other, memory, the registered op."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.decoder import linear
from m3kernels.decoder.reference import TOLERANCE, make_inputs
from m3kernels.testing import bitwise_equal, check_error, surrounded_by_nan, uninitialized_is_nan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # m, n, k
    "one": (1, 1, 1),
    "one_row": (1, 70, 576),
    "one_output": (7, 1, 33),
    "one_column": (5, 6, 1),
    "odd": (3, 37, 129),
    "a_tile": (6, 64, 64),
    "two_tiles": (8, 67, 100),
    "two_pieces": (9, 21, 1040),
    "three_pieces": (2, 10, 2049),
    "two_panels": (120, 260, 600),
    "panels_and_pieces": (70, 131, 1030),
}


@pytest.fixture(params=_cpu_ext.build_info()["isas"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    if request.param not in _cpu_ext.isas():
        pytest.skip(f"this CPU does not run {request.param}")
    before = _cpu_ext.get_isa()
    _cpu_ext.set_isa(request.param)
    yield request.param
    _cpu_ext.set_isa(before)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's thread count for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exact64(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def in_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch in fp32, rounded to x's dtype."""
    y = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return y.to(x.dtype)


# -- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(isa: str, shape: str, weight_dtype: torch.dtype) -> None:
    arguments = make_inputs(*SHAPES[shape], weight_dtype=weight_dtype, bias=shape != "odd")
    check_error(linear(*arguments), exact64(*arguments), in_torch(*arguments), TOLERANCE)


@pytest.mark.parametrize("bias_dtype", (None, "fp32", "weight"))
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_of_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: str | None) -> None:
    of_bias = torch.float32 if bias_dtype == "fp32" else weight_dtype
    arguments = make_inputs(
        13, 39, 77, dtype=dtype, weight_dtype=weight_dtype, bias=bias_dtype is not None, bias_dtype=of_bias
    )
    y = linear(*arguments)
    assert y.dtype == dtype
    check_error(y, exact64(*arguments), in_torch(*arguments), TOLERANCE)


def test_small_and_extreme_halves_of_a_weight(isa: str) -> None:
    """Subnormal, largest and infinite fp16 are read as the numbers that they are."""
    weight = torch.tensor([[2.0**-24, 65504.0, -(2.0**-14), 0.0], [torch.inf, 1.0, -1.0, 2.0**-20]]).half()
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0**20, 0.5, 2.0**14, 3.0]])
    assert torch.equal(linear(x, weight), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("lead", ((), (2, 3), (0, 4), (1, 1, 5)), ids=str)
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    _, weight, bias = make_inputs(1, 11, 19, bias=True)
    x = torch.randn(*lead, 19)
    y = linear(x, weight, bias)
    assert y.shape == (*lead, 11)
    assert bitwise_equal(y.reshape(-1, 11), linear(x.reshape(-1, 19), weight, bias))


@pytest.mark.parametrize(("m", "n", "k"), ((0, 5, 7), (4, 0, 7), (0, 0, 0)))
def test_empty(m: int, n: int, k: int) -> None:
    assert linear(torch.randn(m, k), torch.randn(n, k), torch.randn(n)).shape == (m, n)


def test_a_sum_of_nothing_is_the_bias() -> None:
    bias = torch.randn(5)
    assert torch.equal(linear(torch.empty(3, 0), torch.empty(5, 0), bias), bias.expand(3, 5))


def test_a_weight_may_change_in_place_between_calls() -> None:
    x, weight, _ = make_inputs(9, 21, 40)
    linear(x, weight)
    weight.mul_(2.0)
    assert bitwise_equal(linear(x, weight), linear(x, weight.clone()))


# -- rows do not see each other ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", (17, 576, 1040))
def test_a_row_is_the_same_alone_and_in_every_batch(isa: str, weight_dtype: torch.dtype, k: int) -> None:
    x, weight, bias = make_inputs(260, 133, k, weight_dtype=weight_dtype, bias=True)
    together = linear(x, weight, bias)
    batches = [linear(x[start : start + m], weight, bias) for start, m in ((0, 1), (1, 2), (3, 5), (8, 7), (15, 19))]
    assert bitwise_equal(together[:34], torch.cat(batches))
    assert bitwise_equal(together[50:150], linear(x[50:150], weight, bias))


@pytest.mark.parametrize("threads", (1, 2, 3), indirect=True)
@pytest.mark.parametrize("m", (1, 5, 24, 150))
def test_threads_change_no_bit(threads: int, m: int) -> None:
    x, weight, bias = make_inputs(m, 300, 700, bias=True)
    alone = torch.cat([linear(row[None], weight[:200], bias[:200]) for row in x[:3]])
    assert bitwise_equal(linear(x, weight, bias)[:3, :200].contiguous(), alone)


@pytest.mark.parametrize("m", (1, 6, 7, 130))
def test_rows_at_any_stride(m: int) -> None:
    x, weight, bias = make_inputs(m, 35, 200, bias=True)
    wide = torch.full((m, 301), torch.nan)
    wide[:, 50:250] = x
    assert bitwise_equal(linear(wide[:, 50:250], weight, bias), linear(x, weight, bias))


@pytest.mark.parametrize("m", (1, 9))
def test_columns_apart_and_repeated_rows(m: int) -> None:
    x, weight, _ = make_inputs(m, 35, 60)
    assert bitwise_equal(linear(x.T.contiguous().T, weight), linear(x, weight))
    assert bitwise_equal(linear(x[:1].expand(m, 60), weight), linear(x[:1].repeat(m, 1), weight))


@pytest.mark.parametrize("m", (2, 8, 140))
def test_a_nan_stays_in_its_row(isa: str, m: int) -> None:
    x, weight, _ = make_inputs(m, 40, 90)
    clean = linear(x, weight)
    x[1, 3] = torch.nan
    y = linear(x, weight)
    assert y[1].isnan().all()
    assert bitwise_equal(torch.cat((y[:1], y[2:])), torch.cat((clean[:1], clean[2:])))


# -- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ("one", "odd", "two_tiles", "two_pieces", "panels_and_pieces"))
def test_nothing_outside_the_arguments_is_read_and_every_output_is_written(
    isa: str, shape: str, weight_dtype: torch.dtype
) -> None:
    x, weight, bias = make_inputs(*SHAPES[shape], weight_dtype=weight_dtype, bias=True)
    expected = linear(x, weight, bias)
    with uninitialized_is_nan():
        y = linear(surrounded_by_nan(x), surrounded_by_nan(weight), surrounded_by_nan(bias))
    assert bitwise_equal(y, expected)


def test_the_border_writes_inside_its_rows_only() -> None:
    x, weight, _ = make_inputs(9, 10, 33)
    y = torch.full((9, 16), 7.0)
    span = (weight.data_ptr(), weight.numel())
    rows, out = (x.data_ptr(), 9, 33, 33), (y.data_ptr(), 9, 10, 16)
    _cpu_ext.decoder_linear(rows, (span, 0, 10, 33), ((0, 0), 0), out, 1)
    assert bitwise_equal(y[:, :10].contiguous(), linear(x, weight))
    assert (y[:, 10:] == 7.0).all()


# -- the registered op ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", (False, True))
def test_opcheck(bias: bool) -> None:
    torch.library.opcheck(torch.ops.m3kernels.linear.default, make_inputs(3, 5, 7, bias=bias))


def test_compiled_as_one_graph() -> None:
    arguments = make_inputs(3, 5, 7, bias=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert bitwise_equal(compiled(*arguments), linear(*arguments))


@pytest.mark.parametrize("backend", ["decoder=reference"], indirect=True)
def test_reference_room(backend: str) -> None:
    arguments = make_inputs(3, 5, 7, dtype=torch.bfloat16, weight_dtype=torch.float32, bias=True)
    assert torch.equal(linear(*arguments), exact64(*arguments).to(torch.bfloat16))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instruction sets of x86-64")
def test_every_instruction_set_of_the_build_has_its_own_kernels() -> None:
    assert {"avx512", "avx2", "scalar"} <= set(_cpu_ext.build_info()["isas"])
