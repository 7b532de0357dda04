"""tree_attention on every instruction set of the CPU room that runs here: values, row-invariance, half precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from m3kernels import _cpu_ext
from m3kernels.spec_decode.reference import TOLERANCE
from m3kernels.testing import bitwise_equal, check_error
from tests.kernels.spec_decode_attention_cases import attend, dense, make_request

CASES: dict[str, dict[str, Any]] = {
    "one": dict(prefix=0, queries=1, size=1, heads=(1, 1)),
    "decode": dict(prefix=600, queries=1, size=64, heads=(9, 3)),
    "one_row": dict(prefix=130, queries=1, size=128, heads=(2, 2)),
    "tree": dict(prefix=129, queries=33, size=64, heads=(9, 3), tree=True),
    "odd_size": dict(prefix=70, queries=9, size=37, tree=True, gate="element"),
    "long_head": dict(prefix=90, queries=20, size=200, heads=(4, 1), gate="head"),
    "prefill": dict(prefix=3, queries=150, size=80, heads=(4, 4)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_case = pytest.mark.parametrize("case", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture(params=_cpu_ext.build_info()["isas"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an instruction set, in use for the test."""
    if request.param not in _cpu_ext.isas():
        pytest.skip(f"this CPU does not run {request.param}")
    before = _cpu_ext.get_isa()
    _cpu_ext.set_isa(request.param)
    yield request.param
    _cpu_ext.set_isa(before)


@every_dtype
@every_case
def test_values(isa: str, case: str, dtype: torch.dtype) -> None:
    request = make_request(**CASES[case]).to(dtype, dtype)
    (rows,) = attend(request, window=100)
    exact, theirs = dense(request, torch.float64, 100), dense(request, torch.float32, 100).to(dtype)
    check_error(rows, exact, theirs, TOLERANCE)


@every_case
def test_row_is_its_path_decoded_alone(isa: str, case: str) -> None:
    request = make_request(**CASES[case])
    (rows,) = attend(request, page_size=16)
    nodes = sorted({0, len(rows) // 2, len(rows) - 1})
    decoded = attend(*(request.along(node, 1) for node in nodes), page_size=3)
    assert bitwise_equal(torch.cat(decoded), rows[nodes])


@every_dtype
@pytest.mark.parametrize("queries", [1, 40])
def test_half_precision_is_read_exactly(isa: str, dtype: torch.dtype, queries: int) -> None:
    """Half caches give what the same values in fp32 caches give: subnormals, the largest, both zeros."""
    request = make_request(80, queries, size=37)
    values = request.values.clone()
    special = torch.tensor([0.0, -0.0, 2**-24, -(2**-24), 3 * 2**-20, 2**-14, 65504.0, -65504.0, 1 + 2**-7])
    values[:, :, :9] = special
    half = dataclasses.replace(request, values=values).to(torch.float32, dtype)
    assert bitwise_equal(attend(half)[0], attend(half.to(torch.float32, torch.float32))[0])


@every_dtype
def test_results_are_rounded_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """One key: the result is its value, whatever the score. Halfway cases, overflow, subnormals, infinity and nan."""
    base = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, 65520.0, 7e4, -65520.0, 2.5e-7])
    odd = torch.tensor([2**-25, 3 * 2**-25, 5.96e-8, 6.1e-5, 6.0975e-5, -0.0, torch.inf, -torch.inf, torch.nan, 3.3e38])
    values = torch.cat([base, odd, base + 2**-23, odd * (1 - 2**-23)])
    request = make_request(0, 1, heads=(1, 1), size=len(values))
    one = dataclasses.replace(request, q=request.q.to(dtype), values=values.view(1, 1, -1))
    torch.testing.assert_close(attend(one)[0][0, 0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [64, 128, 37])
def test_many_rows_are_the_few(isa: str, size: int) -> None:
    """Many rows read keys from a copy in another layout, few where they lie; both in any chunk, whole or not."""
    request = make_request(200, 30, size=size, heads=(6, 2))
    (rows,) = attend(request)
    for node in (0, 17, 29):
        (few,) = attend(request.along(node, 2 if node else 1))
        assert bitwise_equal(few[-1], rows[node])
