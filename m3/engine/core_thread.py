"""What drives an engine (Core), and a thread that runs one: orders go in, notices come out, one at a time."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from m3.engine.request import Event, Finished, Reason, Request
from m3.engine.scheduler import QueueFull
from m3kernels.threads import release_threads

Update = Mapping[str, Tensor] | Callable[[], None]


class Core(Protocol):
    """Computes tokens. Not thread-safe: one caller at a time.

    add: ValueError where the request can never be served; QueueFull where it cannot wait here now.
    abort: the next step reports the Finished of the request; nothing happens if it has finished.
    has_work: whether step() has something to compute or to report.
    step: every request added gets one Finished, its last event. An exception of step() means that the core is broken.
    update_weights: ValueError leaves the weights as they were; any other exception leaves them half written.
    """

    def check(self, request: Request) -> None: ...  # raises what add() would, QueueFull apart
    def add(self, request: Request) -> None: ...
    def abort(self, id: str, reason: Reason = "abort") -> object: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[Event]: ...
    def update_weights(self, update: Update, version: int) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a core tells of itself. Pages of the cache: all, owned by running requests, kept for others to find. Since
    its start: nodes drafted and accepted, trees of them, requests preempted, tokens generated."""

    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    drafted: int = 0
    accepted: int = 0
    trees: int = 0
    preemptions: int = 0
    generated: int = 0


@runtime_checkable
class Counted(Protocol):
    """A core that tells its counts; on any thread."""

    def counts(self) -> Counts: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """The core does not take a request."""

    id: str
    error: ValueError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call returned or raised."""

    ticket: object
    value: Any = None
    error: BaseException | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """The last notice: the thread is over, because of this error if there is one."""

    error: BaseException | None


Notice = Event | Refused | Answer | Ended


class CoreThread:
    """Runs a core on a thread of its own until stop().

    Orders are carried out one after another, between two steps, in the order in which they were given. Notices gather
    until they are taken; ``ring`` is called on the thread when there are new ones, once a step at most.
    Without work the thread sleeps, and its idle OpenMP threads are ended. It is a daemon: a program that forgets stop()
    can still end.

    ``steps`` counts the steps of the core.
    """

    def __init__(self, core: Core, ring: Callable[[], None]) -> None:
        self.steps = 0
        self._core = core
        self._ring = ring
        self._wake = threading.Condition()  # guards the next three
        self._orders: deque[Callable[[], None]] = deque()
        self._notices: list[Notice] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="m3-engine", daemon=True)
        # What follows belongs to the thread.
        self._fresh: list[Notice] = []
        self._inside: set[str] = set()  # added to the core, not finished
        self._parked: dict[str, Request] = {}  # found the core's queue full
        self._paused = False

    # -- for the owner ------------------------------------------------------------------------------------------------
    def start(self) -> None:
        release_threads()  # the owner's, who may have loaded the model
        self._thread.start()

    def add(self, request: Request) -> None:
        """Answered by the request's events, or by Refused."""
        self._order(lambda: self._add(request))

    def abort(self, id: str, reason: Reason) -> None:
        """Answered by Finished; by nothing if the request has finished."""
        self._order(lambda: self._abort(id, reason))

    def call(self, ticket: object, function: Callable[[Core], Any]) -> None:
        """Run function(core) between two steps; answered by Answer. An error other than ValueError ends the thread."""
        self._order(lambda: self._call(ticket, function))

    def pause(self, ticket: object) -> None:
        """No step from the Answer on, until resume()."""
        self._order(lambda: self._pause(ticket, True))

    def resume(self, ticket: object) -> None:
        self._order(lambda: self._pause(ticket, False))

    def stop(self) -> None:
        """Abort all requests, report them, and end."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def join(self) -> None:
        self._thread.join()

    def take(self) -> list[Notice]:
        """The notices that have gathered."""
        with self._wake:
            notices, self._notices = self._notices, []
        return notices

    def _order(self, order: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    # -- the thread ---------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            self._fresh.append(Ended(error=error))
            self._hand_over()
            raise
        self._fresh.append(Ended(error=None))
        self._hand_over()

    def _serve(self) -> None:
        while True:
            if not self._can_step():
                release_threads()
            with self._wake:
                while not (self._orders or self._stopping or self._can_step()):
                    self._wake.wait()
                orders, self._orders = self._orders, deque()
                stopping = self._stopping
            for order in orders:
                order()
            if stopping:
                break
            if self._can_step():
                self._step()
            self._hand_over()
        for id in [*self._inside, *self._parked]:
            self._abort(id, "abort")
        while self._inside and self._core.has_work():
            self._step()

    def _can_step(self) -> bool:
        return not self._paused and self._core.has_work()

    def _step(self) -> None:
        events = self._core.step()
        self.steps += 1
        self._fresh += events
        self._inside.difference_update(event.id for event in events if isinstance(event, Finished))
        for request in list(self._parked.values()):
            if not self._try(request):
                break

    def _hand_over(self) -> None:
        if not self._fresh:
            return
        with self._wake:
            self._notices += self._fresh
        self._fresh = []
        self._ring()

    def _add(self, request: Request) -> None:
        if self._parked:  # first come, first served
            self._parked[request.id] = request
        else:
            self._try(request)

    def _try(self, request: Request) -> bool:
        """Whether the core has taken or refused the request; otherwise it is parked until after the next step."""
        try:
            self._core.add(request)
        except QueueFull as error:
            if self._inside:  # whose end makes room
                self._parked[request.id] = request
                return False
            self._fresh.append(Refused(id=request.id, error=ValueError(str(error))))
        except ValueError as error:
            self._fresh.append(Refused(id=request.id, error=error))
        else:
            self._inside.add(request.id)
        self._parked.pop(request.id, None)
        return True

    def _abort(self, id: str, reason: Reason) -> None:
        if id in self._inside:
            self._core.abort(id, reason)
        elif self._parked.pop(id, None) is not None:
            self._fresh.append(Finished(id=id, reason=reason))

    def _call(self, ticket: object, function: Callable[[Core], Any]) -> None:
        try:
            value = function(self._core)
        except BaseException as error:
            self._fresh.append(Answer(ticket=ticket, error=error))
            if not isinstance(error, ValueError):
                raise
        else:
            self._fresh.append(Answer(ticket=ticket, value=value))

    def _pause(self, ticket: object, paused: bool) -> None:
        self._paused = paused
        self._fresh.append(Answer(ticket=ticket))
