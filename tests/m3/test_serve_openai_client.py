"""Every parameter of chats and completions through the official client, over HTTP, against the engine's own answers."""

from __future__ import annotations

import json
import math
import struct
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from letters_model import make_letters_model
from loopback import ask, serving

from m3.engine.batch_engine import Engine
from m3.engine.engine import AsyncEngine
from m3.engine.open import open_core
from m3.engine.outputs import Completion
from m3.engine.request import SamplingParams
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend
from m3.text.embed import LexicalEmbedder

TALK: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, how are you?"}]
PROMPT = [95, 31, 32, 33, 96, 40]
TEXT = "It hurts when I"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def backend(folder: Path) -> EngineBackend:
    return EngineBackend(AsyncEngine.from_model(folder), "letters", max_tokens=20, embedder=LexicalEmbedder(16))


@pytest.fixture(scope="module")
def url(backend: EngineBackend) -> Iterator[str]:
    with serving(build(backend)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*open_core(folder))


# -- what is drawn: fields of the API, and what the engine is to be given ---------------------------------------------
DRAWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "temperature": ({"temperature": 1.3, "seed": 5}, {"temperature": 1.3, "seed": 5}),
    "top_p": ({"temperature": 1, "seed": 5, "top_p": 0.5}, {"temperature": 1.0, "seed": 5, "top_p": 0.5}),
    "top_k": (
        {"temperature": 1, "seed": 5, "extra_body": {"top_k": 3}},
        {"temperature": 1.0, "seed": 5, "top_k": 3},
    ),
    "min_p": (
        {"temperature": 1, "seed": 5, "extra_body": {"min_p": 0.2}},
        {"temperature": 1.0, "seed": 5, "min_p": 0.2},
    ),
    "seed": ({"temperature": 1, "seed": -(2**63)}, {"temperature": 1.0, "seed": -(2**63)}),
    "frequency_penalty": ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    "presence_penalty": ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    "repetition_penalty": ({"extra_body": {"repetition_penalty": 1.8}}, {"repetition_penalty": 1.8}),
    "logit_bias": ({"logit_bias": {"40": 100}}, {"logit_bias": ((40, 100.0),)}),
    "max_tokens": ({"max_tokens": 3}, {"max_tokens": 3}),
    "min_tokens": ({"extra_body": {"min_tokens": 12}}, {"min_tokens": 12}),
    "ignore_eos": ({"extra_body": {"ignore_eos": True}}, {"ignore_eos": True}),
    "stop_token_ids": (
        {"extra_body": {"stop_token_ids": list(range(20))}},
        {"stop_token_ids": tuple(range(20))},
    ),
    "stop": ({"stop": ["a", "e", "i", "o"]}, {"stop": ("a", "e", "i", "o")}),
    "taken and not used": ({"user": "someone"}, {}),
    "nulls": ({"extra_body": {"top_p": None, "stop": None, "n": None, "logit_bias": None, "top_k": None}}, {}),
}
CHANGED = ("temperature", "top_k", "frequency_penalty", "repetition_penalty", "logit_bias", "max_tokens", "stop")


def drawn(engine: Engine, prompt: Any, **params: Any) -> Completion:
    return engine.generate([prompt], SamplingParams(**{"max_tokens": 20, **params}))[0]


def spelled(stream: Any, text: Any) -> tuple[str, str]:
    """(text, finish_reason) of a stream's only choice; each chunk is of it."""
    said, reason = "", None
    for chunk in stream:
        assert chunk.choices[0].index == 0
        said, reason = said + (text(chunk.choices[0]) or ""), chunk.choices[0].finish_reason or reason
    return said, reason


@pytest.mark.parametrize(("fields", "params"), DRAWN.values(), ids=DRAWN)
def test_chats_are_drawn_as_asked(client, engine, fields, params):
    wanted = drawn(engine, engine.tokenizer.chat(TALK), **params)
    asked = {"model": "letters", "messages": TALK, "temperature": 0, **fields}
    whole = client.chat.completions.create(**asked).choices[0]
    assert (whole.message.content, whole.finish_reason) == (wanted.text, wanted.finish_reason)
    stream = client.chat.completions.create(**asked, stream=True)
    assert spelled(stream, lambda choice: choice.delta.content) == (wanted.text, wanted.finish_reason)


