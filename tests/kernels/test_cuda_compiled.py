"""Every CUDA kernel compiled for its targets without a GPU: within its budget, and with the instructions meant.

cuda_budget.json holds registers, local memory and instruction counts of each kernel on each target; cuda_costs.py
renews it after a change of kernel or toolchain.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cuda_costs import ARCHS, costs, instruction_counts, nvcc, short

pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton")
pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc")

BUDGET: dict[str, dict[str, list]] = json.loads((Path(__file__).parent / "cuda_budget.json").read_text())
each_arch = pytest.mark.parametrize(
    "arch", [arch if arch == "90a" else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS]
)

# File of kernels -> instructions of which each kernel there must have at least one, by target.
MATRIX = {
    "int4/gemm_decode": dict.fromkeys(ARCHS, ("HMMA", "LDGSTS", "LDSM")),
    "int4/gemm_many": dict.fromkeys(ARCHS, ("HMMA", "LDGSTS")),
    "int4/gemm_many_sm90": {"90a": ("HGMMA", "UBLKCP")},
    "spec_decode/attention": dict.fromkeys(ARCHS, ("HMMA", "LDGSTS")),
}


@each_arch
def test_every_kernel_keeps_its_budget(arch):
    found = costs(arch)
    assert set(found) == set(BUDGET[arch]), "renew cuda_budget.json (cuda_costs.py)"
    over = {name: (cost, BUDGET[arch][name]) for name, cost in found.items() if cost.registers > BUDGET[arch][name][0]}
    assert not over


@each_arch
def test_nothing_is_in_local_memory(arch):
    """Nor loaded from there or stored; what the budget excuses is one register that nvcc keeps there on sm_100a."""
    spilled = {
        name: cost
        for name, cost in costs(arch).items()
        if cost.local > BUDGET[arch][name][1] or (cost.local == 0 and {"LDL", "STL"} & set(cost.instructions))
    }
    assert not spilled
    assert sum(budget[1] > 0 for budget in BUDGET[arch].values()) <= (arch == "100a")


@each_arch
def test_the_instructions_meant_are_there(arch):
    found = costs(arch)
    missing = [
        (name, want)
        for name, cost in found.items()
        for want in MATRIX.get(name.partition(":")[0], {}).get(arch, ())
        if is_product(name) and want not in cost.instructions
    ]
    assert not missing


def is_product(name: str) -> bool:
    """Kernels that multiply; those that only add up partial results beside them do not."""
    return not any(word in name for word in ("combine", "join", "merge"))


def test_names_are_shortened_to_what_is_read():
    plain = "void m3::int4::(anonymous namespace)::decode<(m3::Half)1, 4, (bool)0>(m3::int4::Args)"
    assert short(plain) == "decode<(Half)1, 4, (bool)0>"


def test_instructions_are_counted_by_kernel():
    code = """
\t.section\t.text._Z1k,"ax",@progbits
        /*0010*/              @P0 LDG.E.NA.LTC256B.128 R4, desc[UR4][R2.64] ;
        /*0020*/                  HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0030*/              @!UP0 UBLKCP.S.G [UR6], [UR8], UR12 ;
\t.section\t.text._Z1m,"ax",@progbits
        /*0010*/                  STL [R1], R2 ;
"""
    want = {"_Z1k": {"LDG.128": 1, "HMMA": 1, "UBLKCP": 1}, "_Z1m": {"STL": 1}}
    assert instruction_counts(code) == want
