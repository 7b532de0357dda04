"""AsyncEngine over a toy core: outputs, mistakes of callers, callers that leave, pressure, orders between steps."""

from __future__ import annotations

import asyncio
import gc
import threading
import time

import pytest
from toy_core import (
    LONG,
    PIECES,
    SHORT,
    ToyCore,
    answer,
    beginning,
    collect,
    make_tokenizer,
    run,
    tokens_of,
    until,
)

from m3.engine.engine import AsyncEngine, Completion, EngineBusy, EngineDead, Output
from m3.engine.request import SamplingParams
from m3.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


# -- a request --------------------------------------------------------------------------------------------------------
def test_a_request():
    async def main() -> None:
        params = SamplingParams(max_tokens=9, seed=3, logprobs="raw", top_logprobs=1, prompt_logprobs=True)
        async with AsyncEngine(ToyCore()) as engine:
            outputs = await collect(engine, [1, 2, 3, 4], params, request_id="mine")
        wanted = answer([1, 2, 3, 4], params, 3)
        whole = Completion.of([1, 2, 3, 4], outputs)
        assert whole.tokens == wanted
        assert whole.logprobs == [-float(token) for token in wanted]
        assert whole.top_logprobs == [[(token, -float(token))] for token in wanted]
        assert whole.prompt_logprobs == [-1.0] * 3
        assert whole.versions == [0] * 9
        assert (whole.text, whole.finish_reason, whole.error, whole.seed) == ("", "length", None, 3)
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.cached_tokens) == (4, 9, 2)
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert {output.request_id for output in outputs} == {"mine"}
        assert [output.usage.completion_tokens for output in outputs] == [
            len(tokens_of(outputs[: n + 1])) for n in range(len(outputs))
        ]

    run(main())


def test_log_probabilities_that_were_not_asked_for_are_none():
    async def main() -> Completion:
        async with AsyncEngine(ToyCore()) as engine:
            return await engine.complete([1], SHORT)

    got = run(main())
    assert (got.logprobs, got.top_logprobs, got.prompt_logprobs) == (None, None, None)


def test_a_seed_is_drawn_and_told():
    async def main(seed: int | None) -> list[Completion]:
        async with AsyncEngine(ToyCore(), seed=seed) as engine:
            return [await engine.complete([7], SamplingParams(max_tokens=8)) for _ in range(2)]

    first, second = run(main(5))
    assert first.seed != second.seed
    assert first.tokens == answer([7], SHORT, first.seed)[:8]
    assert [one.tokens for one in run(main(5))] == [first.tokens, second.tokens]
    assert run(main(None))[0].seed != first.seed


def test_text_in_and_text_out(tokenizer):
    async def main() -> Completion:
        script = {ord("H"): [*"é 🩺 ST".encode(), PIECES[b"STOP"], ord("x")]}
        async with AsyncEngine(ToyCore(script=script), tokenizer) as engine:
            return await engine.complete("Hi", SamplingParams(stop=("STOP",)))

    got = run(main())
    assert got.prompt == list(b"Hi")
    assert (got.text, got.finish_reason) == ("é 🩺 ST", "stop")
    assert bytes(got.tokens) == "é 🩺 ST".encode()
    assert got.usage.completion_tokens == len(got.tokens) + 1


def test_a_stop_string_ends_the_request_in_the_core(tokenizer):
    core = ToyCore(script={1: [*b"abcSTOP"] + [ord("x")] * 50_000})

    async def main() -> None:
        async with AsyncEngine(core, tokenizer) as engine:
            got = await engine.complete([1], SamplingParams(stop=("STOP",), max_tokens=40_000))
            assert (got.text, got.finish_reason, got.usage.completion_tokens) == ("abc", "stop", 7)
            await until(lambda: core.is_clean() and engine.stats().running == 0)  # stats are told after the step
            assert list(core.aborted.values()) == ["stop"]

    run(main())
    assert core.steps < 10_000


