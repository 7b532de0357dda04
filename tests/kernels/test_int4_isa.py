"""Every instruction set of the CPU room that runs here: values, row-invariance, and when exact leaves integers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from m3kernels import _cpu_ext
from m3kernels.int4 import int4_dequantize, int4_gemm, int4_moe
from m3kernels.int4.ops import flat
from m3kernels.int4.reference import TOLERANCE, make_inputs, stored_weight
from m3kernels.int4.reference import int4_gemm as reference_gemm
from m3kernels.testing import bitwise_equal, check_error, relative_error

CASES = {
    "one": dict(m=1, n=64, k=512, group_size=128),
    "direct": dict(m=4, n=70, k=400, group_size=64, bias=True),
    "panel": dict(m=21, n=130, k=528, group_size=128, symmetric=True),
    "two_tasks": dict(m=67, n=65, k=160, group_size=32, act_order=True),
    "per_channel": dict(m=3, n=64, k=1040, group_size=-1),
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


@pytest.mark.parametrize("case", CASES)
def test_exact_is_within_tolerance(isa: str, case: str) -> None:
    x, weight, bias = make_inputs(**CASES[case])
    permuted = x if weight.perm is None else x[:, weight.perm.long()]
    exact = permuted.double() @ stored_weight(weight).T + (0 if bias is None else bias.double())
    dense = x @ int4_dequantize(weight, torch.float32).T + (0 if bias is None else bias)
    check_error(int4_gemm(x, weight, bias, activations="exact"), exact, dense, TOLERANCE)


@pytest.mark.parametrize("activations", ("int16", "int8"))
@pytest.mark.parametrize("case", CASES)
def test_rounded_modes_are_the_reference(isa: str, case: str, activations: str) -> None:
    x, weight, bias = make_inputs(**CASES[case])
    tensors, numbers = flat(weight)[:4], flat(weight)[4:]
    expected = reference_gemm(x, *tensors, bias, *numbers, True, activations)
    assert relative_error(int4_gemm(x, weight, bias, activations=activations), expected)[0] < 1e-6


@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_see_each_other(isa: str, case: str, activations: str) -> None:
    x, weight, bias = make_inputs(**CASES[case])
    x[0, 1] = 3e4  # a row that some modes compute in fp32 stands beside rows that they do not
    together = int4_gemm(x, weight, bias, activations=activations)
    alone = torch.cat([int4_gemm(row[None], weight, bias, activations=activations) for row in x])
    assert bitwise_equal(together, alone)


@pytest.mark.parametrize("huge", (1e2, 1e4, 1e7))
@pytest.mark.parametrize("m", (1, 6))
def test_exact_keeps_small_values_beside_a_huge_one(isa: str, m: int, huge: float) -> None:
    """The huge value meets weights that are 0, so every error it causes in its block shows."""
    x, weight, _ = make_inputs(m, 64, 256, group_size=128, symmetric=True)
    q, scales, _ = weight.unpack()
    q[:, 77] = 8
    weight = type(weight).pack(q, scales, group_size=128)
    x[:, 77] = huge
    exact = x.double() @ stored_weight(weight).T
    check_error(
        int4_gemm(x, weight, activations="exact"), exact, x @ int4_dequantize(weight, torch.float32).T, TOLERANCE
    )


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_exact_at_the_ends_of_its_range(isa: str, sign: float) -> None:
    """Blocks whose values are all at the maximum, or one fp32 step under it, use the largest digits."""
    _, weight, _ = make_inputs(1, 64, 256, group_size=128)
    top = torch.rand(64, 1, generator=torch.Generator().manual_seed(3)) + 0.5
    x = sign * torch.where(torch.arange(256) % 3 == 0, torch.nextafter(top, torch.zeros(())), top).contiguous()
    exact = x.double() @ stored_weight(weight).T
    check_error(
        int4_gemm(x, weight, activations="exact"), exact, x @ int4_dequantize(weight, torch.float32).T, TOLERANCE
    )


@pytest.mark.parametrize("activations", ("exact", "int16", "int8"))
def test_experts_add_up_as_one_token_at_a_time(isa: str, activations: str) -> None:
    _, w13, _ = make_inputs(1, 96, 80, group_size=32, experts=5, seed=1)
    _, w2, _ = make_inputs(1, 80, 48, group_size=32, experts=5, seed=2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 80, generator=generator)
    ids = torch.rand(9, 5, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(9, 2, generator=generator)
    together = int4_moe(x, w13, w2, ids, weights, activations=activations)
    alone = [
        int4_moe(x[t : t + 1], w13, w2, ids[t : t + 1], weights[t : t + 1], activations=activations) for t in range(9)
    ]
    assert bitwise_equal(together, torch.cat(alone))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set_isa: name .*: want one of .*scalar.*; got 'mmx'"):
        _cpu_ext.set_isa("mmx")
