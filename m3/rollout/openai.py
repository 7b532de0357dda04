"""Chat models behind OpenAI-compatible servers: one endpoint (OpenAIChat), or several with a sticky choice
(EndpointPool: calls that share a prefix go where that prefix is in the cache).

Retries, their backoff and the reading of Retry-After are the official client's.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import openai

from m3.rollout.chat import Budget, ChatClient, ChatError, ChatMessages, Failure, Reply, Usage
from m3kernels.checks import refuse

LOG = logging.getLogger("m3.rollout")
TIMEOUT = 120.0  # seconds of one attempt; ours: a long answer of a large model
MAX_RETRIES = 3  # ours: with the client's backoff about four seconds of waiting
CONCURRENCY = 16  # ours: calls under way at once
NO_KEY = "none"  # what is sent to servers that want no key; the official client insists on one
REST = 30.0  # seconds for which an endpoint that could not be reached is passed over; ours
TIMEOUTS = (408, 504)  # statuses of servers that gave up waiting
NOT_REFUSALS = (409, 429)  # and every 5xx: the server could not now, rather than would not


class OpenAIChat:
    """A model behind an OpenAI-compatible server; a ChatClient for one event loop.

    A call lasts at most ``(max_retries + 1) * timeout`` seconds and the backoffs. Where a server refuses a
    ``json_schema`` but takes the same call without, the schema is left out from then on, and a warning says so once.

    Args:
        base_url: with its version: "http://127.0.0.1:8000/v1".
        api_key: None: the environment's OPENAI_API_KEY, and no key where there is none.
        timeout: seconds of one attempt.
        max_retries: further attempts after a timeout, a lost connection, 408, 409, 429 and 5xx.
        concurrency: calls under way at once; others wait here.
        budget: counts calls (not attempts) and tokens; shared with whom it is given to.
        headers: sent with every call.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        max_retries: int = MAX_RETRIES,
        concurrency: int = CONCURRENCY,
        budget: Budget | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise refuse("OpenAIChat", "base_url", "http://... or https://...", repr(base_url))
        if not model:
            raise refuse("OpenAIChat", "model", "the model's name as the server knows it", repr(model))
        if timeout <= 0:
            raise refuse("OpenAIChat", "timeout", "seconds above 0", timeout)
        if concurrency < 1:
            raise refuse("OpenAIChat", "concurrency", "at least 1", concurrency)
        self.base_url = base_url
        self.budget = budget
        self._model = model
        self._room = asyncio.Semaphore(concurrency)
        self._refused_schemas: set[str] = set()
        options: dict[str, Any] = {} if api_key is None else {"api_key": api_key}
        settings: dict[str, Any] = {"base_url": base_url, "timeout": timeout, "max_retries": max_retries}
        try:
            self._client = openai.AsyncOpenAI(**settings, **options, default_headers=headers)
        except openai.OpenAIError:
            if api_key is not None:
                raise
            self._client = openai.AsyncOpenAI(**settings, api_key=NO_KEY, default_headers=headers)

    @property
    def model(self) -> str:
        return self._model

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def chat(
        self,
        messages: ChatMessages,
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
    ) -> Reply:
        """As ChatClient.chat.

        Raises:
            ChatError: timeout; unreachable (no connection, 409, 429, 5xx, or an answer that is no chat completion);
                refused (every other 4xx); over_budget.
        """
        request: dict[str, Any] = {
            "model": self._model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            request["seed"] = seed
        if stop:
            request["stop"] = list(stop)
        async with self._room:
            if self.budget is not None:
                self.budget.take()
            try:
                reply = _read(await self._create(request, json_schema))
            except UnicodeEncodeError:  # of what was to be sent: the caller's
                raise
            except (
                openai.OpenAIError,
                ValueError,
                RecursionError,
            ) as error:  # the last two: of reading a strange answer
                raise self._failed(error) from error
            if self.budget is not None:
                self.budget.add(reply.usage)
            return reply

    async def _create(self, request: dict[str, Any], schema: Mapping[str, Any] | None) -> Any:
        """The server's answer, held to a schema where the server can."""
        key = "" if schema is None else json.dumps(schema, sort_keys=True, default=dict)  # any Mapping, at any depth
        if schema is None or key in self._refused_schemas:
            return await self._client.chat.completions.create(**request)
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": json.loads(key), "strict": True},
        }
        try:
            return await self._client.chat.completions.create(**request, response_format=form)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            answer = await self._client.chat.completions.create(**request)
            if key not in self._refused_schemas:
                self._refused_schemas.add(key)
                LOG.warning("%s (%s) refuses a json_schema: going on without", self.base_url, self._model)
            return answer

    def _failed(self, error: Exception) -> ChatError:
        where = f"{self.base_url} ({self._model})"
        if isinstance(error, openai.APITimeoutError):
            return ChatError(Failure.timeout, f"{where}: no answer in {self._client.timeout} s, after every retry")
        if isinstance(error, openai.APIStatusError):
            status = error.status_code
            if status in TIMEOUTS:
                failure = Failure.timeout
            elif status in NOT_REFUSALS or status >= 500:
                failure = Failure.unreachable
            else:
                failure = Failure.refused
            return ChatError(failure, f"{where}: status {status}: {error.message}"[:500])
        return ChatError(Failure.unreachable, f"{where}: {error}"[:500])


