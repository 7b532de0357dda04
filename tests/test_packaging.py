"""The build as a test: wheels without torch in sight, one wheel for several torch versions, the native code's hygiene.

What compiles is marked slow. ``M3_OTHER_PYTHON`` names an interpreter that has another torch minor version; without it
that one test skips, because a second torch is gigabytes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns("build", "dist", ".git", ".venv", "*.so", "*.egg-info", "__pycache__", ".*_cache")
SYSTEM_LIBRARIES = {"libstdc++.so.6", "libgomp.so.1", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
SYSTEM_LIBRARIES |= {"libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}

slow = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")

# Loads the installed package, not the checkout, and compares the native room with the reference.
USE = """
import sys, torch, m3kernels
from m3kernels import dispatch, int4
from m3kernels.int4.reference import gemm64, make_inputs
assert m3kernels.__file__.startswith(sys.argv[1]), m3kernels.__file__
x, weight, _ = make_inputs(3, 70, 96, group_size=32)
y, wanted = int4.int4_gemm(x, weight, activations="exact").double(), gemm64(x, weight, "exact")
assert (y - wanted).abs().max() <= 1e-5 * wanted.abs().max()
rooms = dispatch.explain("m3kernels.int4", "int4_dequantize", *int4.ops.flat(weight), torch.float32)
assert rooms[0] == ("cpu", ""), rooms
print(torch.__version__)
"""


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to the end; a failure shows what the command said."""
    done = attempt(*command, cwd=cwd, **environment)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def attempt(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("M3_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def copy_source(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE))


def needed(library: Path) -> set[str]:
    """Shared libraries that the dynamic linker must find for this one."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library, cwd=ROOT).stdout))


def wheel(folder: Path, **environment: str) -> Path:
    """A wheel built by pip in an isolated environment, which holds the build requirements and no torch."""
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", folder / "wheels", copy_source(folder)]
    run(*pip, cwd=folder, **environment)
    (built,) = (folder / "wheels").iterdir()
    return built


def unpack(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as file:
        file.extractall(folder)
    return folder


# -- setup.py ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def setup_file(monkeypatch) -> ModuleType:
    """setup.py as a module, without its call of setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("M3_CUDA", "0")
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("machine", "present", "absent"),
    [("x86_64", "gemm_cpu_avx2.cpp", "gemm_cpu_neon.cpp"), ("aarch64", "gemm_cpu_scalar.cpp", "gemm_cpu_avx2.cpp")],
    ids=["x86_64", "aarch64"],
)
def test_only_files_of_the_machine_are_compiled(setup_file, monkeypatch, machine, present, absent):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    names = [path.name for path in setup_file.sources(cuda=False)]
    assert present in names
    assert absent not in names
    assert not [name for name in names if name.endswith((".cu", "_cuda.cpp"))]


def test_baseline_objects_are_linked_before_those_of_an_isa(setup_file, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    special = [setup_file.suffix(path) in setup_file.ISA_FLAGS["x86_64"] for path in setup_file.sources(cuda=False)]
    assert special == sorted(special)
    assert any(special)


def test_build_machine_decides_nothing(setup_file, tmp_path):
    text = setup_file.ninja_file(tmp_path, {"m3kernels._cpu_ext": tmp_path / "_cpu_ext.so"}, sanitize="")
    assert "-march=native" not in text
    assert "-mtune=native" not in text
    assert "-ffp-contract=off" in text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"M3_CUDA": "1", "CUDA_HOME": "/nowhere"}, "setup: M3_CUDA=1: want nvcc in CUDA_HOME=/nowhere/bin; got none"),
        ({"M3_CUDA": "yes"}, "setup: M3_CUDA: want 0, 1 or unset; got 'yes'"),
    ],
    ids=["cuda-demanded-in-vain", "cuda-misspelt"],
)
def test_setup_refuses(environment, message):
    done = attempt(sys.executable, "setup.py", "--version", cwd=ROOT, **environment)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("archs", ["", "sm_80", "80;native"])
def test_setup_refuses_malformed_cuda_targets(setup_file, monkeypatch, archs):
    monkeypatch.setenv("M3_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match="setup: M3_CUDA_ARCHS: want a list like '80;90a;100a;120a'; got"):
        setup_file.gencode()


def test_cuda_targets_become_cubins_and_portable_ptx(setup_file, monkeypatch):
    monkeypatch.setenv("M3_CUDA_ARCHS", "80;90a")
    assert setup_file.gencode() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]


# -- the module of this checkout --------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", ["_cpu_ext", "_cuda_ext"])
def test_module_needs_no_torch_and_no_driver(module):
    spec = importlib.util.find_spec(f"m3kernels.{module}")
    if spec is None:
        assert module == "_cuda_ext", "the CPU module is always built"
        pytest.skip("the CUDA module is not built here")
    assert needed(Path(spec.origin)) <= SYSTEM_LIBRARIES


# -- wheels -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cpu_wheel(tmp_path_factory) -> Path:
    return wheel(tmp_path_factory.mktemp("cpu"), M3_CUDA="0")


