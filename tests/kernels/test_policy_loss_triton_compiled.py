"""The Triton tile kernels of policy_loss, compiled for GPUs that are not here: what they cost, how they address."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from triton_costs import costs, each_target, run_uninterpreted, target

from m3kernels.triton_compile import SHARED_LIMIT, TARGETS

triton = pytest.importorskip("triton", reason="Triton is not installed")
_triton = pytest.importorskip("m3kernels.policy_loss._triton")

BUDGET = json.loads((Path(__file__).parent / "policy_loss_triton_budget.json").read_text())


MODULE = "m3kernels.policy_loss._triton"


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_has_a_budget(target: str) -> None:
    assert {case.name for case in _triton.compile_cases(target)} == set(BUDGET[target])


@pytest.mark.parametrize(("target", "case"), [target(each, case) for each in TARGETS for case in BUDGET[each]])
def test_compiles_within_its_budget(target: str, case: str) -> None:
    cost, budget = costs(MODULE, target)[case], BUDGET[target][case]
    assert cost["shared"] <= SHARED_LIMIT[target]
    if triton.__version__ == BUDGET["triton"]:
        assert {name: cost[name] for name in budget if cost[name] > budget[name]} == {}


@each_target
def test_nothing_spills(target: str) -> None:
    assert {case: cost["spills"] for case, cost in costs(MODULE, target).items() if cost["spills"]} == {}


INTERMEDIATE = """
import json
import triton
from m3kernels import triton_compile
from m3kernels.policy_loss import _triton
compile, kept = triton.compile, []
triton_compile.read_nvidia = lambda compiled: (0, 0, "")
triton.compile = lambda *args, **options: kept.append(compile(*args, **options)) or kept[-1]
cases = _triton.compile_cases("sm_90")
for case in cases:
    triton_compile.compile_case(case, "sm_90")
print(json.dumps({case.name: [one.asm["ttir"], one.asm["ptx"]] for case, one in zip(cases, kept, strict=True)}))
"""


@pytest.fixture(scope="session")
def intermediate() -> dict[str, list[str]]:
    """{case: [Triton's intermediate code, PTX]} for sm_90, from the cache that ``costs`` fills."""
    costs(MODULE, "sm_90")
    result = run_uninterpreted("-c", INTERMEDIATE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


PRODUCT = re.compile(r"(%\S+) = arith\.muli (%\S+), (%\S+) : (?:tensor<[\dx]*)?(i\d+)>?")


@pytest.mark.parametrize("case", BUDGET["sm_90"])
def test_offsets_of_rows_have_64_bits(intermediate: dict[str, list[str]], case: str) -> None:
    """In 32 bits an index is only ever multiplied by a constant: a block or span of columns, never by a stride."""
    code = intermediate[case][0]
    constants = set(re.findall(r"(%\S+) = arith\.constant ", code))
    products = PRODUCT.findall(code)
    assert len(products) == code.count("arith.muli")
    assert [product for product in products if product[3] == "i32" and not constants & set(product[1:3])] == []
    assert [product for product in products if product[3] == "i64"]


@pytest.mark.parametrize("case", [case for case in BUDGET["sm_90"] if "merge" not in case and "odd" not in case])
def test_tiles_are_read_16_bytes_at_a_time(intermediate: dict[str, list[str]], case: str) -> None:
    code = intermediate[case][1]
    assert "ld.global.v4.b32" in code
    assert ("st.global.v4.b32" in code) == ("gradient" in case or "full" in case)
    assert not re.search(r"\b(atom|red)\.", code)


def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    program = (
        "import torch\n"
        "from m3kernels.policy_loss import _triton\n"
        "assert 'TRITON_INTERPRET=1' in _triton.unsupported('linear_logprobs', torch.zeros(2, 3))\n"
    )
    result = run_uninterpreted("-c", program)
    assert result.returncode == 0, result.stderr
