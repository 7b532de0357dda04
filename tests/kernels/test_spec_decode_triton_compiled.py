"""The Triton kernels of spec_decode, compiled for GPUs that are not here: what they cost.

All of them take a quarter of an hour without Triton's cache, hence ``slow``; the default run looks at the budget.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from m3kernels.triton_compile import SHARED_LIMIT, TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.spec_decode._triton")

BUDGET = json.loads((Path(__file__).parent / "spec_decode_triton_budget.json").read_text())
CASES = [(target, case) for target in TARGETS for case in BUDGET[target]]

# Costs of every case; on AMD also registers spilled to memory. Scalar registers that do not fit lie in lanes of vector
# registers there: they are part of the budget, but touch no memory.
PROGRAM = """
import json
import re
import sys
from m3kernels import triton_compile
from m3kernels.spec_decode import _triton
target, read, memory = sys.argv[1], triton_compile.read_amd, []
def read_amd(compiled):
    names = "vgpr_spill_count", "private_segment_fixed_size"
    memory.append(sum(int(re.search(name + r":\\s+(\\d+)", compiled.asm["amdgcn"])[1]) for name in names))
    return read(compiled)
triton_compile.read_amd = read_amd
costs = {}
for case in _triton.compile_cases(target):
    costs[case.name] = triton_compile.compile_case(case, target)._asdict()
    costs[case.name]["memory"] = memory.pop() if memory else costs[case.name]["spills"]
print(json.dumps(costs))
"""


def run_uninterpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def costs() -> dict[str, dict[str, dict[str, int]]]:
    """{target: {case: cost}}; compiled kernels stay in Triton's cache."""
    found = {}
    for target in TARGETS:
        result = run_uninterpreted("-c", PROGRAM, target)
        assert result.returncode == 0, result.stderr
        found[target] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_has_a_budget(target: str) -> None:
    assert {case.name for case in _triton.compile_cases(target)} == set(BUDGET[target])


@pytest.mark.parametrize(("target", "case"), CASES)
def test_budget_has_no_spills_and_fits_shared_memory(target: str, case: str) -> None:
    budget = BUDGET[target][case]
    assert budget["memory"] == 0
    assert budget["shared"] <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", TARGETS)
def test_budget_of_attention_has_matrix_instructions(target: str) -> None:
    claimed = {case.name for case in _triton.compile_cases(target) if case.matrix_units}
    assert "attention_bf16_bf16_128_tree_partial" in claimed
    assert {case for case in claimed if not BUDGET[target][case]["matrix_instructions"]} == set()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), CASES)
def test_compiles_within_its_budget(costs: dict[str, dict[str, dict[str, int]]], target: str, case: str) -> None:
    cost, budget = costs[target][case], BUDGET[target][case]
    assert cost["memory"] == 0
    assert cost["shared"] <= SHARED_LIMIT[target]
    assert bool(cost["matrix_instructions"]) == bool(budget["matrix_instructions"])
    if triton.__version__ == BUDGET["triton"]:
        assert {name: cost[name] for name in budget if cost[name] > budget[name]} == {}


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    program = (
        "import torch\n"
        "from m3kernels.spec_decode import _triton\n"
        "assert 'TRITON_INTERPRET=1' in _triton.unsupported('tree_verify', torch.zeros(2, 3))\n"
    )
    result = run_uninterpreted("-c", program)
    assert result.returncode == 0, result.stderr
