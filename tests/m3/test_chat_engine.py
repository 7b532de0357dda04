"""A chat model in this process, the scripted one, and how each is opened by a word."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from letters_model import LETTERS, make_letters_model
from loopback import EchoBackend, serving
from toy_core import ToyCore, make_tokenizer, until

from m3.engine.batch_engine import Engine
from m3.engine.engine import AsyncEngine
from m3.engine.open import open_core
from m3.engine.request import SamplingParams
from m3.rollout.chat import Budget, ChatClient, ChatError, Failure, Reply
from m3.rollout.engine import EngineChat
from m3.rollout.open import open_chat
from m3.rollout.scripted import ScriptedChat
from m3.serve.app import build

HELLO = [{"role": "user", "content": "Hello, how are you today?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_letters_model(tmp_path_factory.mktemp("letters"))


# -- the engine -------------------------------------------------------------------------------------------------------
def test_a_reply_is_what_the_engine_draws(folder):
    async def main() -> tuple[Reply, Reply]:
        async with open_chat(f"embedded:{folder}") as client:
            assert isinstance(client, ChatClient)
            assert isinstance(client, EngineChat)
            return (
                await client.chat(HELLO, temperature=0.8, max_tokens=24, seed=5),
                await client.chat(HELLO, temperature=0.8, max_tokens=24, seed=6),
            )

    first, second = asyncio.run(main())
    core, tokenizer = open_core(folder)
    prompt = tokenizer.chat(HELLO)
    wanted = Engine(core, tokenizer).generate([prompt], SamplingParams(temperature=0.8, max_tokens=24, seed=5))[0]
    assert (first.text, first.token_ids) == (wanted.text, tuple(wanted.tokens))
    assert (first.finish_reason, first.model) == (wanted.finish_reason, str(folder))
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (len(prompt), wanted.usage.completion_tokens)
    assert set(first.text) <= set(LETTERS)
    assert second.token_ids != first.token_ids


def test_a_conversation_that_goes_on_finds_its_beginning_in_the_cache(folder):
    async def main() -> list[int | None]:
        async with open_chat(f"embedded:{folder}") as client:
            longer = [*HELLO, {"role": "assistant", "content": "well"}, {"role": "user", "content": "good"}]
            replies = [await client.chat(messages, max_tokens=2) for messages in (HELLO, longer)]
            return [reply.usage.cached_tokens for reply in replies]

    assert asyncio.run(main()) == [0, 32]


def test_a_stop_string_ends_a_reply(folder):
    async def main() -> tuple[Reply, Reply]:
        async with open_chat(f"embedded:{folder}") as client:
            whole = await client.chat(HELLO, max_tokens=16)
            return whole, await client.chat(HELLO, max_tokens=16, stop=[whole.text[6:8]])

    whole, stopped = asyncio.run(main())
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(whole.text[6:8])]


def failure(folder: Path, budget: Budget | None = None, **options: object) -> ChatError:
    async def main() -> None:
        async with open_chat(f"embedded:{folder}", budget=budget) as client:
            await client.chat(**{"messages": HELLO, **options})

    with pytest.raises(ChatError) as caught:
        asyncio.run(main())
    return caught.value


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_what_the_engine_cannot_take_is_refused_by_name(folder, options, named):
    error = failure(folder, **options)
    assert error.failure is Failure.refused
    assert named in str(error)


def test_a_budget_is_kept(folder):
    assert failure(folder, Budget(calls=0)).failure is Failure.over_budget


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory):
    return make_tokenizer(tmp_path_factory.mktemp("toy"))


HI = [{"role": "user", "content": "Hi"}]


def test_a_reply_that_takes_too_long_is_a_timeout_and_dropped(toy):
    core = ToyCore()

    async def main() -> ChatError:
        async with AsyncEngine(core, toy) as engine:
            with pytest.raises(ChatError) as caught:
                await EngineChat(engine, "toy", timeout=0.05).chat(HI, max_tokens=10**6)
            return caught.value

    error = asyncio.run(main())
    assert (error.failure, "0.05 s" in str(error)) == (Failure.timeout, True)


def test_a_cancelled_call_is_dropped(toy):
    core = ToyCore()

    async def main() -> None:
        async with AsyncEngine(core, toy) as engine:
            call = asyncio.create_task(EngineChat(engine, "toy").chat(HI, max_tokens=10**6))
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: list(core.aborted.values()) == ["abort"])

    asyncio.run(main())


def test_an_engine_that_is_shut_down_is_unreachable(toy):
    async def main() -> ChatError:
        async with AsyncEngine(ToyCore(), toy) as engine:
            client = EngineChat(engine, "toy")
        with pytest.raises(ChatError) as caught:
            await client.chat(HI)
        return caught.value

    assert asyncio.run(main()).failure is Failure.unreachable


def test_a_reply_under_way_at_the_shutdown_is_unreachable(toy):
    async def main() -> ChatError:
        engine = AsyncEngine(ToyCore(), toy)
        await engine.start()
        call = asyncio.create_task(EngineChat(engine, "toy").chat(HI, max_tokens=10**6))
        await asyncio.sleep(0.05)
        await engine.shutdown(drain=False)
        with pytest.raises(ChatError) as caught:
            await call
        return caught.value

    assert asyncio.run(main()).failure is Failure.unreachable


def test_an_engine_without_a_tokenizer_cannot_chat():
    with pytest.raises(ValueError, match="tokenizer"):
        EngineChat(AsyncEngine(ToyCore()), "toy")


# -- scripts ----------------------------------------------------------------------------------------------------------
def test_a_script_says_its_lines_and_keeps_its_calls():
    client = ScriptedChat(["a", Reply(text="b", finish_reason="length"), ChatError(Failure.timeout, "late")])

    async def main() -> None:
        assert (await client.chat(HELLO, seed=3, stop=["x"], json_schema={})).text == "a"
        assert (await client.chat(HI)).finish_reason == "length"
        with pytest.raises(ChatError, match="late"):
            await client.chat(HI)
        with pytest.raises(ValueError, match="one for call 4; got 3"):
            await client.chat(HI)

    asyncio.run(main())
    assert [call.last for call in client.calls] == [HELLO[0]["content"], "Hi", "Hi"]
    first = client.calls[0]
    assert (first.temperature, first.max_tokens, first.seed, first.stop, first.json_schema) == (0.0, 512, 3, ("x",), {})


def test_a_script_may_be_a_function_or_begin_again():
    async def main() -> list[str]:
        echo, again = ScriptedChat(lambda call: call.last.upper()), ScriptedChat(["a", "b"], repeat=True)
        return [(await client.chat(HI)).text for client in (echo, again, again, again)]

    assert asyncio.run(main()) == ["HI", "a", "b", "a"]


def test_a_script_keeps_a_budget():
    client = ScriptedChat(["a"], repeat=True, budget=Budget(calls=1))

    async def main() -> None:
        await client.chat(HI)
        with pytest.raises(ChatError, match="calls 1 of 1"):
            await client.chat(HI)

    asyncio.run(main())
    assert len(client.calls) == 1


# -- by a word --------------------------------------------------------------------------------------------------------
async def said(spec: str, **options: object) -> list[str]:
    async with open_chat(spec, **options) as client:
        return [(await client.chat(HI)).text for _ in range(3)]


def test_a_script_from_a_file(tmp_path):
    file = tmp_path / "replies.jsonl"
    file.write_text('"yes"\n\n"no\\nway"\n')
    assert asyncio.run(said(f"scripted:{file}")) == ["yes", "no\nway", "yes"]


def test_servers_by_their_urls():
    backend = EchoBackend()
    with serving(build(backend, api_keys=["k"])) as one, serving(build(backend, api_keys=["k"])) as two:
        assert asyncio.run(said(f"{one}#echo", api_key="k")) == ["Hi"] * 3
        assert asyncio.run(said(f"{one},{two}#echo", api_key="k")) == ["Hi"] * 3


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("http://x/v1", "after '#'"),
        ("http://x/v1#", "after '#'"),
        ("embedded:", "want 'http"),
        ("SmolLM2", "want 'http"),
        ("", "want 'http"),
    ],
)
def test_a_word_that_names_no_model(spec, told):
    with pytest.raises(ValueError, match=told):
        asyncio.run(said(spec))


@pytest.mark.parametrize(("text", "told"), [("", "got none"), ("3\n", ":1: .* got int"), ('"a"\n{\n', ":2: want")])
def test_a_script_that_is_none(tmp_path, text, told):
    file = tmp_path / "replies.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        asyncio.run(said(f"scripted:{file}"))
