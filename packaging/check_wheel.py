"""Is an installed wheel whole?

    check_wheel.py kernels|commands|serve VARIANT WHEEL        in an environment with it and torch

kernels: m3kernels alone, which needs torch and nothing else. Looks at what is in the wheel, an INT4 product of the
native room against its fp64 reference, the number of OpenMP runtimes in the process; loads the CUDA kernels, which
must not need a driver. commands: ``m3 --help``. serve: the server without a model, its health and its page.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import AsyncIterator
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


class Nobody:
    """A backend (m3.serve.backend) of no model."""

    def models(self) -> tuple[str, ...]:
        return ()

    def failure(self) -> None:
        return None

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        yield


def serve() -> None:
    import uvicorn

    from m3.serve.app import build

    server = uvicorn.Server(uvicorn.Config(build(Nobody(), page=True), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        check(thread.is_alive(), "m3.serve: want a server that starts")
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    for path, wanted in (("/health", "ok"), ("/", "<!doctype html>"), ("/consult/consult.js", "fetch(")):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            check(wanted in answer.read().decode(), f"{path}: want {wanted} in the answer")
    server.should_exit = True
    thread.join(20)
    sys.stdout.write("m3 serve: health, page\n")


if __name__ == "__main__":
    part, variant, wheel = sys.argv[1:]
    if part == "kernels":
        contents(wheel, variant)
        kernels(variant)
    elif part == "commands":
        commands()
    else:
        serve()
