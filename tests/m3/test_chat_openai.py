"""OpenAIChat and EndpointPool against real servers on loopback: ours, and some that fail on purpose."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from types import MappingProxyType

import pytest
from loopback import EchoBackend, Theirs, completion, serving
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from m3.rollout.chat import Budget, ChatClient, ChatError, Failure, Reply, Usage
from m3.rollout.openai import EndpointPool, OpenAIChat
from m3.rollout.scripted import ScriptedChat
from m3.serve.app import build

KEY = "a key"
BACKEND = EchoBackend()
HELLO = [{"role": "user", "content": "hello there"}]
PROPERTIES = {"met": {"type": "boolean"}}
SCHEMA = {"type": "object", "properties": PROPERTIES}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(build(BACKEND, api_keys=[KEY])) as url:
        yield url


@pytest.fixture(scope="module")
def theirs() -> Iterator[Theirs]:
    server = Theirs()
    with serving(server.app) as server.url:
        yield server


async def one(client: OpenAIChat, messages: list[dict[str, str]] = HELLO, **options: object) -> Reply:
    async with client:
        return await client.chat(messages, **options)


def failure(client: OpenAIChat, messages: list[dict[str, str]] = HELLO) -> ChatError:
    with pytest.raises(ChatError) as caught:
        asyncio.run(one(client, messages))
    return caught.value


# -- a call -----------------------------------------------------------------------------------------------------------
def test_a_reply_with_its_usage(url):
    client = OpenAIChat(url, "echo", api_key=KEY)
    assert isinstance(client, ChatClient)
    assert asyncio.run(one(client)) == Reply(
        text="hello there",
        finish_reason="stop",
        usage=Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=3),
        model="echo",
    )


def test_what_is_asked_reaches_the_server(url):
    asyncio.run(one(OpenAIChat(url, "echo", api_key=KEY), temperature=0.25, max_tokens=9, seed=2**40, stop=["END"]))
    got = BACKEND.requests[-1]
    assert (got.temperature, got.max_tokens, got.seed, got.stop) == (0.25, 9, 2**40, ["END"])
    asyncio.run(one(OpenAIChat(url, "echo", api_key=KEY)))
    got = BACKEND.requests[-1]
    assert (got.temperature, got.seed, got.stop) == (0.0, None, None)


def test_the_key_comes_from_the_environment(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert asyncio.run(one(OpenAIChat(url, "echo"))).text == "hello there"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert failure(OpenAIChat(url, "echo")).failure is Failure.refused


def test_a_seed_too_large_for_the_server_is_refused_by_name(url):
    async def main() -> None:
        await one(OpenAIChat(url, "echo", api_key=KEY), seed=2**64)

    with pytest.raises(ChatError, match="seed") as caught:
        asyncio.run(main())
    assert caught.value.failure is Failure.refused


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        (None, Usage()),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}, Usage(prompt_tokens=5, completion_tokens=2)),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": {}},
            Usage(prompt_tokens=5, completion_tokens=2),
        ),
        (
            {
                "prompt_tokens": 5,
                "completion_tokens": 2,
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
            Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=0),
        ),
    ],
    ids=["no-usage", "no-details", "empty-details", "zero"],
)
def test_cached_tokens_that_are_not_told_are_unknown(usage, wanted, theirs):
    async def answer(request: Request) -> Response:
        return completion("hi", usage=usage)

    theirs.answer = answer
    assert asyncio.run(one(OpenAIChat(theirs.url, "m"))).usage == wanted


def test_headers_are_sent(theirs):
    async def answer(request: Request) -> Response:
        return completion(request.headers["x-team"])

    theirs.answer = answer
    assert asyncio.run(one(OpenAIChat(theirs.url, "m", headers={"X-Team": "clinic"}))).text == "clinic"


# -- failures ---------------------------------------------------------------------------------------------------------
def failing(statuses: list[int]) -> tuple[Callable[[Request], Awaitable[Response]], list[int]]:
    """A server that fails with these statuses, then answers; and what it was asked so far."""
    left, seen = list(statuses), []

    async def answer(request: Request) -> Response:
        seen.append(len(left))
        if left:
            return JSONResponse({"error": {"message": "not now"}}, left.pop(0), headers={"retry-after-ms": "5"})
        return completion("at last")

    return answer, seen


def test_a_server_that_fails_for_a_while_is_asked_again(theirs):
    answer, seen = failing([500, 429])
    theirs.answer = answer
    assert asyncio.run(one(OpenAIChat(theirs.url, "m", max_retries=2))).text == "at last"
    assert seen == [2, 1, 0]


@pytest.mark.parametrize(
    ("status", "attempts", "wanted"),
    [
        (500, 2, Failure.unreachable),
        (503, 2, Failure.unreachable),
        (429, 2, Failure.unreachable),
        (504, 2, Failure.timeout),
        (408, 2, Failure.timeout),
        (400, 1, Failure.refused),
        (401, 1, Failure.refused),
        (404, 1, Failure.refused),
        (413, 1, Failure.refused),
    ],
)
def test_failures_have_names(status, attempts, wanted, theirs):
    answer, seen = failing([status] * 9)
    theirs.answer = answer
    error = failure(OpenAIChat(theirs.url, "m", max_retries=1))
    assert (error.failure, len(seen)) == (wanted, attempts)
    assert f"status {status}" in str(error)


def test_a_server_that_hangs_is_a_timeout(url):
    BACKEND.closed.clear()
    hang = [{"role": "user", "content": "hang"}]
    error = failure(OpenAIChat(url, "echo", api_key=KEY, timeout=0.2, max_retries=0), hang)
    assert (error.failure, "0.2 s" in str(error)) == (Failure.timeout, True)
    assert BACKEND.closed.wait(5), "the server is told"


def test_no_server_is_unreachable():
    with serving(build(BACKEND)) as url:
        pass
    assert failure(OpenAIChat(url, "m", max_retries=0)).failure is Failure.unreachable


@pytest.mark.parametrize(
    "response",
    [
        PlainTextResponse("<html>welcome</html>"),
        PlainTextResponse("{", media_type="application/json"),
        JSONResponse({}),
        JSONResponse([]),
        JSONResponse({"choices": []}),
        JSONResponse({"choices": [{"index": 0}]}),
        JSONResponse({"choices": "no"}),
        JSONResponse({"choices": {"a": 1}}),
        JSONResponse({"choices": [{"message": "hi"}]}),
        JSONResponse({"choices": [{"message": {"content": [{"type": "text", "text": "hi"}]}}]}),
        JSONResponse({"choices": [{"message": {"content": None, "refusal": {"a": 1}}}]}),
        Response(b"[" * 100_000, media_type="application/json"),
        Response(b'{"choices": ' + b"1" * 5000 + b"}", media_type="application/json"),
        Response(b'{"choices": [{"message": {"content": "\xff"}}]}', media_type="application/json"),
    ],
    ids=[
        *("html", "broken", "empty", "list", "no-choice", "no-message", "text", "object", "message-text", "parts"),
        *("refusal-object", "deep", "many-digits", "no-utf8"),
    ],
)
def test_an_answer_that_is_no_completion_is_unreachable(response, theirs):
    async def answer(request: Request) -> Response:
        return response

    theirs.answer = answer
    assert failure(OpenAIChat(theirs.url, "m", max_retries=0)).failure is Failure.unreachable


STRANGE_USAGE = {
    "text": "many",
    "list": [1],
    "words": {"prompt_tokens": "a", "completion_tokens": None},
    "negative": {"prompt_tokens": -5, "completion_tokens": 2.5},
    "details": {"prompt_tokens_details": "x"},
}


@pytest.mark.parametrize("usage", STRANGE_USAGE.values(), ids=STRANGE_USAGE)
def test_counts_that_are_no_numbers_are_unknown(usage, theirs):
    async def answer(request: Request) -> Response:
        choice = {"message": {"content": "hi"}, "finish_reason": [1]}
        return JSONResponse({"choices": [choice], "usage": usage, "model": 7})

    theirs.answer = answer
    budget = Budget(tokens=100)
    reply = asyncio.run(one(OpenAIChat(theirs.url, "m", max_retries=0, budget=budget)))
    assert (reply, budget.tokens_used) == (Reply(text="hi"), 0)


def test_half_a_character_can_be_written_down(theirs):
    async def answer(request: Request) -> Response:
        return Response(b'{"choices": [{"message": {"content": "\\ud83d yes"}}]}', media_type="application/json")

    theirs.answer = answer
    assert asyncio.run(one(OpenAIChat(theirs.url, "m", max_retries=0))).text.encode() == b"? yes"


def test_cancelling_a_call_ends_the_work(url):
    BACKEND.closed.clear()

    async def main() -> None:
        async with OpenAIChat(url, "echo", api_key=KEY) as client:
            call = asyncio.create_task(client.chat([{"role": "user", "content": "hang"}]))
            await asyncio.sleep(0.2)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert (await client.chat(HELLO)).text == "hello there"

    asyncio.run(main())
    assert BACKEND.closed.wait(5)


# -- budget, concurrency, schemas -------------------------------------------------------------------------------------
def test_a_budget_is_shared_and_ends(url):
    budget = Budget(calls=3)

    async def main() -> list[Reply | BaseException]:
        async with (
            OpenAIChat(url, "echo", api_key=KEY, budget=budget) as first,
            OpenAIChat(url, "echo", api_key=KEY, budget=budget) as second,
        ):
            calls = [client.chat(HELLO) for client in (first, second, first, second)]
            return await asyncio.gather(*calls, return_exceptions=True)

    outcomes = [one.failure if isinstance(one, ChatError) else one.text for one in asyncio.run(main())]
    assert sorted(outcomes) == ["hello there"] * 3 + [Failure.over_budget]
    assert (budget.calls_made, budget.tokens_used) == (3, 27)


def test_no_more_calls_are_under_way_than_allowed(theirs):
    now, most = 0, 0

    async def answer(request: Request) -> Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return completion("hi")

    async def main(url: str) -> None:
        async with OpenAIChat(url, "m", concurrency=3) as client:
            await asyncio.gather(*(client.chat(HELLO) for _ in range(12)))

    theirs.answer = answer
    asyncio.run(main(theirs.url))
    assert most == 3


def test_a_schema_that_is_refused_is_left_out_and_said_once(url, caplog):
    async def main() -> list[str]:
        async with OpenAIChat(url, "echo", api_key=KEY) as client:
            return [(await client.chat(HELLO, json_schema=SCHEMA)).text for _ in range(3)]

    with caplog.at_level(logging.WARNING, logger="m3.rollout"):
        assert asyncio.run(main()) == ["hello there"] * 3
    assert caplog.text.count("refuses a json_schema") == 1


@pytest.mark.parametrize(
    "schema",
    [SCHEMA, MappingProxyType({**SCHEMA, "properties": MappingProxyType(PROPERTIES)})],
    ids=["dict", "mapping"],
)
def test_a_schema_is_asked_of_a_server_that_takes_it(theirs, schema):
    asked = []

    async def answer(request: Request) -> Response:
        asked.append((await request.json())["response_format"])
        return completion("{}")

    theirs.answer = answer
    asyncio.run(one(OpenAIChat(theirs.url, "m"), json_schema=schema))
    assert asked == [{"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}]


def test_a_call_that_is_refused_anyway_says_nothing_of_schemas(url, caplog):
    refuse = [{"role": "user", "content": "refuse"}]
    with caplog.at_level(logging.WARNING, logger="m3.rollout"), pytest.raises(ChatError) as caught:
        asyncio.run(one(OpenAIChat(url, "echo", api_key=KEY), refuse, json_schema=SCHEMA))
    assert (caught.value.failure, caplog.text) == (Failure.refused, "")


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"base_url": "localhost:80"}, "base_url"),
        ({"model": ""}, "model"),
        ({"timeout": 0}, "timeout"),
        ({"concurrency": 0}, "concurrency"),
    ],
)
def test_settings_that_make_no_sense(options, argument):
    with pytest.raises(ValueError, match=argument):
        OpenAIChat(**{"base_url": "http://x/v1", "model": "m", **options})


# -- several endpoints ------------------------------------------------------------------------------------------------
def test_a_conversation_stays_with_its_endpoint():
    clients = [ScriptedChat(["a"], repeat=True), ScriptedChat(["b"], repeat=True), ScriptedChat(["c"], repeat=True)]
    pool = EndpointPool(clients, names=["a", "b", "c"])
    assert isinstance(pool, ChatClient)
    assert isinstance(pool.of("x"), ChatClient)

    async def main(pool: EndpointPool, keys: list[str]) -> list[str]:
        return [(await pool.of(key).chat(HELLO)).text for key in keys]

    keys = [f"conversation {n}" for n in range(60)]
    chosen = asyncio.run(main(pool, keys))
    assert chosen == asyncio.run(main(pool, keys)) == [pool.order(key)[0] for key in keys]
    assert all(10 <= chosen.count(name) <= 30 for name in "abc")
    fewer = asyncio.run(main(EndpointPool(clients[:2], names=["a", "b"]), keys))
    assert all(before == after for before, after in zip(chosen, fewer, strict=True) if before != "c")


def test_calls_without_a_key_stay_with_their_first_question():
    clients = {name: ScriptedChat([name], repeat=True) for name in "ab"}
    pool = EndpointPool(list(clients.values()), names=list(clients))
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "my head hurts"}]

    async def main() -> list[str]:
        longer = [*talk, {"role": "assistant", "content": "since when?"}, {"role": "user", "content": "today"}]
        return [(await pool.chat(messages)).text for messages in (talk, longer)]

    first, second = asyncio.run(main())
    assert first == second == pool.order("my head hurts")[0]


def test_an_endpoint_that_cannot_be_reached_is_passed_over(caplog):
    gone = ChatError(Failure.unreachable, "gone")
    clients = {name: ScriptedChat([gone, name], repeat=True) for name in "ab"}
    pool = EndpointPool(list(clients.values()), names=list(clients), rest=60)
    first, second = pool.order("key")
    clients[second] = pool._clients[second] = ScriptedChat([second], repeat=True)

    async def main() -> list[str]:
        return [(await pool.of("key").chat(HELLO)).text for _ in range(3)]

    with caplog.at_level(logging.WARNING, logger="m3.rollout"):
        assert asyncio.run(main()) == [second] * 3
    assert len(clients[first].calls) == 1
    assert caplog.text.count("passed over") == 1


def test_an_endpoint_is_asked_again_after_its_rest():
    gone = ChatError(Failure.unreachable, "gone")
    pool = EndpointPool([ScriptedChat([gone, "back"])], names=["a"], rest=0)

    async def main() -> str:
        with pytest.raises(ChatError, match="gone"):
            await pool.of("key").chat(HELLO)
        return (await pool.of("key").chat(HELLO)).text

    assert asyncio.run(main()) == "back"


def test_a_refusal_is_not_passed_on():
    clients = [ScriptedChat([ChatError(Failure.refused, "no")], repeat=True) for _ in range(2)]
    pool = EndpointPool(clients, names=["a", "b"])
    with pytest.raises(ChatError, match="no"):
        asyncio.run(pool.of("key").chat(HELLO))
    assert sum(len(client.calls) for client in clients) == 1