@pytest.mark.parametrize(("fields", "params"), DRAWN.values(), ids=DRAWN)
def test_completions_are_drawn_as_asked(client, engine, fields, params):
    wanted = drawn(engine, TEXT, **params)
    asked = {"model": "letters", "prompt": TEXT, "temperature": 0, "max_tokens": 20, **fields}
    whole = client.completions.create(**asked).choices[0]
    assert (whole.text, whole.finish_reason) == (wanted.text, wanted.finish_reason)
    stream = client.completions.create(**asked, stream=True)
    assert spelled(stream, lambda choice: choice.text) == (wanted.text, wanted.finish_reason)


@pytest.mark.parametrize("name", CHANGED)
def test_the_parameters_of_the_table_matter(engine, name):
    assert drawn(engine, TEXT, **DRAWN[name][1]).text != drawn(engine, TEXT).text


def test_the_younger_name_of_max_tokens_wins(client):
    got = client.chat.completions.create(model="letters", messages=TALK, max_tokens=9, max_completion_tokens=2)
    assert (got.usage.completion_tokens, got.choices[0].finish_reason) == (2, "length")


def test_fields_of_openai_that_mean_nothing_here_are_taken(client):
    got = client.chat.completions.create(
        model="letters", messages=TALK, metadata={"a": "b"}, store=False, service_tier="auto", user="u",
        parallel_tool_calls=True, tool_choice="none", response_format={"type": "text"},
    )  # fmt: skip
    assert got.choices[0].finish_reason in ("stop", "length")


# -- several answers, several prompts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_several_answers(client, engine, stream):
    prompt = engine.tokenizer.chat(TALK)
    wanted = [drawn(engine, prompt, temperature=1.0, seed=seed).text for seed in range(7, 23)]
    asked: Any = {"model": "letters", "messages": TALK, "seed": 7, "n": 16}
    if stream:
        said = [""] * 16
        for chunk in client.chat.completions.create(**asked, stream=True):
            said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        got = client.chat.completions.create(**asked)
        said = [choice.message.content for choice in got.choices]
        assert [choice.index for choice in got.choices] == list(range(16))
        assert got.usage.prompt_tokens == len(prompt)
    assert said == wanted and len(set(said)) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [[TEXT, "Any fever?"], [PROMPT, PROMPT[:4]]], ids=["texts", "ids"])
def test_several_prompts(client, engine, prompts, stream):
    wanted = [drawn(engine, prompt, temperature=1.0, seed=seed).text for prompt in prompts for seed in (3, 4)]
    asked: Any = {"model": "letters", "prompt": prompts, "seed": 3, "n": 2, "max_tokens": 20}
    if stream:
        said = [""] * 4
        for chunk in client.completions.create(**asked, stream=True):
            said[chunk.choices[0].index] += chunk.choices[0].text
    else:
        got = client.completions.create(**asked)
        said = [choice.text for choice in got.choices]
        assert got.usage.prompt_tokens == sum(map(len, prompts))
    assert said == wanted


