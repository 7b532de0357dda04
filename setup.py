"""Build m3kernels._cpu_ext (always) and m3kernels._cuda_ext (with nvcc): pybind11 modules that know no torch header.

Every source in csrc/ is compiled to its own object by ninja; a changed file rebuilds alone. The file name says what a
file is for: ``*_avx2.cpp`` gets the flags of that ISA, ``*.cu`` and ``*_cuda.cpp`` go into the CUDA module, all else is
baseline. Neither the CPU nor the GPU of the build machine decides anything: which ISA runs is chosen at run time.

Environment:
    M3_CUDA=1 | 0         demand | forbid the CUDA module; unset: built iff nvcc is found (CUDA_HOME or PATH).
    M3_CUDA_ARCHS         CUDA targets, default "80;90a;100a;120a".
    M3_SANITIZE           for example "address,undefined": instruments the CPU module, for tests only.
    CXX, MAX_JOBS         compiler (default g++), number of parallel compilations.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CUDA_ARCHS = "80;90a;100a;120a"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 warns of its own immintrin.h
ISA_FLAGS = {  # machine -> file-name suffix -> flags; a suffix of another machine is not compiled
    "x86_64": {
        "avx2": AVX2,
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx512": AVX512,
        "avx512vnni": [*AVX512, "-mavx512vnni"],
    },
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod+fp16"]},
}
# No contraction, no reassociation: a sum has one order, whatever the compiler sees around it (docs/numerics.md).
CXX_FLAGS = ["-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-ffp-contract=off", "-fno-tree-reassoc"]


def sources(cuda: bool) -> list[Path]:
    """Files of one module, baseline files first, so that a symbol two objects define is linked in its baseline form."""
    machine = ISA_FLAGS.get(platform.machine(), {})
    foreign = {isa for isas in ISA_FLAGS.values() for isa in isas} - set(machine)
    files = [path for pattern in ("*.cpp", "*.cu") for path in sorted((ROOT / "csrc").glob(f"*/{pattern}"))]
    files = [path for path in files if cuda == (path.suffix == ".cu" or suffix(path) == "cuda")]
    return sorted((path for path in files if suffix(path) not in foreign), key=lambda path: suffix(path) in machine)


def suffix(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def extra_flags(path: Path) -> list[str]:
    """Flags of one file beyond CXX_FLAGS: its ISA; for the bindings of the CUDA module, its targets."""
    if suffix(path) == "cuda":
        return [f"-DM3_CUDA_ARCHS='\"{';'.join(cuda_archs())}\"'"]
    return ISA_FLAGS.get(platform.machine(), {}).get(suffix(path), [])


def find_nvcc() -> str | None:
    """nvcc, or None when M3_CUDA=0 or there is none. Raises SystemExit when M3_CUDA=1 asks for one in vain."""
    wish = os.environ.get("M3_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"setup: M3_CUDA: want 0, 1 or unset; got {wish!r}")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None and wish == "1":
        raise SystemExit(f"setup: M3_CUDA=1: want nvcc in {f'CUDA_HOME={home}/bin' if home else 'PATH'}; got none")
    return nvcc


def cuda_archs() -> list[str]:
    archs = [arch for arch in os.environ.get("M3_CUDA_ARCHS", CUDA_ARCHS).replace(",", ";").split(";") if arch]
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise SystemExit(f"setup: M3_CUDA_ARCHS: want a list like {CUDA_ARCHS!r}; got {';'.join(archs)!r}")
    if "90" in archs:
        raise SystemExit("setup: M3_CUDA_ARCHS: want 90a (the kernels use wgmma there); got 90")
    return archs


def gencode() -> list[str]:
    """One cubin per target, and PTX of the newest target that is portable (no "a"), for GPUs not named."""
    archs = cuda_archs()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    portable = sorted((arch for arch in archs if arch.isdigit()), key=int)
    return flags + [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in portable[-1:]]


class NinjaBuild(build_ext):
    """Writes build/native/<python>/build.ninja, runs it, copies the modules to where setuptools wants them."""

    def build_extensions(self) -> None:
        import ninja

        sanitize = os.environ.get("M3_SANITIZE", "")
        kind = "".join(letter if letter.isalnum() else "-" for letter in sanitize)
        folder = ROOT / "build" / "native" / f"{sysconfig.get_config_var('SOABI')}{kind and '-' + kind}"
        folder.mkdir(parents=True, exist_ok=True)
        modules = {ext.name: folder / Path(self.get_ext_filename(ext.name)).name for ext in self.extensions}
        (folder / "build.ninja").write_text(ninja_file(folder, modules, sanitize))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        program = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja") or "ninja"
        status = subprocess.run([program, "-C", str(folder), *jobs], check=False).returncode
        if status:
            raise SystemExit(f"setup: ninja failed with status {status}; the compiler's message is above")
        for name, built in modules.items():
            wanted = Path(self.get_ext_fullpath(name))
            wanted.parent.mkdir(parents=True, exist_ok=True)
            fresh = wanted.with_name(wanted.name + ".new")  # renamed: a process that has the old one mapped keeps it
            shutil.copy2(built, fresh)
            fresh.replace(wanted)


def ninja_file(folder: Path, modules: dict[str, Path], sanitize: str) -> str:
    import pybind11

    includes = [f"-I{ROOT / 'csrc'}", f"-isystem {pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
    instrument, optimise = [], ["-O3", "-DNDEBUG"]
    if sanitize:  # calls instead of inlined checks: the unrolled kernels otherwise take gcc more than ten minutes
        instrument = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
        instrument += ["--param", "asan-instrumentation-with-call-threshold=0", "-fno-var-tracking"]
        optimise = ["-O1"]
    nvcc = find_nvcc()
    nvcc_flags = ["-std=c++20", "-O3", "-DNDEBUG", *gencode(), "-Xfatbin=-compress-all", "--cudart=static"]
    nvcc_flags += [
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-fmad=false",
        "--threads=2",
    ]  # fma is written where it is meant
    neon = ["-DM3_NEON"] if any(suffix(path) == "neon" for path in sources(cuda=False)) else []
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"nvcc = {nvcc}",
        f"includes = {' '.join(includes)}",
        f"cxxflags = {' '.join([*CXX_FLAGS, *optimise, *instrument, *neon])}",
        f"nvccflags = {' '.join(nvcc_flags)}",
        f"ldflags = -shared -fopenmp {'' if sanitize else '-s'} {' '.join(instrument)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $extra $includes -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $nvccflags $includes -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $ldflags",
        "rule nvcc_link",
        "  command = $nvcc -shared --cudart=static $in -o $out",
    ]
    for name, module in modules.items():
        cuda = name.endswith("_cuda_ext")
        objects = []
        for path in sources(cuda):
            target = folder / path.relative_to(ROOT).with_suffix(path.suffix + ".o")
            objects.append(escape(target))
            lines.append(f"build {escape(target)}: {'nvcc' if path.suffix == '.cu' else 'cxx'} {escape(path)}")
            lines.append(f"  extra = {' '.join(extra_flags(path))}")
        lines.append(f"build {escape(module)}: {'nvcc_link' if cuda else 'link'} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def extensions() -> list[Extension]:
    if sys.platform != "linux":
        raise SystemExit(f"setup: platform: want Linux (gcc or clang with OpenMP); got {sys.platform}")
    modules = {"m3kernels._cpu_ext": sources(cuda=False)}
    if find_nvcc():
        modules["m3kernels._cuda_ext"] = sources(cuda=True)
    return [Extension(name, [str(path.relative_to(ROOT)) for path in files]) for name, files in modules.items()]


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
