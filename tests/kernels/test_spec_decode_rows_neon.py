"""The NEON kernels of rows of logits on a machine of another architecture: cross-compiled, run by QEMU.

They must decide as the portable kernels do, which test_spec_decode_rows_isa.py holds against the reference. On AArch64
itself that test covers NEON. Elsewhere: apt-get install g++-aarch64-linux-gnu qemu-user.
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
    "csrc/spec_decode/rows_cpu.cpp": [],
    "csrc/spec_decode/rows_cpu_law.cpp": [],
    "csrc/spec_decode/rows_cpu_scalar.cpp": [],
    "csrc/spec_decode/rows_cpu_neon.cpp": ["-march=armv8.2-a+dotprod+fp16"],  # the ISA of setup.py
    "tests/kernels/spec_decode_rows_check.cpp": [],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine runs NEON: test_spec_decode_rows_isa.py"),
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
    built = folder / "spec_decode_rows_check"
    subprocess.run([COMPILER, "-static", "-fopenmp", *folder.glob("*.o"), "-o", built], check=True)
    return built


@pytest.mark.parametrize("seed", [0, 1])
def test_neon_decides_as_portable_code(program: Path, seed: int) -> None:
    command = [EMULATOR, "-cpu", "max", str(program), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (0, "")
