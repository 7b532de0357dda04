"""Is an installed wheel whole? ``check_wheel.py kernels|commands VARIANT WHEEL``, in an environment with it and torch.

kernels: m3kernels alone, which needs torch and nothing else. Looks at what is in the wheel, an INT4 product of the
native room against its fp64 reference, the number of OpenMP runtimes in the process; loads the CUDA kernels, which
must not need a driver. commands: ``m3 --help``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path


def check(good: bool, what: str) -> None:
    if not good:
        raise SystemExit(f"check_wheel: {what}")


def contents(wheel: str, variant: str) -> None:
    libraries = sorted(name for name in zipfile.ZipFile(wheel).namelist() if re.search(r"\.so(\.|$)", name))
    wanted = ["_cpu_ext"] if variant == "cpu" else ["_cpu_ext", "_cuda_ext"]
    found = [name.removeprefix("m3kernels/").partition(".")[0] for name in libraries]
    check(found == wanted, f"libraries: want {wanted}, nothing vendored; got {libraries}")


def kernels(variant: str) -> None:
    import torch

    import m3kernels
    from m3kernels import dispatch, int4
    from m3kernels.int4.reference import gemm64, make_inputs

    check(str(m3kernels.__file__).startswith(sys.prefix), f"want the installed package; got {m3kernels.__file__}")
    x, weight, _ = make_inputs(5, 200, 192, group_size=32)
    found, wanted = int4.int4_gemm(x, weight, activations="exact").double(), gemm64(x, weight, "exact")
    error = float((found - wanted).abs().max() / wanted.abs().max())
    check(error <= 1e-5, f"int4_gemm: want a relative error of at most 1e-5; got {error:.1e}")
    room = dispatch.explain("m3kernels.int4", "int4_dequantize", *int4.ops.flat(weight), torch.float32)[0]
    check(room == ("cpu", ""), f"want the native room; got {room}")
    runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    check(len(runtimes) == 1, f"want one OpenMP runtime in the process; got {sorted(runtimes)}")
    facts = f"torch {torch.__version__}, int4_gemm's error {error:.1e}, OpenMP of {Path(*runtimes).parent.parent.name}"
    if variant == "cu13":
        from m3kernels import _cuda_ext

        facts += f", CUDA targets {_cuda_ext.build_info()['archs']}"
    sys.stdout.write(facts + "\n")


def commands() -> None:
    done = subprocess.run([f"{sys.prefix}/bin/m3", "--help"], capture_output=True, text=True, check=False)
    check(done.returncode == 0 and "quantize" in done.stdout, f"m3 --help: {done.stdout[-500:]}{done.stderr[-2000:]}")
    sys.stdout.write("m3 --help\n")


if __name__ == "__main__":
    part, variant, wheel = sys.argv[1:]
    if part == "kernels":
        contents(wheel, variant)
        kernels(variant)
    else:
        commands()
