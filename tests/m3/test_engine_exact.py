"""Seed-exactness: however a request is served, it yields the tokens, log-probabilities and logits of a plain engine.

The plain engine serves one request at a time and is itself held against m3.models.decoder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import (
    Ask,
    Logits,
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

from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import EngineCore
from m3.engine.request import SamplingParams
from m3.models.generate import Sampling, generate

CHAIN = Shape.chain(3)
NARROW, WIDE, SHORT = Shape(steps=4, topk=4, nodes=8), Shape(steps=5, topk=8, nodes=32), Shape(steps=2, topk=3, nodes=6)
SHAPES = (Shape.chain(1), Shape.chain(2), CHAIN, NARROW, WIDE, SHORT)
FAMILIES = ("llama", "llama-untied-bias", "qwen2", "qwen3", "qwen3_moe", "qwen3_moe-one-dense-layer")


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_same_logits(got: Logits, want: dict[tuple[str, int], torch.Tensor]) -> None:
    """Bitwise, at every position of every answer."""
    assert want.keys() <= got.rows.keys()
    differing = [place for place, row in want.items() if not torch.equal(got.rows[place], row)]
    assert differing == []


# -- plain ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_the_decoder(family):
    model, ours = target(family), reference(family)
    asked = [(index, ask) for index, ask in enumerate(ours.asks) if not ask.params.temperature]
    want = [list(generate(model, ask.prompt, Sampling(max_tokens=ask.params.max_tokens))) for _, ask in asked]
    assert [ours.answers[index].tokens for index, _ in asked] == want
    index, ask = asked[-1]
    tokens = torch.tensor([ask.prompt + ours.answers[index].tokens])
    logits = model(tokens)[0]
    got = {position: row for (id, position), row in ours.logits.items() if id == str(index)}
    at = sorted(got)[: len(ours.answers[index].tokens)]
    torch.testing.assert_close(torch.stack([got[p] for p in at]), logits[at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 1, "num_pages": 2000},
        {"page_size": 3, "num_pages": 700},
        {"page_size": 64, "num_pages": 60},
        {"max_running": 1, "max_step_tokens": 1},
        {"max_running": 4, "max_step_tokens": 7},
        {"max_running": 3, "max_step_tokens": 16, "prefix_reuse": False},
    ],
    ids=str,
)
def test_plain_batches(config):
    want, core = reference(), plain_core(target("llama"), **config)
    logits = Logits(core, want.truth)
    answers = together(core, want.asks)
    assert drawn(answers) == drawn(want.answers)
    assert_same_logits(logits, want.logits)


@pytest.mark.parametrize("page_size", [1, 3])
def test_plain_preemption(page_size):
    want = reference(growing=True)
    core = plain_core(target("llama"), page_size=page_size, num_pages=60 // page_size)
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)
    assert core.stats.preemptions > 5


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_staggered_arrivals(threads):
    want, core = reference(), plain_core(target("llama"))
    assert drawn(together(core, want.asks, stagger=2)) == drawn(want.answers)


def test_an_id_may_come_again():
    core, want = plain_core(target("llama")), reference()
    assert drawn([together(core, [ask])[0] for ask in want.asks]) == drawn(want.answers)


def test_a_prompt_is_found_in_the_cache():
    want = reference()
    core = plain_core(target("llama"), page_size=2)
    together(core, want.asks)
    again = together(core, want.asks)
    assert drawn(again) == drawn(want.answers)
    assert sum(answer.finished[0].cached_tokens for answer in again) > 100


# -- with a draft -----------------------------------------------------------------------------------------------------
WAYS: dict[str, tuple[dict[str, Any], Speculation]] = {
    **{f"{shape}": ({}, fixed(shape)) for shape in SHAPES},
    "page of 1": ({"page_size": 1, "num_pages": 2000}, fixed(NARROW)),
    "pages of 3": ({"page_size": 3, "num_pages": 700}, fixed(WIDE)),
    "chunks": ({"max_running": 3, "max_step_tokens": 25}, fixed(SHORT)),
    "chunks, pages of 3, nothing shared": (
        {"max_running": 3, "max_step_tokens": 25, "page_size": 3, "num_pages": 700, "prefix_reuse": False},
        fixed(SHORT),
    ),
    "adaptive": ({}, Speculation(shapes=SHAPES)),
    "no shared noise": ({}, fixed(NARROW, shared_noise=0.0)),
    "shared noise at any temperature": ({}, fixed(NARROW, shared_noise=0.1)),
}


@pytest.mark.parametrize(("config", "speculation"), WAYS.values(), ids=WAYS)
def test_speculation(config, speculation):
    want, model = reference(), target("llama")
    config = EngineConfig(**{"num_pages": 200, **config})
    core = knowing_core(model, make_draft(model), config, speculation, want.truth)
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks, stagger=3)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)
    assert core.stats.accepted > 0


@pytest.mark.parametrize("speculation", [fixed(CHAIN), fixed(NARROW), Speculation(shapes=SHAPES)], ids=str)
@pytest.mark.parametrize("page_size", [1, 3])
@pytest.mark.parametrize("reuse", [True, False])
def test_preemption(page_size, speculation, reuse):
    want, model = reference(growing=True), target("llama")
    config = EngineConfig(page_size=page_size, num_pages=60 // page_size, prefix_reuse=reuse)
    core = knowing_core(model, make_draft(model), config, speculation, want.truth)
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)
    assert core.stats.preemptions > 0
    assert core.stats.accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_one_temperature_for_all(temperature, noise):
    """Drafts are ranked with the target's noise where all requests are warm enough."""
    asked = [dataclasses.replace(ask, params=SamplingParams(max_tokens=16, temperature=temperature)) for ask in ASKS]
    model = target("llama")
    want = one_by_one(plain_core(model), asked)
    core = EngineCore(
        model, EngineConfig(num_pages=200), draft=make_draft(model), speculation=fixed(NARROW, shared_noise=noise)
    )
    assert drawn(together(core, asked)) == drawn(want)


