"""Several streams as one, each item with the number of its stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item]]) -> AsyncGenerator[tuple[int, Item]]:
    """(number, item) as items come. The first error of a stream is raised; then, and when this one is closed, all of
    them are closed."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Item]] = asyncio.Queue(maxsize=len(streams))

    async def forward(number: int) -> None:
        async with contextlib.aclosing(streams[number]) as stream:
            async for item in stream:
                await queue.put((number, item))

    tasks = {asyncio.create_task(forward(number)) for number in range(len(streams))}
    left = set(tasks)
    getting = asyncio.create_task(queue.get())
    try:
        while left or not queue.empty() or getting.done():
            await asyncio.wait({getting, *left}, return_when=asyncio.FIRST_COMPLETED)
            if getting.done():
                yield getting.result()
                getting = asyncio.create_task(queue.get())
            for done in [task for task in left if task.done()]:
                done.result()
                left.discard(done)
    finally:
        for task in (getting, *tasks):
            task.cancel()
        await asyncio.gather(getting, *tasks, return_exceptions=True)
