"""What every test shares: one seed, Triton's interpreter where there is no GPU, and the choice of a room by name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from m3kernels import dispatch

try:
    from m3kernels import _cpu_ext
except ImportError:  # not built
    _cpu_ext = None

WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # None: tests run in one process
if WORKER is not None:
    torch.set_num_threads(1)  # a core for each
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no module above does


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for nvcc comes last."""
    items.sort(key=lambda item: "test_cuda_compiled" in item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With -n, a file's tests run in one process: what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What tests will want compiled, the emulated CUDA module and the cubins, is begun now, on a core left free."""
    if session.config.getoption("collectonly"):
        return
    names = [item.nodeid for item in session.items]
    first = WORKER in (None, "gw0")
    if first and not torch.cuda.is_available() and any("_cuda" in item.path.name for item in session.items):
        import emulated_cuda

        emulated_cuda.begin()
    if WORKER is None and any("test_cuda_compiled" in name and "[90a]" in name for name in names):
        import cuda_costs

        if cuda_costs.nvcc() is not None:
            cuda_costs.begin("90a")


@pytest.fixture(autouse=True)
def seed() -> None:
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same; torch.manual_seed notes the call stack for each kind of device that is not there: a millisecond
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def instruction_set() -> Iterator[None]:
    """Every test leaves the instruction set as it was: those after it, and processes, would have other bits."""
    before = None if _cpu_ext is None else _cpu_ext.get_isa()
    yield
    assert _cpu_ext is None or _cpu_ext.get_isa() == before


@pytest.fixture
def cuda_module() -> Iterator[None]:
    """The CUDA kernels: as built where there is a GPU, else for the emulated device (an H100 with 4 processors)."""
    if torch.cuda.is_available():
        yield
        return
    import emulated_cuda

    with emulated_cuda.installed(emulated_cuda.load(emulated_cuda.build_once())):
        emulated_cuda.configure()
        yield


@contextlib.contextmanager
def forced(room: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("M3KERNELS_BACKEND", room)
    dispatch.rooms.cache_clear()
    yield room
    dispatch.rooms.cache_clear()


@pytest.fixture
def backend_as_built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces the room named by the (indirect) parameter; a room that cannot serve a call then raises BackendError."""
    with forced(request.param, monkeypatch):
        yield request.param


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same; where there is no GPU, CUDA rooms are those of the emulated device."""
    if request.param.rpartition("=")[2] == "cuda":
        request.getfixturevalue("cuda_module")
    with forced(request.param, monkeypatch):
        yield request.param