@slow
def test_wheel_holds_the_packages_and_the_module(cpu_wheel):
    names = zipfile.ZipFile(cpu_wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"m3", "m3kernels"}
    assert [name for name in names if re.fullmatch(r"m3kernels/_cpu_ext\..*\.so", name)]
    assert not [name for name in names if "_cuda_ext." in name and name.endswith(".so")]
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "m3/serve/page").iterdir()}
    assert pages <= set(names)
    assert {"m3kernels/py.typed", "m3kernels/_cpu_ext.pyi", "m3/cli.py"} <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@slow
def test_source_distribution_holds_what_a_build_needs(tmp_path):
    source = copy_source(tmp_path)
    run(sys.executable, "setup.py", "-q", "sdist", "--formats=gztar", cwd=source, M3_CUDA="0")
    (archive,) = (source / "dist").iterdir()
    shutil.unpack_archive(archive, tmp_path / "sdist")
    (inside,) = (tmp_path / "sdist").iterdir()
    wanted = {path.relative_to(ROOT) for folder in ("csrc", "m3", "m3kernels") for path in (ROOT / folder).rglob("*.*")}
    wanted = {path for path in wanted if path.suffix not in (".so", ".pyc", ".o")}
    assert not [path for path in wanted if not (inside / path).exists()]


@slow
def test_wheel_works_with_this_torch(cpu_wheel, tmp_path):
    installed = unpack(cpu_wheel, tmp_path / "installed")
    done = run(sys.executable, "-c", USE, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.strip() == torch.__version__


@slow
def test_wheel_works_with_another_torch(cpu_wheel, tmp_path):
    other = os.environ.get("M3_OTHER_PYTHON")
    if other is None:
        pytest.skip("M3_OTHER_PYTHON is not set (an interpreter that has another torch minor version)")
    installed = unpack(cpu_wheel, tmp_path / "installed")
    done = run(other, "-c", USE, installed, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.strip().split(".")[:2] != torch.__version__.split(".")[:2]


@slow
@needs_nvcc
def test_cuda_wheel_imports_without_a_driver(tmp_path):
    installed = unpack(wheel(tmp_path, M3_CUDA="1", M3_CUDA_ARCHS="80;90a"), tmp_path / "installed")
    (library,) = installed.glob("m3kernels/_cuda_ext*.so")
    assert needed(library) <= SYSTEM_LIBRARIES
    ask = "import m3kernels._cuda_ext as module; info = module.build_info(); print(info['archs'], info['runtime'] > 0)"
    done = run(sys.executable, "-c", ask, cwd=tmp_path, PYTHONPATH=str(installed), CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split() == ["80;90a", "True"]


# -- native code ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def built_source(tmp_path_factory) -> Path:
    source = copy_source(tmp_path_factory.mktemp("built"))
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, M3_CUDA="0")
    return source


@slow
def test_changed_file_rebuilds_alone(built_source):
    (built_source / "csrc/int4/gemm_cpu_scalar.cpp").touch()
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=built_source, M3_CUDA="0")
    assert "[2/2]" in done.stdout
    assert "gemm_cpu_scalar.cpp" in done.stdout


@slow
def test_no_function_of_an_isa_can_replace_a_shared_one(built_source, setup_file):
    """An object built for one ISA defines no symbol that the linker may merge with another object's (weak, unique)."""
    isas = setup_file.ISA_FLAGS[platform.machine()]
    objects = [
        path
        for path in built_source.glob("build/native/*/csrc/*/*.o")
        if path.stem.split(".")[0].rpartition("_")[2] in isas
    ]
    assert objects
    merged = {
        path.name: re.findall(r"^\S+ [WVu] (.+)$", run("nm", "-C", path, cwd=ROOT).stdout, re.MULTILINE)
        for path in objects
    }
    assert {file: symbols for file, symbols in merged.items() if symbols} == {}


SANITIZED = [
    f"tests/kernels/test_{name}.py"
    for name in ("int4", "spec_decode_rows", "spec_decode_attention", "spec_decode_tree", "spec_decode_together")
]


@slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="paths of the sanitizer's libraries are those of x86-64 gcc")
def test_native_kernels_pass_under_address_and_undefined_sanitizers(tmp_path):
    source = copy_source(tmp_path)
    run(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        cwd=source,
        M3_CUDA="0",
        M3_SANITIZE="address,undefined",
    )
    (module,) = source.glob("m3kernels/_cpu_ext*.so")
    assert {"libasan.so.8", "libubsan.so.1"} & needed(module), "the module is not instrumented"
    libraries = [
        run("g++", f"-print-file-name={name}", cwd=source).stdout.strip() for name in ("libasan.so", "libubsan.so")
    ]
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and not triton", *SANITIZED),
        cwd=source,
        PYTHONPATH=str(source),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        OMP_NUM_THREADS="2",
    )
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]


@slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="paths of the sanitizer's libraries are those of x86-64 gcc")
def test_cuda_kernels_pass_on_the_emulated_device_under_the_address_sanitizer(tmp_path):
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*_cuda.py"))
    assert tests
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
        cwd=ROOT,
        M3_SANITIZE="address",
        LD_PRELOAD=":".join(
            run("g++", f"-print-file-name={name}", cwd=ROOT).stdout.strip() for name in ("libasan.so", "libstdc++.so")
        ),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-2000:]
