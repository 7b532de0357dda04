"""Which requests run in the next step, and on which pages: continuous batching, first come, first served.

A step computes rows. A request that lacks the key of its last token only decodes: one row, or ``lookahead`` rows where
the runner speculates. A request that lacks more prefills: a chunk of its tokens. Decodes come first, chunks fill the
rest of ``max_step_tokens``. Everything here happens between two steps, when no row is in flight, and decides when a
token is drawn, never which: neighbours, pages, sharing and preemption leave no trace in what a request yields.

No request starves. Requests are served in the order of add(): whoever runs came before whoever waits, and whoever came
last is preempted first. So the oldest request is admitted at once and never preempted, and every step draws a token of
it, or computes the rest of its tokens or ``c`` of them: c = 1 + max_step_tokens - max_running, or half a step where
decodes speculate. It ends after at most ceil(n / c) + m steps, for n tokens in the end and m drawn; and any request
after at most the sum of these over itself and those that came before it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

from m3.engine.config import EngineConfig
from m3.engine.kv_cache import Key, PagePool
from m3.engine.request import Finished, Reason, Request
from m3kernels.checks import refuse


class QueueFull(RuntimeError):  # noqa: N818
    """``max_waiting`` requests wait already; try again after a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one step. A request is in at most one of decodes, prefills and finished.

    decodes: the last token of each is to be computed; slots ``len(tokens) - 1 .. len(tokens) - 2 + lookahead`` are its
        own. Afterwards the runner appends 1 to ``lookahead`` tokens, at most ``Scheduler.room(request)`` of them, and
        sets ``computed = len(tokens) - 1``.
    prefills: (request, start, stop): ``tokens[start:stop]`` are to be computed. Afterwards the runner sets ``computed =
        stop``; where that is ``len(tokens)`` it draws the next token from the last row and appends it.
    lookahead: of all decodes: that of the scheduler, or 1 where pages or rows are short.
    preempted: have lost their pages since the last plan; what the runner keeps of them beside their tokens is void. To
        be read first: their prefill starts anew, in this plan or later, after the pages that can be found again, or at
        0 while prompt_logprobs are owed.
    finished: requests that ended without the runner: aborted, out of time, out of room.

    Page lists hold for this step: build block tables from them in every step.
    """

    decodes: list[Request] = dataclasses.field(default_factory=list)
    prefills: list[tuple[Request, int, int]] = dataclasses.field(default_factory=list)
    finished: list[Finished] = dataclasses.field(default_factory=list)
    preempted: list[Request] = dataclasses.field(default_factory=list)
    lookahead: int = 1


def block_table(requests: Sequence[Request]) -> list[list[int]]:
    """The pages of each request, in order; the requests' own lists, not copies."""
    return [request.pages for request in requests]


