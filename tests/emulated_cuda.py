"""Builds the CUDA module for the emulated device: every .cu of csrc as C++, with the headers of tests/cuda_emulator.

    python tests/emulated_cuda.py        builds it (ninja: what changed) and prints its path

``installed`` puts it in place of m3kernels._cuda_ext, so that the CUDA rooms serve CPU tensors; ``configure`` chooses
the device played: compute capability, multiprocessors, and the seed of every order that a GPU leaves open.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import m3kernels
from m3kernels import dispatch

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "cuda_emulator"
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-mavx2", "-mfma", "-mf16c"]
FLAGS += [
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
    "-Wno-attributes",
    "-Wno-ignored-attributes",
]
INFO = "common/cuda_info.cu"  # asks the real runtime; cuda_info.cpp here answers instead


def flags() -> list[str]:
    """Of the C++ compiler; those of x86-64 only there. M3_SANITIZE=address: every access to memory is checked."""
    sanitize = os.environ.get("M3_SANITIZE", "")
    extra = [f"-fsanitize={sanitize}", "--param", "asan-stack=0"] if sanitize else []  # fibers have stacks of their own
    return [flag for flag in FLAGS if not flag.startswith("-m") or os.uname().machine == "x86_64"] + extra


def build(folder: Path | None = None, layout: str | None = None) -> Path:
    """Path of the built module. ``layout``: a folder whose headers come first, to plant mistakes in them."""
    import ninja
    import pybind11

    csrc = ROOT / "csrc"
    kind = os.environ.get("M3_SANITIZE", "")
    folder = folder or ROOT / "build" / "cuda_emulator" / f"{sysconfig.get_config_var('SOABI')}{kind and '-' + kind}"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(csrc.glob("*/*.cu")), *sorted(csrc.glob("*/*_cuda.cpp")), *sorted(HERE.glob("*.cpp"))]
    sources = [source for source in sources if str(source.relative_to(csrc.parent)) != f"csrc/{INFO}"]
    includes = [*([layout] if layout else []), str(HERE), str(csrc)]
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    command = [os.environ.get("CXX", "g++"), *flags(), "-DM3_CUDA_ARCHS='\"emulated\"'"]
    command += [f"-I{path}" for path in includes] + [f"-isystem {path}" for path in system]
    module = folder / f"_cuda_ext{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "rule cxx",
        f"  command = {' '.join(command)} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {' '.join(command[:1] + flags())} -shared $in -o $out",
    ]
    objects = [folder / f"{source.parent.name}_{source.name}.o" for source in sources]
    lines += [f"build {target}: cxx {source}" for source, target in zip(sources, objects, strict=True)]
    lines.append(f"build {module}: link {' '.join(map(str, objects))}")
    program = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja") or "ninja"
    with (folder / "lock").open("w") as lock:  # of processes that test side by side, the first builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        done = subprocess.run([program, "-C", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"cuda_emulator: the kernels do not compile as C++:\n{done.stdout[-8000:]}")
    return module


_begun: list[subprocess.Popen[bytes]] = []


def begin() -> None:
    """Start the build beside other tests; ``build_once`` waits for it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    quiet = subprocess.DEVNULL
    _begun.append(subprocess.Popen([sys.executable, __file__], env=environment, stdout=quiet, stderr=quiet))


@functools.cache
def attempt() -> Path | RuntimeError:
    for process in _begun:
        process.wait()
    try:
        return build()
    except RuntimeError as error:
        return error


def build_once() -> Path:
    """The module, built by the first call in this process, or the same error for everyone."""
    built = attempt()
    if isinstance(built, RuntimeError):
        raise built
    return built


@functools.cache
def load(path: Path) -> ModuleType:
    """The built module, by a name of its own: pybind11 keeps a module by the name of its first import."""
    spec = importlib.util.spec_from_file_location("emulated._cuda_ext", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rests_on_the_module(name: str) -> bool:
    return name in ("m3kernels._cuda_ext", "m3kernels.cuda") or (
        name.startswith("m3kernels.") and name.rpartition(".")[2].startswith(("_cuda", "cuda_"))
    )


def forget() -> dict[str, ModuleType]:
    """Takes the CUDA module and all that was imported with it out of the package; returns it."""
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if rests_on_the_module(name)}
    for name in taken:
        package, _, last = name.rpartition(".")
        if hasattr(sys.modules[package], last):
            delattr(sys.modules[package], last)
    dispatch.rooms.cache_clear()
    return taken


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[None]:
    """While this lasts, ``module`` is m3kernels._cuda_ext and the CUDA rooms are imported with it."""
    before = forget()
    sys.modules["m3kernels._cuda_ext"] = m3kernels._cuda_ext = module  # type: ignore[attr-defined]
    try:
        yield
    finally:
        forget()
        for name, old in before.items():
            sys.modules[name] = old
            package, _, last = name.rpartition(".")
            setattr(sys.modules[package], last, old)


def configure(capability: int = 90, multiprocessors: int = 4, seed: int = 0) -> None:
    """Choose the device that the emulated module plays, from the next launch on."""
    library = ctypes.CDLL(str(build_once()))
    library.m3_emulator_set(ctypes.c_int(capability), ctypes.c_int(multiprocessors), ctypes.c_uint64(seed))


if __name__ == "__main__":
    print(build())  # noqa: T201