ASKS = [Ask([3 + 7 * index % 90, 11, 40 + index], SamplingParams(), index) for index in range(6)]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model(family, weights):
    want, model = reference(family, weights), target(family, weights)
    core = knowing_core(
        model, make_draft(model, weights="int4"), EngineConfig(num_pages=200), fixed(NARROW), want.truth
    )
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)
    assert core.stats.accepted > 10


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("kv_dtype", ["bf16", "fp16", "int8"])
def test_every_cache(kv_dtype, family):
    want, model = reference(family, "fp32", kv_dtype, growing=True), target(family)
    config = EngineConfig(page_size=3, num_pages=20, kv_dtype=kv_dtype)
    core = knowing_core(model, make_draft(model, weights="bf16"), config, fixed(NARROW), want.truth)
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)
    assert core.stats.preemptions > 0
    assert core.stats.accepted > 10


DRAFTS: dict[str, dict[str, Any]] = {
    "none": {"gate": "none"},
    "headwise": {"gate": "headwise", "norm_before_residual": True},
    "headwise with a bias": {"gate": "headwise", "gate_bias": True, "norm_before_fc": True},
    "elementwise": {"gate": "elementwise", "fc_norm": True, "norm_output": True},
    "elementwise with a bias": {"gate": "elementwise", "gate_bias": True, "norm_output": True},
}


@pytest.mark.parametrize("options", DRAFTS.values(), ids=DRAFTS)
def test_every_draft(options):
    want, model = reference(), target("llama")
    core = knowing_core(
        model, make_draft(model, **options), EngineConfig(num_pages=200), fixed(SHORT), want.truth, skill=0.5
    )
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert core.stats.accepted > 10


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_every_number_of_threads(threads):
    want, model = reference("llama", "int4"), target("llama", "int4")
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(WIDE), want.truth)
    logits = Logits(core, want.truth)
    assert drawn(together(core, want.asks)) == drawn(want.answers)
    assert_same_logits(logits, want.logits)


