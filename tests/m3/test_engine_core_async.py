"""AsyncEngine and Engine over the real core: a tiny model, with and without a draft, and a real tokenizer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import assert_empty, fixed, make_draft, make_target, target
from toy_core import collect, make_tokenizer, run, tokens_of, until

from m3.engine.config import EngineConfig, Shape
from m3.engine.core import EngineCore
from m3.engine.engine import AsyncEngine, Completion, Engine
from m3.engine.request import SamplingParams
from m3.models.tokenizer import Tokenizer

PROMPTS = ["User: abac", " STOP", "!", "END", "User: abac!", "a"]
PARAMS = [
    SamplingParams(max_tokens=9 + index, temperature=index % 3 / 2, seed=index, ignore_eos=True, logprobs="raw")
    for index in range(len(PROMPTS))
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes 0..98, of which these prompts consist, are tokens of the tiny model."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def core(draft: bool, **config: Any) -> EngineCore:
    model = target("llama")
    given: dict[str, Any] = {"draft": make_draft(model), "speculation": fixed(Shape(steps=2, topk=3, nodes=6))}
    return EngineCore(model, EngineConfig(**{"num_pages": 64, **config}), **(given if draft else {}))


def facts(completion: Completion) -> tuple[object, ...]:
    return completion.text, completion.tokens, completion.logprobs, completion.finish_reason, completion.seed


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Letters above the tiny vocabulary become others."""
    return [[token % 99 for token in tokenizer.encode(text)] for text in PROMPTS]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of a process are counted in /proc")
def test_idle_threads_are_ended(tokenizer):
    """More of them than cores, and GNU's OpenMP lets all fall asleep between two products."""

    def tasks() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    async def fewer_or(most: int) -> None:
        await asyncio.wait_for(until(lambda: tasks() <= most), 10)

    async def main() -> None:
        used = core(False)
        torch.set_num_threads(2)
        torch.ones(1 << 20).exp()  # as a loader would
        before = tasks()
        async with AsyncEngine(used, tokenizer) as engine:
            await fewer_or(before)  # ours went, the engine's came
            await collect(engine, prompts(tokenizer)[0], PARAMS[0])
            await engine.call(lambda _: torch.ones(1 << 20).exp())
            await fewer_or(before)  # its worker went
        await fewer_or(before - 1)
        assert tasks() == before - 1

    threads = torch.get_num_threads()
    try:
        asyncio.run(main())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("draft", [False, True])
def test_streams_are_what_a_list_gives(tokenizer, draft):
    given = prompts(tokenizer)
    alone = [Engine(core(False), tokenizer).generate([p], [q])[0] for p, q in zip(given, PARAMS, strict=True)]
    used = core(draft)
    listed = Engine(used, tokenizer).generate(given, PARAMS)
    assert [facts(one) for one in listed] == [facts(one) for one in alone]
    assert_empty(used)

    async def main() -> list[Completion]:
        async with AsyncEngine(used, tokenizer) as engine:
            streams = [collect(engine, p, q) for p, q in zip(given, PARAMS, strict=True)]
            outputs = await asyncio.gather(*streams)
            return [Completion.of(p, each) for p, each in zip(given, outputs, strict=True)]

    assert [facts(one) for one in run(main())] == [facts(one) for one in alone]
    assert_empty(used)


@pytest.mark.parametrize("draft", [False, True])
def test_a_stop_string(tokenizer, draft):
    """The text ends before it, and the core's request with it."""
    given = prompts(tokenizer)[0]
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    used = core(draft)
    whole = Engine(used, tokenizer).generate([given], [params])[0].text
    stop = whole[20:22]
    cut = Engine(used, tokenizer).generate(
        [given], [SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True, stop=(stop,))]
    )[0]
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert_empty(used)


@pytest.mark.parametrize("draft", [False, True])
def test_who_leaves_frees_the_pages(tokenizer, draft):
    used = core(draft)
    given = prompts(tokenizer)
    long = SamplingParams(max_tokens=400, ignore_eos=True, seed=1)

    async def leave(engine: AsyncEngine) -> None:
        async for output in engine.generate(given[1], long):
            if output.usage.completion_tokens > 5:
                break

    async def main() -> list[int]:
        async with AsyncEngine(used, tokenizer) as engine:
            gone = asyncio.create_task(collect(engine, given[0], long))
            await until(lambda: engine.stats().running > 0)
            await leave(engine)
            gone.cancel()
            short = await collect(engine, given[2], PARAMS[2])
            await until(lambda: engine.stats().running + engine.stats().waiting == 0)
            return tokens_of(short)

    want = Engine(core(False), tokenizer).generate([given[2]], [PARAMS[2]])[0].tokens
    assert run(main()) == want
    assert_empty(used)


@pytest.mark.parametrize("draft", [False, True])
def test_weights_change_between_two_steps_of_a_stream(tokenizer, draft):
    model = make_target("llama")
    given: dict[str, Any] = {"draft": make_draft(model), "speculation": fixed(Shape.chain(2))} if draft else {}
    used = EngineCore(model, EngineConfig(num_pages=64), **given)
    params = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))

    async def main() -> Completion:
        async with AsyncEngine(used, tokenizer) as engine:
            outputs = []
            async for output in engine.generate([5, 6, 7], params):
                outputs.append(output)
                if output.usage.completion_tokens >= 10 and used.version == 0:
                    with pytest.raises(ValueError, match="refresh_weights"):
                        await engine.update_weights({name: weight[1:]}, 1)
                    await engine.update_weights({name: weight}, 2)
            return Completion.of([5, 6, 7], outputs)

    got = run(main())
    old, new = got.versions.count(0), got.versions.count(2)
    assert got.versions == [0] * old + [2] * new
    assert old >= 10
    assert new > 0
    assert got.tokens[:old] == Engine(core(False)).generate([[5, 6, 7]], params)[0].tokens[:old]
    rest = SamplingParams(max_tokens=new, ignore_eos=True, seed=1)
    assert got.tokens[old:] == Engine(EngineCore(model)).generate([[5, 6, 7, *got.tokens[:old]]], rest)[0].tokens
    assert_empty(used)
