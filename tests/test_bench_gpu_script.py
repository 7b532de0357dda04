"""bench/gpu.sh on machines that are folders: what it skips, in which order it runs, what a failure stops."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("build", "tests", "sanitize", "int4", "peers", "moe", "spec_decode", "policy_loss")
PYTHON_STUB = """#!/bin/bash
case "$1" in -) exec {python} "$@" ;; esac
echo "$PYTHONPATH" > {folder}/pythonpath
echo "$*" >> {folder}/calls
case "$*" in {failing}) exit 1 ;; esac
"""
SMI_STUB = """#!/bin/bash
case "$*" in *compute_cap*) echo 9.0 ;; *) echo "NVIDIA H100 80GB HBM3" ;; esac
"""


class Machine:
    """A folder of stand-ins for nvidia-smi, python and compute-sanitizer, and what gpu.sh does there."""

    def __init__(self, folder: Path, *, gpu: bool = True, failing: str = "nothing") -> None:
        self.folder, self.gpu = folder, gpu
        self.stub("python", PYTHON_STUB.format(python=sys.executable, folder=folder, failing=failing))
        self.stub("compute-sanitizer", f'#!/bin/bash\necho "sanitizer $*" >> {folder}/calls\n')
        self.stub("nvidia-smi", SMI_STUB if gpu else "#!/bin/bash\nexit 9\n")

    def stub(self, name: str, text: str) -> None:
        (self.folder / "bin").mkdir(exist_ok=True)
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        places = {"OUT": str(self.folder / "out"), "STATE": str(self.folder / "state"), "PYTHON": "python"}
        variables = {**os.environ, "PATH": path, **places, **environment}
        variables.pop("SECTIONS", None) if "SECTIONS" not in environment else None
        run = ["bash", str(ROOT / "bench" / "gpu.sh"), *words]
        return subprocess.run(run, env=variables, capture_output=True, text=True, check=False, timeout=60)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if not line.startswith("-c ")]


def test_the_script_is_bash():
    assert subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=False).returncode == 0


def test_without_a_gpu_every_section_is_skipped_aloud(tmp_path):
    machine = Machine(tmp_path, gpu=False)
    done = machine.run()
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert [line.split(": ")[1] for line in lines[:-1]] == list(SECTIONS)
    assert all(": skipped: no CUDA GPU here" in line for line in lines[:-1])
    assert machine.calls == []


def test_sections_run_in_order_and_tests_come_first(tmp_path):
    machine = Machine(tmp_path)
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [
        ("build", "setup.py -q build_ext --inplace"),
        ("report", "-m m3kernels"),
        *(
            (f"tests {name}", f"tests/kernels/test_{name}")
            for name in ("int4", "spec_decode", "policy_loss", "decoder")
        ),
        ("memcheck", "sanitizer --tool memcheck"),
        ("racecheck", "sanitizer --tool racecheck"),
        ("int4", "-m bench int4 --device cuda --preset gpu --out"),
        ("moe", "-m bench int4 --device cuda --preset gpu_moe --out"),
        ("spec_decode", "-m bench spec_decode --device cuda --out"),
        ("policy_loss", "-m bench policy_loss --device cuda --out"),
        ("goals", "-m bench goals --results"),
    ]
    assert len(machine.calls) == len(kinds)
    for call, (_, text) in zip(machine.calls, kinds, strict=True):
        assert text in call
    assert "for sm_90a" in done.stdout
    assert "peers: skipped: none of gemlite, humming, vllm can be imported" in done.stdout


def test_a_family_whose_tests_fail_is_not_measured(tmp_path):
    machine = Machine(tmp_path, failing="*tests/kernels/test_int4*")
    done = machine.run("tests", "int4", "moe", "spec_decode")
    assert done.returncode == 1
    assert "tests: FAILED: int4" in done.stdout
    for section in ("int4", "moe"):
        assert f"{section}: skipped: the GPU tests of int4 did not pass" in done.stdout
    measured = [call for call in machine.calls if call.startswith("-m bench") and "goals" not in call]
    assert [call.split()[2] for call in measured] == ["spec_decode"]


def test_tests_that_passed_on_these_sources_are_not_run_again(tmp_path):
    machine = Machine(tmp_path)
    first, second = machine.run("moe"), machine.run(SECTIONS="int4")
    assert first.returncode == second.returncode == 0
    assert sum("-m pytest" in call for call in machine.calls) == 1
    assert "int4: passed before on these sources" in second.stdout
    assert any("--preset gpu --out" in call for call in machine.calls)


def test_a_bench_that_fails_fails_the_run(tmp_path):
    done = Machine(tmp_path, failing="*bench*spec_decode*").run("spec_decode", "policy_loss")
    assert done.returncode == 1
    assert "spec_decode: FAILED" in done.stdout and "policy_loss: FAILED" not in done.stdout


def test_an_unknown_section_is_refused(tmp_path):
    done = Machine(tmp_path).run("nope")
    assert done.returncode == 2
    assert "section: want names of" in done.stderr


def test_the_sections_are_listed_with_limits_inside_ten_minutes(tmp_path):
    lines = Machine(tmp_path).run("--list").stdout.splitlines()
    limits = {line.split()[0]: int(line.split()[1]) for line in lines}
    assert list(limits)[: len(SECTIONS)] == list(SECTIONS)
    assert sum(limits[name] for name in SECTIONS) <= 600
    assert Machine(tmp_path).run("--help").stdout.startswith("Build for this machine's GPU")


def test_peers_are_unpacked_to_the_python_path(tmp_path):
    peers = tmp_path / "peers"
    (peers / "plain" / "third").mkdir(parents=True)
    with zipfile.ZipFile(peers / "first-1.0-py3-none-any.whl", "w") as wheel:
        tool = zipfile.ZipInfo("first-1.0.data/scripts/tool")
        tool.external_attr = 0o100755 << 16
        wheel.writestr(tool, "#!/bin/sh\n")
        wheel.writestr("first/__init__.py", "")
    (tmp_path / "second-1.0" / "second").mkdir(parents=True)
    with tarfile.open(peers / "second-1.0.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "second-1.0", "second-1.0")
    machine = Machine(tmp_path)
    assert machine.run("sanitize", PEERS=str(peers)).returncode == 0
    places = (tmp_path / "pythonpath").read_text().strip().split(":")
    found = {name for place in places for name in ("first", "second", "third") if (Path(place) / name).is_dir()}
    assert found == {"first", "second", "third"}
    tool_path = tmp_path / "state" / "peers" / "first-1.0-py3-none-any.whl" / "first-1.0.data" / "scripts" / "tool"
    assert os.access(tool_path, os.X_OK)
