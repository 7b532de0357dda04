"""One sequence inside the engine: how it is sampled (SamplingParams), where it stands (Request), its events."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from m3.engine.grammars import Grammar
from m3kernels.checks import refuse

Reason = Literal["stop", "length", "abort", "deadline", "error"]
LOGPROBS = ("none", "raw", "sampling")
MAX_TOP_LOGPROBS = 64


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _biased(token: object, bias: object) -> bool:
    return isinstance(token, int) and _integer(token) and token >= 0 and _number(bias) and -100 <= bias <= 100  # type: ignore[operator]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn, and when to stop. The same prompt, parameters and seed give the same tokens, always.

    temperature: 0 is greedy. top_k: 0 is none. top_p, min_p: as in m3kernels.spec_decode.tree_verify, in that order.
    seed: None lets the engine draw one; any int64. max_tokens: new tokens.
    stop: text that ends the answer and is not part of it. stop_token_ids: tokens that end it and are not part of it,
        beside the model's own end tokens, which ignore_eos turns off. keep_end: the token that ends the answer is part
        of it after all, with its log-probability: a trainer teaches a policy to stop through it.
    logprobs: of the tokens drawn: "raw" under softmax(logits), "sampling" under the law after temperature and filters.
    top_logprobs: the likeliest tokens at every position, under softmax(logits). prompt_logprobs: of every prompt token
        but the first, under softmax(logits). top_prompt_logprobs: with prompt_logprobs, the likeliest tokens there.
    repetition_penalty: for tokens of the prompt or the answer so far: logit / p where it is positive, else logit * p.
    frequency_penalty, presence_penalty: for tokens of the answer so far: logit -= count * frequency + presence.
    logit_bias: (token, -100..100): added to its logit. These act in this order; softmax(logits) is without them.
    min_tokens: end tokens and stop_token_ids are not drawn before so many others were.
    grammar: of Engine.grammars: the answer is a text of it. Where it is complete only an end token may follow, whatever
        min_tokens and ignore_eos say.
    deadline: seconds from arrival after which the request ends with what it has.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    keep_end: bool = False
    logprobs: str = "none"
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    top_prompt_logprobs: int = 0
    deadline: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        op = "SamplingParams"
        if not _number(self.temperature) or not (self.temperature == 0 or 1e-6 <= self.temperature < 100):
            raise refuse(op, "temperature", "0, or 1e-6 <= temperature < 100", self.temperature)
        if not _integer(self.top_k) or not 0 <= self.top_k < 2**31:
            raise refuse(op, "top_k", "an int, 0 for none", self.top_k)
        if not _number(self.top_p) or not 1e-6 <= self.top_p <= 1:  # smaller ones are 0 in fp32
            raise refuse(op, "top_p", "1e-6 <= top_p <= 1", self.top_p)
        if not _number(self.min_p) or not 0 <= self.min_p <= 1:
            raise refuse(op, "min_p", "0 <= min_p <= 1", self.min_p)
        if self.seed is not None and (not _integer(self.seed) or not -(2**63) <= self.seed < 2**63):
            raise refuse(op, "seed", "an int64, or None", self.seed)
        if not _integer(self.max_tokens) or self.max_tokens < 1:
            raise refuse(op, "max_tokens", "an int of at least 1", self.max_tokens)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise refuse(op, "stop", "a tuple of non-empty strings", repr(self.stop)[:200])
        if not isinstance(self.stop_token_ids, tuple) or not all(map(_integer, self.stop_token_ids)):
            raise refuse(op, "stop_token_ids", "a tuple of ints", repr(self.stop_token_ids)[:200])
        if self.logprobs not in LOGPROBS:
            raise refuse(op, "logprobs", ", ".join(map(repr, LOGPROBS)), self.logprobs)
        if not _integer(self.top_logprobs) or not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise refuse(op, "top_logprobs", f"an int in 0..{MAX_TOP_LOGPROBS}", self.top_logprobs)
        if self.deadline is not None and (not _number(self.deadline) or not 0 < self.deadline < float("inf")):
            raise refuse(op, "deadline", "seconds above 0, or None", self.deadline)
        if not _integer(self.top_prompt_logprobs) or not 0 <= self.top_prompt_logprobs <= MAX_TOP_LOGPROBS:
            raise refuse(op, "top_prompt_logprobs", f"an int in 0..{MAX_TOP_LOGPROBS}", self.top_prompt_logprobs)
        if self.top_prompt_logprobs and not self.prompt_logprobs:
            raise refuse(op, "top_prompt_logprobs", "0 without prompt_logprobs", self.top_prompt_logprobs)
        self._check_adjustments(op)

    def _check_adjustments(self, op: str) -> None:
        for name, value in (("frequency", self.frequency_penalty), ("presence", self.presence_penalty)):
            if not _number(value) or not -2 <= value <= 2:
                raise refuse(op, f"{name}_penalty", "a number in -2..2", value)
        if not _number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise refuse(op, "repetition_penalty", "a number above 0", self.repetition_penalty)
        pairs = self.logit_bias if isinstance(self.logit_bias, tuple) else (None,)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and _biased(*pair) for pair in pairs):
            raise refuse(op, "logit_bias", "a tuple of (token, -100..100)", repr(self.logit_bias)[:200])
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise refuse(op, "logit_bias", "every token once", repr(self.logit_bias)[:200])
        if not _integer(self.min_tokens) or not 0 <= self.min_tokens <= self.max_tokens:
            raise refuse(op, "min_tokens", f"an int in 0..{self.max_tokens} (max_tokens)", self.min_tokens)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise refuse(op, "grammar", "a Grammar of Engine.grammars, or None", repr(self.grammar)[:200])


def choices(params: SamplingParams, n: int) -> list[SamplingParams]:
    """Parameters of n answers to one prompt: seeds seed, seed + 1, ..., modulo 2**64; None stays None."""
    if not _integer(n) or n < 1:
        raise refuse("choices", "n", "an int of at least 1", n)
    if params.seed is None:
        return [params] * n
    seeds = [(params.seed + index + 2**63) % 2**64 - 2**63 for index in range(n)]
    return [dataclasses.replace(params, seed=seed) for seed in seeds]


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """One sequence. The scheduler owns ``pages``, ``computed`` and ``state``; the core appends to ``tokens``."""

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    arrival: float  # seconds on the engine's clock
    tokens: list[int]  # the prompt, then what was drawn
    computed: int = 0  # tokens whose keys are in the cache
    pages: list[int] = dataclasses.field(default_factory=list)
    state: Literal["waiting", "running", "finished"] = "waiting"
    finish_reason: Reason | None = None
    cached: int = 0  # prompt tokens that another request had computed

    @property
    def drawn(self) -> int:
        return len(self.tokens) - len(self.prompt)


# -- events: what a step of the core returns --------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """New tokens of a request, and the version of the weights that they were drawn with."""

    id: str
    tokens: list[int]
    version: int
    logprobs: list[float] | None = None  # nats
    top_logprobs: list[list[tuple[int, float]]] | None = None  # best first
    drafted: int = 0  # nodes that were verified for them beside the root
    accepted: int = 0  # of these tokens, that were nodes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """log p(prompt[i] | prompt[:i]) for i = 1.., nats; once a request, before its first Tokens."""

    id: str
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None = None  # best first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of a request."""

    id: str
    reason: Reason
    error: str | None = None
    cached_tokens: int = 0
    drafted: int = 0  # nodes that were verified in its last step, where no token came of it


Event = Tokens | PromptLogprobs | Finished