class Scheduler:
    """Requests that wait and run, on a pool of pages that is the scheduler's alone.

    Invariants, verified by check():
    - Every page in use is owned by running requests; those that wait own none and have nothing computed.
    - A running request owns pages for all tokens that it was admitted with, and for all computed since; more, where it
      speculated, as long as nobody lacks them.
    - All running requests came before all waiting ones, and both are in the order of add().
    - A request has at most ``limit`` tokens, and ends in the plan after; with fewer, it fits the pool alone.
    """

    def __init__(self, config: EngineConfig, pool: PagePool) -> None:
        if pool.page_size != config.page_size:
            raise refuse("Scheduler", "pool", f"pages of {config.page_size} tokens", f"{pool.page_size}")
        self.config = config
        self.pool = pool
        self.lookahead = 1  # slots that a decode may write; settable before every plan()
        # Tokens at which a request ends. The last one is drawn and needs no slot.
        self.limit = min(config.max_context or 2**63, pool.num_pages * pool.page_size + 1)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._order: dict[str, int] = {}  # by id; rises with add()
        self._added = 0
        self._prefill_until: dict[str, int] = {}  # by id: its tokens when it was last admitted
        self._finished: list[Finished] = []  # told by the next plan, and so are these:
        self._preempted: list[Request] = []

    # -- requests -----------------------------------------------------------------------------------------------------
    def add(self, request: Request) -> None:
        """Raises ValueError where the request can never be served, QueueFull where it cannot wait here now."""
        if request.id in self._requests:
            raise refuse("Scheduler.add", "id", "an id that no unfinished request has", repr(request.id))
        if not 0 < len(request.tokens) < self.limit:
            sizes = f"max_context {self.config.max_context or 'unlimited'}, {self.pool.num_pages} pages of "
            want = f"1..{self.limit - 1} tokens ({sizes}{self.pool.page_size})"
            raise refuse("Scheduler.add", "prompt", want, f"{len(request.tokens)}")
        if len(self.waiting) >= self.config.max_waiting:
            raise QueueFull(f"Scheduler.add: want at most {self.config.max_waiting} requests that wait; got one more")
        request.state, request.pages, request.computed, request.finish_reason = "waiting", [], 0, None
        self._requests[request.id] = request
        self._order[request.id] = self._added
        self._added += 1
        self.waiting.append(request)

    def finish(self, request: Request, reason: Reason, error: str | None = None) -> Finished:
        """Ends a request between two steps and returns its last event, which the caller passes on."""
        if self._requests.get(request.id) is not request:
            raise refuse("Scheduler.finish", "request", "one that is not finished", repr(request.id))
        if request.state == "running":
            self._release(request, publish=reason != "error")
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        del self._requests[request.id], self._order[request.id]
        self._prefill_until.pop(request.id, None)
        request.state, request.finish_reason = "finished", reason
        return Finished(id=request.id, reason=reason, error=error, cached_tokens=request.cached)

    def abort(self, id: str, reason: Reason = "abort") -> bool:
        """Ends a request; the next plan tells. False where no such request is left: it may just have finished."""
        request = self._requests.get(id)
        if request is not None:
            self._finished.append(self.finish(request, reason))
        return request is not None

    def room(self, request: Request) -> int:
        """Tokens that the request may still be given."""
        return min(self.limit - len(request.tokens), request.params.max_tokens - request.drawn)

    def has_work(self) -> bool:
        return bool(self._requests or self._finished)

    # -- a step -------------------------------------------------------------------------------------------------------
    def plan(self, now: float) -> Plan:
        """The next step, at the time ``now`` on the clock of ``Request.arrival``. The step before must be complete."""
        for request in self.running:
            self._publish(request)
        self._end(now)
        decodes, lookahead = self._grow_or_preempt()
        plan = Plan(decodes=decodes, lookahead=lookahead, finished=self._finished, preempted=self._preempted)
        self._finished, self._preempted = [], []
        self._fill(plan)
        return plan

    def _decodes(self, request: Request) -> bool:
        return request.computed >= self._prefill_until[request.id]

    def _end(self, now: float) -> None:
        """Ends what is out of time or of room."""
        for request in list(self._requests.values()):
            deadline = request.params.deadline
            if deadline is not None and now >= request.arrival + deadline:
                self.abort(request.id, "deadline")
            elif len(request.tokens) >= self.limit:
                self.abort(request.id, "length")

    def _grow_or_preempt(self) -> tuple[list[Request], int]:
        """The decodes, each with pages for its slots: for all slots, else for one; else the youngest give way."""
        decodes = [request for request in self.running if self._decodes(request)]
        lookahead = self._affordable(decodes)
        if self.waiting or self._missing(decodes, lookahead) > self.pool.available:
            self._trim(decodes, lookahead)
        while self._missing(decodes, lookahead) > self.pool.available:
            youngest = self.running[-1]
            self._preempt(youngest)
            decodes = [request for request in decodes if request is not youngest]
        for request in decodes:
            if missing := self._missing([request], lookahead):
                request.pages += self.pool.allocate(missing)
        return decodes, lookahead

    def _affordable(self, decodes: list[Request]) -> int:
        """The lookahead that all decodes can have. Tokens that wait to be computed have a right to half of the rows."""
        lookahead, rows = max(1, self.lookahead), self.config.max_step_tokens
        if len(decodes) < len(self.running) or (self.waiting and len(self.running) < self.config.max_running):
            rows //= 2
        fits = (
            len(decodes) * lookahead <= rows
            and all(len(request.tokens) + lookahead <= self.limit for request in decodes)
            and self._missing(decodes, lookahead) <= self.pool.available
        )
        return lookahead if fits else 1

    def _missing(self, decodes: list[Request], lookahead: int) -> int:
        """Pages that the decodes need beyond their own."""
        missing, slots = 0, lookahead - 1
        for request in decodes:
            missing += max(0, self.pool.pages_for(len(request.tokens) + slots) - len(request.pages))
        return missing

    def _fill(self, plan: Plan) -> None:
        """Fills the rest of the step with chunks, of running requests, then of waiting ones."""
        rows = self.config.max_step_tokens - len(plan.decodes) * plan.lookahead
        in_flight: set[Key] = set()  # the page that each chunk begins with
        for request in self.running:
            if rows and not self._decodes(request):
                rows -= self._chunk(plan, request, rows, in_flight)
        while rows and self.waiting and len(self.running) < self.config.max_running:
            if not self._admit(self.waiting[0], in_flight):
                break
            request = self.waiting.popleft()
            self.running.append(request)
            rows -= self._chunk(plan, request, rows, in_flight)

    def _chunk(self, plan: Plan, request: Request, rows: int, in_flight: set[Key]) -> int:
        start = request.computed
        stop = min(len(request.tokens), start + rows)
        plan.prefills.append((request, start, stop))
        in_flight.add(self.pool.page_key(request.tokens, request.pages, start // self.pool.page_size))
        return stop - start

    def _admit(self, request: Request, in_flight: set[Key]) -> bool:
        """Gives a waiting request pages for all its tokens, found or fresh, where enough are left.

        Every running request keeps a page to grow into: what is admitted is not preempted a step later. And a request
        whose next page another one computes in this very step waits to share it.
        """
        tokens, params = request.tokens, request.params
        reuse = self.config.prefix_reuse and (request.drawn > 0 or not params.prompt_logprobs)
        pages = self.pool.match(tokens[:-1]) if reuse else []
        more = reuse and (len(pages) + 1) * self.pool.page_size < len(tokens)
        shared_soon = more and self.pool.page_key(tokens, pages, len(pages)) in in_flight
        fresh = self.pool.pages_for(len(tokens)) - len(pages)
        if shared_soon or fresh + len(self.running) > self.pool.available:
            self.pool.release(pages)
            return False
        request.state, request.computed = "running", len(pages) * self.pool.page_size
        request.pages = pages + self.pool.allocate(fresh)
        if request.id not in self._prefill_until:
            request.cached = request.computed
        self._prefill_until[request.id] = len(tokens)
        return True

    # -- pages --------------------------------------------------------------------------------------------------------
    def _publish(self, request: Request) -> None:
        left = len(request.tokens) - request.computed
        assert left == 1 or (left > 1 and not self._decodes(request)), (
            f"request {request.id} has {left} tokens to compute"
        )
        if self.config.prefix_reuse:
            self.pool.publish(request.tokens, request.pages, request.computed)

    def _release(self, request: Request, *, publish: bool = True) -> None:
        if publish and self.config.prefix_reuse:
            self.pool.publish(request.tokens, request.pages, request.computed)
        self.pool.release(request.pages)
        request.pages, request.computed = [], 0

    def _trim(self, decodes: list[Request], lookahead: int) -> None:
        """Gives back what a larger lookahead left."""
        for request in decodes:
            keep = self.pool.pages_for(len(request.tokens) - 1 + lookahead)
            self.pool.release(request.pages[keep:])
            del request.pages[keep:]

    def _preempt(self, request: Request) -> None:
        """Takes the pages of the youngest running request. Its tokens stay; it is the next to be admitted."""
        self._release(request)
        self.running.remove(request)
        request.state = "waiting"
        self.waiting.appendleft(request)
        self._preempted.append(request)

    def preempt_all(self) -> None:
        """Sends all running requests back: their keys are void, as after new weights with ``pool.clear_prefixes()``."""
        while self.running:
            self._preempt(self.running[-1])

    # -- accounting ---------------------------------------------------------------------------------------------------
    def check(self) -> None:
        """Raises AssertionError, naming the request or the page, where an invariant is broken."""
        self.pool.check(owners=block_table(self.running))
        everyone = [*self.running, *self.waiting]
        order = [self._order[request.id] for request in everyone]
        assert order == sorted(order), f"requests {[request.id for request in everyone]} are out of order"
        assert everyone == [self._requests[id] for id in sorted(self._order, key=self._order.__getitem__)]
        assert set(self._prefill_until) <= set(self._order), "a finished request left a trace"
        assert len(self.running) <= self.config.max_running
        for request in everyone:
            assert len(request.tokens) <= self.limit, f"request {request.id} has {len(request.tokens)} tokens"
        for request in self.running:
            assert request.state == "running", f"request {request.id} runs and is {request.state}"
            slots = len(request.pages) * self.pool.page_size
            assert slots >= request.computed, f"request {request.id} has {request.computed} tokens in {slots} slots"
        for request in self.waiting:
            assert request.state == "waiting", f"request {request.id} waits and is {request.state}"
            assert not request.pages and not request.computed, f"request {request.id} waits and owns {request.pages}"
