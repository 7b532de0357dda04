"""Fill a store with the target's own responses: a plan of requests, and whatever serves them.

A plan is a function of the prompts alone: training prompts in their order, each time with the next temperature,
held-out and free prompts greedily. So a stopped run goes on where it was, and more tokens can be asked for later.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from m3.draft.hidden import Probe, StateCache
from m3.draft.prompts import PromptSet
from m3.draft.store import HELD_OUT, OUT_OF_TEMPLATE, TRAIN, Response, Store
from m3.engine.config import EngineConfig
from m3.engine.core import EngineCore
from m3.engine.request import Finished, SamplingParams, Tokens
from m3.models.decoder import Decoder, KvCache
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

Progress = Callable[[int, int], None]  # (response tokens so far, wanted)
ALIVE = 0.75  # share of a batch that still runs, below which its finished rows are dropped from the cache


class Request(NamedTuple):
    """One prompt to respond to; temperature 0 is greedy."""

    prompt: Sequence[int]
    temperature: float
    seed: int
    max_tokens: int


class Generator(Protocol):
    """What can respond: the embedded engine, a server, or the plain loop below."""

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


class DecoderGenerator:
    """Batches over one contiguous cache: prompts of similar length step together, longer ones still reading theirs.

    XX"""

    def __init__(self, model: Decoder, *, batch: int = 96, aux_layers: Sequence[int] = ()) -> None:
        self.model, self.batch = model, batch
        self.probe = Probe(model, aux_layers) if aux_layers else None
        self._states: tuple[Tensor, Tensor] | None = None

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int]]]:
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        with self.probe or contextlib.nullcontext():
            for start in range(0, len(order), self.batch):
                yield from self._together(requests, order[start : start + self.batch])

    def states(self) -> tuple[Tensor, Tensor] | None:
        """Of the reply that was last yielded, with ``aux_layers``: what StateCache.append wants."""
        return self._states

    @torch.inference_mode()
    def _together(self, requests: Sequence[Request], rows: list[int]) -> Iterator[tuple[int, list[int]]]:
        model, stops = self.model, self.model.config.eos_token_ids
        texts = {row: list(requests[row].prompt) for row in rows}
        limits = {row: len(requests[row].prompt) + requests[row].max_tokens for row in rows}
        uniform = {row: _uniform(requests[row]) for row in rows}
        longest = min(max(limits.values()), model.config.max_position_embeddings)
        device = model.embedding.device
        cache = model.new_cache(longest, len(rows))
        notes = _Notes(self.probe, len(rows), longest)
        at = min(len(text) for text in texts.values())  # tokens of each row that the cache is about to hold
        logits = model(torch.tensor([texts[row][:at] for row in rows], device=device), cache)
        done: set[int] = set()
        while True:
            notes.add(logits)
            logits = logits[:, -1]
            waiting = [row in done or len(texts[row]) > at for row in rows]
            tokens = _draw(logits, [(requests[row], uniform[row], at - len(requests[row].prompt)) for row in rows])
            for i, (row, waits, token) in enumerate(zip(rows, waiting, tokens.tolist(), strict=True)):
                if waits:
                    continue
                texts[row].append(token)
                if token in stops or len(texts[row]) >= min(limits[row], longest):
                    done.add(row)
                    self._states = notes.of(i)
                    yield row, texts[row][len(requests[row].prompt) :]
            alive = [i for i, row in enumerate(rows) if row not in done]
            if not alive:
                return
            if len(alive) < ALIVE * len(rows):
                kept = torch.tensor(alive, device=device)
                _keep_rows(cache, kept)
                notes.keep_rows(kept)
                rows = [rows[i] for i in alive]
            following = [texts[row][at] if at < len(texts[row]) else texts[row][-1] for row in rows]
            logits = model(torch.tensor(following, device=device)[:, None], cache)
            at += 1


class _Notes:
    """Hidden states and likeliest tokens of a batch as it goes; nothing without a probe."""

    def __init__(self, probe: Probe | None, rows: int, longest: int) -> None:
        self.probe, self.length = probe, 0
        self.states = torch.empty(rows, longest if probe else 0, probe.width if probe else 0, dtype=torch.float16)
        self.best = torch.empty(rows, longest if probe else 0, dtype=torch.int32)

    def add(self, logits: Tensor) -> None:
        if self.probe is None:
            return
        batch, count = logits.shape[:2]
        span = slice(self.length, self.length + count)
        self.states[:, span] = self.probe.take().view(batch, count, -1)
        self.best[:, span] = logits.argmax(-1)
        self.length += count

    def of(self, row: int) -> tuple[Tensor, Tensor] | None:
        return (self.states[row, : self.length], self.best[row, : self.length]) if self.probe else None

    def keep_rows(self, rows: Tensor) -> None:
        self.states, self.best = self.states[rows.cpu()], self.best[rows.cpu()]


def _keep_rows(cache: KvCache, rows: Tensor) -> None:
    cache.keys, cache.values = cache.keys[:, rows], cache.values[:, rows]
    cache.layers = list(zip(cache.keys, cache.values, strict=True))


def _uniform(request: Request) -> Tensor:
    return torch.rand(request.max_tokens, generator=torch.Generator().manual_seed(request.seed), dtype=torch.float64)


def _draw(logits: Tensor, rows: list[tuple[Request, Tensor, int]]) -> Tensor:
    """(B,) one token a row: the likeliest, or above temperature 0 the inverse of the cumulative law at its number."""
    tokens = logits.argmax(-1)
    warm = [i for i, (request, _, _) in enumerate(rows) if request.temperature > 0]
    if warm:
        heat = torch.tensor([rows[i][0].temperature for i in warm], device=logits.device)
        mass = (logits[warm].float() / heat[:, None]).softmax(-1).cumsum(-1)
        coin = torch.stack([uniform[min(max(at, 0), len(uniform) - 1)] for _, uniform, at in (rows[i] for i in warm)])
        threshold = (coin.to(mass) * mass[:, -1])[:, None]
        tokens[warm] = torch.searchsorted(mass, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens


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
    cache: StateCache | None = None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Generate what the plan wants and the store lacks; hidden states go to ``cache`` where the generator has them."""
    for group, texts, count in (
        (HELD_OUT, prompts.held_out, plan.held_out),
        (OUT_OF_TEMPLATE, prompts.out_of_template, plan.out_of_template),
    ):
        requests = requests_of(group, texts, min(count, len(texts)), plan, tokenizer)
        _serve(store, generator, group, requests, cache, lambda: None)
    most = plan.passes * len(prompts.train)
    count = 0
    while store.tokens(TRAIN) < plan.tokens and count < most:
        count = min(count + plan.round, most)
        requests = requests_of(TRAIN, prompts.train, count, plan, tokenizer)
        _serve(store, generator, TRAIN, requests, cache, lambda: progress(store.tokens(TRAIN), plan.tokens))


def _serve(
    store: Store,
    generator: Generator,
    group: str,
    requests: list[tuple[int, Request]],
    cache: StateCache | None,
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
        states = generator.states() if cache is not None and isinstance(generator, DecoderGenerator) else None
        if cache is not None and states is not None and (group, index) not in cache:
            cache.append(group, index, *states)
        tell()
    store.sync()
