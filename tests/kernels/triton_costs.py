"""Costs of Triton kernels compiled for GPUs that are not here: one target by default, the others with ``-m slow``."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from m3kernels.triton_compile import TARGETS

DEFAULT = "sm_90"


def run_uninterpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@functools.cache
def costs(module: str, target: str) -> dict[str, dict[str, int]]:
    """{case: cost} of a module's kernels on a target; what was compiled before is in Triton's cache."""
    result = run_uninterpreted("-m", "m3kernels.triton_compile", module, target)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)[target]


def target(*values: str) -> object:
    """A parameter set whose first value is a target: slow, unless that is the default one."""
    return pytest.param(*values, marks=() if values[0] == DEFAULT else pytest.mark.slow)


each_target = pytest.mark.parametrize("target", [target(each) for each in TARGETS])
