"""What the tests of the engine core share: tiny targets and drafts, requests, a run, a draft that knows the answer."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny_models import make_checkpoint
from torch import Tensor

from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import Draft, EngineCore
from m3.engine.request import Finished, PromptLogprobs, Request, SamplingParams, Tokens
from m3.engine.speculative import Drafter
from m3.models.decoder import Decoder
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.models.loader import load_model
from m3.quantize.round_to_nearest import RoundConfig, quantize_model
from m3kernels.decoder.program import Batch
from m3kernels.spec_decode.types import BITS

ROUNDING = RoundConfig(group_size=32, head=True)
DRAFT_VOCABULARY = 80
SURE, LIKELY = 12.0, 4.0  # added to the logit of what a drafter that knows the answer proposes


# -- models -----------------------------------------------------------------------------------------------------------
def make_target(family: str, weights: str = "fp32") -> Decoder:
    """A new tiny random model: weights "fp32", "bf16" or "int4"."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), family)
        model = load_model(folder, dtype=torch.bfloat16 if weights == "bf16" else torch.float32)
    return quantize_model(model, ROUNDING) if weights == "int4" else model


@cache
def target(family: str, weights: str = "fp32") -> Decoder:
    """The same model in every test: not to be changed."""
    return make_target(family, weights)


def make_draft(model: Decoder, gate: str = "elementwise", *, weights: str = "fp32", **options: Any) -> Draft:
    """A random draft over part of the target's vocabulary."""
    config = GatedEagle3Config.for_target(
        model.config, draft_vocab_size=DRAFT_VOCABULARY, gate=gate, aux_layers=(0, 2, 3)
    )
    config = dataclasses.replace(config, **options)
    draft = GatedEagle3(config, model.embedding.float())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            one = parameter.ndim == 1
            torch.nn.init.normal_(parameter, mean=float(one), std=0.2, generator=generator)
    draft.set_vocabulary(torch.randperm(model.config.vocab_size, generator=generator)[:DRAFT_VOCABULARY])
    return Draft(config=config, tensors=draft.state_dict(), weights=weights)


# -- requests ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Ask:
    """A request before it is made."""

    prompt: list[int]
    params: SamplingParams
    seed: int = 0


