"""AsyncEngine: many callers at once, on one event loop, over a core on a thread (Engine, for lists: batch_engine.py).

On that loop a request is a stream: outside (no room yet), inside (the core has it), over. It is over at the first of:
the core's Finished, a stop string, its deadline, abort(), its caller gone. Where the core does not know yet, it is
told, and what it still says of the request is ignored.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from m3.engine.batch_engine import Engine
from m3.engine.config import EngineConfig
from m3.engine.core_thread import Answer, Core, CoreThread, Counted, Counts, Ended, Notice, Refused, Update
from m3.engine.grammars import Grammars, grammars_of
from m3.engine.intake import (
    GREEDY,
    EngineBusy,
    EngineClosed,
    EngineDead,
    Intake,
    Message,
    Prompt,
    apply,
    core_failed,
    describe,
)
from m3.engine.outputs import Assembly, Completion, Output, Usage
from m3.engine.request import Finished, PromptLogprobs, Reason, SamplingParams, Tokens
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

__all__ = [
    "AsyncEngine",
    "Completion",
    "Engine",
    "EngineBusy",
    "EngineClosed",
    "EngineDead",
    "Output",
    "Stats",
    "Usage",
]

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """An AsyncEngine now (outside: no room yet; waiting: in the core's queue; running) and since its start."""

    state: str
    paused: bool
    outside: int
    waiting: int
    running: int
    finished: dict[str, int]  # by reason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    steps: int
    failure: str | None
    # Of the core (core_thread.Counts); 0 where it does not tell.
    pages_total: int
    pages_used: int
    pages_cached: int
    drafted: int
    accepted: int
    trees: int
    preemptions: int
    generated: int


class _Stream:
    """One request of an AsyncEngine, as the event loop sees it."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.id = assembly.request.id
        self.error: Exception | None = None  # to be raised where the request is consumed
        self.timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()

    @property
    def over(self) -> bool:
        return self.error is not None or self.assembly.finish_reason is not None

    def wake(self) -> None:
        if self.error is not None or self.assembly.has_output:
            self._news.set()

    async def next(self) -> Output:
        await self._news.wait()
        self._news.clear()
        if self.error is not None:
            raise self.error
        return self.assembly.take()


class AsyncEngine:
    """Serves many callers at once, on one event loop; the core runs on a thread of its own.

    ``async with AsyncEngine(core, tokenizer) as engine`` starts it and shuts it down: it finishes what is under way, or
    aborts it if the block was left by an exception.

    A caller that reads slowly gets fewer, longer outputs: what it has not read is merged. When the core fails, every
    request under way ends with the reason "error", and every later call raises EngineDead.

    Args:
        core: computes the tokens; the engine's alone from start() to shutdown().
        tokenizer: for prompts that are text, and for text out; None: tokens only.
        max_waiting: requests that may wait in the core; others wait outside, or are refused (on_full).
        on_full: "wait": generate() waits for room, first come, first served; "refuse": it raises EngineBusy.
        seed: of the seeds that are drawn for requests without one.
    """

    def __init__(
        self,
        core: Core,
        tokenizer: Tokenizer | None = None,
        *,
        max_waiting: int = 256,
        on_full: Literal["wait", "refuse"] = "wait",
        seed: int | None = None,
    ) -> None:
        if max_waiting < 1:
            raise refuse("engine", "max_waiting", "at least 1", max_waiting)
        if on_full not in ("wait", "refuse"):
            raise refuse("engine", "on_full", "'wait' or 'refuse'", on_full)
        self.core = core
        self.tokenizer = tokenizer
        self.max_waiting = max_waiting
        self.on_full = on_full
        self.state: Literal["new", "running", "draining", "closed", "dead"] = "new"
        self.failure: BaseException | None = None
        self._intake = Intake(tokenizer, seed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = CoreThread(core, self._ring)
        self._named: dict[str, _Stream] = {}  # by the caller's id, until over
        self._outside: dict[str, _Stream] = {}  # by the core's id, and so are these: in order of arrival
        self._waiting: dict[str, _Stream] = {}  # inside, not seen to run yet
        self._inside: dict[str, _Stream] = {}  # until the core has finished them
        self._calls: set[asyncio.Future[Any]] = set()
        self._empty = asyncio.Event()  # nothing outside or inside
        self._ended = asyncio.Event()  # the thread
        self._paused = False
        self._finished: Counter[str] = Counter()
        self._used: Counter[str] = Counter()

    @classmethod
    def from_model(cls, name: str | Path, config: EngineConfig | None = None, **options: Any) -> Self:
        """An engine over a model by name or folder; options as in m3.engine.open.open_core: weights, draft, ..."""
        from m3.engine.open import open_core

        core, tokenizer = open_core(name, config, **options)
        return cls(core, tokenizer, max_waiting=core.config.max_waiting)

    @functools.cached_property
    def grammars(self) -> Grammars | None:
        """For SamplingParams.grammar; None without a tokenizer. Compiling can take a while: not on the event loop."""
        return grammars_of(self.core, self.tokenizer)

    # -- life ---------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Bind the engine to the running event loop and start its thread."""
        if self.state != "new":
            raise EngineClosed(f"engine: start: want an engine that was never started; got one that is {self.state}")
        self._loop = asyncio.get_running_loop()
        self.state = "running"
        self._empty.set()
        self._thread.start()

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, finish those under way (a paused engine goes on), and end the thread.

        What is left after ``timeout`` seconds, or all if not ``drain``, is aborted; a step that runs is waited for.
        What was computed can still be read. May be called again, also after it was cancelled.
        """
        if self.state == "new":
            self.state = "closed"
            return
        self._check_loop()
        if self.state == "running":
            self.state = "draining"
        if self.state == "draining" and drain:
            if self._paused:
                self._paused = False
                self._thread.resume(None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), timeout)
        for stream in [*self._outside.values(), *self._inside.values()]:
            self._end(stream, "abort")
        self._thread.stop()
        await self._ended.wait()
        self._thread.join()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown(drain=error is None)

    # -- requests -----------------------------------------------------------------------------------------------------
    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        request_id: str | None = None,
        skip_special_tokens: bool = True,
    ) -> AsyncGenerator[Output]:
        """Yields the outputs of a request as they come; the last one has a finish_reason.

        Leaving the loop, closing the iterator and cancelling the task abort the request.

        Args:
            request_id: to abort() it by, and in its outputs; None: made up.

        Raises:
            ValueError: a prompt that can never be served, an id that is in use, another event loop.
            EngineBusy: max_waiting requests wait, and on_full is "refuse".
            EngineDead, EngineClosed: the engine takes no requests.
        """
        stream = self._open(prompt, params, request_id, skip_special_tokens)
        try:
            output = await stream.next()
            while output.finish_reason is None:
                yield output
                output = await stream.next()
            yield output
        finally:
            self._end(stream, "abort")

    async def complete(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        request_id: str | None = None,
        skip_special_tokens: bool = True,
    ) -> Completion:
        """The whole of a request; raises as generate()."""
        self._check()
        tokens = self._intake.encode(prompt)
        async with contextlib.aclosing(
            self.generate(tokens, params, request_id=request_id, skip_special_tokens=skip_special_tokens)
        ) as outputs:
            return Completion.of(tokens, [output async for output in outputs])

    async def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams = GREEDY,
        *,
        request_id: str | None = None,
        skip_special_tokens: bool = True,
        **variables: Any,
    ) -> AsyncGenerator[Output]:
        """As generate(), for a conversation, rendered by the model's own template with these variables."""
        prompt = self._intake.chat(messages, variables)
        async with contextlib.aclosing(
            self.generate(prompt, params, request_id=request_id, skip_special_tokens=skip_special_tokens)
        ) as outputs:
            async for output in outputs:
                yield output

    def abort(self, request_id: str) -> bool:
        """End a request with the reason "abort", now. False where it is not under way."""
        self._check_loop()
        stream = self._named.get(request_id)
        if stream is not None:
            self._end(stream, "abort")
        return stream is not None

    # -- the core -----------------------------------------------------------------------------------------------------
    async def call(self, function: Callable[[Core], Result]) -> Result:
        """What function(core) returns, called between two steps on the core's thread.

        A ValueError is raised here and nothing else happens. Any other exception is raised here too, and the engine is
        dead: the core may be half changed.
        """
        result: Result = await self._ask(lambda ticket: self._thread.call(ticket, function))
        return result

    async def update_weights(self, update: Update, version: int) -> None:
        """New weights from the next step on, also for requests under way; errors as in call()."""
        await self.call(lambda core: core.update_weights(update, version))

    async def pause(self) -> None:
        """Returns when no step runs, and none will until resume(). Aborts and deadlines still end requests."""
        self._paused = True
        await self._ask(self._thread.pause)

    async def resume(self) -> None:
        self._paused = False
        await self._ask(self._thread.resume)

    def stats(self) -> Stats:
        """Counts, in any state of the engine."""
        self._see_who_waits()
        return Stats(
            state=self.state,
            paused=self._paused,
            outside=len(self._outside),
            waiting=len(self._waiting),
            running=len(self._inside) - len(self._waiting),
            finished=dict(self._finished),
            prompt_tokens=self._used["prompt"],
            completion_tokens=self._used["completion"],
            cached_tokens=self._used["cached"],
            steps=self._thread.steps,
            failure=None if self.failure is None else describe(self.failure),
            **dataclasses.asdict(self.core.counts() if isinstance(self.core, Counted) else Counts()),
        )

    # -- on the loop --------------------------------------------------------------------------------------------------
    def _check_loop(self) -> None:
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise refuse("engine", "loop", "the event loop that the engine was started on", "another one")

    def _check(self) -> None:
        if self.failure is not None:
            raise core_failed(self.failure)
        if self.state != "running":
            raise EngineClosed(f"engine: want one that was started and not shut down; got one that is {self.state}")
        self._check_loop()

    async def _ask(self, order: Callable[[object], None]) -> Any:
        self._check()
        assert self._loop is not None
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._calls.add(answer)
        order(answer)
        return await answer

    def _open(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None, skip_special_tokens: bool
    ) -> _Stream:
        self._check()
        assert self._loop is not None
        if request_id in self._named:
            raise refuse("engine", "request_id", "one that no request under way has", repr(request_id))
        stream = _Stream(self._intake.assembly(prompt, params, request_id, skip_special_tokens=skip_special_tokens))
        if self.on_full == "refuse" and not self._has_room():
            raise EngineBusy(f"engine: want at most {self.max_waiting} requests that wait; got one more")
        if params.deadline is not None:
            stream.timer = self._loop.call_later(params.deadline, self._end, stream, "deadline")
        self._named[stream.assembly.request_id] = stream
        self._outside[stream.id] = stream
        self._empty.clear()
        self._let_in()
        return stream

    def _has_room(self) -> bool:
        if len(self._waiting) >= self.max_waiting:
            self._see_who_waits()
        return len(self._waiting) < self.max_waiting

    def _see_who_waits(self) -> None:
        """Who was seen to run does not wait again, even if the core preempts it."""
        waiting = self._waiting.items()
        self._waiting = {id: stream for id, stream in waiting if stream.assembly.request.state == "waiting"}

    def _let_in(self) -> None:
        """As many as there is room for, first come, first served."""
        while self._outside and self._has_room():
            id = next(iter(self._outside))
            stream = self._outside.pop(id)
            self._waiting[id] = self._inside[id] = stream
            self._thread.add(stream.assembly.request)

    def _ring(self) -> None:
        """On the core's thread: there are notices."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._receive)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
            self._thread.stop()  # nobody is left to listen

    def _receive(self) -> None:
        notices = self._thread.take()
        try:
            for notice in notices:
                self._handle(notice)
            self._let_in()
            if not self._inside and not self._outside:
                self._empty.set()
        except Exception as error:
            self._die(error)
            self._thread.stop()
            if any(isinstance(notice, Ended) for notice in notices):
                self._ended.set()
            raise

    def _handle(self, notice: Notice) -> None:
        match notice:
            case Answer():
                self._answer(notice)
            case Refused():
                stream = self._leave(notice.id)
                if stream is not None and not stream.over:
                    stream.error = notice.error
                    self._close(stream)
            case Ended():
                if notice.error is not None:
                    self._die(notice.error)
                elif self.state != "dead":
                    self.state = "closed"
                self._ended.set()
            case Tokens() | PromptLogprobs():
                stream = self._inside.get(notice.id)
                if stream is None or stream.over:
                    return
                if apply(notice, stream.assembly):
                    self._thread.abort(notice.id, "stop")
                    self._close(stream)
                stream.wake()
            case Finished():
                stream = self._leave(notice.id)
                if stream is not None and not stream.over:
                    apply(notice, stream.assembly)
                    self._close(stream)

    def _answer(self, answer: Answer) -> None:
        future = answer.ticket
        if not isinstance(future, asyncio.Future):  # resumed by shutdown()
            return
        if answer.error is not None and not future.done():  # done: the caller was cancelled
            future.set_exception(answer.error)
        elif not future.done():
            future.set_result(answer.value)
        self._calls.discard(future)

    def _leave(self, id: str) -> _Stream | None:
        """The core is done with the request."""
        self._waiting.pop(id, None)
        return self._inside.pop(id, None)

    def _end(self, stream: _Stream, reason: Reason, error: str | None = None) -> None:
        """End a request for its caller; the core, if it has it, is told."""
        if stream.over:
            return
        if self._outside.pop(stream.id, None) is None:
            self._thread.abort(stream.id, reason)
        stream.assembly.finish(reason, error=error)
        self._close(stream)
        if not self._inside and not self._outside:
            self._empty.set()

    def _close(self, stream: _Stream) -> None:
        """Whatever ended it: count it, wake its caller."""
        assembly = stream.assembly
        del self._named[assembly.request_id]
        if assembly.finish_reason is not None:
            usage = assembly.usage
            self._finished[assembly.finish_reason] += 1
            self._used.update(
                prompt=usage.prompt_tokens, completion=usage.completion_tokens, cached=usage.cached_tokens
            )
        if stream.timer is not None:
            stream.timer.cancel()
        stream.wake()

    def _die(self, error: BaseException) -> None:
        """The core, or what reads its events, has failed: end everything, keep the cause."""
        self.state, self.failure = "dead", self.failure or error
        for stream in [*self._outside.values(), *self._inside.values()]:
            self._end(stream, "error", describe(error))
        self._inside.clear()
        self._waiting.clear()
        self._empty.set()
        for call in self._calls:
            if not call.done():
                call.set_exception(core_failed(error))
        self._calls.clear()
