"""Products of 2 to 9 rows in every instruction set: the bits of a row are those of a product of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from m3kernels import _cpu_ext
from m3kernels.int4 import int4_gemm, int4_grouped_gemm
from m3kernels.int4.reference import make_inputs
from m3kernels.testing import bitwise_equal

CASES = {  # blocks of 3, 3 and 1 k-tiles, n and k that fill no tile; blocks of 4
    "odd_blocks": dict(n=70, k=106, group_size=48),
    "even_blocks": dict(n=64, k=192, group_size=64, symmetric=True),
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


@pytest.mark.parametrize("m", (2, 3, 4, 5, 6, 7, 8, 9))
@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
@pytest.mark.parametrize("case", CASES)
def test_few_rows_have_the_bits_of_one(isa: str, case: str, activations: str, m: int) -> None:
    x, weight, bias = make_inputs(m, **CASES[case])
    alone = torch.cat([int4_gemm(row[None], weight, bias, activations=activations) for row in x])
    assert bitwise_equal(int4_gemm(x, weight, bias, activations=activations), alone)


@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
def test_a_row_that_leaves_integers_does_not_disturb_the_others(isa: str, activations: str) -> None:
    x, weight, _ = make_inputs(5, 128, 256, group_size=128, symmetric=True)
    x[1, 7], x[3, 200] = 3e7, torch.inf
    alone = torch.cat([int4_gemm(row[None], weight, activations=activations) for row in x])
    assert bitwise_equal(int4_gemm(x, weight, activations=activations), alone)


@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
def test_experts_of_few_rows_each(isa: str, activations: str) -> None:
    counts = [1, 8, 0, 2, 9, 3]
    x, weight, _ = make_inputs(sum(counts), 128, 192, group_size=64, symmetric=True, experts=len(counts))
    offsets = torch.tensor([0, *counts]).cumsum(0)
    together = int4_grouped_gemm(x, weight, offsets, activations=activations)
    order = [(expert, row) for expert, count in enumerate(counts) for row in range(count)]
    rows = []
    for index, (expert, _) in enumerate(order):
        one = torch.zeros(len(counts) + 1, dtype=torch.int64)
        one[expert + 1 :] = 1
        rows.append(int4_grouped_gemm(x[index : index + 1], weight, one, activations=activations))
    assert bitwise_equal(together, torch.cat(rows))