# -- log-probabilities ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client, engine, stream):
    wanted = drawn(engine, engine.tokenizer.chat(TALK), logprobs="raw", top_logprobs=3)
    asked: Any = {"model": "letters", "messages": TALK, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        rows = [row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content]
    else:
        rows = client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [row.logprob for row in rows] == wanted.logprobs
    assert [[one.logprob for one in row.top_logprobs] for row in rows] == [
        [logprob for _, logprob in top] for top in wanted.top_logprobs
    ]
    assert "".join(row.token for row in rows) == wanted.text
    assert all(bytes(row.bytes).decode() == row.token for row in rows)


def test_log_probabilities_without_likeliest_ones(client):
    got = client.chat.completions.create(model="letters", messages=TALK, logprobs=True).choices[0]
    assert {len(row.top_logprobs) for row in got.logprobs.content} == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client, engine, stream):
    wanted = drawn(engine, TEXT, logprobs="raw", top_logprobs=4, temperature=1.0, seed=2)
    asked: Any = {"model": "letters", "prompt": TEXT, "seed": 2, "logprobs": 4, "max_tokens": 20}
    got = [client.completions.create(**asked)] if not stream else client.completions.create(**asked, stream=True)
    parts = [one.choices[0].logprobs for one in got if one.choices[0].logprobs]
    assert [value for part in parts for value in part.token_logprobs] == wanted.logprobs
    told = [token for part in parts for token in part.tokens]
    assert "".join(told).replace("<s>", "") == wanted.text  # a control token has a name, and no place in the text
    places = [place for part in parts for place in part.text_offset]
    assert places == [len("".join(told[:n]).replace("<s>", "")) for n in range(20)]
    for row, top, token, own in zip(
        [row for part in parts for row in part.top_logprobs],
        wanted.top_logprobs, wanted.tokens, wanted.logprobs, strict=True,
    ):  # fmt: skip
        letters = {one: engine.tokenizer.fast.decode([one], skip_special_tokens=False) for one, _ in [*top, (token, 0)]}
        assert row == {**{letters[one]: value for one, value in top}, letters[token]: own}


@pytest.mark.parametrize("most", [0, 5])
def test_log_probabilities_of_a_prompt(client, engine, most):
    wanted = drawn(engine, PROMPT, prompt_logprobs=True, top_prompt_logprobs=most)
    got = client.completions.create(model="letters", prompt=PROMPT, extra_body={"prompt_logprobs": most}).choices[0]
    assert got.prompt_logprobs[0] is None
    rows = got.prompt_logprobs[1:]
    assert [row[str(token)]["logprob"] for row, token in zip(rows, PROMPT[1:], strict=True)] == wanted.prompt_logprobs
    for row, top in zip(rows, wanted.prompt_top_logprobs or [[]] * 5, strict=True):
        assert [row[str(token)]["rank"] for token, _ in top] == list(range(1, most + 1))
        assert len(row) in (most, most + 1)


def test_log_probabilities_of_a_conversation(client, engine):
    wanted = drawn(engine, engine.tokenizer.chat(TALK), prompt_logprobs=True)
    got = client.chat.completions.create(model="letters", messages=TALK, extra_body={"prompt_logprobs": 0})
    assert [next(iter(row.values()))["logprob"] for row in got.prompt_logprobs[1:]] == wanted.prompt_logprobs


# -- echo -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [TEXT, PROMPT], ids=["text", "ids"])
def test_the_prompt_is_said_first(client, engine, prompt, stream):
    shown = prompt if isinstance(prompt, str) else engine.tokenizer.fast.decode(prompt, skip_special_tokens=False)
    asked: Any = {"model": "letters", "prompt": prompt, "temperature": 0, "max_tokens": 20, "echo": True}
    wanted = shown + drawn(engine, prompt).text
    if stream:
        assert spelled(client.completions.create(**asked, stream=True), lambda choice: choice.text)[0] == wanted
    else:
        assert client.completions.create(**asked).choices[0].text == wanted


def test_a_prompt_alone_is_scored(client, engine):
    """As lm-eval asks: nothing is drawn."""
    wanted = drawn(engine, TEXT, prompt_logprobs=True, top_prompt_logprobs=1)
    got = client.completions.create(model="letters", prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    told = got.choices[0].logprobs
    assert (got.choices[0].text, got.choices[0].finish_reason, got.usage.completion_tokens) == (TEXT, "length", 0)
    assert (told.token_logprobs, told.tokens) == ([None, *wanted.prompt_logprobs], list(TEXT))
    assert told.top_logprobs[0] is None and told.text_offset == list(range(len(TEXT)))
    best = [max(row.values()) for row in told.top_logprobs[1:]]
    assert best == [top[0][1] for top in wanted.prompt_top_logprobs]


# -- usage ------------------------------------------------------------------------------------------------------------
def test_usage_in_every_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    asked: Any = {"model": "letters", "messages": TALK, "temperature": 0, "n": 2, "stream_options": options}
    chunks = list(client.chat.completions.create(**asked, stream=True))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == counts[-2] > counts[0] > 0
    assert chunks[-1].choices == [] and len({chunk.usage.prompt_tokens for chunk in chunks}) == 1
    whole = client.chat.completions.create(**{**asked, "stream_options": openai.omit})
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (counts[-1], chunks[-1].usage.prompt_tokens)
    assert whole.usage.prompt_tokens_details.cached_tokens > 0
    details = whole.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)


