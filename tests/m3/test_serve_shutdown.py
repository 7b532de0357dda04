"""The end of a server: who is inside is answered, who comes is sent away; and a client that leaves frees its pages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from letters_model import make_letters_model
from loopback import EchoBackend, ask, serving, until

from m3.engine.engine import AsyncEngine
from m3.serve.app import build
from m3.serve.cli import all_keys
from m3.serve.engine_backend import EngineBackend
from m3.serve.listening import Protocol, Server


def said(text: str) -> Any:
    return [{"role": "user", "content": text}]


def row(text: str, **fields: object) -> str:
    return json.dumps({"model": "echo", "messages": said(text), **fields})


# -- the application --------------------------------------------------------------------------------------------------
def test_a_server_that_drains_takes_nobody_and_says_so():
    app = build(EchoBackend())
    with serving(app) as url:
        root = url.removesuffix("/v1")
        assert ask(f"{root}/health/ready").status == 200
        app.state.serving.drain()
        got = {
            path: ask(f"{root}{path}")
            for path in ("/health/ready", "/health", "/health/live", "/metrics", "/v1/models")
        }
        assert {path: one.status for path, one in got.items()} == {
            "/health/ready": 503, "/health": 503, "/health/live": 200, "/metrics": 200, "/v1/models": 503,
        }  # fmt: skip
        assert got["/health/ready"].json() == {"status": "shutting down"}
        refused = ask(f"{url}/chat/completions", row("hi"))
        assert (refused.status, refused.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_under_way_goes_on_until_the_end(stream):
    backend = EchoBackend()
    app = build(backend)
    serving_state = app.state.serving

    async def main(url: str) -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            call = client.chat.completions.create(model="echo", messages=said("then hang"), stream=stream)
            if not stream:
                task = asyncio.create_task(call)
                while not serving_state.under_way:
                    await asyncio.sleep(0.01)
                serving_state.end()
                with pytest.raises(openai.InternalServerError) as caught:
                    await task
                assert caught.value.status_code == 503
                return "", str(caught.value)
            heard = ""
            with pytest.raises(openai.APIError) as failed:
                async for chunk in await call:
                    heard += chunk.choices[0].delta.content or ""
                    if heard.endswith("hang"):
                        serving_state.drain()
                        await asyncio.sleep(0.05)
                        serving_state.end()
            return heard, str(failed.value)

    with serving(app) as url:
        heard, told = asyncio.run(main(url))
        assert heard == ("then hang" if stream else "") and "shutting down" in told
        assert backend.closed.wait(5)
        until(lambda: serving_state.under_way == 0)


def test_the_last_words_of_a_stream_are_an_error_and_done():
    app = build(EchoBackend())
    asked: Any = {"model": "echo", "messages": said("then hang"), "stream": True}
    with (
        serving(app) as url,
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
        client.chat.completions.with_streaming_response.create(**asked) as response,
    ):
        lines = [line for line in _until_hang(response.iter_lines(), app.state.serving.end) if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert lines[-1] == "data: [DONE]"


def _until_hang(lines: Iterator[str], then: Any) -> Iterator[str]:
    for line in lines:
        yield line
        if '" hang"' in line:
            then()


# -- pages ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.mark.parametrize("path", ["chat", "completions"])
def test_a_client_that_leaves_frees_its_pages(folder, path):
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters")

    async def leave(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            asked: Any = {
                "model": "letters",
                "max_tokens": 400,
                "n": 3,
                "stream": True,
                "extra_body": {"ignore_eos": True},
            }
            if path == "chat":
                stream: Any = await client.chat.completions.create(messages=said("Hello"), **asked)
            else:
                stream = await client.completions.create(prompt="Hello", **asked)
            async with stream:
                async for _ in stream:
                    assert backend.engine.stats().pages_used > 0
                    return

    with serving(build(backend)) as url:
        asyncio.run(leave(url))
        until(lambda: sum(backend.engine.stats().finished.values()) == 3)
        until(lambda: backend.engine.stats().pages_used == 0)
        assert backend.engine.stats().finished.get("abort", 0) > 0


# -- the process ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def listening(grace: float) -> Iterator[tuple[Server, threading.Thread, str]]:
    """The command's server over an echo, on a thread, and its URL."""
    app = build(EchoBackend())
    config = uvicorn.Config(app, port=0, http=Protocol, log_config=None, log_level="error", timeout_graceful_shutdown=2)
    server = Server(config, app.state.serving, grace, lambda: None)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_a_signal_ends_the_server_in_order():
    """Ready says no, new requests get 503 while a stream hangs; after the grace the stream ends with an error."""
    with (
        listening(grace=0.6) as (server, thread, url),
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="echo", messages=said("then hang"), stream=True)
        assert next(stream).choices[0].delta.content == "then"
        begun = time.monotonic()
        server.handle_exit(signal.SIGTERM, None)
        assert ask(f"{url.removesuffix('/v1')}/health/ready").status == 503
        assert ask(f"{url}/chat/completions", row("hi")).status == 503
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert time.monotonic() - begun > 0.5
        thread.join(20)
        assert (thread.is_alive(), server.signal) == (False, signal.SIGTERM)


def test_a_server_without_work_ends_at_once():
    with listening(grace=60) as (server, thread, _):
        server.handle_exit(signal.SIGINT, None)
        thread.join(20)
        assert not thread.is_alive()


def test_a_second_signal_is_the_end_of_patience():
    with (
        listening(grace=60) as (server, thread, url),
        openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(model="echo", messages=said("then hang"), stream=True)
        next(stream)
        server.handle_exit(signal.SIGINT, None)
        server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        thread.join(20)
        assert not thread.is_alive()


# -- the command's words ----------------------------------------------------------------------------------------------
KEYS_GIVEN = {
    "none": (None, None, None, []),
    "given": (["a", "b"], "c", None, ["a", "b"]),
    "of the environment": (None, "a, b,", None, ["a", "b"]),
    "of a file too": (["a"], None, "b\n# no\n", ["a", "b"]),
}


@pytest.mark.parametrize(("given", "environment", "file", "wanted"), KEYS_GIVEN.values(), ids=KEYS_GIVEN)
def test_keys_of_the_command(tmp_path, given, environment, file, wanted):
    path = None if file is None else tmp_path / "keys"
    if path is not None:
        path.write_text(file)
    assert all_keys(given, environment, path) == wanted


def test_no_key_where_keys_are_wanted_is_refused(tmp_path):
    (tmp_path / "keys").write_text("# none yet")
    with pytest.raises(ValueError, match="api keys"):
        all_keys(None, None, tmp_path / "keys")
    with pytest.raises(ValueError, match="api keys"):
        all_keys(None, " , ", None)