@dataclasses.dataclass
class Answer:
    """All events of a request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[list[float]] = dataclasses.field(default_factory=list)
    finished: list[Finished] = dataclasses.field(default_factory=list)

    def take(self, event: Tokens | PromptLogprobs | Finished) -> None:
        assert not self.finished, f"{event} after the last event"
        match event:
            case Tokens():
                self.tokens += event.tokens
                self.versions += [event.version] * len(event.tokens)
                self.logprobs += event.logprobs or []
                self.top += event.top_logprobs or []
            case PromptLogprobs():
                assert not self.tokens, "log-probabilities of the prompt come first"
                self.prompt_logprobs.append(event.logprobs)
            case Finished():
                self.finished.append(event)

    @property
    def reason(self) -> str:
        assert len(self.finished) == 1
        return self.finished[0].reason

    @property
    def drawn(self) -> tuple[object, ...]:
        """What must not depend on how the request was served."""
        return self.tokens, self.reason, self.logprobs, self.top, self.prompt_logprobs


SAMPLERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 1.5, "min_p": 0.02, "logprobs": "sampling"},
    {"logprobs": "raw", "top_logprobs": 3},
)


def asks(count: int, *, seed: int = 0, longest: int = 40, most_tokens: int = 14, **params: Any) -> list[Ask]:
    """Prompts of 1 .. longest tokens, some with a beginning in common, and all kinds of sampling."""
    chance = random.Random(seed)
    shared = [chance.randrange(3, 99) for _ in range(longest)]
    found = []
    for index in range(count):
        tokens = [chance.randrange(3, 99) for _ in range(chance.randint(1, longest))]
        if index % 3 == 1:
            same = chance.randrange(longest)
            tokens = shared[:same] + tokens[: max(1, longest - same)]
        settings = {"max_tokens": chance.randint(1, most_tokens), **SAMPLERS[index % len(SAMPLERS)], **params}
        found.append(Ask(tokens, SamplingParams(**settings), seed * 1000 + index))
    return found


def add(core: EngineCore, ask: Ask, id: str) -> Request:
    request = core.new_request(id, ask.prompt, ask.params, ask.seed)
    core.add(request)
    return request


def drain(core: EngineCore, answers: dict[str, Answer], *, steps: int = 10_000) -> None:
    """Steps until there is no work, with the books checked after each."""
    for _ in range(steps):
        if not core.has_work():
            break
        for event in core.step():
            answers[event.id].take(event)
        core.scheduler.check()


def together(core: EngineCore, cases: Sequence[Ask], *, first: int = 0, stagger: int = 0) -> list[Answer]:
    """The answers to requests ``first`` .. that are all there from the start, or come ``stagger`` at a time, a step."""
    answers = {str(first + index): Answer() for index in range(len(cases))}
    for index, ask in enumerate(cases):
        add(core, ask, str(first + index))
        if stagger and index % stagger == 0:
            drain(core, answers, steps=1)
    drain(core, answers)
    assert_empty(core)
    return list(answers.values())


def one_by_one(core: EngineCore, cases: Sequence[Ask]) -> list[Answer]:
    return [together(core, [ask], first=index)[0] for index, ask in enumerate(cases)]


def assert_empty(core: EngineCore) -> None:
    """No request has left anything behind."""
    core.scheduler.check()
    assert not core.has_work()
    assert core.pool.used == 0
    assert not core._prompt_logprobs
    if core.drafter is not None:
        assert not core.drafter._known


def plain_core(model: Decoder, **config: Any) -> EngineCore:
    return EngineCore(model, EngineConfig(**{"num_pages": 200, **config}))


@dataclasses.dataclass
class Reference:
    """What a plain engine gives, one request at a time and sharing nothing: all else is compared with it."""

    asks: list[Ask]
    answers: list[Answer]
    logits: dict[tuple[str, int], Tensor]  # by request and position
    longer: list[list[int]]  # prompt and answer, past the answer's end

    def truth(self, request: Request) -> list[int]:
        return self.longer[int(request.id)]


@cache
def reference(
    family: str = "llama", weights: str = "fp32", kv_dtype: str = "fp32", *, growing: bool = False
) -> Reference:
    """``growing``: short prompts and long answers, for which a small pool is soon too small."""
    cases = asks(12, longest=6, most_tokens=40) if growing else asks(12)
    core = plain_core(target(family, weights), kv_dtype=kv_dtype, prefix_reuse=False)
    longer = [
        Ask(
            ask.prompt,
            dataclasses.replace(ask.params, max_tokens=ask.params.max_tokens + 12, ignore_eos=True),
            ask.seed,
        )
        for ask in cases
    ]
    whole = [ask.prompt + answer.tokens for ask, answer in zip(longer, one_by_one(core, longer), strict=True)]
    logits = Logits(core, lambda request: whole[int(request.id)])
    return Reference(cases, one_by_one(core, cases), logits.rows, whole)


def drawn(answers: Sequence[Answer]) -> list[tuple[object, ...]]:
    return [answer.drawn for answer in answers]


# -- a draft that knows the answer ------------------------------------------------------------------------------------
class KnowingDrafter(Drafter):
    """The drafter as it is, but the true next token is made likely, by and large, where a path has been right so far.

    It is right with probability ``skill`` at each node, and not always sure: the true path runs through first, second
    and third children.
    """

    def __init__(self, drafter: Drafter, truth: Callable[[Request], Sequence[int]], skill: float = 0.85) -> None:
        super().__init__(drafter.draft, drafter.config, drafter.page_size)
        self.truth, self.skill = truth, skill
        self.chance = random.Random(0)
        self._nodes: list[list[int]] = []

    def _extend(self, requests: Sequence[Request], *, draw: bool) -> list[Tensor]:
        logits, hidden = super()._extend(requests, draw=draw)
        if not draw:
            return [logits, hidden]
        self._nodes = [[] for _ in requests]
        logits = logits.clone()
        for row, request in enumerate(requests):
            self._raise(logits[row], request, [])
        return [logits, hidden]

    def _grow(
        self, requests: Sequence[Request], tokens: Tensor, hidden: Tensor, bits: Tensor, step: int, k: int
    ) -> list[Tensor]:
        logits, hidden = super()._grow(requests, tokens, hidden, bits, step, k)
        logits = logits.clone()
        for b, request in enumerate(requests):
            self._nodes[b] += tokens[b].tolist()
            for j in range(k):
                words = [word & 0xFFFFFFFF for word in bits[b, j].tolist()]
                path = [
                    token for place, token in enumerate(self._nodes[b]) if words[place // BITS] >> (place % BITS) & 1
                ]
                self._raise(logits[b * k + j], request, path)
        return [logits, hidden]

    def _raise(self, row: Tensor, request: Request, path: list[int]) -> None:
        rest = list(self.truth(request)[len(request.tokens) :])
        if path != rest[: len(path)] or len(rest) == len(path) or self.chance.random() > self.skill:
            return
        ids = torch.arange(len(self.draft.d2t)) + self.draft.d2t
        place = (ids == rest[len(path)]).nonzero().flatten()
        row[place] += self.chance.choice((LIKELY, SURE))


def knowing_core(
    model: Decoder,
    draft: Draft,
    config: EngineConfig,
    speculation: Speculation,
    truth: Callable[[Request], Sequence[int]],
    *,
    skill: float = 0.85,
) -> EngineCore:
    core = EngineCore(model, config, draft=draft, speculation=speculation)
    assert core.drafter is not None
    core.drafter = KnowingDrafter(core.drafter, truth, skill)
    return core


def fixed(shape: Shape, **options: Any) -> Speculation:
    return Speculation(shapes=(shape,), adaptive=False, **options)


# -- logits -----------------------------------------------------------------------------------------------------------
class Logits:
    """Keeps the logits of every row of a core whose tokens, ancestors included, are those of ``truth``.

    By (request, position); a row that is computed again must give the same bits.
    """

    def __init__(self, core: EngineCore, truth: Callable[[Request], Sequence[int]]) -> None:
        self.core, self.truth = core, truth
        self.rows: dict[tuple[str, int], Tensor] = {}
        self._run = core.target.program.run
        core.target.program.run = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: Batch, *inputs: Any) -> list[Tensor]:
        outputs = self._run(batch, *inputs)
        starts, keys = batch.cu_seqlens.tolist(), batch.cache_seqlens.tolist()
        pages = self.core.config.page_size
        for out, row in zip(outputs[0], batch.picked.tolist(), strict=True):
            index = next(b for b in range(len(keys)) if starts[b] <= row < starts[b + 1])
            page, at = divmod(int(batch.slots[starts[index]]), pages)
            cached = keys[index] - (starts[index + 1] - starts[index])  # the first row's place in the cache
            assert cached % pages == at
            request = next(
                r for r in self.core.scheduler.running if r.pages[cached // pages : cached // pages + 1] == [page]
            )
            position, truth = int(batch.positions[row]), list(self.truth(request))
            path = self._path(batch, index, row, starts)
            if truth[position + 1 - len(path) : position + 1] == path:
                known = self.rows.setdefault((request.id, position), out.clone())
                assert torch.equal(known, out)
        return outputs

    def _path(self, batch: Batch, index: int, row: int, starts: list[int]) -> list[int]:
        """Tokens of the pass that the row sees, in order, its own last."""
        first = starts[index]
        if index < batch.causal:
            return batch.tokens[first : row + 1].tolist()
        assert batch.mask_bits is not None
        words = [word & 0xFFFFFFFF for word in batch.mask_bits[row - starts[batch.causal]].tolist()]
        nodes = range(starts[index + 1] - first)
        seen = [node for node in nodes if words[node // BITS] >> (node % BITS) & 1]
        return [int(batch.tokens[first + node]) for node in sorted(seen, key=lambda n: int(batch.positions[first + n]))]
