"""Choose the room that serves a call. The folder is the registry: a backend is a file, nothing is listed elsewhere.

A room is a module ``_cpu.py``, ``_triton.py``, ``_cuda.py`` or ``reference.py`` of a family. It holds functions named
like the ops, with the ops' arguments (the first is a tensor, whose device decides), and ``unsupported(op, *args)``: ""
if it can serve the call, else one sentence that says why not.
``M3KERNELS_BACKEND=reference`` or ``int4=triton,policy_loss=cpu`` forces a room by name.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ROOMS = {  # per device type, best first; the only such list
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
    "meta": ("reference",),
}
NAMES = ("cpu", "cuda", "triton", "reference")


class BackendError(RuntimeError):
    """No room can serve this call, or the one asked for by name cannot; the message says why, room by room."""


class Room(NamedTuple):
    name: str
    function: Callable[..., Any] | None
    unsupported: Callable[..., str] | None
    absent: str  # why there is no function; "" if there is one


def forced(family: str) -> str | None:
    """Room that M3KERNELS_BACKEND names for this family, or None."""
    for entry in filter(None, os.environ.get("M3KERNELS_BACKEND", "").split(",")):
        name, _, room = entry.strip().rpartition("=")
        if room not in NAMES:
            raise BackendError(f"M3KERNELS_BACKEND: want one of {', '.join(NAMES)}, or family=room; got {entry!r}")
        if name in ("", family):
            return room
    return None


@functools.cache
def rooms(package: str, op: str, device: str) -> tuple[Room, ...]:
    """The rooms to try for one op on one device type, best first. Cached: the environment is read once per op."""
    choice = forced(package.rpartition(".")[2])
    found = []
    for name in (choice,) if choice else ROOMS.get(device, ("reference",)):
        try:
            module = importlib.import_module(f"{package}.{name if name == 'reference' else '_' + name}")
        except ImportError as error:  # extension not built, no Triton: a reason to report, not a crash
            found.append(Room(name, None, None, str(error)))
            continue
        function = getattr(module, op, None)
        found.append(Room(name, function, module.unsupported, "" if function else f"has no {op}"))
    return tuple(found)


def offered(package: str, function: str, tensor: torch.Tensor) -> Callable[..., Any] | None:
    """The first room's ``function`` for this tensor, or None: for work that is no op, whose bits are those of torch.

    Nothing is refused: where no room offers it, or none of those that M3KERNELS_BACKEND allows, the caller's torch
    serves. So it does for what has no memory to point at: tracing, compiling, tensor subclasses.
    """
    if type(tensor) is not torch.Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return None
    for room in rooms(package, function, tensor.device.type):
        if room.function and room.unsupported and not room.unsupported(function, tensor):
            return room.function
    return None


def explain(package: str, op: str, *args: Any) -> list[tuple[str, str]]:
    """[(room, reason)] in the order tried; an empty reason means that the room can serve the call."""
    return [
        (room.name, room.absent or (room.unsupported(op, *args) if room.unsupported else ""))
        for room in rooms(package, op, args[0].device.type)
    ]


def select(package: str, op: str, *args: Any) -> Callable[..., Any]:
    """First room that accepts these arguments; the reference always does, unless a room was forced.

    Raises:
        BackendError: no room accepts; names every room tried and its reason.
    """
    for _, function, unsupported, _ in rooms(package, op, args[0].device.type):
        if function and unsupported and not unsupported(op, *args):
            return function
    reasons = "; ".join(f"{name}: {why}" for name, why in explain(package, op, *args))
    raise BackendError(f"{package}.{op}: {reasons}")
