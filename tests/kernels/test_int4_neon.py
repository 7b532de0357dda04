"""The NEON kernels on a machine of another architecture: cross-compiled, run by QEMU, held against a double product.

On AArch64 itself test_int4.py covers them. Elsewhere: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-tree-reassoc", "-DM3_NEON", "-Icsrc"]
ISA_FLAGS = ["-march=armv8.2-a+dotprod+fp16", "-O1"]  # the ISA of setup.py; all else is not optimised, to build fast
SOURCES = {
    "csrc/common/isa.cpp": [],
    "csrc/int4/gemm_cpu.cpp": [],
    "csrc/int4/gemm_cpu_scalar.cpp": [],
    "csrc/int4/gemm_cpu_neon.cpp": ISA_FLAGS,
    "tests/kernels/int4_isa_check.cpp": [],
}

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON: test_int4.py covers it"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in (COMPILER, EMULATOR)
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neon")
    for source, flags in SOURCES.items():
        command = [COMPILER, *FLAGS, *flags, "-c", source, "-o", str(folder / f"{Path(source).stem}.o")]
        subprocess.run(command, cwd=ROOT, check=True)
    built = folder / "int4_isa_check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", built], check=True)
    return built


def emulate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [EMULATOR, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_cpu_with_dot_product_runs_neon(program):
    assert emulate("-cpu", "max", program, "isas").stdout.split() == ["neon", "scalar"]


def test_cpu_without_dot_product_runs_portable_code(program):
    assert emulate("-cpu", "cortex-a53", program, "isas").stdout.split() == ["scalar"]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_mode_is_the_product_and_row_invariant(program, seed):
    done = emulate("-cpu", "max", program, seed)
    assert (done.returncode, done.stdout) == (0, "")


def test_neon_uses_the_dot_product_instruction(program):
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", program.parent / "gemm_cpu_neon.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sdot" in listing
    assert "fmla" in listing
