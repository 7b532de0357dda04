"""Fill a store with the target's own responses: a plan of requests, and whatever serves them.

A plan is a function of the prompts alone: training prompts in their order, each time with the next temperature,
held-out and free prompts greedily. So a stopped run goes on where it was, and more tokens can be asked for later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from m3.draft.prompts import PromptSet
from m3.draft.store import HELD_OUT, OUT_OF_TEMPLATE, TRAIN, Response, Store
from m3.engine.config import EngineConfig
from m3.engine.core import EngineCore
from m3.engine.request import Finished, SamplingParams, Tokens
from m3.models.decoder import Decoder
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

Progress = Callable[[int, int], None]  # (response tokens so far, wanted)


class Request(NamedTuple):
    """One prompt to respond to; temperature 0 is greedy."""

    prompt: Sequence[int]
    temperature: float
    seed: int
    max_tokens: int


class Generator(Protocol):
    """What can respond: the embedded engine, or a server."""

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        """(number of the request, response tokens) of each request, in any order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of what is generated."""

    tokens: int = 150_000  # response tokens to train on, at least
    held_out: int = 48  # prompts
    out_of_template: int = 42  # prompts
    max_tokens: int = 256  # of a response
    temperatures: tuple[float, ...] = (0.0, 0.7, 1.0)
    seed: int = 0
    passes: int = 8  # over the training prompts, at most
    round: int = 480  # training requests between two looks at the token count

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.max_tokens < 1 or not self.temperatures:
            raise refuse("Plan", "tokens, max_tokens, temperatures", "at least one of each", f"{self}"[:200])


class EngineGenerator:
    """The embedded engine: continuous batching over a paged cache."""

    def __init__(self, model: Decoder, *, batch: int = 64) -> None:
        config = EngineConfig(max_running=batch, max_waiting=1 << 20, kv_dtype="fp32", memory_mb=2048)
        self.core = EngineCore(model, config)
        self.ends = frozenset(model.config.eos_token_ids)

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        core = self.core
        texts: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            params = SamplingParams(temperature=request.temperature, max_tokens=request.max_tokens, ignore_eos=True)
            id = str(number)
            core.add(core.new_request(id, request.prompt, params, request.seed))
            texts[id] = []
        try:
            yield from self._replies(texts)
        finally:  # whoever stops listening leaves a core without requests
            for id in texts:
                core.abort(id)
            while texts and core.has_work():
                core.step()

    def _replies(self, texts: dict[str, list[int]]) -> Iterator[tuple[int, list[int]]]:
        core = self.core
        while core.has_work():
            for event in core.step():
                if isinstance(event, Tokens):
                    text = texts[event.id]
                    ended = any(token in self.ends for token in text)
                    text += [] if ended else event.tokens
                    if not ended and any(token in self.ends for token in event.tokens):
                        core.abort(event.id)  # the end token is part of what a draft learns
                elif isinstance(event, Finished):
                    if event.error:
                        raise RuntimeError(f"generate: request {event.id}: {event.error}")
                    text = texts.pop(event.id)
                    stop = next((at for at, token in enumerate(text) if token in self.ends), len(text))
                    yield int(event.id), text[: stop + 1]


def requests_of(
    group: str, prompts: Sequence[str], count: int, plan: Plan, tokenizer: Tokenizer
) -> list[tuple[int, Request]]:
    """The first ``count`` requests of a group, numbered."""
    encoded: dict[str, list[int]] = {}
    found = []
    for index in range(count):
        which, turn = index % len(prompts), index // len(prompts)
        text = prompts[which]
        if text not in encoded:
            encoded[text] = prompt_ids(tokenizer, text)
        kinds = plan.temperatures if group == TRAIN else (0.0,)
        temperature = kinds[(which + turn) % len(kinds)]
        found.append((index, Request(encoded[text], temperature, plan.seed * 1_000_003 + index, plan.max_tokens)))
    return found


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A prompt in the target's chat template, or as it is where there is none."""
    if tokenizer.template is None:
        return tokenizer.encode(text)
    return tokenizer.chat([{"role": "user", "content": text}])


def fill(
    store: Store,
    generator: Generator,
    prompts: PromptSet,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    progress: Progress = lambda done, total: None,
) -> None:
    """Generate what the plan wants and the store lacks."""
    for group, texts, count in (
        (HELD_OUT, prompts.held_out, plan.held_out),
        (OUT_OF_TEMPLATE, prompts.out_of_template, plan.out_of_template),
    ):
        requests = requests_of(group, texts, min(count, len(texts)), plan, tokenizer)
        _serve(store, generator, group, requests, lambda: None)
    most = plan.passes * len(prompts.train)
    count = 0
    while store.tokens(TRAIN) < plan.tokens and count < most:
        count = min(count + plan.round, most)
        requests = requests_of(TRAIN, prompts.train, count, plan, tokenizer)
        _serve(store, generator, TRAIN, requests, lambda: progress(store.tokens(TRAIN), plan.tokens))


def _serve(
    store: Store,
    generator: Generator,
    group: str,
    requests: list[tuple[int, Request]],
    tell: Callable[[], None],
) -> None:
    missing = [(index, request) for index, request in requests if (group, index) not in store]
    for which, tokens in generator.generate([request for _, request in missing]):
        index, request = missing[which]
        store.append(
            Response(
                group=group,
                index=index,
                prompt=tuple(request.prompt),
                response=tuple(tokens),
                temperature=request.temperature,
                seed=request.seed,
            )
        )
        tell()
    store.sync()
