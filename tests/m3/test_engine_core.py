"""EngineCore: log-probabilities, ends of requests, refusals, faults of one request, and nothing left behind."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_cases import (
    Answer,
    Ask,
    KnowingDrafter,
    add,
    asks,
    assert_empty,
    drain,
    drawn,
    fixed,
    knowing_core,
    make_draft,
    make_target,
    one_by_one,
    plain_core,
    reference,
    target,
    together,
)

from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import EngineCore
from m3.engine.request import Finished, SamplingParams, Tokens
from m3.engine.scheduler import QueueFull

CHAIN, NARROW = Shape.chain(3), Shape(steps=4, topk=4, nodes=8)
SIZES = EngineConfig(num_pages=200)


def speculative(**options: Any) -> EngineCore:
    model = target("llama")
    config = EngineConfig(**{"num_pages": 200, **options})
    return knowing_core(model, make_draft(model), config, fixed(NARROW), reference().truth)


def law(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log of what a token is drawn by, fp64: temperature, then top_k, then top_p, then min_p."""
    if params.temperature == 0:
        return torch.where(torch.arange(len(logits)) == logits.argmax(), 0.0, -torch.inf)
    p = (logits / params.temperature).softmax(-1)
    order = p.argsort(descending=True)
    kept = p[order]
    if params.top_k:
        kept[params.top_k :] = 0
    kept /= kept.sum()
    kept[kept.cumsum(0) - kept >= params.top_p] = 0
    kept[kept < params.min_p * kept[0]] = 0
    return torch.zeros_like(p).scatter(0, order, kept / kept.sum()).log()


def decoder_logits(ask: Ask, answer: Answer, family: str = "llama") -> torch.Tensor:
    """(tokens, V) fp64: what the decoder of one sequence says before each token but the first."""
    return target(family)(torch.tensor([ask.prompt + answer.tokens]))[0].double()


# -- log-probabilities ------------------------------------------------------------------------------------------------
MIXED = [
    dataclasses.replace(ask, params=dataclasses.replace(ask.params, logprobs=kind, top_logprobs=index % 3))
    for kind in ("raw", "sampling")
    for index, ask in enumerate(asks(12))
]


@pytest.fixture(scope="module")
def mixed() -> list[Answer]:
    """One at a time, plainly."""
    return one_by_one(plain_core(target("llama"), prefix_reuse=False), MIXED)


