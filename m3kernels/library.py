"""One torch.library namespace for every op of the package, declared the cheap way (about 3 us a call).

Plain eager calls go straight to the room. Behind a kernel that has just streamed megabytes the dispatcher's own code
is cold: it costs 35 us a call, 3 % of a 4096 x 4096 product of one row. Tracing, compiling and tensor subclasses see
the op.
"""

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

    Returns a function of the op's arguments: the op, or in plain eager mode the room itself. Autograd is registered
    only where ``backward`` is given (it costs 10 us a call), and such an op is always called as one.
    """
    name = schema.partition("(")[0]
    LIB.define(schema)
    LIB.impl(name, lambda *args: select(package, name, *args)(*args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"m3kernels::{name}", fake, lib=LIB)
    if backward is not None:
        torch.library.register_autograd(f"m3kernels::{name}", backward, setup_context=setup_context, lib=LIB)
    op = getattr(torch.ops.m3kernels, name).default
    if backward is not None:
        return op

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) is not torch.Tensor or torch._C._len_torch_dispatch_stack():
            return op(*args)
        return select(package, name, *args)(*args)

    return call
