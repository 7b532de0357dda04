"""The table of CUDA kernels: well formed, complete, and asked the way users ask it."""

from __future__ import annotations

import pytest

from m3kernels.int4 import kernel_for
from m3kernels.int4.crossovers import TABLE, Crossover, crossover
from m3kernels.int4.reference import make_inputs

KERNELS = {"decode", "many", "wgmma", "dense"}
REGIMES = {"row_invariant", "row_invariant_experts", "free", "free_experts"}
every_row = pytest.mark.parametrize(
    ("capability", "regime"), [(capability, regime) for capability in TABLE for regime in TABLE[capability]]
)


def test_every_architecture_has_every_regime() -> None:
    assert set(TABLE) == {80, 86, 89, 90, 100, 120}
    assert all(set(regimes) == REGIMES for regimes in TABLE.values())


@every_row
def test_rows_ascend_to_any_number_and_have_a_source(capability: int, regime: str) -> None:
    choices = TABLE[capability][regime]
    bounds = [choice.up_to for choice in choices]
    assert bounds[-1] is None and None not in bounds[:-1]
    finite = [bound for bound in bounds if bound is not None]
    assert finite == sorted(set(finite)) and all(bound > 0 for bound in finite)
    assert all(isinstance(choice, Crossover) and choice.kernel in KERNELS and choice.source for choice in choices)


@every_row
def test_kernels_are_where_they_can_be(capability: int, regime: str) -> None:
    kernels = {choice.kernel for choice in TABLE[capability][regime]}
    assert "wgmma" not in kernels or (capability == 90 and regime.startswith("free"))
    assert "dense" not in kernels or regime == "free"  # other bits, and no experts
    if regime.startswith("row_invariant"):
        assert kernels <= {"decode", "many"}  # the two that share their bits


@pytest.mark.parametrize("capability", (75, 80, 86, 87, 89, 90, 100, 103, 120, 121))
@pytest.mark.parametrize("rows", (0, 1, 64, 65, 10**6))
def test_every_device_and_number_of_rows_has_a_kernel(capability: int, rows: int) -> None:
    for experts in (None, 1, 128):
        for row_invariant in (True, False):
            assert crossover(capability, rows, experts, row_invariant).kernel in KERNELS


def test_kernel_for() -> None:
    weight = make_inputs(1, 64, 64, group_size=32)[1]
    stack = make_inputs(1, 64, 64, group_size=32, experts=4)[1]
    assert kernel_for(weight, 64, capability=(9, 0)) == "decode"
    assert kernel_for(weight, 65, capability=(9, 0)) == "many"
    assert kernel_for(weight, 65, row_invariant=False, capability=(9, 0)) == "wgmma"
    assert kernel_for(weight, 5000, row_invariant=False, capability=(8, 6)) == "dense"
    assert kernel_for(stack, 128, capability=(9, 0)) == "decode"
    assert kernel_for(stack, 129, capability=(9, 0)) == "many"
    assert kernel_for(stack, 5000, row_invariant=False, capability=(12, 1)) == "many"


def test_kernel_for_refuses_what_it_cannot_answer() -> None:
    weight = make_inputs(1, 64, 64, group_size=32)[1]
    with pytest.raises(ValueError, match="kernel_for: rows: want an integer >= 0; got -1"):
        kernel_for(weight, -1)
    with pytest.raises(ValueError, match="kernel_for: capability: want a compute capability for a weight on cpu"):
        kernel_for(weight, 1)