@pytest.mark.parametrize("budget", [True, False])
def test_a_budget_of_experts(budget):
    want, model = reference("qwen3_moe", "int4"), target("qwen3_moe", "int4")
    speculation = Speculation(shapes=(NARROW, WIDE), expert_budget=budget)
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), speculation, want.truth)
    assert drawn(together(core, want.asks, stagger=1)) == drawn(want.answers)


# -- ends in the middle of what was accepted --------------------------------------------------------------------------
def test_paths_are_scattered(monkeypatch):
    """What this file relies on: accepted nodes lie apart in the cache, and their keys are moved."""
    from m3.engine import core as module

    moved = []
    whole = module.tree_commit

    def commit(index: torch.Tensor, *rest: Any, **options: Any) -> Any:
        moved.append(index.tolist())
        return whole(index, *rest, **options)

    monkeypatch.setattr(module, "tree_commit", commit)
    want, model = reference(), target("llama")
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(WIDE), want.truth)
    together(core, want.asks)
    paths = [path for batch in moved for path in batch]
    assert max(sum(node >= 0 for node in path) for path in paths) >= 4
    assert any(b > a + 1 for path in paths for a, b in itertools.pairwise(path))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_a_stop_token(shape, place):
    want, model = reference(), target("llama")
    asked, expected = [], []
    for ask, whole in zip(want.asks, want.longer, strict=True):
        answer = whole[len(ask.prompt) :]
        stop = answer[place % len(answer)]
        params = dataclasses.replace(ask.params, stop_token_ids=(stop, 98), max_tokens=len(answer), ignore_eos=True)
        asked.append(dataclasses.replace(ask, params=params))
        ends = [index for index, token in enumerate(answer) if token in (stop, 98)]
        expected.append((answer[: ends[0]], "stop"))
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(shape), want.truth, skill=1.0)
    answers = together(core, asked)
    assert [(answer.tokens, answer.reason) for answer in answers] == expected
    assert [len(answer.logprobs) for answer in answers] == [
        0 if ask.params.logprobs == "none" else len(tokens) for ask, (tokens, _) in zip(asked, expected, strict=True)
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [CHAIN, WIDE], ids=str)
def test_max_tokens(shape, most):
    want, model = reference(), target("llama")
    asked = [
        dataclasses.replace(ask, params=dataclasses.replace(ask.params, max_tokens=most, ignore_eos=True))
        for ask in want.asks
    ]
    core = knowing_core(model, make_draft(model), EngineConfig(num_pages=200), fixed(shape), want.truth, skill=1.0)
    expected = [whole[len(ask.prompt) :][:most] for ask, whole in zip(want.asks, want.longer, strict=True)]
    answers = together(core, asked)
    assert [answer.tokens for answer in answers] == expected
    assert {answer.reason for answer in answers} == {"length"}


@pytest.mark.parametrize("shape", [Shape.chain(1), CHAIN, NARROW, WIDE], ids=str)
@pytest.mark.parametrize("context", [41, 60])
def test_the_end_of_the_context(shape, context):
    want, model = reference(), target("llama")
    asked = [
        dataclasses.replace(ask, params=dataclasses.replace(ask.params, max_tokens=500, ignore_eos=True))
        for ask in want.asks
        if len(ask.prompt) > 20
    ]
    plain = one_by_one(plain_core(model, max_context=context), asked)
    whole = [ask.prompt + answer.tokens for ask, answer in zip(asked, plain, strict=True)]
    assert {len(tokens) for tokens in whole} == {context}
    config = EngineConfig(num_pages=200, max_context=context)
    core = knowing_core(
        model, make_draft(model), config, fixed(shape), lambda request: whole[int(request.id)], skill=1.0
    )
    assert drawn(together(core, asked)) == drawn(plain)
    assert core.stats.accepted > 0 or shape.slots > context - 40  # the longest prompt has 40 tokens
