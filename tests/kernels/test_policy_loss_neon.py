"""The NEON tile kernels on a machine of another architecture: cross-compiled, run by QEMU, held against double.

On AArch64 itself test_policy_loss_tiles*.py cover them. Elsewhere: apt-get install g++-aarch64-linux-gnu qemu-user.
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
    "csrc/policy_loss/tiles_cpu.cpp": [],
    "csrc/policy_loss/tiles_cpu_scalar.cpp": [],
    "csrc/policy_loss/tiles_cpu_neon.cpp": ISA_FLAGS,
    "tests/kernels/policy_loss_isa_check.cpp": [],
}

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON: test_policy_loss_tiles.py"),
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
    built = folder / "policy_loss_isa_check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", built], check=True)
    return built


@pytest.mark.parametrize("seed", [0, 1])
def test_tile_kernels_are_the_formulas(program, seed):
    command = [EMULATOR, "-cpu", "max", str(program), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "")


def test_neon_uses_fused_multiply_add(program):
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", program.parent / "tiles_cpu_neon.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "fmla" in listing
