"""The core under a crowd: a cache that is too small, cancellations, deadlines, requests that cannot be served."""

from __future__ import annotations

import dataclasses
import random
from functools import cache

import pytest
from engine_cases import (
    SAMPLERS,
    Answer,
    Ask,
    KnowingDrafter,
    add,
    assert_empty,
    fixed,
    make_draft,
    one_by_one,
    plain_core,
    target,
)

from m3.engine.config import EngineConfig, Shape, Speculation
from m3.engine.core import EngineCore
from m3.engine.request import Request, SamplingParams
from m3.engine.scheduler import QueueFull

SIZES = {"page_size": 4, "num_pages": 24, "max_running": 8, "max_step_tokens": 48, "max_waiting": 12}
NARROW = Shape(steps=4, topk=4, nodes=8)
WAYS = {
    "plain": None,
    "chain": fixed(Shape.chain(2)),
    "tree": fixed(NARROW),
    "adaptive": Speculation(shapes=(Shape.chain(1), NARROW, Shape(steps=2, topk=3, nodes=6))),
}
TOO_LONG = SIZES["page_size"] * SIZES["num_pages"] + 1


@dataclasses.dataclass(frozen=True)
class Visit:
    """A request, when it comes, and when its caller leaves."""

    ask: Ask
    comes: int  # step
    leaves: int | None
    deadline: float | None  # steps


@cache
def crowd(count: int, family: str) -> tuple[list[Visit], list[Answer]]:
    """Visits and what each would be given if it were alone and stayed."""
    chance = random.Random(count)
    shared = [chance.randrange(3, 99) for _ in range(40)]
    visits, step = [], 0
    for index in range(count):
        length = chance.choice((1, 2, 5, 9, 17, 30, 60))
        prompt = shared[: chance.choice((0, 0, 8, 21, 40))] + [chance.randrange(3, 99) for _ in range(length)]
        prompt = prompt[:70]
        params = SamplingParams(
            **SAMPLERS[index % len(SAMPLERS)],
            max_tokens=chance.choice((1, 2, 5, 9, 20, 40)),
            ignore_eos=chance.random() < 0.5,
            prompt_logprobs=chance.random() < 0.1,
            stop_token_ids=(chance.randrange(3, 99),) if chance.random() < 0.3 else (),
        )
        leaves = step + chance.randrange(12) if chance.random() < 0.15 else None
        deadline = float(chance.randrange(1, 40)) if chance.random() < 0.15 else None
        visits.append(Visit(Ask(prompt, params, chance.getrandbits(40)), step, leaves, deadline))
        step += chance.choice((0, 0, 0, 1, 1, 4))
    alone = plain_core(target(family), prefix_reuse=False, page_size=4, num_pages=SIZES["num_pages"])
    return visits, one_by_one(alone, [visit.ask for visit in visits])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def serve(core: EngineCore, clock: Clock, visits: list[Visit]) -> tuple[list[Answer], int]:
    """The answers, and how often the queue was full. The books are exact after every step."""
    answers = {str(index): Answer() for index in range(len(visits))}
    outside, refused, step = list(range(len(visits))), 0, 0
    while outside or core.has_work():
        while outside and visits[outside[0]].comes <= step:
            ask = visits[outside[0]].ask
            params = dataclasses.replace(ask.params, deadline=visits[outside[0]].deadline)
            try:
                add(core, dataclasses.replace(ask, params=params), str(outside[0]))
            except QueueFull:
                refused += 1
                break
            outside.pop(0)
        for index, visit in enumerate(visits):
            if visit.leaves is not None and visit.leaves <= step:
                core.abort(str(index))
        if step % 37 == 20:
            with pytest.raises(ValueError, match="engine: prompt: want fewer than"):
                add(core, Ask([5] * TOO_LONG, SamplingParams()), "too long")
        for event in core.step():
            answers[event.id].take(event)
        core.scheduler.check()
        if core.drafter is not None:
            running = {request.id for request in core.scheduler.running}
            assert set(core.drafter._known) <= running
        clock.now += 1.0
        step += 1
        assert step < 100 * len(visits), "somebody starves"
    return list(answers.values()), refused


def assert_served(visits: list[Visit], alone: list[Answer], answers: list[Answer]) -> None:
    normal = [answer.drawn == one.drawn for answer, one in zip(answers, alone, strict=True) if answer.reason in ENDS]
    assert all(normal)
    assert len(normal) > len(visits) // 2
    for visit, answer, one in zip(visits, answers, alone, strict=True):
        if answer.reason not in ENDS:
            assert {"abort": visit.leaves, "deadline": visit.deadline}[answer.reason] is not None
            assert answer.tokens == one.tokens[: len(answer.tokens)]
    assert {answer.reason for answer in answers} == {"stop", "length", "abort", "deadline"}


ENDS = ("stop", "length")


def run(count: int, speculation: Speculation | None, family: str = "llama") -> EngineCore:
    visits, alone = crowd(count, family)
    model, clock = target(family), Clock()
    draft = None if speculation is None else make_draft(model, weights="int4")
    core = EngineCore(model, EngineConfig(**SIZES), draft=draft, speculation=speculation, clock=clock)
    if core.drafter is not None:

        def truth(request: Request) -> list[int]:
            return request.prompt + alone[int(request.id)].tokens

        core.drafter = KnowingDrafter(core.drafter, truth)
    answers, refused = serve(core, clock, visits)
    assert_served(visits, alone, answers)
    assert_empty(core)
    assert core.pool.free + core.pool.cached == SIZES["num_pages"]
    assert core.stats.preemptions > count // 50
    assert refused > 0
    if speculation is not None:  # where speed decides, a model this small may hardly speculate
        assert core.stats.accepted > (0 if speculation.adaptive else count // 10)
    return core


@pytest.mark.parametrize("speculation", WAYS.values(), ids=WAYS)
def test_a_crowd(speculation):
    run(120, speculation)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("speculation", WAYS.values(), ids=WAYS)
def test_500_requests(speculation, family):
    run(500, speculation, family)
