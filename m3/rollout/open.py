"""Open a chat model by one word of the command line."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from m3.rollout.chat import Budget, ChatClient
from m3.text.jsonl import read_values
from m3kernels.checks import refuse

FORMS = "'http://host:port/v1#model' (several URLs with commas), 'embedded:MODEL' or 'scripted:FILE'"


@contextlib.asynccontextmanager
async def open_chat(
    spec: str,
    *,
    api_key: str | None = None,
    timeout: float | None = None,
    max_retries: int | None = None,
    concurrency: int | None = None,
    budget: Budget | None = None,
    headers: Mapping[str, str] | None = None,
    weights: str = "fp32",
    draft: str | Path | None = None,
) -> AsyncGenerator[ChatClient]:
    """``async with open_chat(spec) as client``: a chat model, closed at the end.

    Args:
        spec: ``http://host:port/v1#model``: an OpenAI-compatible server, or several of one model:
            ``http://a/v1,http://b/v1#model``; ``embedded:MODEL``: the engine in this process, over a checkpoint
            folder or a model's name; ``scripted:FILE``: one reply a line, each a JSON string, over and over.
        api_key, max_retries, concurrency, headers: of servers; None: as OpenAIChat has them.
        timeout: seconds of a call (of an attempt, for servers).
        weights, draft: of the embedded engine, as in m3.engine.open.open_core.

    Raises:
        ValueError: no such form; a script that is empty or no JSON.
        OSError: no such file.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("http", "https"):
        from m3.rollout.openai import CONCURRENCY, MAX_RETRIES, TIMEOUT, EndpointPool, OpenAIChat

        urls, _, model = spec.partition("#")
        if not model:
            raise refuse("open_chat", "spec", "the model after '#': http://host:port/v1#model", repr(spec))
        clients = [
            OpenAIChat(
                url,
                model,
                api_key=api_key,
                timeout=TIMEOUT if timeout is None else timeout,
                max_retries=MAX_RETRIES if max_retries is None else max_retries,
                concurrency=CONCURRENCY if concurrency is None else concurrency,
                budget=budget,
                headers=headers,
            )
            for url in urls.split(",")
        ]
        async with contextlib.AsyncExitStack() as stack:
            for client in clients:
                await stack.enter_async_context(client)
            yield clients[0] if len(clients) == 1 else EndpointPool(clients)
    elif kind == "embedded" and rest:
        from m3.engine.engine import AsyncEngine
        from m3.rollout.engine import TIMEOUT as ENGINE_TIMEOUT
        from m3.rollout.engine import EngineChat

        engine = await asyncio.to_thread(AsyncEngine.from_model, rest, weights=weights, draft=draft)
        async with engine:
            yield EngineChat(engine, rest, timeout=ENGINE_TIMEOUT if timeout is None else timeout, budget=budget)
    elif kind == "scripted" and rest:
        from m3.rollout.scripted import ScriptedChat

        yield ScriptedChat(read_replies(Path(rest)), model=spec, repeat=True, budget=budget)
    else:
        raise refuse("open_chat", "spec", FORMS, repr(spec))


def read_replies(file: Path) -> list[str]:
    """Replies of a script, one JSON string a line; empty lines are left out.

    Raises:
        ValueError: names file and line.
    """
    replies = []
    for place, reply in read_values(file):
        if not isinstance(reply, str):
            raise ValueError(f"{place}: want a JSON string; got {type(reply).__name__}")
        replies.append(reply)
    if not replies:
        raise ValueError(f"{file}: want one reply or more, one a line; got none")
    return replies