@pytest.mark.parametrize("index", range(len(MIXED)))
def test_logprobs_are_those_of_the_law(mixed, index):
    ask, answer = MIXED[index], mixed[index]
    logits = decoder_logits(ask, answer)[len(ask.prompt) - 1 :]
    raw = logits.log_softmax(-1)
    rows = range(len(answer.tokens))
    wanted = raw if ask.params.logprobs == "raw" else torch.stack([law(row, ask.params) for row in logits])
    want = [float(wanted[row, token]) for row, token in zip(rows, answer.tokens, strict=True)]
    assert answer.logprobs == pytest.approx(want, abs=1e-4)
    if count := ask.params.top_logprobs:
        best = raw[: len(answer.tokens)].topk(count)
        assert [[token for token, _ in row] for row in answer.top] == best.indices.tolist()
        got = torch.tensor([[chance for _, chance in row] for row in answer.top], dtype=torch.float64)
        torch.testing.assert_close(got, best.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("speculation", [fixed(CHAIN), fixed(NARROW), Speculation()], ids=str)
def test_logprobs_with_a_draft_are_bitwise_those_without(mixed, speculation):
    """Also where neighbours want others, or none."""
    model, want = target("llama"), reference()
    core = knowing_core(
        model, make_draft(model), SIZES, speculation, lambda request: want.longer[int(request.id) % len(want.longer)]
    )
    assert drawn(together(core, MIXED)) == drawn(mixed)
    assert core.stats.accepted > 0


PROMPTED = [
    dataclasses.replace(ask, params=dataclasses.replace(ask.params, prompt_logprobs=index % 4 < 2))
    for index, ask in enumerate(asks(12))
]


@pytest.fixture(scope="module")
def prompted() -> list[Answer]:
    return one_by_one(plain_core(target("llama"), prefix_reuse=False), PROMPTED)


def test_prompt_logprobs_are_those_of_the_decoder(prompted):
    for ask, answer in zip(PROMPTED, prompted, strict=True):
        if not ask.params.prompt_logprobs:
            assert answer.prompt_logprobs == []
            continue
        chances = decoder_logits(ask, answer).log_softmax(-1)
        want = [float(chances[at, token]) for at, token in enumerate(ask.prompt[1:])]
        assert len(answer.prompt_logprobs) == 1
        assert answer.prompt_logprobs[0] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"max_running": 2, "max_step_tokens": 3},
        {"max_running": 1, "max_step_tokens": 1},
        {"max_running": 3, "max_step_tokens": 40, "page_size": 2, "num_pages": 700},
        {"page_size": 1, "num_pages": 75},
    ],
    ids=str,
)
@pytest.mark.parametrize("draft", [False, True])
def test_prompt_logprobs_in_chunks_and_of_a_known_prompt(prompted, options, draft):
    core = speculative(**options) if draft else plain_core(target("llama"), **options)
    assert drawn(together(core, PROMPTED)) == drawn(prompted)
    assert drawn(together(core, PROMPTED, stagger=2)) == drawn(prompted)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_prompt_logprobs_are_told_once_whoever_is_preempted(draft, reuse):
    model, want = target("llama"), reference(growing=True)
    asked = [
        dataclasses.replace(ask, params=dataclasses.replace(ask.params, prompt_logprobs=True)) for ask in want.asks
    ]
    config = EngineConfig(page_size=1, num_pages=60, prefix_reuse=reuse)
    core = EngineCore(model, config)
    if draft:
        core = knowing_core(model, make_draft(model), config, fixed(CHAIN), want.truth)
    answers = together(core, asked)
    assert core.stats.preemptions > 0
    assert [(answer.tokens, answer.reason) for answer in answers] == [(a.tokens, a.reason) for a in want.answers]
    assert [[len(each) for each in answer.prompt_logprobs] for answer in answers] == [
        [len(ask.prompt) - 1] for ask in asked
    ]


def test_prompt_logprobs_of_one_token():
    core = plain_core(target("llama"))
    (answer,) = together(core, [Ask([5], SamplingParams(prompt_logprobs=True, max_tokens=2))])
    assert answer.prompt_logprobs == [[]]


# -- ends -------------------------------------------------------------------------------------------------------------
def test_an_end_token_and_ignore_eos():
    """The model's own end token is 2; the prompt is chosen so that it is drawn."""
    model = target("llama")
    core = plain_core(model)
    params = SamplingParams(temperature=5.0, max_tokens=400, ignore_eos=True)
    (whole,) = together(core, [Ask([5, 6], params)])
    end = whole.tokens.index(2)
    (short,) = together(core, [Ask([5, 6], dataclasses.replace(params, ignore_eos=False))])
    assert (short.tokens, short.reason) == (whole.tokens[:end], "stop")
    assert (len(whole.tokens), whole.reason) == (400, "length")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("draft", [False, True])