def test_held_back_text_is_flushed(tokenizer):
    async def main() -> Completion:
        async with AsyncEngine(ToyCore(script={1: [*b"abcSTO"]}), tokenizer) as engine:
            return await engine.complete([1], SamplingParams(stop=("STOP",)))

    got = run(main())
    assert (got.text, bytes(got.tokens), got.finish_reason) == ("abcSTO", b"abcSTO", "stop")


def test_a_conversation(tokenizer):
    messages = [{"role": "user", "content": "Hi"}]

    async def main() -> list[Output]:
        script = {tokenizer.chat(messages)[0]: [*b"Hello"]}
        async with AsyncEngine(ToyCore(script=script), tokenizer) as engine:
            return [output async for output in engine.chat(messages, request_id="talk")]

    outputs = run(main())
    assert "".join(output.text for output in outputs) == "Hello"
    assert outputs[-1].usage.prompt_tokens == len(tokenizer.chat(messages))
    assert outputs[0].request_id == "talk"


# -- what a caller may get wrong --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("text", SHORT, "engine: prompt: want tokens where there is no tokenizer; got a str"),
        ([], SHORT, r"engine: prompt: want a str, or a list of ints, of at least one token; got \[\]"),
        ([1, 2.0], SHORT, "engine: prompt: want a str, or a list of ints"),
        ([True], SHORT, "engine: prompt: want a str, or a list of ints"),
        (7, SHORT, "engine: prompt: want a str, or a list of ints"),
        ([-1], SHORT, "core: prompt"),
        ([1], {"max_tokens": 3}, "engine: params: want SamplingParams"),
        ([1], SamplingParams(stop=("x",)), "engine: stop: want no stop strings where there is no tokenizer"),
    ],
    ids=["text", "empty", "float", "bool", "int", "core", "params", "stop"],
)
def test_a_bad_request_is_refused_and_harms_nobody(prompt, params, message):
    async def main() -> None:
        async with AsyncEngine(ToyCore()) as engine:
            other = asyncio.create_task(engine.complete([1], SHORT))
            with pytest.raises(ValueError, match=message):
                await collect(engine, prompt, params)
            assert (await other).tokens == answer([1], SHORT, 0)
            assert engine.stats().finished == {"length": 1}

    run(main())


def test_an_id_is_one_request_at_a_time():
    async def main() -> None:
        async with AsyncEngine(ToyCore()) as engine:
            stream = engine.generate([1], LONG, request_id="mine")
            await anext(stream)
            with pytest.raises(ValueError, match="engine: request_id: want one that no request under way has"):
                await collect(engine, [2], SHORT, request_id="mine")
            await stream.aclose()
            again = await collect(engine, [2], SHORT, request_id="mine")
            assert tokens_of(again) == answer([2], SHORT, 0)

    run(main())


def test_one_event_loop():
    engine = AsyncEngine(ToyCore())

    async def elsewhere() -> None:
        with pytest.raises(ValueError, match="engine: loop: want the event loop that the engine was started on"):
            await engine.complete([1], SHORT)
        with pytest.raises(ValueError, match="engine: loop"):
            await engine.shutdown()
        with pytest.raises(ValueError, match="engine: loop"):
            engine.abort("mine")

    async def main() -> None:
        async with engine:
            await asyncio.to_thread(asyncio.run, elsewhere())
            assert (await engine.complete([1], SHORT)).tokens == answer([1], SHORT, 0)

    run(main())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_waiting": 0}, "engine: max_waiting: want at least 1"), ({"on_full": "x"}, "engine: on_full")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AsyncEngine(ToyCore(), **options)


# -- leaving ----------------------------------------------------------------------------------------------------------
async def leave_by_break(engine: AsyncEngine) -> None:
    async for _ in engine.generate([1], LONG):
        break
    gc.collect()


async def leave_by_aclose(engine: AsyncEngine) -> None:
    stream = engine.generate([1], LONG)
    await anext(stream)
    await stream.aclose()


