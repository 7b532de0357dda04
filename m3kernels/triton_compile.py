"""Compile Triton kernels for GPUs that this machine need not have, and read what they cost from the machine code.

    python -m m3kernels.triton_compile m3kernels.int4._triton sm_90 gfx942    JSON: {target: {case: cost}}

A module of kernels offers ``compile_cases(target)``: the configurations that are launched, each with its argument
types. The interpreter (TRITON_INTERPRET=1) replaces kernels at import, so compile in a process of its own. Registers,
stack and local memory come from ``cuobjdump -res-usage`` (NVIDIA) or the kernel's metadata (AMD); shared memory from
Triton; matrix instructions are counted in the disassembly. Triton's own binaries are used: no CUDA or ROCm is needed.
The output is also the form of a committed budget, such as tests/kernels/int4_triton_budget.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}  # bytes per block
MATRIX_INSTRUCTION = {  # by target, what the disassembly must show where a kernel claims matrix units
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"\bUTC\w*MMA\b",
    "gfx942": r"\bv_mfma_",
}


class CompileCase(NamedTuple):
    """One kernel with the types of one launch.

    Args:
        name: unique in its module.
        kernel: the @triton.jit function.
        signature: argument -> type ("*fp16", "i32"); "i32:16" and every pointer are known to be divisible by 16.
        constants: argument -> value: constexpr arguments, and None for absent tensors.
        options: num_warps, num_stages, enable_fp_fusion.
        matrix_units: whether the kernel must reach the matrix units of the GPU.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    matrix_units: bool = False


class Cost(NamedTuple):
    """What a compiled kernel takes: registers per thread, spilled bytes per thread, shared bytes per block."""

    registers: int
    spills: int
    shared: int
    matrix_instructions: int


def compile_case(case: CompileCase, target: str) -> Cost:
    """Compile one case. Raises what Triton raises if it does not compile; exceeding SHARED_LIMIT is not an error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("triton_compile: TRITON_INTERPRET: want unset, kernels are not compiled under it; got 1")
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr").removesuffix(":16") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if case.signature.get(name, "").startswith("*") or case.signature.get(name, "").endswith(":16")
    }
    constants = {name: case.constants[name] for name in names if name not in case.signature}
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=dict(case.options))
    registers, spills, code = read_amd(compiled) if amd else read_nvidia(compiled)
    found = Counter(re.findall(MATRIX_INSTRUCTION[target], code)).total()
    return Cost(registers, spills, compiled.metadata.shared, found)


def read_nvidia(compiled: Any) -> tuple[int, int, str]:
    """(registers, stack plus local bytes, disassembly) of a cubin."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run(tools / "cuobjdump", "-res-usage", file.name)
        code = run(tools / "nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"], code


def read_amd(compiled: Any) -> tuple[int, int, str]:
    """(vector registers, spilled bytes, assembly) of an AMD kernel."""
    code = compiled.asm["amdgcn"]
    numbers = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", code, re.MULTILINE)}
    return numbers["vgpr_count"], 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]), code


def run(program: Path, *arguments: str) -> str:
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m m3kernels.triton_compile", description=__doc__.split("\n")[0])
    parser.add_argument("module", help="a module with compile_cases(target), such as m3kernels.int4._triton")
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    options = parser.parse_args(arguments)
    cases_for = importlib.import_module(options.module).compile_cases
    costs: dict[str, Any] = {"triton": importlib.metadata.version("triton")}
    for target in options.targets:
        cases = [case for case in cases_for(target) if options.cases in case.name]
        costs[target] = {case.name: compile_case(case, target)._asdict() for case in cases}
    json.dump(costs, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main(sys.argv[1:])