def test_completions_tell_usage_too(client):
    asked: Any = {"model": "letters", "prompt": TEXT, "stream_options": {"include_usage": True}}
    last = list(client.completions.create(**asked, stream=True))[-1]
    assert (last.choices, last.usage.prompt_tokens) == ([], len(TEXT))


# -- forms ------------------------------------------------------------------------------------------------------------
SCHEMA = {
    "type": "object", "properties": {"pain": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
    "required": ["pain", "side"], "additionalProperties": False,
}  # fmt: skip
TASK: Any = [{"role": "user", "content": "Where?"}]


@pytest.mark.parametrize("seed", range(3))
def test_json_of_a_schema(client, seed):
    form: Any = {"type": "json_schema", "json_schema": {"name": "pain", "schema": SCHEMA, "strict": True}}
    asked: Any = {"model": "letters", "messages": TASK, "response_format": form, "max_tokens": 300, "seed": seed}
    got = client.chat.completions.create(**asked).choices[0]
    said = json.loads(got.message.content)
    assert got.finish_reason == "stop" and set(said) == {"pain", "side"}
    assert type(said["pain"]) is bool and said["side"] in ("left", "right")


def test_any_json(client):
    form: Any = {"type": "json_object"}
    got = client.chat.completions.create(
        model="letters", messages=TASK, response_format=form, max_tokens=400, logit_bias={"91": 20}, temperature=0.2
    ).choices[0]
    assert got.message.content.startswith("{")
    assert got.finish_reason == "length" or isinstance(json.loads(got.message.content), dict)


STRUCTURED: dict[str, tuple[dict[str, Any], Any]] = {
    "choice": ({"choice": ["left arm", "right arm"]}, {"left arm", "right arm"}),
    "regex": ({"regex": "(yes|no), (once|twice)"}, {f"{a}, {b}" for a in ("yes", "no") for b in ("once", "twice")}),
    "grammar": ({"grammar": 'start: "a" ("b" | "c") "."'}, {"ab.", "ac."}),
    "json": ({"json": {"enum": ["mild", "severe"]}}, {'"mild"', '"severe"'}),
    "json as text": ({"json": '{"const": 7}'}, {"7"}),
}


@pytest.mark.parametrize(("asked", "wanted"), STRUCTURED.values(), ids=STRUCTURED)
def test_structured_outputs(client, asked, wanted):
    more: Any = {"extra_body": {"structured_outputs": asked}, "max_tokens": 60}
    said = {
        client.chat.completions.create(model="letters", messages=TASK, **more).choices[0].message.content,
        client.completions.create(model="letters", prompt=TEXT, **more).choices[0].text,
    }
    assert said <= wanted


UNCOMPILED: dict[str, tuple[dict[str, Any], str]] = {
    "schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "animal"}}}},
        "response_format",
    ),
    "regex": ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs"),
    "grammar": ({"extra_body": {"structured_outputs": {"grammar": "begin: x"}}}, "structured_outputs"),
}


@pytest.mark.parametrize(("fields", "param"), UNCOMPILED.values(), ids=UNCOMPILED)
def test_a_form_that_cannot_be_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="letters", messages=TASK, **fields)
    assert caught.value.param == param


def test_tools_want_a_template_that_shows_them(client):
    tool: Any = {"type": "function", "function": {"name": "look"}}
    with pytest.raises(openai.BadRequestError, match="template") as caught:
        client.chat.completions.create(model="letters", messages=TASK, tools=[tool])
    assert caught.value.param == "tools"


