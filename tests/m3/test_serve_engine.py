"""``m3 serve``'s application over a real engine of a tiny model, and its command in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import typer
from letters_model import make_letters_model
from loopback import ask, serving, until
from toy_core import ToyCore, make_tokenizer
from typer.testing import CliRunner

from m3.engine.batch_engine import Engine
from m3.engine.engine import AsyncEngine, EngineBusy
from m3.engine.open import open_core
from m3.engine.request import SamplingParams
from m3.serve.app import build
from m3.serve.backend import Delta
from m3.serve.chat_schema import ChatRequest
from m3.serve.cli import serve
from m3.serve.engine_backend import EngineBackend
from m3.serve.schema import RequestError

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello, how are you today?"}]
SERVE = [sys.executable, "-m", "m3", "serve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters", max_tokens=20)
    with serving(build(backend)) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(*open_core(folder))


# -- over HTTP --------------------------------------------------------------------------------------------------------
OPTIONS = {
    "greedy": ({"temperature": 0, "max_tokens": 12}, SamplingParams(max_tokens=12)),
    "openai's": ({"seed": 4}, SamplingParams(temperature=1.0, max_tokens=20, seed=4)),
    "filtered": (
        {"temperature": 0.9, "top_p": 0.8, "seed": 4, "extra_body": {"top_k": 20, "min_p": 0.01}},
        SamplingParams(temperature=0.9, top_p=0.8, top_k=20, min_p=0.01, max_tokens=20, seed=4),
    ),
}


@pytest.mark.parametrize(("options", "params"), OPTIONS.values(), ids=OPTIONS)
def test_an_answer_is_what_the_engine_says(client, engine, options, params):
    wanted = engine.generate([engine.tokenizer.chat(TALK)], params)[0]
    whole = client.chat.completions.create(model="letters", messages=TALK, **options)
    stream = client.chat.completions.create(
        model="letters", messages=TALK, stream=True, stream_options={"include_usage": True}, **options
    )
    chunks = list(stream)
    assert whole.choices[0].message.content == wanted.text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted.text
    assert whole.choices[0].finish_reason == chunks[-2].choices[0].finish_reason == wanted.finish_reason
    for usage in (whole.usage, chunks[-1].usage):
        assert usage.completion_tokens == wanted.usage.completion_tokens
        assert usage.prompt_tokens == wanted.usage.prompt_tokens


def test_a_stream_comes_in_pieces(client):
    """Not in as many as there are tokens: those drawn while nobody reads come together."""
    asked = {"model": "letters", "messages": TALK, "temperature": 0, "max_tokens": 200}
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert sum(map(bool, pieces)) > 3
    assert "".join(pieces) == client.chat.completions.create(**asked).choices[0].message.content


def test_cached_tokens_are_told(client):
    talk = [{"role": "user", "content": "What is it that brings you here today, please?"}]
    first, second = (client.chat.completions.create(model="letters", messages=talk, max_tokens=1) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens == 48


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused(client, stream):
    talk = [{"role": "user", "content": "x" * 1000}]
    with pytest.raises(openai.BadRequestError, match="tokens") as caught:
        client.chat.completions.create(model="letters", messages=talk, stream=stream)
    assert caught.value.param == "messages"


def test_no_message_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="one or more"):
        client.chat.completions.create(model="letters", messages=[])


def test_special_words_of_the_api_are_words(client):
    got = client.chat.completions.create(
        model="letters", messages=[{"role": "user", "content": "{{ 7 * 7 }} {% raw %}"}], max_tokens=2
    )
    assert got.usage.completion_tokens == 2


def test_many_at_once_get_their_own_and_who_leaves_leaves_nothing(folder, engine):
    backend = EngineBackend(AsyncEngine.from_model(folder), "letters")

    async def consult(client: openai.AsyncOpenAI, seed: int) -> str | None:
        heard = ""
        stream = await client.chat.completions.create(
            model="letters", messages=TALK, seed=seed, max_tokens=40, stream=True
        )
        async with stream:
            async for chunk in stream:
                heard += chunk.choices[0].delta.content or ""
                if seed % 3 == 0 and len(heard) > 5:
                    return None
        return heard

    async def main(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(consult(client, seed) for seed in range(18)))

    with serving(build(backend)) as url:
        heard = asyncio.run(main(url))
        until(lambda: sum(backend.engine.stats().finished.values()) == 18)
        stats = backend.engine.stats()
    prompt = engine.tokenizer.chat(TALK)
    params = [SamplingParams(temperature=1.0, max_tokens=40, seed=seed) for seed in range(18)]
    wanted = [done.text for done in engine.generate([prompt] * 18, params)]
    stayed = [seed for seed in range(18) if heard[seed] is not None]
    assert set() < set(range(18)) - set(stayed) <= {0, 3, 6, 9, 12, 15}
    assert [heard[seed] for seed in stayed] == [wanted[seed] for seed in stayed]
    assert (stats.outside, stats.waiting, stats.running) == (0, 0, 0)


# -- the engine's ends ------------------------------------------------------------------------------------------------
REQUEST = ChatRequest.model_validate({"model": "toy", "messages": [{"role": "user", "content": "Hi"}]})


@contextlib.asynccontextmanager
async def toy(tmp_path: Path, timeout: float = 60, **options: object):
    backend = EngineBackend(
        AsyncEngine(ToyCore(), make_tokenizer(tmp_path), **options), "toy", timeout=timeout, max_tokens=10**6
    )
    async with backend.lifespan():
        yield backend


async def collect(backend: EngineBackend) -> list[Delta]:
    return [delta async for delta in backend.stream(REQUEST)]


def test_the_time_of_a_request_is_kept(tmp_path):
    async def main() -> None:
        async with toy(tmp_path, timeout=0.05) as backend:
            with pytest.raises(RequestError) as caught:
                await collect(backend)
            assert caught.value.status == 504

    asyncio.run(main())


def test_a_reply_that_is_left_is_dropped(tmp_path):
    async def main() -> None:
        async with toy(tmp_path) as backend:
            async with contextlib.aclosing(backend.stream(REQUEST)) as deltas:
                await anext(deltas)
                assert backend.engine.stats().finished == {}
            assert backend.engine.stats().finished == {"abort": 1}

    asyncio.run(main())


def test_an_engine_that_goes_under_way_is_told(tmp_path):
    async def main() -> None:
        async with toy(tmp_path) as backend:
            assert backend.failure() is None
            call = asyncio.create_task(collect(backend))
            await asyncio.sleep(0.05)
            await backend.engine.shutdown(drain=False)
            with pytest.raises(RequestError) as caught:
                await call
            assert caught.value.status == 503
            assert backend.failure() == "engine closed"
            with pytest.raises(RequestError) as caught:
                await collect(backend)
            assert caught.value.status == 503

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_is_told_without_its_words(tmp_path):
    async def main() -> None:
        async with toy(tmp_path) as backend:
            with pytest.raises(RuntimeError):
                await backend.engine.call(lambda core: (_ for _ in ()).throw(RuntimeError("secret")))
            with pytest.raises(RequestError) as caught:
                await collect(backend)
            assert (caught.value.status, caught.value.message) == (500, "the engine failed")
            assert backend.failure() == "engine dead"

    asyncio.run(main())


def test_a_full_engine_is_told(tmp_path):
    async def main() -> None:
        async with toy(tmp_path, max_waiting=1, on_full="refuse") as backend:
            await backend.engine.pause()
            call = asyncio.create_task(collect(backend))
            await asyncio.sleep(0.05)
            with pytest.raises(RequestError) as caught:
                await collect(backend)
            assert caught.value.status == 503
            assert isinstance(caught.value.__cause__, EngineBusy)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await backend.engine.resume()

    asyncio.run(main())


def test_a_model_without_a_template_cannot_be_served():
    with pytest.raises(ValueError, match="chat template"):
        EngineBackend(AsyncEngine(ToyCore()), "toy")


# -- the command ------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The served command and its base URL."""
    process = subprocess.Popen(
        [*SERVE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "http://" in line:
                yield process, line.split()[-1]
                break
        else:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
    finally:
        process.kill()
        process.communicate()


def test_the_command_serves_and_ends_with_its_streams(folder):
    with command(str(folder), "--port", "0", "--name", "letters", M3_API_KEY="k") as (process, url):
        assert ask(f"{url}/models").status == 401
        assert [row["id"] for row in ask(f"{url}/models", key="k").json()["data"]] == ["letters"]
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="letters", messages=TALK, temperature=0, max_tokens=300, stream=True
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
        assert process.wait(20) == 0


def test_the_command_sizes_the_engine(folder):
    sizes = ("--context", "64", "--running", "3", "--cache-mb", "1", "--cache-dtype", "int8")
    model = open_core(folder)[0].model.config
    page = 2 * model.num_layers * 16 * model.num_kv_heads * (model.head_dim + 4)
    with command(str(folder), "--port", "0", "--name", "letters", *sizes) as (_, url):
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="64"):
                client.chat.completions.create(model="letters", messages=[{"role": "user", "content": "x" * 65}])
            assert client.chat.completions.create(model="letters", messages=TALK[1:], max_tokens=2).choices
        metrics = ask(f"{url.removesuffix('/v1')}/metrics").text
    assert f'm3_cache_pages{{state="total"}} {min(10**6 // page, 5 * 3):.1f}' in metrics


def test_a_command_that_cannot_serve_says_so_in_one_line(folder):
    app = typer.Typer()
    app.command()(serve)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        in_use = CliRunner().invoke(app, [str(folder), "--port", port])
    absent = CliRunner().invoke(app, [str(folder / "none")])
    for got in (in_use, absent):
        assert (got.exit_code, got.stderr.count("\n"), got.stderr[:7]) == (1, 1, "error: ")
