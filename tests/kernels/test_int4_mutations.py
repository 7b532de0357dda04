"""Mistakes planted in the CUDA product of few rows, one line each: on the emulated device every one is found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import emulated_cuda
import numpy as np
import pytest
import torch

from m3kernels.int4.reference import gemm64, make_inputs
from m3kernels.testing import relative_error

CHECK = Path(__file__).parent / "int4_decode_check.cu"
M, N, K, GROUP = 3, 130, 432, 32

MUTATIONS = {  # name -> (file, what stands there once, what stands there instead)
    "none": ("int4/layout.h", "", ""),
    "chunks of a tile in order": ("int4/layout.h", "t * 128 + ((g ^ (2 * t)) * 16)", "t * 128 + (g * 16)"),
    "columns of A repeated": ("int4/product.cuh", "shifted = word >> 8;", "shifted = word;"),
    "scales of the other half": ("int4/gemm_decode.cu", "scale[i >> 1][a]", "scale[i & 1][a]"),
    "a run of tiles too long": ("int4/gemm_decode.cu", "left = d.group_tiles;", "left = d.group_tiles + 1;"),
}


def product(folder: Path, mutation: str) -> torch.Tensor | str:
    """y (M, N) of the kernel compiled with one line changed, or what it complained of."""
    file, before, after = MUTATIONS[mutation]
    text = (emulated_cuda.ROOT / "csrc" / file).read_text()
    assert not before or text.count(before) == 1, f"the mutation no longer fits {file}"
    (folder / "int4").mkdir()
    (folder / file).write_text(text.replace(before, after) if before else text)
    flags = [flag for flag in emulated_cuda.flags() if flag not in ("-O2", "-g1")]
    includes = [f"-I{path}" for path in (folder, emulated_cuda.HERE, emulated_cuda.ROOT / "csrc")]
    sources = ["-x", "c++", CHECK, emulated_cuda.HERE / "emulator.cpp"]
    subprocess.run(["g++", *flags, "-O0", *includes, *sources, "-o", folder / "check"], check=True)
    x, weight, _ = make_inputs(M, N, K, group_size=GROUP, symmetric=True, dtype=torch.float16)
    (folder / "in").write_bytes(b"".join(t.numpy().tobytes() for t in (x, weight.qweight, weight.scales)))
    sizes = map(str, (M, N, K, GROUP))
    done = subprocess.run([folder / "check", folder / "in", folder / "out", *sizes], capture_output=True, text=True)
    if done.returncode:
        return done.stdout + done.stderr
    return torch.from_numpy(np.fromfile(folder / "out", np.float32).reshape(M, N))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_only_the_kernel_as_it_stands_is_right(tmp_path, mutation):
    x, weight, _ = make_inputs(M, N, K, group_size=GROUP, symmetric=True, dtype=torch.float16)
    y = product(tmp_path, mutation)
    right = isinstance(y, torch.Tensor) and relative_error(y, gemm64(x, weight, "exact")).max < 1e-5
    assert right == (mutation == "none"), y
