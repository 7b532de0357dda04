"""The arms of policy_loss.py as pytest-benchmark cases: ``pytest bench --benchmark-only [--benchmark-compare]``.

One thread, a quarter of the tokens of the smaller head; each case passes its error gate first. The arms run one after
another here, so compare runs of one arm with each other; ``python -m bench policy_loss`` interleaves arms.
"""

from __future__ import annotations

import functools

import pytest

from bench import policy_loss
from bench.harness import UnavailableError
from bench.workloads import LossHead, LossProblem, LossResult, expected_loss, make_loss_problem

HEAD = LossHead(name="quarter", tokens=256, hidden=576, vocabulary=49152)


@functools.cache
def case(dtype: str, density: float) -> tuple[LossProblem, LossResult]:
    problem = make_loss_problem(HEAD, dtype, density)
    return problem, expected_loss(problem)


@pytest.mark.parametrize("arm_name", policy_loss.PRESETS["acceptance"].arms)
@pytest.mark.parametrize("density", [1.0, 0.4], ids=lambda density: f"density{density}")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_linear_policy_loss(benchmark, dtype, density, arm_name):
    problem, expected = case(dtype, density)
    try:
        arm = policy_loss.ARMS[arm_name](problem, 1)
        arm.name = arm_name
        gate = policy_loss.gate(arm, expected, {})
    except UnavailableError as error:
        pytest.skip(str(error))
    assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
    benchmark.group = f"{HEAD.name} {dtype} density {density}"
    benchmark.extra_info.update(error=gate.error)
    benchmark.pedantic(lambda: arm.run(0), setup=arm.enter, rounds=5, warmup_rounds=1)
