"""The NEON kernels of tree_attention on a machine of another architecture: cross-compiled, run by QEMU.

On AArch64 itself test_spec_decode_attention*.py cover them. Elsewhere: apt-get install g++-aarch64-linux-gnu qemu-user.
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
SOURCES = {
    "csrc/common/isa.cpp": [],
    "csrc/spec_decode/attention_cpu.cpp": [],
    "csrc/spec_decode/attention_cpu_scalar.cpp": [],
    "csrc/spec_decode/attention_cpu_neon.cpp": ["-march=armv8.2-a+dotprod+fp16", "-O1"],  # the ISA of setup.py
    "tests/kernels/spec_decode_attention_isa_check.cpp": [],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON"),
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
    built = folder / "spec_decode_attention_isa_check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", built], check=True)
    return built


@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_row_invariance(program, seed):
    command = [EMULATOR, "-cpu", "max", str(program), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "")


def test_neon_uses_fused_multiply_add(program):
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", program.parent / "attention_cpu_neon.o"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "fmla" in listing
