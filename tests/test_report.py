"""``python -m m3kernels``: the report tells of every op on every device, and does not fail where a part is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m3kernels import __main__ as report
from m3kernels import dispatch

ROOT = Path(__file__).parent.parent
OPS = [
    "linear",
    "int4_dequantize", "int4_gemm", "int4_grouped_gemm", "int4_moe",
    "linear_distill_loss", "linear_logprobs", "linear_logprobs_backward", "linear_policy_loss",
    "build_tree_kernel_efficient", "chain_speculative_sampling", "draft_topk", "reconstruct_indices_from_tree_mask",
    "tree_attention", "tree_budget", "tree_commit", "tree_finalize", "tree_speculative_sampling_target_only",
    "tree_verify", "verify_tree_greedy",
]  # fmt: skip


def test_every_op_is_served_by_the_native_room_on_cpu():
    found = {service.op: service.room for service in report.services() if service.device == "cpu"}
    assert found == dict.fromkeys(OPS, "cpu")


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_a_room_forced_by_name_is_the_one_that_serves(backend):
    rooms = {service.room for service in report.services() if service.device == "cpu"}
    assert rooms == {backend}


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_forced_room_that_cannot_serve_is_explained(backend):
    service = next(service for service in report.services() if service.device == "cpu")
    assert service.room == ""
    assert [name for name, _ in service.others] == [backend]
    assert service.others[0][1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_every_cuda_room_says_why():
    services = [service for service in report.services() if service.device == "cuda"]
    assert [service.room for service in services] == [""] * len(OPS)
    assert all([name for name, _ in service.others] == list(dispatch.ROOMS["cuda"]) for service in services)
    assert all(dict(service.others)["reference"] == "no CUDA device here" for service in services)


def test_command_prints_what_is_built_and_who_serves(tmp_path):
    environment = {
        key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "M3KERNELS_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-m", "m3kernels"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = [line.split()[0] for line in lines[-2 * len(OPS) :: 2]]
    assert told == [op for examples in report.EXAMPLES.values() for op in examples()]
    assert sorted(told) == sorted(OPS)
    assert any(line.startswith("cpu module") and "this CPU runs" in line and "chosen" in line for line in lines)