async def leave_by_cancel(engine: AsyncEngine) -> None:
    task = asyncio.create_task(collect(engine, [1], LONG))
    await until(lambda: engine.stats().running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def leave_by_timeout(engine: AsyncEngine) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.complete([1], LONG), 0.02)


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_aclose, leave_by_cancel, leave_by_timeout], ids=lambda way: way.__name__
)
def test_a_caller_that_leaves_ends_its_request(leave):
    core = ToyCore(step_time=0.0005)

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            await leave(engine)
            await until(lambda: core.is_clean() and engine.stats().running == 0)
            assert engine.stats().finished == {"abort": 1}
            assert list(core.aborted.values()) == ["abort"]

    run(main())


def test_abort_by_id():
    async def main() -> None:
        async with AsyncEngine(ToyCore(step_time=0.0005)) as engine:
            task = asyncio.create_task(collect(engine, [1], LONG, request_id="mine"))
            await until(lambda: engine.stats().running == 1)
            assert engine.abort("mine")
            assert not engine.abort("mine")
            outputs = await task
            assert outputs[-1].finish_reason == "abort"
            got = tokens_of(outputs)
            assert got == beginning([1], len(got))
            assert not engine.abort("nobody")

    run(main())


def test_a_deadline():
    async def main() -> None:
        async with AsyncEngine(ToyCore(step_time=0.001)) as engine:
            start = time.monotonic()
            got = await engine.complete([1], SamplingParams(max_tokens=100_000, deadline=0.3, seed=0))
            assert got.finish_reason == "deadline"
            assert time.monotonic() - start >= 0.3
            assert got.tokens == beginning([1], len(got.tokens))
            assert len(got.tokens) == got.usage.completion_tokens

    run(main())


def test_a_deadline_outside_and_while_paused():
    core = ToyCore()

    async def main() -> None:
        async with AsyncEngine(core, max_waiting=1) as engine:
            await engine.pause()
            hurried = SamplingParams(deadline=0.05)
            inside, outside = await asyncio.gather(engine.complete([1], hurried), engine.complete([2], hurried))
            assert [(one.finish_reason, one.tokens) for one in (inside, outside)] == [("deadline", [])] * 2
            assert (core.steps, len(core.added)) == (0, 1)

    run(main())
    assert core.is_clean()


# -- pressure ---------------------------------------------------------------------------------------------------------
def test_who_finds_no_room_waits_in_order():
    core = ToyCore(max_running=1, max_waiting=2, step_time=0.0005)
    order: list[int] = []

    async def one(engine: AsyncEngine, index: int) -> None:
        got = await engine.complete([index], SHORT)
        order.append(index)
        assert got.tokens == answer([index], SHORT, 0)

    async def main() -> None:
        async with AsyncEngine(core, max_waiting=2) as engine:
            await engine.pause()
            tasks = [asyncio.create_task(one(engine, index)) for index in range(20)]
            await asyncio.sleep(0)
            stats = engine.stats()
            assert (stats.waiting, stats.outside, stats.running) == (2, 18, 0)
            await engine.resume()
            await asyncio.gather(*tasks)

    run(main())
    assert order == list(range(20))


