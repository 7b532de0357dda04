"""Several coroutines at once, with the first error as it is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """What each gives, in order. The first to fail ends the others, and its error is raised; so does cancelling."""
    try:
        async with asyncio.TaskGroup() as tasks:
            done = [tasks.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in done]
