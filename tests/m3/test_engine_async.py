"""AsyncEngine over a toy core: no request lost, no stream mixed up, no deadlock, whatever callers and the core do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from toy_core import PIECES, ToyCore, answer, make_tokenizer

from m3.engine.engine import AsyncEngine, Completion, EngineBusy, EngineClosed, EngineDead, Output
from m3.engine.request import SamplingParams
from m3.models.tokenizer import Tokenizer

PATIENCE = 30.0  # seconds after which a test calls it a deadlock
LONG = SamplingParams(max_tokens=100_000, seed=0)
SHORT = SamplingParams(max_tokens=12, seed=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(main: Awaitable[Any]) -> Any:
    async def patiently() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await main

    return asyncio.run(patiently())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def collect(engine: AsyncEngine, prompt: list[int], params: SamplingParams, **options: Any) -> list[Output]:
    return [output async for output in engine.generate(prompt, params, **options)]


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.tokens]


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
            await until(core.is_clean)
            assert list(core.aborted.values()) == ["stop"]
            assert engine.stats().running == 0

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
            assert got == answer([1], SamplingParams(max_tokens=len(got)), 0) if got else True
            assert not engine.abort("nobody")

    run(main())


def test_a_deadline():
    async def main() -> None:
        async with AsyncEngine(ToyCore(step_time=0.001)) as engine:
            start = time.monotonic()
            got = await engine.complete([1], SamplingParams(max_tokens=100_000, deadline=0.3, seed=0))
            assert got.finish_reason == "deadline"
            assert time.monotonic() - start >= 0.3
            assert got.tokens == answer([1], SamplingParams(max_tokens=len(got.tokens)), 0)
            assert len(got.tokens) == got.usage.completion_tokens > 0

    run(main())


def test_a_deadline_outside_and_while_paused():
    core = ToyCore()

    async def main() -> None:
        async with AsyncEngine(core, max_waiting=1) as engine:
            await engine.pause()
            hurried = SamplingParams(deadline=0.05)
            inside, outside = await asyncio.gather(engine.complete([1], hurried), engine.complete([2], hurried))
            assert [(one.finish_reason, one.tokens) for one in (inside, outside)] == [("deadline", [])] * 2
            assert (core.steps, core.added) == (0, 1)

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


# -- a core that breaks -----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_core_ends_every_request():
    core = ToyCore(max_running=2, max_waiting=2, step_time=0.001, fail_at=20)

    async def main() -> None:
        async with AsyncEngine(core, max_waiting=2) as engine:
            tasks = [asyncio.create_task(engine.complete([index], LONG)) for index in range(8)]
            await until(lambda: core.steps > 2)
            done = await asyncio.gather(*tasks)
            for index, one in enumerate(done):
                assert (one.finish_reason, one.error) == ("error", "ZeroDivisionError: the toy broke")
                assert (
                    one.tokens == answer([index], SamplingParams(max_tokens=len(one.tokens) or 1), 0)[: len(one.tokens)]
                )
            stats = engine.stats()
            assert (stats.state, stats.failure) == ("dead", "ZeroDivisionError: the toy broke")
            assert (stats.finished, stats.running, stats.outside) == ({"error": 8}, 0, 0)
            with pytest.raises(EngineDead, match="the toy broke") as caught:
                await engine.complete([1], SHORT)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            with pytest.raises(EngineDead):
                await engine.pause()
            assert not engine.abort("request-1")

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_asks_a_core_that_breaks_is_told():
    core = ToyCore(fail_at=1, on_step=lambda step: time.sleep(0.1))

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            task = asyncio.create_task(engine.complete([1], LONG))
            await until(lambda: core.steps == 1)
            with pytest.raises(EngineDead, match="the toy broke"):
                await engine.call(lambda core: None)
            await task

    run(main())


def test_events_that_cannot_be_read_are_the_end():
    """A core that leaves out log-probabilities that were asked for."""
    core = ToyCore()
    draw = core._draw

    def forgetful(request: Any) -> None:
        request.params, asked = SHORT, request.params
        draw(request)
        request.params = asked

    core._draw = forgetful  # type: ignore[method-assign]
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with AsyncEngine(core) as engine:
            got = await engine.complete([1], SamplingParams(logprobs="raw"))
            assert got.finish_reason == "error"
            assert engine.stats().state == "dead"

    run(main())
    assert len(complaints) == 1
    assert core.is_clean()


# -- the end ----------------------------------------------------------------------------------------------------------
def test_shutdown_finishes_what_is_under_way():
    core = ToyCore(max_running=2, max_waiting=2)

    async def main() -> list[Completion]:
        async with AsyncEngine(core, max_waiting=2) as engine:
            tasks = [asyncio.create_task(engine.complete([index], SHORT)) for index in range(9)]
            await asyncio.sleep(0)
        assert engine.state == "closed"
        return await asyncio.gather(*tasks)

    done = run(main())
    assert [one.tokens for one in done] == [answer([index], SHORT, 0) for index in range(9)]
    assert core.is_clean()


def test_shutdown_takes_nothing_new():
    async def main() -> None:
        engine = AsyncEngine(ToyCore(step_time=0.001))
        with pytest.raises(
            EngineClosed, match="engine: want one that was started and not shut down; got one that is new"
        ):
            await engine.complete([1], SHORT)
        await engine.start()
        task = asyncio.create_task(engine.complete([1], SamplingParams(max_tokens=2000)))
        await until(lambda: engine.stats().running == 1)
        ending = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        with pytest.raises(EngineClosed, match="draining"):
            await engine.complete([2], SHORT)
        await asyncio.gather(ending, engine.shutdown())
        assert (await task).finish_reason == "length"
        for late in (engine.complete([1], SHORT), engine.pause(), engine.start()):
            with pytest.raises(EngineClosed, match="closed"):
                await late
        await engine.shutdown()

    run(main())


@pytest.mark.parametrize("options", [{"drain": False}, {"drain": True, "timeout": 0.02}], ids=["abort", "timeout"])
def test_shutdown_aborts(options):
    core = ToyCore(max_running=2, max_waiting=2, step_time=0.001)

    async def main() -> None:
        engine = AsyncEngine(core, max_waiting=2)
        await engine.start()
        tasks = [asyncio.create_task(engine.complete([index], LONG)) for index in range(8)]
        await until(lambda: core.steps > 2)
        await engine.shutdown(**options)
        done = await asyncio.gather(*tasks)
        assert [one.finish_reason for one in done] == ["abort"] * 8
        assert core.is_clean()

    run(main())


def test_shutdown_may_be_cancelled_and_called_again():
    core = ToyCore(step_time=0.001)

    async def main() -> None:
        engine = AsyncEngine(core)
        await engine.start()
        task = asyncio.create_task(engine.complete([1], LONG))
        await until(lambda: core.steps > 2)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.shutdown(), 0.02)
        await engine.shutdown(drain=False)
        assert (await task).finish_reason == "abort"

    run(main())


def test_shutdown_of_a_paused_engine_goes_on():
    async def main() -> None:
        async with AsyncEngine(ToyCore()) as engine:
            await engine.pause()
            task = asyncio.create_task(engine.complete([1], SHORT))
            await asyncio.sleep(0)
        assert (await task).tokens == answer([1], SHORT, 0)

    run(main())


def test_a_block_left_by_an_exception_aborts():
    core = ToyCore(step_time=0.001)
    tasks = []

    async def main() -> None:
        async with AsyncEngine(core) as engine:
            tasks.append(asyncio.create_task(engine.complete([1], LONG)))
            await until(lambda: core.steps > 2)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main())
    assert core.is_clean()


def test_what_was_computed_can_be_read_after_the_end():
    async def main() -> list[Output]:
        async with AsyncEngine(ToyCore()) as engine:
            stream = engine.generate([1], SHORT)
            outputs = [await anext(stream)]
        return outputs + [output async for output in stream]

    assert tokens_of(run(main())) == answer([1], SHORT, 0)


def test_a_loop_that_ends_without_shutdown_ends_the_thread():
    core = ToyCore(step_time=0.001)
    engine = AsyncEngine(core)
    stream = engine.generate([1], LONG)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(engine.start())
    loop.run_until_complete(anext(stream))
    loop.close()
    engine._thread._thread.join(PATIENCE)
    assert not engine._thread._thread.is_alive()
    assert core.is_clean()


def test_a_core_may_serve_one_engine_after_another():
    core = ToyCore()

    async def main() -> Completion:
        async with AsyncEngine(core) as engine:
            return await engine.complete([1], SHORT)

    assert run(main()).tokens == run(main()).tokens == answer([1], SHORT, 0)


# -- stress -----------------------------------------------------------------------------------------------------------
async def whole(engine: AsyncEngine, prompt: list[int], params: SamplingParams, chance: random.Random) -> list[Output]:
    return await collect(engine, prompt, params)


async def slow(engine: AsyncEngine, prompt: list[int], params: SamplingParams, chance: random.Random) -> list[Output]:
    outputs = []
    async for output in engine.generate(prompt, params):
        outputs.append(output)
        await asyncio.sleep(chance.random() * 0.01)
    return outputs


async def broken_off(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams, chance: random.Random
) -> list[Output]:
    outputs = []
    async for output in engine.generate(prompt, params):
        outputs.append(output)
        if chance.random() < 0.3:
            break
    return outputs


async def closed(engine: AsyncEngine, prompt: list[int], params: SamplingParams, chance: random.Random) -> list[Output]:
    outputs = []
    async with contextlib.aclosing(engine.generate(prompt, params)) as stream:
        async for output in stream:
            outputs.append(output)
            if chance.random() < 0.3:
                break
    return outputs


async def cancelled(
    engine: AsyncEngine, prompt: list[int], params: SamplingParams, chance: random.Random
) -> list[Output]:
    outputs: list[Output] = []

    async def read() -> None:
        async for output in engine.generate(prompt, params):
            outputs.append(output)

    task = asyncio.create_task(read())
    await asyncio.wait([task], timeout=chance.random() * 0.05)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return outputs


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("requests", [300])
def test_stress(tokenizer, requests, seed):
    """Hundreds of callers at once, each leaving in its own way: every token is of its own request, and none is lost."""
    core = ToyCore(max_running=16, max_waiting=5, step_time=0.0003)
    chance = random.Random(seed)
    ways = [whole, slow, broken_off, closed, cancelled]

    async def one(engine: AsyncEngine, index: int) -> None:
        prompt = [chance.randrange(256) for _ in range(chance.randint(1, 9))]
        params = SamplingParams(
            max_tokens=chance.randint(1, 60),
            seed=index,
            stop=("a",) if chance.random() < 0.3 else (),
            deadline=chance.choice([None, None, None, 0.02, 0.5]),
        )
        await asyncio.sleep(chance.random() * 0.1)
        way = chance.choice(ways)
        outputs = await way(engine, prompt, params, chance)
        full = answer(prompt, params, index)
        got = tokens_of(outputs)
        assert got == full[: len(got)]
        reason = outputs[-1].finish_reason if outputs else None
        text = "".join(output.text for output in outputs)
        assert "a" not in text or not params.stop
        if way in (whole, slow):
            assert reason in ("length", "stop", "deadline")
            assert (reason == "length") <= (got == full)
            if reason == "stop":
                cut = b"".join({v: k for k, v in PIECES.items()}[t] for t in full).decode(errors="replace")
                assert text == cut.partition("a")[0]
            if reason == "deadline":
                assert params.deadline is not None

    async def main() -> None:
        async with AsyncEngine(core, tokenizer, max_waiting=12, seed=seed) as engine:
            await asyncio.gather(*[one(engine, index) for index in range(requests)])
            await until(lambda: engine.stats().running == 0 and engine.stats().outside == 0)
            stats = engine.stats()
            assert sum(stats.finished.values()) == requests
            assert stats.waiting == 0
            assert not engine._named

    run(main())
    assert core.is_clean()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("end", ["shutdown", "abort", "break"])
def test_stress_that_ends_in_the_middle(end):
    core = ToyCore(max_running=8, max_waiting=5, step_time=0.0003, fail_at=60 if end == "break" else 0)
    chance = random.Random(0)
    ends = []

    async def one(engine: AsyncEngine, index: int) -> None:
        await asyncio.sleep(chance.random() * 0.1)
        params = SamplingParams(max_tokens=chance.randint(1, 300), seed=index)
        try:
            got = await engine.complete([index % 256], params)
        except (EngineClosed, EngineDead):
            ends.append("refused")
            return
        ends.append(got.finish_reason)
        assert got.tokens == answer([index % 256], params, index)[: len(got.tokens)]

    async def main() -> None:
        engine = AsyncEngine(core, max_waiting=12)
        await engine.start()
        tasks = [asyncio.create_task(one(engine, index)) for index in range(200)]
        await until(lambda: core.steps > 50)
        if end != "break":
            await engine.shutdown(drain=end == "shutdown")
        await asyncio.gather(*tasks)
        await engine.shutdown()

    run(main())
    assert len(ends) == 200
    assert set(ends) <= {"length", "refused", {"shutdown": "length", "abort": "abort", "break": "error"}[end]}
    assert "length" in ends
    assert end == "break" or core.is_clean()
