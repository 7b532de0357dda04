"""The NEON kernels of dense products on a machine of another architecture: cross-compiled, run by QEMU.

They are held against sums in double, and a row against itself in other batches. On AArch64 itself test_decoder.py
covers them. Elsewhere: apt-get install g++-aarch64-linux-gnu qemu-user.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++20", "-fopenmp", "-ffp-contract=off", "-fno-tree-reassoc", "-DM3_NEON", "-Icsrc", "-O1"]
SOURCES = {
    "csrc/common/isa.cpp": [],
    "csrc/decoder/linear_cpu.cpp": [],
    "csrc/decoder/linear_cpu_scalar.cpp": [],
    "csrc/decoder/linear_cpu_neon.cpp": ["-march=armv8.2-a+dotprod+fp16"],  # the ISA of setup.py
    "tests/kernels/decoder_linear_check.cpp": [],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON: test_decoder.py"),
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in (COMPILER, EMULATOR)
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("neon")
    for source, flags in SOURCES.items():
        command = [COMPILER, *FLAGS, *flags, "-c", source, "-o", str(folder / f"{Path(source).stem}.o")]
        subprocess.run(command, cwd=ROOT, check=True)
    built = folder / "decoder_linear_check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", built], check=True)
    return built


def emulate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [EMULATOR, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_cpu_with_dot_product_runs_neon(program: Path) -> None:
    assert emulate("-cpu", "max", program, "isas").stdout.split() == ["neon", "scalar"]


@pytest.mark.parametrize("seed", [0, 1])
def test_neon_is_the_product_and_row_invariant(program: Path, seed: int) -> None:
    done = emulate("-cpu", "max", program, seed)
    assert (done.returncode, done.stdout) == (0, "")
