"""The scheduler under random loads on small pools: no page is lost, no token changes, and no request starves."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_model import Runner, alone, make_request, make_scheduler

from m3.engine.request import Request
from m3.engine.scheduler import Plan, QueueFull, Scheduler


def bound(scheduler: Scheduler, request: Request) -> int:
    """Steps in which the oldest request ends: the docstring of the module."""
    config = scheduler.config
    rows = min(1 + config.max_step_tokens - config.max_running, config.max_step_tokens - config.max_step_tokens // 2)
    return -(-(len(request.prompt) + request.params.max_tokens) // rows) + request.params.max_tokens


@dataclasses.dataclass
class Load:
    """What was asked for, and by which step each must be through: all that came before it, one after the other."""

    runner: Runner
    requests: dict[str, Request] = dataclasses.field(default_factory=dict)
    due: dict[str, int] = dataclasses.field(default_factory=dict)
    steps: int = 0

    def add(self, request: Request) -> None:
        scheduler = self.runner.scheduler
        try:
            scheduler.add(request)
        except QueueFull:
            return
        before = [*scheduler.running, *scheduler.waiting]  # itself among them
        self.requests[request.id] = request
        self.due[request.id] = self.steps + sum(bound(scheduler, other) for other in before)

    def step(self) -> Plan:
        scheduler = self.runner.scheduler
        oldest = next(iter(scheduler.running), None)
        plan = self.runner.step()
        self.steps += 1
        assert self.runner.rows <= scheduler.config.max_step_tokens
        assert oldest not in plan.preempted
        for request in [*scheduler.running, *scheduler.waiting]:
            assert self.steps < self.due[request.id], f"{request.id} starves"
        return plan

    def close(self) -> None:
        """Runs to the end: every request has one end, what it yielded is its own, and every page is back."""
        scheduler = self.runner.scheduler
        while scheduler.has_work():
            self.step()
        assert self.runner.finished.keys() == self.requests.keys()
        for id, request in self.requests.items():
            expected = alone(request, scheduler.limit)
            if self.runner.finished[id].reason in ("abort", "deadline"):
                expected = expected[: len(request.tokens)]
            assert request.tokens == expected, id
        scheduler.check()
        assert scheduler.pool.used == 0
        scheduler.pool.clear_prefixes()
        assert scheduler.pool.free == scheduler.pool.num_pages


def random_request(rng: random.Random, id: str, *, longest: int, now: float) -> Request:
    prompt = [rng.choice([1, 1, 1, 2]) for _ in range(rng.randint(1, longest))]  # many equal beginnings
    return make_request(
        id,
        prompt,
        arrival=now,
        seed=rng.randrange(4),
        max_tokens=rng.randint(1, 24),
        ignore_eos=rng.random() < 0.7,
        prompt_logprobs=rng.random() < 0.1,
        deadline=rng.uniform(1, 12) if rng.random() < 0.15 else None,
    )


SIZES = {
    "tiny_pool": dict(num_pages=5, max_running=4, max_step_tokens=8),
    "one_at_a_time": dict(num_pages=6, max_running=1, max_step_tokens=1),
    "as_many_rows_as_requests": dict(num_pages=16, max_running=6, max_step_tokens=6),
    "small_pool": dict(num_pages=18, max_running=8, max_step_tokens=32),
    "short_context": dict(num_pages=40, max_running=8, max_step_tokens=24, max_context=22),
    "no_reuse": dict(num_pages=10, max_running=5, max_step_tokens=16, prefix_reuse=False),
    "much_room": dict(num_pages=200, max_running=16, max_step_tokens=64),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_random_load(sizes):
    rng = random.Random(5)
    scheduler = make_scheduler(max_waiting=12, **sizes)
    load = Load(Runner(scheduler, accept=lambda lookahead: rng.randint(1, lookahead)))
    preempted = 0
    for number in range(700):
        if rng.random() < 0.25:
            load.add(random_request(rng, f"r{number}", longest=min(18, scheduler.limit - 1), now=load.runner.now))
        if rng.random() < 0.03 and load.requests:
            scheduler.abort(rng.choice(list(load.requests)))
        if rng.random() < 0.01:
            scheduler.pool.clear_prefixes()
        scheduler.lookahead = rng.choice([1, 1, 2, 4, 7])
        preempted += len(load.step().preempted)
    load.close()
    cached = sum(event.cached_tokens for event in load.runner.finished.values())
    reasons = {event.reason for event in load.runner.finished.values()}
    assert reasons == {"stop", "length", "abort", "deadline"}
    assert (cached > 0) == scheduler.config.prefix_reuse
    assert (preempted > 0) == (sizes["num_pages"] <= 18 and sizes["max_running"] > 1)


@pytest.mark.parametrize("other", list(SIZES)[1:])
def test_what_a_request_yields_does_not_depend_on_the_sizes(other):
    """Requests that fit everywhere: equal streams under every order, pool and speculation."""
    rng = random.Random(11)
    requests = [make_request(f"r{n}", [1] * rng.randint(1, 9), seed=n, max_tokens=10) for n in range(30)]
    streams = []
    for sizes in (SIZES["tiny_pool"], SIZES[other]):
        scheduler = make_scheduler(max_waiting=64, **sizes)
        runner = Runner(scheduler, accept=lambda lookahead: rng.randint(1, lookahead))
        scheduler.lookahead = rng.choice([1, 3, 5])
        for request in requests:
            scheduler.add(dataclasses.replace(request, tokens=list(request.prompt)))
        copies = list(scheduler.waiting)
        runner.drain()
        streams.append([request.tokens for request in copies])
    assert streams[0] == streams[1] == [alone(request, 99) for request in requests]


class Machine(RuleBasedStateMachine):
    """Any order of adds, steps, ends and resets, on pools of 1..9 pages; check() after each."""

    @initialize(num_pages=st.integers(1, 9), max_running=st.integers(1, 4), rows=st.integers(0, 8), reuse=st.booleans())
    def begin(self, num_pages: int, max_running: int, rows: int, reuse: bool) -> None:
        scheduler = make_scheduler(
            num_pages, max_running=max_running, max_step_tokens=max_running + rows, prefix_reuse=reuse, max_waiting=6
        )
        self.load = Load(Runner(scheduler))
        self.count = 0

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=12),
        max_tokens=st.integers(1, 30),
        seed=st.integers(0, 2),
    )
    def add(self, prompt: list[int], max_tokens: int, seed: int) -> None:
        self.count += 1
        if len(prompt) < self.load.runner.scheduler.limit:
            self.load.add(make_request(f"r{self.count}", prompt, max_tokens=max_tokens, seed=seed))

    @rule(lookahead=st.integers(1, 6), accept=st.integers(1, 6), steps=st.integers(1, 4))
    def step(self, lookahead: int, accept: int, steps: int) -> None:
        self.load.runner.scheduler.lookahead = lookahead
        self.load.runner.accept = lambda granted: min(accept, granted)
        for _ in range(steps):
            self.load.step()

    @precondition(lambda self: self.load.requests)
    @rule(data=st.data())
    def abort(self, data) -> None:
        scheduler = self.load.runner.scheduler
        id = data.draw(st.sampled_from(sorted(self.load.requests)))
        unfinished = self.load.requests[id].state != "finished"
        assert scheduler.abort(id) == unfinished

    @rule(clear=st.booleans())
    def start_anew(self, clear: bool) -> None:
        """Every request starts anew: all that runs may need its steps once more."""
        scheduler = self.load.runner.scheduler
        if clear:
            scheduler.pool.clear_prefixes()
        scheduler.preempt_all()
        again = sum(bound(scheduler, request) for request in scheduler.waiting)
        self.load.due = {id: step + again for id, step in self.load.due.items()}

    @invariant()
    def accounted(self) -> None:
        if hasattr(self, "load"):
            self.load.runner.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "load"):
            self.load.close()


Machine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestMachine = Machine.TestCase
