"""The arms of spec_decode.py as pytest-benchmark cases: ``pytest bench --benchmark-only [--benchmark-compare]``.

One thread; each case passes its gate first. The arms run one after another here, so compare runs of one arm with each
other; ``python -m bench spec_decode`` interleaves arms.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bench import spec_decode
from bench.spec_decode_arms import ARMS
from bench.spec_decode_cases import find_case

NAMES = (
    "verify.n8.v49152.greedy",
    "verify.n8.v49152.coupled.filtered",
    "verify.n32.v151936.b1.target_only",
    "smollm2-135m.decode.c2048",
    "smollm2-135m.verify32.c2048",
    "draft.next.v32000.b1",
    "finalize.n32.b8",
    "commit.smollm2-135m.b1",
)


@functools.cache
def problems(name: str) -> list[Any]:
    return spec_decode.problems_of(find_case(name))


@pytest.mark.parametrize(("name", "arm_name"), [(name, arm) for name in NAMES for arm in ARMS[find_case(name).op]])
def test_spec_decode(benchmark, name, arm_name):
    arm = ARMS[find_case(name).op][arm_name](problems(name), 1)
    gate = arm.gate()
    assert gate.passed, f"error {gate.error:.2e}, tolerance {gate.tolerance:.0e}"
    benchmark.group = name
    benchmark.extra_info.update(error=gate.error, span=arm.span)
    benchmark.pedantic(lambda: arm.run(0), setup=arm.enter, rounds=5, warmup_rounds=1)
