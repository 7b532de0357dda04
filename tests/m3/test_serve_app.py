"""The OpenAI-compatible server on a real socket, asked by the official client and by raw HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator

import openai
import pytest
from loopback import EchoBackend, Got, ask, serving, until

from m3.serve.app import build
from m3.serve.security import Limits

KEY = "a key"
BACKEND = EchoBackend(["echo", "patient/a b"])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build(BACKEND, api_keys=[KEY], limits=Limits(body_bytes=5000))) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def said(text: str) -> list:
    return [{"role": "user", "content": text}]


def post(url: str, body: bytes | str) -> Got:
    return ask(f"{url}/chat/completions", body, key=KEY)


# -- answers ----------------------------------------------------------------------------------------------------------
def test_a_whole_answer(client):
    got = client.chat.completions.create(model="echo", messages=said("good morning to you"))
    assert (got.choices[0].message.content, got.choices[0].message.role) == ("good morning to you", "assistant")
    assert (got.choices[0].finish_reason, got.model, got.object) == ("stop", "echo", "chat.completion")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (7, 4, 11)
    assert got.usage.prompt_tokens_details.cached_tokens == 3


def test_a_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="echo", messages=said("one two three"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices[0].delta.content for chunk in chunks[:-2]] == ["one", " two", " three"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, None, "stop"]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 10)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_is_framed_as_events(url):
    got = post(url, json.dumps({"model": "echo", "messages": said("é\n🩺"), "stream": True}))
    assert got.content_type.startswith("text/event-stream")
    assert got.text.endswith("data: [DONE]\n\n")
    rows = [json.loads(event.removeprefix("data: ")) for event in got.text.split("\n\n")[:-2]]
    assert rows[0]["choices"][0]["delta"]["content"] == "é\n🩺"
    assert all("usage" not in row for row in rows)


def test_every_parameter_reaches_the_backend(client):
    client.chat.completions.create(
        model="echo",
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=17,
        seed=-3,
        stop=["x", "y"],
        n=1,
        user="someone",
        extra_body={"top_k": 4, "min_p": 0.25},
    )
    got = BACKEND.requests[-1]
    assert (got.temperature, got.top_p, got.limit, got.seed, got.stops) == (0.5, 0.9, 17, -3, ("x", "y"))
    assert (got.top_k, got.min_p) == (4, 0.25)
    assert got.plain() == [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "bc"},
    ]


def test_defaults_are_those_of_openai(client):
    client.chat.completions.create(model="echo", messages=said("a"), temperature=None, n=None)
    got = BACKEND.requests[-1]
    assert (got.temperature, got.top_p, got.limit, got.seed, got.stops, got.n) == (1.0, 1.0, None, None, (), 1)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["echo", "patient/a b"]
    assert client.models.retrieve("patient/a b").id == "patient/a b"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("patient/c")


def test_health_wants_no_key(url):
    root = url.removesuffix("/v1")
    assert ask(f"{root}/health").json() == {"status": "ok"}
    BACKEND.state = "engine dead"
    try:
        got = ask(f"{root}/health")
    finally:
        BACKEND.state = None
    assert (got.status, got.json()) == (503, {"status": "engine dead"})


# -- mistakes ---------------------------------------------------------------------------------------------------------
ROW = {"model": "echo", "messages": said("hi")}
MISTAKES = {
    "role": ({**ROW, "messages": [{"role": "doctor", "content": "hi"}]}, "messages.0.role"),
    "no-messages": ({"model": "echo"}, "messages"),
    "messages-no-list": ({**ROW, "messages": "hi"}, "messages"),
    "content": ({**ROW, "messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    "image": ({**ROW, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "temperature": ({**ROW, "temperature": 2.5}, "temperature"),
    "temperature-nan": ({**ROW, "temperature": float("nan")}, "temperature"),
    "top_p": ({**ROW, "top_p": 0}, "top_p"),
    "max_tokens": ({**ROW, "max_tokens": 0}, "max_tokens"),
    "seed": ({**ROW, "seed": 2**63}, "seed"),
    "seed-text": ({**ROW, "seed": "one"}, "seed"),
    "stop-empty": ({**ROW, "stop": ""}, "stop"),
    "stop-many": ({**ROW, "stop": ["x"] * 17}, "stop"),
    "n": ({**ROW, "n": 17}, "n"),
    "n-text": ({**ROW, "n": "1"}, "n"),
    "logprobs": ({**ROW, "logprobs": 3}, "logprobs"),
    "top_logprobs": ({**ROW, "top_logprobs": 3}, "top_logprobs"),
    "tools": ({**ROW, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function"),
    "functions": ({**ROW, "functions": []}, "functions"),
    "schema": ({**ROW, "response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema"),
    "format": ({**ROW, "response_format": {"type": "xml"}}, "response_format.type"),
    "stream_options": ({**ROW, "stream_options": {"include_usage": True}}, "stream_options"),
    "logit_bias": ({**ROW, "logit_bias": {"x": 1}}, "logit_bias"),
    "unknown": ({**ROW, "temprature": 1}, "temprature"),
}


@pytest.mark.parametrize(("row", "param"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused_by_the_name_of_its_argument(url, row, param):
    got = post(url, json.dumps(row))
    error = got.json()["error"]
    assert (got.status, error["type"]) == (400, "invalid_request_error")
    assert error["param"].startswith(param), error


@pytest.mark.parametrize(
    "body", ["", "{", "[1]", '"x"', "null", "\x00", "[" * 2000, '{"a":' * 800, b"\xff\xfe{}"], ids=range(9)
)
def test_a_body_that_is_no_request_is_refused(url, body):
    got = post(url, body)
    assert (got.status, got.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_oversized_body_is_refused(url):
    got = post(url, json.dumps({**ROW, "messages": said("x" * 5000)}))
    assert (got.status, got.json()["error"]["code"]) == (413, "request_too_large")


def test_the_body_is_not_kept_beyond_the_limit(url):
    def endless() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 1000

    assert ask(f"{url}/chat/completions", endless(), key=KEY).status == 413


def test_an_unknown_model_is_told(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=said("hi"))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", "é"])
@pytest.mark.parametrize("path", ["/models", "/models/echo", "/chat/completions"])
def test_a_wrong_key_is_refused(url, key, path):
    method = "POST" if path == "/chat/completions" else "GET"
    got = ask(f"{url}{path}", key=key, method=method)
    assert (got.status, got.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_path_that_is_not_there(url):
    got = ask(f"{url}/nothing/../../etc", key=KEY)
    assert (got.status, got.json()["error"]["code"]) == (404, "unknown_url")
    got = ask(f"{url}/chat/completions", key=KEY)
    assert (got.status, got.json()["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_refuses(client, stream):
    with pytest.raises(openai.BadRequestError, match="want something else") as caught:
        client.chat.completions.create(model="echo", messages=said("refuse"), stream=stream)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("stream", [False, True])
def test_a_backend_that_fails_tells_nothing(client, stream, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="echo", messages=said("fail: secret words"), stream=stream)
    assert "RuntimeError" in str(caught.value)
    [failed] = [record.fields for record in caplog.records if record.message == "failed"]
    assert failed["error"] == "RuntimeError" and "loopback.py" in failed["at"]
    assert "secret" not in str(caught.value) + caplog.text + str([vars(record) for record in caplog.records])


def test_an_error_after_the_first_words_of_a_stream_is_an_event(client):
    stream = client.chat.completions.create(model="echo", messages=said("very late"), stream=True)
    heard: list[str | None] = []
    with pytest.raises(openai.APIError, match="time of a request"):
        heard.extend(chunk.choices[0].delta.content for chunk in stream)
    assert heard == ["very", " late"]


def test_an_error_before_a_whole_answer_has_its_status(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="echo", messages=said("very late"))
    assert caught.value.status_code == 504


# -- clients that leave -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(url, stream):
    BACKEND.closed.clear()

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            call = client.chat.completions.create(model="echo", messages=said("then hang"), stream=stream)
            if stream:
                async for chunk in await call:
                    if chunk.choices[0].delta.content == " hang":
                        break
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(call, 0.3)

    asyncio.run(leave())
    assert BACKEND.closed.wait(5)


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error(url, caplog):
    host, _, port = url.removeprefix("http://").removesuffix("/v1").partition(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head.encode() + b'{"mod')
                time.sleep(0.05)
        assert ask(f"{url}/models", key=KEY).status == 200
    assert "ASGI" not in caplog.text


def test_logs_count_and_do_not_quote(client, caplog):
    with caplog.at_level(logging.DEBUG, logger="m3.serve"):
        client.chat.completions.create(model="echo", messages=said("my chest hurts"))
        until(lambda: len(caplog.records) > 0)
    [told] = [record.fields for record in caplog.records]
    assert (told["prompt_tokens"], told["completion_tokens"], told["cached_tokens"]) == (7, 3, 3)
    assert (told["status"], told["path"], told["model"]) == (200, "/v1/chat/completions", "echo")
    assert "chest" not in str(told)
