"""A model of 7 tokens on real pages, for tests of the scheduler, and the runner that runs its plans.

Key i follows from token i and from key i - 1 as it is read from the pages, and the next token from all keys. A page
that is lost, shared too early or written by two changes what is drawn.
"""

from __future__ import annotations

import random

from m3.engine.config import EngineConfig
from m3.engine.kv_cache import PagePool
from m3.engine.request import Finished, Request, SamplingParams
from m3.engine.scheduler import Plan, Scheduler

PAGE = 4
VOCAB = 7
END = 6  # the model's end token


def make_scheduler(num_pages: int = 64, **sizes) -> Scheduler:
    config = EngineConfig(page_size=PAGE, num_pages=num_pages, **{"max_running": 8, "max_step_tokens": 16, **sizes})
    return Scheduler(config, PagePool(num_pages, PAGE))


def make_request(id: str, prompt: list[int] | int, *, arrival: float = 0.0, seed: int = 0, **params) -> Request:
    """A prompt of so many tokens that starts with the request's own; or the given prompt."""
    if isinstance(prompt, int):
        prompt = [1000 + sum(id.encode()), *range(prompt - 1)]
    params = {"max_tokens": 8, "ignore_eos": True, **params}
    return Request(
        id=id, prompt=list(prompt), params=SamplingParams(**params), seed=seed, arrival=arrival, tokens=list(prompt)
    )


def next_key(index: int, token: int, before: int) -> int:
    return hash((index, token, before))


def draw(seed: int, keys: tuple[int, ...]) -> int:
    return random.Random(hash((seed, keys))).randrange(VOCAB)


def alone(request: Request, limit: int) -> list[int]:
    """What the model draws for a request, without pages and without neighbours."""
    tokens, keys = list(request.prompt), []
    while len(tokens) < min(limit, len(request.prompt) + request.params.max_tokens):
        for index in range(len(keys), len(tokens)):
            keys.append(next_key(index, tokens[index], keys[-1] if keys else 0))
        tokens.append(draw(request.seed, tuple(keys)))
        if tokens[-1] == END and not request.params.ignore_eos:
            break
    return tokens


class Runner:
    """Runs plans as the core does. ``accept``: tokens that a decode yields, of 1..lookahead."""

    def __init__(self, scheduler: Scheduler, accept=lambda lookahead: lookahead) -> None:
        self.scheduler = scheduler
        self.accept = accept
        self.memory: dict[tuple[int, int], int] = {}
        self.finished: dict[str, Finished] = {}
        self.now = 0.0
        self.rows = 0

    def write(self, request: Request, index: int, key: int) -> None:
        page = request.pages[index // PAGE]
        sharing = [other.id for other in self.scheduler.running if page in other.pages]
        assert sharing == [request.id], f"{request.id} writes page {page} of {sharing}"
        self.memory[page, index % PAGE] = key

    def read(self, request: Request, index: int) -> int:
        return self.memory[request.pages[index // PAGE], index % PAGE]

    def compute(self, request: Request, start: int, stop: int) -> None:
        for index in range(start, stop):
            before = self.read(request, index - 1) if index else 0
            self.write(request, index, next_key(index, request.tokens[index], before))

    def extend(self, request: Request) -> bool:
        """Draws one token behind the keys of all others. Whether there may be another."""
        keys = tuple(self.read(request, index) for index in range(len(request.tokens)))
        request.tokens.append(draw(request.seed, keys))
        ended = request.tokens[-1] == END and not request.params.ignore_eos
        return not ended and self.scheduler.room(request) > 0

    def run(self, plan: Plan) -> None:
        for request in plan.decodes:
            first = len(request.tokens) - 1
            for slot in range(first, first + plan.lookahead):
                self.write(request, slot, -1)  # drafts
            for _ in range(min(self.accept(plan.lookahead), self.scheduler.room(request))):
                self.compute(request, len(request.tokens) - 1, len(request.tokens))
                if not self.extend(request):
                    break
            request.computed = len(request.tokens) - 1
        for request, start, stop in plan.prefills:
            assert start == request.computed < stop <= len(request.tokens)
            self.compute(request, start, stop)
            request.computed = stop
            if stop == len(request.tokens):
                self.extend(request)
        self.rows = len(plan.decodes) * plan.lookahead + sum(stop - start for _, start, stop in plan.prefills)

    def end(self, event: Finished) -> None:
        assert event.id not in self.finished
        self.finished[event.id] = event

    def step(self, seconds: float = 1.0) -> Plan:
        plan = self.scheduler.plan(self.now)
        self.scheduler.check()
        for event in plan.finished:
            self.end(event)
        self.run(plan)
        for request in [*plan.decodes, *(request for request, _, _ in plan.prefills)]:
            if request.drawn and request.tokens[-1] == END and not request.params.ignore_eos:
                self.end(self.scheduler.finish(request, "stop"))
            elif request.drawn >= request.params.max_tokens:
                self.end(self.scheduler.finish(request, "length"))
        self.scheduler.check()
        self.now += seconds
        return plan

    def until(self, reached, steps: int = 2000) -> Plan:
        """Steps, at least one, until the plan is what was waited for."""
        for _ in range(steps):
            if reached(plan := self.step()):
                return plan
        raise AssertionError(f"not reached in {steps} steps")

    def drain(self) -> None:
        self.until(lambda plan: not self.scheduler.has_work())
