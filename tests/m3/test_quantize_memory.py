"""The memory of the quantisation job: no more for more layers, and less than two layers for one of many experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantize_memory import ENVIRONMENT, EXPERT_WEIGHTS, EXPERTS, FEW, LAYER_WEIGHTS, MANY

BF16, PACKED = 2.0, 0.53  # bytes of a weight; packed: with scales of groups of 64 in fp16
NOISE = 4 << 20  # of malloc


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process can be set back on Linux only")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}
    script = Path(__file__).with_name("quantize_memory.py")
    command = [sys.executable, script, tmp_path_factory.mktemp("memory")]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_more_layers_take_no_more(peaks):
    held = (MANY - FEW) * LAYER_WEIGHTS * PACKED  # if no more than the packed linears of each layer were kept
    assert held > 2 * NOISE
    assert peaks["many"] - peaks["few"] < NOISE


def test_a_layer_of_experts_is_as_stored_and_packed_never_a_byte_a_weight(peaks):
    weights = EXPERTS * EXPERT_WEIGHTS
    assert peaks["mixture"] > weights * BF16  # the stored layer is seen
    assert peaks["mixture"] - peaks["few"] < weights * (BF16 + PACKED)  # few: what any model takes