def test_a_deadline(draft):
    clock, model = Clock(), target("llama")
    given: dict[str, Any] = {"draft": make_draft(model), "speculation": fixed(CHAIN)} if draft else {}
    core = EngineCore(model, SIZES, clock=clock, **given)
    answers = {"a": Answer(), "b": Answer()}
    add(core, Ask([5, 6, 7], SamplingParams(max_tokens=50, deadline=2.0, ignore_eos=True)), "a")
    add(core, Ask([5, 6, 8], SamplingParams(max_tokens=50, ignore_eos=True)), "b")
    drain(core, answers, steps=4)
    before = list(answers["a"].tokens)
    clock.now += 2.0
    drain(core, answers)
    assert (answers["a"].tokens, answers["a"].reason) == (before, "deadline")
    assert len(before) >= 4
    assert answers["b"].reason == "length"
    assert_empty(core)


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("draft", [False, True])
def test_abort_in_every_state(steps, draft):
    """Waiting, half prefilled, decoding; the others do not notice."""
    want = reference()
    options = {"max_running": 3, "max_step_tokens": 30}
    core = speculative(**options) if draft else plain_core(target("llama"), **options)
    answers = {str(index): Answer() for index in range(12)}
    for index, ask in enumerate(want.asks):
        add(core, ask, str(index))
    drain(core, answers, steps=steps)
    chosen = [str(index) for index in range(0, 12, 2) if not answers[str(index)].finished]
    assert [core.abort(id) for id in chosen] == [True] * len(chosen)
    assert not core.abort(chosen[0])
    core.scheduler.check()
    drain(core, answers)
    assert_empty(core)
    for index, answer in enumerate(want.answers):
        if str(index) in chosen:
            assert answers[str(index)].reason == "abort"
            assert answers[str(index)].tokens == answer.tokens[: len(answers[str(index)].tokens)]
        else:
            assert answers[str(index)].drawn == answer.drawn


def test_an_aborted_id_may_come_again_at_once():
    want, core = reference(), speculative()
    add(core, want.asks[5], "1")
    core.step()
    core.abort("1")
    add(core, want.asks[1], "1")
    events = core.step()
    assert [type(event) for event in events if event.id == "1"] == [Finished, Tokens]
    answers = {"1": Answer(tokens=[t for event in events if isinstance(event, Tokens) for t in event.tokens])}
    drain(core, answers)
    assert answers["1"].tokens == want.answers[1].tokens
    assert_empty(core)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "one or more tokens in 0..98"),
        ([5, 99], "one or more tokens in 0..98"),
        ([-1], "one or more tokens in 0..98"),
        ([5] * 40, "fewer than 40 tokens"),
    ],
    ids=["empty", "beyond the vocabulary", "negative", "too long"],
)
def test_what_can_never_be_served_is_refused(prompt, message):
    core = plain_core(target("llama"), max_context=40)
    with pytest.raises(ValueError, match=message):
        add(core, Ask(prompt, SamplingParams()), "a")
    assert_empty(core)


def test_a_prompt_that_the_cache_cannot_hold_is_refused():
    core = plain_core(target("llama"), page_size=4, num_pages=5)
    with pytest.raises(ValueError, match="cache of 5 pages of 4"):
        add(core, Ask([5] * 21, SamplingParams()), "a")
    (answer,) = together(core, [Ask([5] * 20, SamplingParams(max_tokens=9, ignore_eos=True))])
    assert (len(answer.tokens), answer.reason) == (1, "length")


def test_a_full_queue():
    core = plain_core(target("llama"), max_waiting=2)
    for id in "ab":
        add(core, Ask([5], SamplingParams(max_tokens=1)), id)
    with pytest.raises(QueueFull):
        add(core, Ask([5], SamplingParams(max_tokens=1)), "c")
    core.step()
    add(core, Ask([5], SamplingParams(max_tokens=1)), "c")


def test_a_draft_of_another_target_is_refused():
    draft = make_draft(target("llama"))
    other = dataclasses.replace(draft, config=dataclasses.replace(draft.config, vocab_size=100))
    with pytest.raises(ValueError, match="engine: draft: want one for a target of hidden size and vocabulary"):
        EngineCore(target("llama"), SIZES, draft=other)
    deep = dataclasses.replace(draft, config=dataclasses.replace(draft.config, aux_layers=(0, 2, 4)))
    with pytest.raises(ValueError, match="aux_layers of at most 3"):
        EngineCore(target("llama"), SIZES, draft=deep)


