"""AsyncEngine when its core breaks, when it shuts down, under stress: nothing lost, mixed up or deadlocked."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import pytest
from toy_core import (
    LONG,
    PATIENCE,
    PIECES,
    SHORT,
    ScheduledCore,
    ToyCore,
    answer,
    beginning,
    collect,
    make_tokenizer,
    run,
    tokens_of,
    until,
)

from m3.engine.config import EngineConfig
from m3.engine.engine import AsyncEngine, Completion, EngineClosed, EngineDead, Output
from m3.engine.request import SamplingParams
from m3.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


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
                assert one.tokens == beginning([index], len(one.tokens))
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


BY_TOKEN = {token: piece for piece, token in PIECES.items()}
SMALL_CACHE = EngineConfig(page_size=4, num_pages=40, max_running=16, max_step_tokens=32, max_waiting=5)


@pytest.mark.parametrize("requests", [300])
@pytest.mark.parametrize(
    ("make_core", "seed"),
    [
        (lambda: ToyCore(max_running=16, max_waiting=5, step_time=0.0003), 0),
        (lambda: ToyCore(max_running=3, max_waiting=1), 1),
        (lambda: ToyCore(max_running=64, max_waiting=100, step_time=0.002), 2),
        (lambda: ScheduledCore(SMALL_CACHE), 3),
        (lambda: ScheduledCore(SMALL_CACHE), 4),
    ],
    ids=["toy", "narrow", "wide", "scheduler", "scheduler-again"],
)
def test_stress(tokenizer, requests, make_core, seed):
    """Hundreds of callers at once, each leaving in its own way: every token is of its own request, and none is lost."""
    core = make_core()
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
                assert text == b"".join(BY_TOKEN[token] for token in full).decode(errors="replace").partition("a")[0]
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
