"""The end of a server: who is inside is answered, who comes is sent away; and a client that leaves frees its pages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from letters_model import make_letters_model
from loopback import EchoBackend, ask, serving, until

from m3.engine.engine import AsyncEngine
from m3.serve.app import build
from m3.serve.engine_backend import EngineBackend


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
PROCESS = """
import sys, typer
sys.path[:0] = {path!r}
from loopback import EchoBackend
from m3.serve.app import build
from m3.serve.cli import run
try:
    run(build(EchoBackend()), "127.0.0.1", 0, "echo", grace={grace}, log_format="json", log_level="info")
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@contextlib.contextmanager
def process(grace: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """An echo behind the command's server, and its URL."""
    here = Path(__file__).parent
    code = PROCESS.format(path=[str(here), str(here.parent.parent)], grace=grace)
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        line = next((line for line in running.stdout if "http://" in line), None)
        assert line is not None, running.communicate()[1]
        yield running, line.split()[-1]
    finally:
        running.kill()
        running.communicate()


def test_a_signal_ends_the_process_in_order():
    """Ready says no, new requests get 503 while a stream hangs; after the grace the stream ends with an error."""
    with process(grace=1.5) as (running, url), openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="echo", messages=said("then hang"), stream=True)
        assert next(stream).choices[0].delta.content == "then"
        begun = time.monotonic()
        running.send_signal(signal.SIGTERM)
        until(lambda: ask(f"{url.removesuffix('/v1')}/health/ready").status == 503)
        assert ask(f"{url}/chat/completions", row("hi")).status == 503
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert time.monotonic() - begun > 1
        assert running.wait(20) == 0
        assert running.stderr is not None
        rows = [json.loads(line) for line in running.stderr.read().splitlines()]
    told = [one for one in rows if one["event"] == "request" and one.get("path") == "/v1/chat/completions"]
    assert [(one["status"], one["outcome"]) for one in told] == [(200, "shutting_down")]
    assert rows[-1]["event"] == "ended" and rows[-1]["signal"] == signal.SIGTERM


@pytest.mark.slow
def test_a_process_without_work_ends_at_once():
    with process(grace=60) as (running, url):
        assert ask(f"{url.removesuffix('/v1')}/health").status == 200
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