def test_who_finds_no_room_may_be_refused():
    async def main() -> None:
        async with AsyncEngine(ToyCore(), max_waiting=2, on_full="refuse") as engine:
            await engine.pause()
            tasks = [asyncio.create_task(engine.complete([index], SHORT)) for index in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(EngineBusy, match="engine: want at most 2 requests that wait; got one more"):
                await engine.complete([3], SHORT)
            await engine.resume()
            assert [one.finish_reason for one in await asyncio.gather(*tasks)] == ["length"] * 2
            assert (await engine.complete([3], SHORT)).finish_reason == "length"

    run(main())


def test_a_core_with_less_room_than_the_engine_loses_nobody():
    core = ToyCore(max_running=2, max_waiting=1)

    async def main() -> None:
        async with AsyncEngine(core, max_waiting=64) as engine:
            tasks = [asyncio.create_task(engine.complete([index], SHORT)) for index in range(40)]
            await asyncio.sleep(0)
            tasks[30].cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(done[30], asyncio.CancelledError)
            for index in [*range(30), *range(31, 40)]:
                assert done[index].tokens == answer([index], SHORT, 0)

    run(main())
    assert core.is_clean()


def test_who_finds_the_core_full_is_not_overtaken():
    core = ToyCore(max_waiting=1)

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            await engine.pause()
            tasks = [asyncio.create_task(engine.complete([1], SHORT, request_id=name)) for name in ("first", "second")]
            await asyncio.sleep(0)
            engine.abort("first")
            tasks.append(asyncio.create_task(engine.complete([1], SHORT, request_id="third")))
            await asyncio.sleep(0)
            await engine.resume()
            reasons = [one.finish_reason for one in await asyncio.gather(*tasks)]
            assert reasons == ["abort", "length", "length"]

    run(main())
    assert [name.partition("#")[0] for name in core.added] == ["first", "second", "third"]


def test_a_core_that_never_has_room_refuses():
    async def main() -> None:
        async with AsyncEngine(ToyCore(max_waiting=0)) as engine:
            with pytest.raises(ValueError, match="core: full"):
                await engine.complete([1], SHORT)

    run(main())


def test_what_is_not_read_is_merged():
    params = SamplingParams(max_tokens=400, seed=0)

    async def main() -> list[Output]:
        async with AsyncEngine(ToyCore()) as engine:
            stream = engine.generate([1], params)
            reader = asyncio.create_task(anext(stream))
            await until(lambda: engine.stats().finished == {"length": 1})
            return [await reader] + [output async for output in stream]

    outputs = run(main())
    assert tokens_of(outputs) == answer([1], params, 0)
    assert len(outputs) <= 2


def test_without_work_the_core_is_left_alone():
    core = ToyCore()

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            await engine.complete([1], SHORT)
            steps = core.steps
            await asyncio.sleep(0.05)
            assert core.steps == steps == engine.stats().steps

    run(main())


# -- between steps ----------------------------------------------------------------------------------------------------
def test_pause_and_resume():
    core = ToyCore(step_time=0.0005)
    params = SamplingParams(max_tokens=300, seed=0)

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            task = asyncio.create_task(engine.complete([1], params))
            await until(lambda: core.steps > 3)
            await engine.pause()
            steps = core.steps
            await asyncio.sleep(0.02)
            assert core.steps == steps
            assert engine.stats().paused
            await engine.resume()
            assert (await task).tokens == answer([1], params, 0)

    run(main())


def test_new_weights_come_between_two_steps():
    core = ToyCore(step_time=0.0005)

    async def main() -> list[int]:
        async with AsyncEngine(core) as engine:
            stream = engine.generate([1], LONG)
            versions = (await anext(stream)).versions
            await engine.update_weights({}, 1)
            seen: list[str] = []
            await engine.update_weights(lambda: seen.append(threading.current_thread().name), 2)
            assert seen == ["m3-engine"]
            with pytest.raises(ValueError, match="core: version: want one above 2; got 2"):
                await engine.update_weights({}, 2)
            assert await engine.call(lambda core: core) is core
            async for output in stream:
                versions += output.versions
                assert output.version == output.versions[-1]
                if output.version == 2:
                    break
            await stream.aclose()
            return versions

    versions = run(main())
    assert versions == sorted(versions)
    assert {0, 2} <= set(versions)
    assert core.weights == {}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_weights_half_written_are_the_end():
    def tear() -> None:
        raise OSError("the file is torn")

    async def main() -> None:
        async with AsyncEngine(ToyCore(step_time=0.0005)) as engine:
            task = asyncio.create_task(engine.complete([1], LONG))
            await until(lambda: engine.stats().running == 1)
            with pytest.raises(OSError, match="the file is torn"):
                await engine.update_weights(tear, 1)
            got = await task
            assert (got.finish_reason, got.error) == ("error", "OSError: the file is torn")
            with pytest.raises(EngineDead, match="OSError: the file is torn"):
                await engine.update_weights({}, 1)

    run(main())


def test_a_caller_of_the_core_may_be_cancelled():
    async def main() -> None:
        async with AsyncEngine(ToyCore()) as engine:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.call(lambda core: time.sleep(0.05)), 0.01)
            assert (await engine.complete([1], SHORT)).tokens == answer([1], SHORT, 0)

    run(main())
