"""One torch.library namespace for every op of the package, declared the cheap way (about 3 us a call)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from m3kernels.dispatch import select

LIB = torch.library.Library("m3kernels", "FRAGMENT")


def define(
    package: str,
    schema: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Declare op ``m3kernels::<name>``; its kernel is whichever room of ``package`` can serve the call.

    Returns the ``.default`` overload. Autograd is registered only where ``backward`` is given: it costs 10 us a call.
    """
    name = schema.partition("(")[0]
    LIB.define(schema)
    LIB.impl(name, lambda *args: select(package, name, *args)(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"m3kernels::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"m3kernels::{name}", backward, setup_context=setup_context, lib=LIB)
    return getattr(torch.ops.m3kernels, name).default
