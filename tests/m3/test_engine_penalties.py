"""Penalties, bias, minimum lengths and grammars in the engine: the textbook's tokens, whoever drafts or preempts."""

from __future__ import annotations

import dataclasses
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from engine_cases import (
    Answer,
    Ask,
    asks,
    drawn,
    fixed,
    knowing_core,
    make_draft,
    one_by_one,
    plain_core,
    reference,
    target,
    together,
)
from letters_model import make_letters_model

from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import EngineCore
from m3.engine.grammars import Grammar, Grammars
from m3.engine.request import SamplingParams, choices
from m3.models.tokenizer import Tokenizer
from m3kernels.spec_decode import law

VOCABULARY, END = 99, 2
CHAIN, NARROW, WIDE = Shape.chain(3), Shape(steps=4, topk=4, nodes=8), Shape(steps=5, topk=8, nodes=32)
WORDS = [a + b for a in ("yes", "no", "nothing", "not", "maybe ", "") for b in ("", "!", "?!", "77")]


@cache
def letters() -> Tokenizer:
    """The 95 printable letters, <s> and </s>: two ids fewer than the model has."""
    with TemporaryDirectory() as folder:
        return Tokenizer(make_letters_model(Path(folder)))


@cache
def grammars() -> Grammars:
    return Grammars(letters(), VOCABULARY, (END,))


def words() -> Grammar:
    """A finite language, so that the oracle can list it."""
    return grammars().regex("|".join(word.replace("?", "[?]") for word in WORDS))


FEATURES: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 1.3},
    "frequency, below 0": {"frequency_penalty": -0.7},
    "presence": {"presence_penalty": 1.9},
    "repetition": {"repetition_penalty": 1.6},
    "repetition, encouraged": {"repetition_penalty": 0.8},
    "bias": {"logit_bias": ((7, 3.5), (40, -100.0), (41, 2.25), (98, 5.0))},
    "at least": {"min_tokens": 9, "logit_bias": ((END, 6.0), (11, 4.0)), "stop_token_ids": (11, 12)},
    "at least, no end": {"min_tokens": 6, "ignore_eos": True, "stop_token_ids": (5, 11, 60), "logit_bias": ((5, 4.0),)},
    "all": {
        "frequency_penalty": 0.9,
        "presence_penalty": -0.4,
        "repetition_penalty": 1.3,
        "logit_bias": ((END, 4.0), (50, 3.0)),
        "min_tokens": 5,
    },
    "words": {"grammar": "words"},
    "words, all": {
        "grammar": "words",
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.5,
        "logit_bias": ((24, 3.0), (0, 60.0)),
        "min_tokens": 5,
    },
    "words, no end": {"grammar": "words", "ignore_eos": True},
}


def with_feature(asked: list[Ask], feature: dict[str, Any]) -> list[Ask]:
    if "grammar" in feature:
        feature = {**feature, "grammar": words()}
    most = max(feature.get("min_tokens", 0), 10)
    return [
        dataclasses.replace(
            ask, params=dataclasses.replace(ask.params, **{"max_tokens": most, **feature, "logprobs": kind})
        )
        for ask, kind in zip(asked, ("raw", "sampling", "none") * len(asked), strict=False)
    ]


# -- the oracle -------------------------------------------------------------------------------------------------------
def oracle(ask: Ask) -> tuple[list[int], str, list[float]]:
    """Tokens, reason and log-probabilities, from the decoder of one sequence, a token at a time, dense, in fp64."""
    params, tokens = ask.params, list(ask.prompt)
    logprobs: list[float] = []
    for count in range(params.max_tokens):
        given = target("llama")(torch.tensor([tokens]))[0, -1].double()
        z, answer = given.clone(), tokens[len(ask.prompt) :]
        for v in range(VOCABULARY):
            if v in tokens:
                z[v] = z[v] / params.repetition_penalty if z[v] > 0 else z[v] * params.repetition_penalty
            z[v] -= answer.count(v) * params.frequency_penalty + (v in answer) * params.presence_penalty
            z[v] += dict(params.logit_bias).get(v, 0.0)
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
        if params.grammar is not None:
            text = letters().fast.decode(answer, skip_special_tokens=False)
            nexts = {word[len(text)] for word in WORDS if word.startswith(text) and word != text}
            allowed = {letters().fast.token_to_id(letter) for letter in nexts}
            if text in WORDS and not (allowed and (count < params.min_tokens or params.ignore_eos)):
                allowed.add(END)
            z[[v for v in range(VOCABULARY) if v not in allowed]] = -torch.inf
        elif count < params.min_tokens:
            z[list(ends)] = -torch.inf
        if params.temperature == 0:
            token, chances = int(z.argmax()), None
        else:
            p = law.probabilities(z, params.temperature, params.top_k, params.top_p, params.min_p)
            noise = law.race(torch.tensor(ask.seed), torch.tensor(len(tokens)), torch.arange(VOCABULARY))
            token = int((z / params.temperature - noise.log()).where(p > 0, -torch.inf).argmax())
            chances = p.log()
        if token in ends or (token == END and params.grammar is not None):
            return answer, "stop", logprobs
        tokens.append(token)
        if params.logprobs == "raw":
            logprobs.append(float(given.log_softmax(-1)[token]))
        elif params.logprobs == "sampling":
            logprobs.append(0.0 if chances is None else float(chances[token]))
    return tokens[len(ask.prompt) :], "length", logprobs


