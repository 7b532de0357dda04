"""Grammars: what is compiled and what is refused, sets of tokens in trees, and answers that other readers accept."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import pytest
import torch
from engine_cases import (
    Answer,
    Ask,
    drawn,
    fixed,
    knowing_core,
    make_draft,
    make_target,
    one_by_one,
    plain_core,
    target,
)
from engine_cases import together as together_in
from letters_model import make_letters_model

from m3.engine import grammars as module
from m3.engine.batch_engine import Engine
from m3.engine.config import EngineConfig, Shape
from m3.engine.engine import AsyncEngine
from m3.engine.grammars import Grammar, Grammars, Matcher
from m3.engine.logits_processor import LogitsProcessor
from m3.engine.request import Request, SamplingParams
from m3.models.tokenizer import Tokenizer
from m3kernels.spec_decode.law import allowed

VOCABULARY, END = 99, 2
NARROW, WIDE = Shape(steps=4, topk=4, nodes=8), Shape(steps=5, topk=8, nodes=32)


@cache
def letters() -> Tokenizer:
    """The 95 printable letters, <s> and </s>: two ids fewer than the model has, whose end token is the letter 2."""
    with TemporaryDirectory() as folder:
        return Tokenizer(make_letters_model(Path(folder)))


@cache
def grammars() -> Grammars:
    return Grammars(letters(), VOCABULARY, (END,))


def ids(text: str) -> list[int]:
    return letters().encode(text, special_tokens=False)


def text_of(tokens: list[int]) -> str:
    return letters().fast.decode(tokens, skip_special_tokens=False)


def follows(matcher: Matcher) -> str:
    tokens, may_end = matcher.allowed()
    return text_of([token for token in range(VOCABULARY) if tokens >> token & 1]) + "." * may_end


# -- sets of tokens ---------------------------------------------------------------------------------------------------
def test_what_may_follow():
    matcher = grammars().regex("ab|abc[134]").matcher()
    assert follows(matcher) == "a"
    matcher.advance(ids("ab"))
    assert follows(matcher) == "c."
    matcher.enter(*ids("c"))
    assert follows(matcher) == "134"
    matcher.leave([])
    assert (follows(matcher), matcher.complete) == ("c.", False)
    matcher.advance(ids("c3"))
    assert (follows(matcher), matcher.complete, matcher.error) == (".", True, None)


def test_no_id_that_is_no_text():
    """Special tokens, the head's padding, and the end token, though it is a letter."""
    tokens, may_end = grammars().regex("(?s:.*)").matcher().allowed()
    assert may_end
    assert {token for token in range(200) if tokens >> token & 1} == set(range(95)) - {END}


