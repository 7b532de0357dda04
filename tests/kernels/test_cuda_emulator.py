"""The emulated CUDA device: does what a GPU does, and catches what a GPU would punish only sometimes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated_cuda
import pytest
import torch

CHECK = Path(__file__).parent / "cuda_emulator_check.cu"
SEEDS = range(6)
BLOCK = 128


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulator")
    command = ["g++", *emulated_cuda.flags(), f"-I{emulated_cuda.HERE}", f"-I{emulated_cuda.ROOT / 'csrc'}"]
    sources = ["-x", "c++", CHECK, emulated_cuda.HERE / "emulator.cpp"]
    subprocess.run([*command, *sources, "-o", folder / "check"], check=True)
    return folder / "check"


def run(program, kernel: str, seed: int = 0, kind: str = "right") -> str:
    done = subprocess.run([program, kernel, str(seed), kind], capture_output=True, text=True, check=True)
    return done.stdout


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


INTS = torch.arange(512) * 7 % 101
FLOATS = torch.arange(8192) % 1013
HALVES = (torch.arange(1024) * 5 % 37 - 18).double()


def expected(kernel: str) -> torch.Tensor:
    """What each kernel computes, restated."""
    if kernel == "reverse":
        return INTS.view(4, BLOCK).flip(1).flatten().double()
    if kernel == "warp_sum":
        return INTS[:BLOCK].view(4, 32).sum(1, keepdim=True).expand(4, 32).flatten().double()
    if kernel == "copy_in":
        rows = FLOATS[:512].view(BLOCK, 4).double().clone()
        rows[::2, 2:] = 0  # eight valid bytes, then zeros
        return rows.roll(-1, 0).flatten()
    if kernel == "bulk":
        return FLOATS[:3072].double()
    if kernel == "cluster_sum":
        return FLOATS[:1024].view(2, 4, BLOCK).double().sum(1, keepdim=True).expand(2, 4, BLOCK).flatten()
    w = HALVES.view(64, 16)
    return torch.cat([(w @ w.T).flatten()] * 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ["reverse", "warp_sum", "copy_in", "bulk", "cluster_sum", "products"])
def test_right_kernels_compute_what_they_say(program, kernel, seed):
    assert torch.equal(numbers(run(program, kernel, seed)), expected(kernel))


@pytest.mark.parametrize("kernel", ["reverse", "copy_in", "bulk", "products"])
def test_what_is_not_waited_for_is_not_there(program, kernel):
    texts = [run(program, kernel, seed, "wrong") for seed in SEEDS]
    assert any(text.startswith("refused") or not torch.equal(numbers(text), expected(kernel)) for text in texts)


@pytest.mark.parametrize("kind", ["right", "wrong"])  # here: as stored, transposed
def test_ldmatrix(program, kind):
    matrices = torch.arange(256).view(4, 8, 8)
    if kind == "wrong":
        matrices = matrices.transpose(1, 2)
    pairs = matrices.reshape(4, 32, 2)  # row i // 4, columns 2 (i % 4) and the next
    want = (pairs[..., 0] + 65536 * pairs[..., 1]).T.flatten().double()
    assert torch.equal(numbers(run(program, "ldmatrix", 0, kind)), want)


@pytest.mark.parametrize(
    ("kernel", "complaint"),
    [
        ("divergent", "other lanes of the warp are at"),
        ("half_a_barrier", "deadlock: 32 threads wait"),
        ("overrun", "cp.async: outside of the block's 1024 bytes of shared memory, at 1024"),
        ("waits_for_the_next", "a block waits for one that has not run"),
    ],
)
def test_mistakes_are_named(program, kernel, complaint):
    assert complaint in run(program, kernel)