@pytest.mark.parametrize(
    "shape",
    [Shape(steps=2, topk=64, nodes=8), Shape(steps=64, topk=17, nodes=8)],
    ids=["more than the draft's vocabulary", "more nodes than a mask has bits"],
)
def test_a_shape_that_cannot_be_drafted_is_refused(shape):
    model = target("llama")
    draft = make_draft(model)
    few = torch.arange(32)
    tensors = {
        **draft.tensors,
        "d2t": draft.tensors["d2t"][few],
        "lm_head.weight": draft.tensors["lm_head.weight"][few],
    }
    small = dataclasses.replace(draft, config=dataclasses.replace(draft.config, draft_vocab_size=32), tensors=tensors)
    with pytest.raises(ValueError, match="engine: shapes"):
        EngineCore(model, SIZES, draft=small, speculation=Speculation(shapes=(CHAIN, shape)))


# -- faults -----------------------------------------------------------------------------------------------------------
POISON = 98  # a token whose embedding is not a number


@pytest.fixture(scope="module")
def poisoned() -> Any:
    model = make_target("llama")
    model.embedding[POISON] = torch.nan
    return model


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_logits_that_are_not_numbers_end_one_request(poisoned, draft, kv_dtype):
    """Others do not notice, neither beside it nor in its pages afterwards, nor where a draft proposes the token."""
    cases = [Ask([token for token in ask.prompt if token != POISON] or [7], ask.params, ask.seed) for ask in asks(12)]
    cases = [dataclasses.replace(ask, params=dataclasses.replace(ask.params, ignore_eos=True)) for ask in cases]
    sizes = {"page_size": 3, "num_pages": 40, "kv_dtype": kv_dtype}
    want = one_by_one(plain_core(poisoned, prefix_reuse=False, **sizes), cases)
    whole = [ask.prompt + answer.tokens for ask, answer in zip(cases, want, strict=True)]
    core = plain_core(poisoned, **sizes)
    if draft:
        wrong = [tokens[: len(tokens) - 2] + [POISON] * 4 for tokens in whole]
        core = EngineCore(poisoned, EngineConfig(**sizes), draft=make_draft(poisoned), speculation=fixed(NARROW))
        assert core.drafter is not None
        core.drafter = KnowingDrafter(
            core.drafter, lambda request: wrong[int(request.id)] if request.id in names else request.tokens, 1.0
        )
    names = {str(index) for index in range(12)}
    answers = {name: Answer() for name in [*names, "bad 0", "bad 1"]}
    add(core, Ask([5, POISON, 6] * 4, SamplingParams(max_tokens=9)), "bad 0")
    for index, ask in enumerate(cases):
        add(core, ask, str(index))
    add(core, Ask([8, 9, POISON], SamplingParams(max_tokens=9, temperature=1.0, logprobs="raw")), "bad 1")
    drain(core, answers)
    assert_empty(core)
    assert drawn([answers[str(index)] for index in range(12)]) == drawn(want)
    for bad in ("bad 0", "bad 1"):
        assert answers[bad].tokens == []
        assert answers[bad].finished == [
            Finished(id=bad, reason="error", error="the model's logits are not numbers", cached_tokens=0)
        ]


def test_an_error_after_the_last_token_is_none():
    """A path may be longer than the answer: what lies beyond it is nobody's fault."""
    core = speculative()
    request = add(core, Ask([5, 6], SamplingParams(max_tokens=3, ignore_eos=True)), "a")
    core.step()
    events = core._append(request, [7, 8, -1], None, None, 3, 2)
    assert [event.reason for event in events if isinstance(event, Finished)] == ["length"]
    assert request.tokens[-2:] == [7, 8]


# -- counts -----------------------------------------------------------------------------------------------------------
def test_counts():
    want, core = reference(), speculative()
    answers = together(core, want.asks)
    stats = core.stats
    assert stats.drawn == sum(len(answer.tokens) for answer in answers)
    assert 0 < stats.accepted < stats.drawn
    assert stats.accepted < stats.drafted
    assert stats.speculative_steps < stats.steps < stats.drawn


def test_the_first_step_waits_for_nobody():
    """Without requests a step does nothing."""
    core = plain_core(target("llama"))
    assert core.step() == []
    assert not core.has_work()