SOURCES: dict[str, Callable[[], Grammar]] = {
    "regex": lambda: grammars().regex(r"([a-f]{1,4}[0-9]?(, |;))+end"),
    "schema": lambda: grammars().json_schema(
        {"type": "object", "properties": {"a": {"enum": ["x", "xy", 1]}, "b": {"type": "array"}}, "required": ["a"]}
    ),
    "lark": lambda: grammars().ebnf('start: "(" start* ")" | "a" start | "b"'),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("source", SOURCES)
def test_a_tree_is_read_as_its_paths_are(source, seed):
    """Each node's set is that of a matcher that read the path alone; the tree leaves no trace."""
    chance, grammar = random.Random(seed), SOURCES[source]()
    request = Request(id="a", prompt=[5], params=SamplingParams(grammar=grammar), seed=0, arrival=0.0, tokens=[5])
    processor = LogitsProcessor(request, (END,), VOCABULARY, torch.device("cpu"))

    def alone(path: list[int]) -> tuple[int, bool]:
        matcher = grammar.matcher()
        matcher.advance(path)
        return matcher.allowed()

    allowed_nodes = 0
    for _ in range(6):
        answer = request.tokens[1:]
        candidates, parents, paths = [request.tokens[-1]], [-1], [answer]
        for _ in range(20):
            parent = chance.randrange(len(paths))
            text = alone(paths[parent])[0] if paths[parent] is not None else 0
            choices = [token for token in range(VOCABULARY) if text >> token & 1]
            right = choices and chance.random() < 0.8
            token = chance.choice(choices) if right else chance.randrange(VOCABULARY)
            candidates.append(token)
            parents.append(parent)
            paths.append([*paths[parent], token] if text >> token & 1 else None)
        rows = allowed(processor.bits(candidates, parents), VOCABULARY)
        allowed_nodes += sum(path is not None for path in paths[1:])
        for row, path in zip(rows, paths, strict=True):
            tokens, may_end = (0, False) if path is None else alone(path)
            assert set(row.nonzero().flatten().tolist()) == {
                token for token in range(VOCABULARY) if tokens >> token & 1
            } | ({END} if may_end else set())
        longest = max((path for path in paths if path is not None and alone(path)[0]), key=len, default=answer)
        request.tokens = [5, *longest]
        processor.follow()
    assert allowed_nodes > 10


# -- answers ----------------------------------------------------------------------------------------------------------
def schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema whose texts are short. The letter 2 is the end token: no number or name needs it."""
    kinds = ["enum", "boolean", "null", "string", "integer", "pattern", "const"]
    match chance.choice(kinds if depth > 2 else [*kinds, "object", "array", "object", "array", "anyOf"]):
        case "object":
            names = chance.sample("abcdefgh", chance.randint(1, 3))
            return {
                "type": "object",
                "properties": {name: schema(chance, depth + 1) for name in names},
                "required": names[: chance.randint(0, 3)],
                "additionalProperties": False,
            }
        case "array":
            least = chance.randint(0, 2)
            return {"type": "array", "items": schema(chance, depth + 1), "minItems": least, "maxItems": least + 1}
        case "anyOf":
            return {"anyOf": [schema(chance, depth + 1), schema(chance, depth + 1)]}
        case "enum":
            return {"enum": ["mild", "severe", 3, None, True][: chance.randint(1, 5)]}
        case "string":
            return {"type": "string", "minLength": 1, "maxLength": chance.randint(1, 6)}
        case "integer":
            return {"type": "integer", "minimum": -chance.randint(0, 50), "maximum": chance.randint(1, 500)}
        case "pattern":
            return {"type": "string", "pattern": "^[A-F]{1,3}(-[0-9])?$"}
        case "const":
            return {"const": chance.choice(["yes", 0, False])}
        case kind:
            return {"type": kind}


def schemas(count: int) -> list[Ask]:
    found = []
    for index in range(count):
        chance = random.Random(index)
        grammar = grammars().json_schema(schema(chance))
        params = SamplingParams(max_tokens=460, temperature=chance.choice([0.7, 1.0, 1.5]), grammar=grammar)
        found.append(Ask([5 + index], params, index))
    return found


@cache
def answered() -> tuple[list[Ask], list[Answer]]:
    asked = schemas(16)
    return asked, one_by_one(plain_core(target("llama"), num_pages=40), asked)


def test_answers_are_valid():
    """By another reader of schemas, and by Python's json."""
    for ask, answer in zip(*answered(), strict=True):
        assert answer.reason == "stop"
        assert ask.params.grammar is not None
        value = json.loads(text_of(answer.tokens))
        jsonschema.Draft202012Validator(json.loads(ask.params.grammar.source)).validate(value)


@pytest.mark.parametrize("pages", [130, 2000])
def test_answers_are_the_same_with_a_draft(pages):
    asked, answers = answered()
    whole = [ask.prompt + answer.tokens + [END] for ask, answer in zip(asked, answers, strict=True)]
    config = EngineConfig(page_size=1, num_pages=pages)
    core = knowing_core(
        target("llama"), make_draft(target("llama")), config, fixed(WIDE), lambda request: whole[int(request.id)]
    )
    assert drawn(together_in(core, asked)) == drawn(answers)
    assert (core.stats.preemptions > 0) == (pages == 130)
    assert core.stats.accepted > 10


def test_an_object():
    params = SamplingParams(max_tokens=300, temperature=1.0, grammar=grammars().json_object())
    (answer,) = one_by_one(plain_core(target("llama")), [Ask([9, 8], params, 4)])
    text = text_of(answer.tokens)
    assert text.startswith("{")
    assert answer.reason == "length" or isinstance(json.loads(text), dict)


@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize(
    ("options", "end", "text"),
    [
        ({}, END, "yes"),
        ({"min_tokens": 9}, END, "yes"),
        ({"ignore_eos": True}, END, "yes"),
        ({"keep_end": True}, END, "yes2"),
        ({}, None, "yes"),
        ({"ignore_eos": True, "min_tokens": 4}, None, "yes"),
    ],
    ids=str,
)
def test_a_complete_text_ends_the_answer(draft, options, end, text):
    model = target("llama") if end is not None else endless()
    grammar = Grammars(letters(), VOCABULARY, model.config.eos_token_ids).regex("yes")
    ask = Ask([5, 6], SamplingParams(max_tokens=10, grammar=grammar, **options))
    core = plain_core(model)
    if draft:
        whole = [5, 6, *ids("yes"), 2, 2, 2]
        core = knowing_core(
            model, make_draft(model), EngineConfig(num_pages=99), fixed(NARROW), lambda request: whole, skill=1.0
        )
    (answer,) = together_in(core, [ask])
    assert (text_of(answer.tokens), answer.reason) == (text, "stop")


@cache
def endless() -> Any:
    """A model without an end token."""
    model = make_target("llama")
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    return model


def test_a_stop_token_inside_the_grammar():
    grammar = grammars().regex("(ab)*c")
    params = SamplingParams(max_tokens=40, stop_token_ids=tuple(ids("c")), min_tokens=6, grammar=grammar)
    biased = dataclasses.replace(params, logit_bias=((ids("c")[0], 90.0),))
    (answer,) = one_by_one(plain_core(target("llama")), [Ask([5], biased)])
    assert (text_of(answer.tokens), answer.reason) == ("ababab", "stop")


def test_a_limit_that_is_passed_later_ends_the_request():
    """Its neighbour does not notice."""
    grammar = grammars().json_schema({"type": "object", "properties": {f"p{n}": {} for n in range(1001)}})
    hard = SamplingParams(max_tokens=200, grammar=grammar)
    easy = SamplingParams(max_tokens=20, temperature=1.0)
    core = plain_core(target("llama"))
    (want,) = one_by_one(core, [Ask([7], easy, 1)])
    bad, good = together_in(core, [Ask([5], hard), Ask([7], easy, 1)])
    assert good.drawn == want.drawn
    assert bad.reason == "error"
    assert (bad.finished[0].error or "").startswith("grammar: Parser Error: Current row has 4")
    assert set(text_of(bad.tokens[-2:])) <= set("{ \n\t\r")


def test_a_lexer_that_is_used_up_is_replaced():
    """What requests have in common leaves no trace: neither who came before, nor where a draft looked."""
    grammar = Grammars(letters(), VOCABULARY, (END,)).regex("((a{1,100}){1,100}){1,100}b")
    params = SamplingParams(max_tokens=120, temperature=1.0, grammar=grammar, logit_bias=((ids("b")[0], -100.0),))
    asked = [Ask([5 + index], params, index) for index in range(3)]
    core, compiled = plain_core(target("llama")), []
    whole = grammar._compile
    grammar._compile = lambda: compiled.append(1) or whole()  # type: ignore[func-returns-value]
    answers = one_by_one(core, asked)
    assert len({(text_of(answer.tokens), answer.finished[0].error) for answer in answers}) == 1
    assert answers[0].reason == "error"
    assert len(answers[0].tokens) > 20
    assert len(compiled) >= 3
    draft = knowing_core(
        target("llama"),
        make_draft(target("llama")),
        EngineConfig(num_pages=99),
        fixed(WIDE),
        lambda request: [5 + int(request.id), *ids("a" * 130)],
    )
    assert drawn(together_in(draft, asked)) == drawn(answers)


# -- what is refused --------------------------------------------------------------------------------------------------
def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


def doubled(depth: int) -> dict[str, Any]:
    """Each definition holds the one before it twice, so written out it has 2 ** depth leaves."""
    pairs = {
        f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n - 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/a{n - 1}"}}]}
        for n in range(1, depth)
    }
    return {"$defs": {"a0": {"type": "null"}, **pairs}, "$ref": f"#/$defs/a{depth - 1}"}


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no JSON": (lambda: grammars().json_schema("{"), "schema: want a JSON schema"),
    "no schema": (lambda: grammars().json_schema("[]"), "schema: want a JSON schema"),
    "not even JSON": (lambda: grammars().json_schema({"enum": [{1, 2}]}), "schema: want a JSON schema"),
    "no type": (lambda: grammars().json_schema({"type": "strin"}), "schema: .*Invalid type: strin"),
    "a keyword": (lambda: grammars().json_schema({"not": {}}), r'schema: .*Unimplemented keys: \["not"\]'),
    "unsatisfiable": (
        lambda: grammars().json_schema({"type": "integer", "minimum": 5, "maximum": 3}),
        "schema: .*minimum",
    ),
    "a cycle": (lambda: grammars().json_schema(CYCLE), "schema: want one that some text matches"),
    "itself": (lambda: grammars().json_schema({"anyOf": [{"$ref": "#"}]}), "schema: want one that some text matches"),
    "elsewhere": (lambda: grammars().json_schema({"$ref": "https://example.org/a"}), "schema: .*example.org"),
    "deep": (lambda: grammars().json_schema(nested(500)), "schema: .*recursion limit"),
    "very deep": (lambda: grammars().json_schema(nested(3000)), "schema: .*recursion limit"),
    "long": (lambda: grammars().json_schema(nested(6000)), "schema: want at most 65536 characters; got 126"),
    "a huge enum": (
        lambda: grammars().json_schema({"enum": [f"value {n}" for n in range(9999)]}),
        "schema: want at most 65536 characters",
    ),
    "alternatives": (
        lambda: grammars().json_schema(
            {"allOf": [{"anyOf": [{"required": [f"{n}{m}"]} for m in range(4)]} for n in range(10)]}
        ),
        "schema: .*too large",
    ),
    "a range": (
        lambda: grammars().json_schema({"type": "number", "minimum": 0.1, "maximum": 1e300}),
        "schema: want one that can be compiled",
    ),
    "a regex": (lambda: grammars().regex("a("), "pattern: .*unclosed group"),
    "letters unknown": (lambda: grammars().regex("é+"), "pattern: want one that some text matches"),
    "no str": (lambda: grammars().regex(b"a"), "pattern: want a str"),  # type: ignore[arg-type]
    "a grammar": (lambda: grammars().ebnf("start: (a"), "text: want one that can be compiled"),
    "an endless grammar": (lambda: grammars().ebnf("start: start"), "text: want one that some text matches"),
    "an import": (lambda: grammars().ebnf("start: @elsewhere"), "text: .*unknown grammar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    ask, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"grammars: {message}"):
        ask()


HARD: dict[str, Callable[[], Grammar]] = {
    "exponential references": lambda: grammars().json_schema(doubled(40)),
    "an enum": lambda: grammars().json_schema({"enum": [f"value {n}" for n in range(4500)]}),
    "names": lambda: grammars().json_schema({"properties": {f"p{n}": {"type": "null"} for n in range(1500)}}),
    "catastrophic backtracking": lambda: grammars().regex("(a+)+b"),
    "an exponential automaton": lambda: grammars().regex("(a|b)*a(a|b){18}"),
    "repeated": lambda: grammars().regex("((a{1,100}){1,100}){1,100}"),
    "ambiguous": lambda: grammars().ebnf('start: e\ne: e e | e e e | "a"'),
    "many items": lambda: grammars().json_schema({"items": {"type": "null"}, "minItems": 10**6, "type": "array"}),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_ones_stay_within_their_limits(name):
    """Compiled in a second or two, a step in far less; where a limit is passed, the matcher says so."""
    chance, started = random.Random(0), time.process_time()
    matcher = HARD[name]().matcher()
    for _ in range(40):
        text, _ = matcher.allowed()
        if matcher.error is not None or not text:
            break
        matcher.advance([chance.choice([token for token in range(VOCABULARY) if text >> token & 1])])
    assert time.process_time() - started < 10
    assert matcher.read


# -- compiled once ----------------------------------------------------------------------------------------------------
def test_compiled_grammars_are_kept(monkeypatch):
    monkeypatch.setattr(module, "MAX_COMPILED", 2)
    ours = Grammars(letters(), VOCABULARY, (END,))
    first = ours.regex("a")
    assert ours.json_schema({"const": "a"}) is ours.json_schema('{"const": "a"}')
    assert ours.regex("a") is first
    ours.regex("b")  # in place of the schema, the one not asked for longest
    assert ours.regex("a") is first
    assert list(ours._compiled) == [("regex", "b"), ("regex", "a")]


def test_one_grammar_for_many_requests():
    grammar = grammars().regex("(a|b|cd)*")
    one, other = grammar.matcher(), grammar.matcher()
    one.advance(ids("c"))
    assert (follows(one), follows(other)) == ("d", "abc.")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RuntimeError, match=re.escape('pip install "m3-clinical[m3]"')):
        Grammars(letters(), VOCABULARY, (END,)).regex("a")


# -- through the engines ----------------------------------------------------------------------------------------------
def test_engines_have_grammars():
    engine = Engine(plain_core(target("llama")), letters())
    assert engine.grammars is not None
    params = SamplingParams(
        grammar=engine.grammars.regex("(no|yes), [a-c]{3}"), top_prompt_logprobs=1, prompt_logprobs=True
    )
    (done,) = engine.generate(["well?"], params)
    assert re.fullmatch("(no|yes), [a-c]{3}", done.text)
    assert done.prompt_top_logprobs is not None
    assert [len(row) for row in done.prompt_top_logprobs] == [1] * 4
    assert Engine(plain_core(target("llama"))).grammars is None


def test_usage_and_stats():
    whole = [*ids("well?"), *ids("abababababababab")]
    core = knowing_core(
        target("llama"),
        make_draft(target("llama")),
        EngineConfig(num_pages=99),
        fixed(NARROW),
        lambda _: whole,
        skill=1.0,
    )

    async def ask() -> tuple[list[Any], Any]:
        async with AsyncEngine(core, letters()) as engine:
            assert engine.grammars is not None
            params = SamplingParams(max_tokens=16, grammar=engine.grammars.regex("(ab)*"), ignore_eos=True)
            outputs = [output async for output in engine.generate("well?", params)]
            return outputs, engine.stats()

    outputs, stats = asyncio.run(ask())
    assert "".join(output.text for output in outputs) == "ab" * 8
    pairs = [(output.usage.accepted_tokens, output.usage.drafted_tokens) for output in outputs]
    assert pairs == sorted(pairs)
    assert 0 < pairs[-1][0] <= pairs[-1][1] == stats.drafted
    assert pairs[-1][0] < outputs[-1].usage.completion_tokens == stats.generated == 16
    assert stats.accepted >= pairs[-1][0]
    assert (stats.pages_total, stats.pages_used, stats.preemptions) == (99, 0, 0)
    assert stats.pages_cached >= 1
    assert 0 < stats.trees < 16
