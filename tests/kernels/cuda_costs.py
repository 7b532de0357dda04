"""What the CUDA kernels cost on a target, read from the machine code: registers, local memory, and its instructions.

    python tests/kernels/cuda_costs.py 80 90a 100a 120a > tests/kernels/cuda_budget.json

Needs nvcc; reads cubins with the cuobjdump and nvdisasm that Triton carries. No GPU and no driver. Where the CUDA
module was built from these very sources for that target, its objects hold the cubins; else they are compiled.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG", "-fmad=false", f"-I{ROOT / 'csrc'}"]  # as in setup.py
ARCHS = ("80", "90a", "100a", "120a")
COUNTED = ("HGMMA", "HMMA", "LDG.128", "LDGSTS", "UBLKCP", "LDSM", "LDL", "STL")  # LDG.128: with any other suffix
NO_KERNELS = "cuda_info.cu"


class Cost(NamedTuple):
    """Of one kernel: registers a thread, bytes of local memory a thread (spills, stack), and counted instructions."""

    registers: int
    local: int
    instructions: dict[str, int]  # of COUNTED; those that occur


def nvcc() -> str | None:
    return shutil.which("nvcc")


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def sources() -> list[Path]:
    return [path for path in sorted((ROOT / "csrc").glob("*/*.cu")) if path.name != NO_KERNELS]


@functools.cache
def built(arch: str) -> dict[str, Path]:
    """{source: cubin} out of the objects of the CUDA module; empty where one is missing, older, or of other targets."""
    objects = ROOT / "build" / "native" / str(sysconfig.get_config_var("SOABI"))
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").glob("*/*.[ch]*"))
    folder = ROOT / "build" / "cuda_cubins" / arch / "built"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = {}
    for path in sources():
        source = path.relative_to(ROOT)
        object_ = objects / f"{source}.o"
        if not object_.is_file() or object_.stat().st_mtime < newest:
            return {}
        command = [tool("cuobjdump"), "-xelf", f"sm_{arch}", str(object_)]
        subprocess.run(command, cwd=folder, capture_output=True, check=False)  # without that target it fails
        cubins = [*folder.glob(f"{path.name}.*.cubin")]
        if len(cubins) != 1:
            return {}
        place = folder / f"{path.parent.name}_{path.stem}.cubin"
        found[str(source)] = cubins[0].rename(place)
    return found


_begun: dict[str, subprocess.Popen[bytes]] = {}


def begin(arch: str) -> None:
    """Start compiling beside other tests, one file at a time; ``compiled`` waits for it. Nothing where all is built."""
    if built(arch):
        return
    command, _ = plan(arch)
    with log(arch).open("w") as file:
        _begun[arch] = subprocess.Popen(["nice", *command, "-j", "1"], stdout=file, stderr=file)


def log(arch: str) -> Path:
    return ROOT / "build" / "cuda_cubins" / arch / "begun.log"


def plan(arch: str) -> tuple[list[str], dict[str, Path]]:
    """(the command that compiles what changed since the last time, {source: cubin}) for one target."""
    import ninja

    folder = ROOT / "build" / "cuda_cubins" / arch
    folder.mkdir(parents=True, exist_ok=True)
    cubins = {str(path.relative_to(ROOT)): folder / f"{path.parent.name}_{path.stem}.cubin" for path in sources()}
    lines = [
        "rule nvcc",
        f"  command = {nvcc()} {' '.join(FLAGS)} -gencode=arch=compute_{arch},code=sm_{arch} "
        "-MD -MF $out.d -cubin $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        *(f"build {cubin}: nvcc {ROOT / source}" for source, cubin in cubins.items()),
    ]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return [shutil.which("ninja", path=ninja.BIN_DIR) or "ninja", "-C", str(folder)], cubins


@functools.cache
def compiled(arch: str) -> dict[str, Path]:
    """{source: cubin} for one target."""
    if found := built(arch):
        return found
    said = ""
    if arch in _begun:
        _begun[arch].wait()
        said = log(arch).read_text()
    command, cubins = plan(arch)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"sm_{arch}: a kernel does not compile:\n{done.stdout[-6000:]}"
    said += done.stdout
    assert "Potential Performance Loss" not in said, said[-6000:]
    return cubins


def short(name: str) -> str:
    """A demangled kernel without namespaces, return type and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|m3::(int4|spec_decode|policy_loss)::|m3::", "", name)
    name = name.removeprefix("void ")
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        cast = name[index : index + 1] == "(" and depth
        if letter == "(" and not depth and not cast:
            return name[:index]
    return name


@functools.cache
def costs(arch: str) -> dict[str, Cost]:
    """{"family_file: kernel<...>": Cost} of every kernel, compiled for one target."""
    found = {}
    for source, cubin in compiled(arch).items():
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True)
        code = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True).stdout
        counts = instruction_counts(code)
        for mangled, facts in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage.stdout + usage.stderr):
            numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", facts)}
            plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
            name = f"{source.removeprefix('csrc/').removesuffix('.cu')}: {short(plain)}"
            found[name] = Cost(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], counts.get(mangled, {}))
    return found


def instruction_counts(code: str) -> dict[str, dict[str, int]]:
    """{mangled kernel: {instruction of COUNTED: how often it stands in the code}}."""
    counts: dict[str, Counter[str]] = {}
    kernel = ""
    for line in code.splitlines():
        if re.match(r"\s*\.section\s", line):
            section = re.search(r"\.text\.(\S+?)[,\"]", line)
            kernel = section.group(1) if section else ""
        elif kernel and (found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            name = re.sub(r"^LDG\..*\.128.*", "LDG.128", found.group(1))
            for each in COUNTED:
                if name.startswith(each):
                    counts.setdefault(kernel, Counter())[each] += 1
    return {name: dict(counter) for name, counter in counts.items()}


if __name__ == "__main__":
    table = {
        arch: {name: [cost.registers, cost.local, cost.instructions] for name, cost in sorted(costs(arch).items())}
        for arch in sys.argv[1:] or ARCHS
    }
    text = json.dumps(table, indent=1)
    entry = re.compile(r"\[\n\s+(\d+),\n\s+(\d+),\n\s+(\{[^}]*\})\n\s+\]")
    print(entry.sub(lambda m: f"[{m[1]}, {m[2]}, {' '.join(m[3].split())}]", text))  # noqa: T201
