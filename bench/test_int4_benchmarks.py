"""The arms of int4.py as pytest-benchmark cases: ``pytest bench --benchmark-only [--benchmark-compare]``.

One thread, one shape, two M; each case passes its error gate first. The arms run one after another here, so compare
runs of one arm with each other; ``python -m bench int4`` interleaves arms to compare them.
"""

from __future__ import annotations

import functools
import itertools

import pytest

from bench import harness, int4
from bench.harness import Rotation, UnavailableError
from bench.workloads import Problem, find, make_problem

SHAPE = "4096x4096"
ROTATION = Rotation(span=2, parts=3)
MS = (1, 16)


@functools.cache
def problem() -> Problem:
    return make_problem(find(SHAPE), max(MS))


@pytest.mark.parametrize("arm_name", int4.DEFAULT_ARMS)
@pytest.mark.parametrize("m", MS, ids=lambda m: f"m{m}")
def test_int4_gemm(benchmark, m, arm_name):
    try:
        arm = int4.ARMS[arm_name](problem(), ROTATION, 1)
    except UnavailableError as error:
        pytest.skip(str(error))
    arm.load(problem().x[:m].clone())
    gate = harness.gate(arm, functools.partial(problem().result, m))
    assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
    benchmark.group = f"{SHAPE} M={m}"
    benchmark.extra_info.update(error=gate.error, products_per_round=ROTATION.span)
    parts = itertools.cycle(range(ROTATION.parts))
    benchmark.pedantic(lambda: arm.run(next(parts)), rounds=20, warmup_rounds=2)
    arm.close()