def _read(answer: Any) -> Reply:
    """What a chat completion says; the first choice. Counts that are no whole numbers are unknown.

    Raises:
        ChatError: unreachable: it is no chat completion.
    """
    choices = getattr(answer, "choices", None)
    choice: Any = choices[0] if isinstance(choices, list) and choices else None
    message: Any = getattr(choice, "message", None)
    if not hasattr(message, "content"):
        raise ChatError(Failure.unreachable, f"want a chat completion; got {type(answer).__name__} without a choice")
    text = message.content or getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        raise ChatError(Failure.unreachable, f"want a chat completion; got content that is a {type(text).__name__}")
    usage, finish_reason, model = answer.usage, choice.finish_reason, answer.model
    details = getattr(usage, "prompt_tokens_details", None)
    return Reply(
        text=text.encode(errors="replace").decode(),  # half a character ("\ud83d") could not be written down
        finish_reason=finish_reason if isinstance(finish_reason, str) and finish_reason else "stop",
        usage=Usage(
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            cached_tokens=_count(details, "cached_tokens"),
        ),
        model=model if isinstance(model, str) else "",
    )


def _count(counts: Any, name: str) -> int | None:
    value = getattr(counts, name, None)
    return value if type(value) is int and value >= 0 else None


class EndpointPool:
    """Several endpoints of one model as one ChatClient: calls with the same key go to the same endpoint.

    The choice is by rendezvous hashing: an endpoint more or less moves only its own share of the keys. An endpoint
    that cannot be reached is passed over for ``rest`` seconds, and the call goes to the key's next one.

    Args:
        clients: their order means nothing; each is told apart by ``names``.
        names: by default the clients' base_url.
        rest: seconds.
    """

    def __init__(
        self, clients: Sequence[ChatClient], *, names: Sequence[str] | None = None, rest: float = REST
    ) -> None:
        if not clients:
            raise refuse("EndpointPool", "clients", "one or more", "none")
        found = [str(getattr(client, "base_url", client.model)) for client in clients] if names is None else list(names)
        if len(set(found)) != len(clients) or len(found) != len(clients):
            raise refuse("EndpointPool", "names", "one for each client, each once", ", ".join(found))
        self._clients = dict(zip(found, clients, strict=True))
        self._rest = rest
        self._resting: dict[str, float] = {}  # until when

    @property
    def model(self) -> str:
        return next(iter(self._clients.values())).model

    def order(self, key: str) -> list[str]:
        """The names of the endpoints for a key, the preferred one first."""
        weight = {name: hashlib.sha256(f"{name}\n{key}".encode()).digest() for name in self._clients}
        return sorted(weight, key=weight.__getitem__, reverse=True)

    def of(self, key: str) -> Endpoint:
        """The client for all the calls of a conversation."""
        return Endpoint(self, key)

    async def chat(self, messages: ChatMessages, **options: Any) -> Reply:
        """As ChatClient.chat; the key is the first message of a user: whoever knows better says ``of(key).chat``."""
        first = next((message["content"] for message in messages if message["role"] == "user"), "")
        return await self.call(first, messages, options)

    async def call(self, key: str, messages: ChatMessages, options: Mapping[str, Any]) -> Reply:
        """The answer of the first endpoint of a key's order that can be reached.

        Raises:
            ChatError: none could be reached, or the first that could did not answer.
        """
        now = time.monotonic()
        order = self.order(key)
        awake = [name for name in order if self._resting.get(name, 0.0) <= now]
        last: ChatError | None = None
        for name in awake or order:
            try:
                reply = await self._clients[name].chat(messages, **options)
            except ChatError as error:
                if error.failure is not Failure.unreachable:
                    raise
                last = error
                self._resting[name] = time.monotonic() + self._rest
                LOG.warning("%s cannot be reached: passed over for %g s", name, self._rest)
            else:
                self._resting.pop(name, None)
                return reply
        assert last is not None, "there is an endpoint"
        raise last

    async def close(self) -> None:
        """Close the connections of all."""
        for client in self._clients.values():
            if isinstance(client, OpenAIChat):
                await client.close()


class Endpoint:
    """A pool as the client of one conversation."""

    def __init__(self, pool: EndpointPool, key: str) -> None:
        self._pool, self._key = pool, key

    @property
    def model(self) -> str:
        return self._pool.model

    async def chat(self, messages: ChatMessages, **options: Any) -> Reply:
        """As ChatClient.chat."""
        return await self._pool.call(self._key, messages, options)