# -- what the engine refuses ------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a token that is none": ({"logit_bias": {"4000": 1}}, "logit_bias"),
    "more at least than at most": ({"max_tokens": 3, "extra_body": {"min_tokens": 4}}, "min_tokens"),
    "a variable of the template's own": (
        {"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs",
    ),
    "a special token's name": (
        {"extra_body": {"chat_template_kwargs": {"eos_token": "x"}}}, "chat_template_kwargs",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_what_the_engine_refuses_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="letters", messages=TASK, **fields)
    assert caught.value.param == param


# -- tokens and embeddings --------------------------------------------------------------------------------------------
def post(url: str, path: str, row: Any) -> Any:
    return ask(url.removesuffix("/v1") + path, json.dumps(row))


def test_tokens_of_a_text_and_back(url, engine):
    got = post(url, "/tokenize", {"model": "letters", "prompt": "Hi <s>", "return_token_strs": True}).json()
    assert got["tokens"] == engine.tokenizer.encode("Hi <s>")
    assert (got["count"], got["max_model_len"], got["token_strs"]) == (4, 512, ["H", "i", " ", "<s>"])
    assert post(url, "/detokenize", {"tokens": got["tokens"]}).json() == {"prompt": "Hi <s>"}


def test_tokens_of_a_conversation(url, engine):
    row = {"messages": TALK, "add_generation_prompt": False}
    assert post(url, "/tokenize", row).json()["tokens"] == engine.tokenizer.chat(TALK, add_generation_prompt=False)
    told = post(url, "/tokenize", {"messages": [{"role": "user", "content": "<s>"}]}).json()
    assert told["tokens"].count(95) == 2 and told["token_strs"] is None


TOKEN_MISTAKES = {
    "both": ("/tokenize", {"prompt": "a", "messages": []}, 400),
    "neither": ("/tokenize", {}, 400),
    "no such token": ("/detokenize", {"tokens": [1, 99999]}, 400),
    "no such model": ("/detokenize", {"model": "x", "tokens": [1]}, 404),
}


@pytest.mark.parametrize(("path", "row", "status"), TOKEN_MISTAKES.values(), ids=TOKEN_MISTAKES)
def test_mistakes_about_tokens(url, path, row, status):
    assert post(url, path, row).status == status


def test_embeddings(client):
    wanted = LexicalEmbedder(16)(["chest pain", "a cough"])
    for options in ({}, {"encoding_format": "float"}, {"dimensions": 16}):
        got = client.embeddings.create(model="lexical-16", input=["chest pain", "a cough"], **options)
        assert [row.index for row in got.data] == [0, 1]
        assert [[pytest.approx(number) for number in row.embedding] for row in got.data] == wanted.tolist()
    assert math.isclose(
        sum(x * x for x in client.embeddings.create(model="lexical-16", input="a").data[0].embedding), 1
    )
    assert [model.id for model in client.models.list()] == ["letters", "lexical-16"]


def test_embeddings_as_base64(url):
    row = {"model": "lexical-16", "input": "chest pain", "encoding_format": "base64"}
    packed = post(url, "/v1/embeddings", row).json()["data"][0]["embedding"]
    assert list(struct.unpack("<16f", b64decode(packed))) == LexicalEmbedder(16)(["chest pain"])[0].tolist()


def test_what_does_not_embed_says_so(client, folder):
    with pytest.raises(openai.NotFoundError, match="lexical-16"):
        client.embeddings.create(model="letters", input="a")
    with pytest.raises(openai.BadRequestError, match="16"):
        client.embeddings.create(model="lexical-16", input="a", dimensions=4)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="lexical-16", messages=TALK)
    with serving(build(EngineBackend(AsyncEngine.from_model(folder), "letters"))) as url:
        got = post(url, "/v1/embeddings", {"model": "letters", "input": "a"})
        assert got.status == 404 and "--embeddings" in got.json()["error"]["message"]