@cache
def plain(name: str) -> tuple[list[Ask], list[Answer]]:
    """One at a time and sharing nothing."""
    asked = with_feature(asks(6, seed=1, longest=9, most_tokens=8), FEATURES[name])
    return asked, one_by_one(plain_core(target("llama"), prefix_reuse=False), asked)


@pytest.mark.parametrize("name", FEATURES)
def test_the_textbook(name):
    asked, answers = plain(name)
    for ask, answer in zip(asked, answers, strict=True):
        tokens, reason, logprobs = oracle(ask)
        assert (answer.tokens, answer.reason) == (tokens, reason)
        assert answer.logprobs == pytest.approx(logprobs, abs=2e-4)


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_felt(name):
    asked, answers = plain(name)
    none = [
        dataclasses.replace(ask, params=SamplingParams(temperature=ask.params.temperature, max_tokens=10))
        for ask in asked
    ]
    without = one_by_one(plain_core(target("llama")), none)
    assert sum(a.tokens != b.tokens for a, b in zip(answers, without, strict=True)) >= 2


# -- however it is served ---------------------------------------------------------------------------------------------
def truth(asked: list[Ask], answers: list[Answer]) -> Any:
    """For a draft that knows the answer; what follows its end is a guess."""
    chance = random.Random(1)
    whole = [
        ask.prompt + answer.tokens + [END] + [chance.randrange(VOCABULARY) for _ in range(12)]
        for ask, answer in zip(asked, answers, strict=True)
    ]
    return lambda request: whole[int(request.id) % len(whole)]


@pytest.mark.parametrize("name", FEATURES)
def test_a_draft_changes_nothing(name):
    asked, answers = plain(name)
    model = target("llama")
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(WIDE), truth(asked, answers))
    assert drawn(together(core, asked, stagger=3)) == drawn(answers)
    assert core.stats.accepted > 0
    assert not core._processors


@cache
def mixed() -> tuple[list[Ask], list[Answer]]:
    """Every feature, and none, side by side; long enough that a small cache is soon full."""
    asked = []
    for index, feature in enumerate([*FEATURES.values(), {}]):
        few = asks(2, seed=index, longest=4)
        asked += with_feature(few, {"max_tokens": 30, **feature})
    return asked, one_by_one(plain_core(target("llama"), prefix_reuse=False), asked)


@pytest.mark.parametrize(
    ("pages", "speculation"),
    [
        (60, None),
        (60, fixed(CHAIN)),
        (60, Speculation(shapes=(CHAIN, NARROW))),
        (600, fixed(NARROW)),
        (600, fixed(WIDE, shared_noise=0.1)),
    ],
    ids=str,
)
def test_neighbours_and_preemption_change_nothing(pages, speculation):
    asked, answers = mixed()
    model, config = target("llama"), EngineConfig(page_size=1, num_pages=pages)
    core = EngineCore(model, config)
    if speculation is not None:
        core = knowing_core(model, make_draft(model), config, speculation, truth(asked, answers))
    assert drawn(together(core, asked, stagger=5)) == drawn(answers)
    assert (core.stats.preemptions > 3) == (pages == 60)
    assert speculation is None or core.stats.accepted > 10


def test_a_neighbour_pays_nothing():
    """Rows of requests without such parameters are drawn from as the model gave them."""
    core = plain_core(target("llama"))
    seen = []
    whole = core._draw_group

    def draw(group: Any, rows: Any, hidden: Any) -> Any:
        seen.append(({draw.request.id for draw in group}, rows.adjusted is None and rows.bits is None))
        return whole(group, rows, hidden)

    core._draw_group = draw  # type: ignore[method-assign]
    together(core, [Ask([5, 6], SamplingParams(max_tokens=4, presence_penalty=float(index % 2))) for index in range(4)])
    assert all(untouched for ids, untouched in seen if ids <= {"0", "2"})
    assert {frozenset(ids) for ids, _ in seen} == {frozenset({"0", "2"}), frozenset({"1", "3"})}


