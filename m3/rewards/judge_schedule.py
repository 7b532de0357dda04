"""Which judge's calls go where and when, so that a server's prefix cache serves most of each prompt.

The clauses of one conversation share the conversation. So its first clause is asked alone, and the others at once when
the first is answered and its prefix is cached; and all calls that begin alike go to the same endpoint, told by a hash
of their first block. ``plan`` predicts what that saves before anything is spent. Source: Baichuan-M3, arXiv 2602.06570,
on the rubric verifier ("prefix affinity"); blocks of 16 tokens are those of vLLM.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from m3.rewards.rubric import RubricItem
from m3.rewards.rubric_templates import Template
from m3.rewards.verdict import Verdict
from m3.rollout.chat import ChatMessages, Usage
from m3kernels.checks import refuse

BLOCK_SIZE = 16  # tokens: the block of vLLM's prefix cache
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One answer to judge: the conversation that ends in it, and the clauses."""

    conversation: ChatMessages
    items: Sequence[RubricItem]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What judging will take. Tokens of the chat template around the messages are not counted."""

    calls: int
    prompt_tokens: int
    reusable_tokens: int  # in whole blocks found in the endpoint's cache
    calls_per_endpoint: tuple[int, ...]

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the servers must compute."""
        return self.prompt_tokens - self.reusable_tokens

    @property
    def share(self) -> float:
        """Reusable of all prompt tokens, in [0, 1]; 0 without calls."""
        return self.reusable_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reuse:
    """What judging took. None is "unknown": a server did not say."""

    calls: int
    prompt_tokens: int | None
    cached_tokens: int | None

    @property
    def share(self) -> float | None:
        """Cached of all prompt tokens; None where either is unknown, or nothing was asked."""
        if not self.prompt_tokens or self.cached_tokens is None:
            return None
        return self.cached_tokens / self.prompt_tokens


def conversation_key(conversation: ChatMessages) -> str:
    """A name of all conversations that begin with the same words of the user; those of one name share an endpoint.

    The first block is hashed, not all: the growing turns of one consultation and the rollouts of one prompt stay
    together.
    """
    digest = hashlib.sha256()
    for message in conversation:
        digest.update(f"{message['role']}\0{message['content']}\0".encode())
        if message["role"] == "user":
            break
    return digest.hexdigest()


async def first_then_rest(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Answers in order: the first call alone, the others together after it."""
    if not calls:
        return []
    first = await calls[0]()
    return [first, *await together(calls[1:])]


async def together(calls: Iterable[Callable[[], Awaitable[T]]]) -> list[T]:
    """Answers in order of calls made at once. Where one fails, or this is cancelled, all have ended on return."""
    tasks = [asyncio.ensure_future(call()) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def plan(
    requests: Iterable[Request],
    encode: Callable[[str], Sequence[int]],
    template: Template,
    *,
    block_size: int = BLOCK_SIZE,
    endpoints: int = 1,
) -> Plan:
    """Calls, prompt tokens and how many of them a prefix cache can serve, with requests judged one after another.

    Conversations are spread over the endpoints by their key, evenly, and each endpoint keeps all blocks it has seen. A
    call reuses the whole blocks of its longest prefix in the cache, as it stands when the call is launched; siblings
    are launched together, so they reuse what the first left, not each other. One token of a prompt is always computed.

    Args:
        encode: text to token ids, without special tokens: the judge's tokenizer.
    Raises:
        ValueError: block_size or endpoints below 1.
    """
    for name, number in (("block_size", block_size), ("endpoints", endpoints)):
        if number < 1:
            raise refuse("plan", name, "1 or more", number)
    caches: list[set[bytes]] = [set() for _ in range(endpoints)]
    calls = [0] * endpoints
    prompt_tokens = reusable = 0
    for request in requests:
        place = int(conversation_key(request.conversation), 16) % endpoints
        cache = caches[place]
        calls[place] += len(request.items)
        for wave in (request.items[:1], request.items[1:]):
            seen: list[bytes] = []
            for item in wave:
                messages = template.messages(request.conversation, item)
                ids = [token for message in messages for token in encode(message["content"])]
                blocks = list(_blocks(ids, block_size))
                prompt_tokens += len(ids)
                usable = blocks[: max(0, len(ids) - 1) // block_size]
                reusable += block_size * next((i for i, b in enumerate(usable) if b not in cache), len(usable))
                seen += blocks
            cache.update(seen)
    return Plan(
        calls=sum(calls), prompt_tokens=prompt_tokens, reusable_tokens=reusable, calls_per_endpoint=tuple(calls)
    )


def _blocks(ids: Sequence[int], block_size: int) -> Iterator[bytes]:
    """A name for each whole block that holds all tokens up to its end: two are equal only where prefixes are."""
    digest = hashlib.sha256()
    for end in range(block_size, len(ids) + 1, block_size):
        digest.update(b"".join(int(token).to_bytes(8, "big", signed=True) for token in ids[end - block_size : end]))
        yield digest.digest()[:16]


def achieved(verdicts: Iterable[Verdict]) -> Reuse:
    """What servers said of the calls behind verdicts, to set beside a plan; one that did not say makes it unknown."""
    used = [verdict.usage for verdict in verdicts if verdict.usage is not None]
    total = add_usage(used)
    return Reuse(calls=len(used), prompt_tokens=total.prompt_tokens, cached_tokens=total.cached_tokens)


def add_usage(used: Sequence[Usage]) -> Usage:
    """The sum; a count that one of them does not say is None. Of none: None."""

    def total(counts: list[int | None]) -> int | None:
        known = [count for count in counts if count is not None]
        return sum(known) if counts and len(known) == len(counts) else None

    return Usage(
        prompt_tokens=total([one.prompt_tokens for one in used]),
        completion_tokens=total([one.completion_tokens for one in used]),
        cached_tokens=total([one.cached_tokens for one in used]),
    )