def test_raw_logprobs_are_those_of_the_same_tokens_without_parameters():
    """Bitwise: a bias that decides everything, and the law that it does not touch."""
    model, free = target("llama"), SamplingParams(max_tokens=10, temperature=1.0, logprobs="raw", ignore_eos=True)
    (want,) = together(plain_core(model), [Ask([5, 6, 7], free, 3)])
    tokens = dict.fromkeys(want.tokens)
    params = dataclasses.replace(free, logit_bias=tuple((token, 0.0) for token in tokens), frequency_penalty=1e-30)
    (got,) = together(plain_core(model), [Ask([5, 6, 7], params, 3)])
    assert got.drawn == want.drawn


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frequency_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -3),
        ("presence_penalty", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", [(1, 2.0)]),
        ("logit_bias", ((1, 101.0),)),
        ("logit_bias", ((1, float("nan")),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((True, 1.0),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logit_bias", (1, 2)),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("min_tokens", 1.0),
        ("grammar", "[0-9]+"),
        ("top_prompt_logprobs", 65),
        ("top_prompt_logprobs", 3),
    ],
    ids=str,
)
def test_parameters_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"SamplingParams: {name}: want"):
        SamplingParams(**{name: value})


def test_what_the_model_does_not_have():
    core = plain_core(target("llama"))
    with pytest.raises(ValueError, match=r"engine: logit_bias: want tokens in 0..98; got \(\(99, 1.0\),\)"):
        together(core, [Ask([5], SamplingParams(logit_bias=((99, 1.0),)))])
    with pytest.raises(ValueError, match="engine: grammar: want one made for a vocabulary of 99; got 100"):
        together(core, [Ask([5], SamplingParams(grammar=Grammars(letters(), 100, (2,)).regex("a")))])


# -- the rest of a request --------------------------------------------------------------------------------------------
def test_choices():
    params = SamplingParams(temperature=1.0, seed=2**63 - 2, max_tokens=5)
    assert [each.seed for each in choices(params, 3)] == [2**63 - 2, 2**63 - 1, -(2**63)]
    assert choices(SamplingParams(), 2) == [SamplingParams(), SamplingParams()]
    with pytest.raises(ValueError, match="choices: n: want an int of at least 1; got 0"):
        choices(params, 0)


@pytest.mark.parametrize("sizes", [{}, {"max_running": 1, "max_step_tokens": 3}], ids=["at once", "in chunks"])
def test_top_prompt_logprobs(sizes):
    asked = [
        Ask(ask.prompt, SamplingParams(max_tokens=2, prompt_logprobs=True, top_prompt_logprobs=index % 4))
        for index, ask in enumerate(asks(8))
    ]
    core = plain_core(target("llama"), **sizes)
    found: dict[str, list[Any]] = {}
    for index, ask in enumerate(asked):
        request = core.new_request(str(index), ask.prompt, ask.params, 0)
        core.add(request)
    while core.has_work():
        for event in core.step():
            found.setdefault(event.id, []).append(event)
    for index, ask in enumerate(asked):
        told = found[str(index)][0]
        chances = target("llama")(torch.tensor([ask.prompt]))[0].double().log_softmax(-1)[:-1]
        if not ask.params.top_prompt_logprobs:
            assert told.top_logprobs is None
            continue
        best = chances.topk(ask.params.top_prompt_logprobs)
        assert [[token for token, _ in row] for row in told.top_logprobs] == best.indices.tolist()
        values = [value for row in told.top_logprobs for _, value in row]
        assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-4)
        said = {(place, token): value for place, row in enumerate(told.top_logprobs) for token, value in row}
        for place, (token, value) in enumerate(zip(ask.prompt[1:], told.logprobs, strict=True)):
            assert said.get((place, token), value) == value


def test_nodes_are_counted_for_each_request():
    want, model = reference(), target("llama")
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(NARROW), want.truth, skill=1.0)
    answers = {str(index): [] for index in range(len(want.asks))}
    for index, ask in enumerate(want.asks):
        core.add(core.new_request(str(index), ask.prompt, ask.params, ask.seed))
    while core.has_work():
        for event in core.step():
            answers[event.id].append(event)
    nodes = [event for events in answers.values() for event in events if getattr(event, "drafted", 0)]
    assert sum(event.drafted for event in nodes) == core.stats.drafted == core.counts().drafted
    accepted = sum(getattr(event, "accepted", 0) for event in nodes)
    assert 0 < accepted <= core.stats.accepted
    assert all(getattr(event, "accepted", 0) <= event.drafted for event in nodes)
