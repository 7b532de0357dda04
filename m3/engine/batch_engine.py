"""Engine: lists of prompts, completed on the caller's thread."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from m3.engine.config import EngineConfig
from m3.engine.core_thread import Core
from m3.engine.grammars import Grammars, grammars_of
from m3.engine.intake import GREEDY, EngineBusy, Intake, Message, Prompt, apply, core_failed
from m3.engine.outputs import Assembly, Completion
from m3.engine.request import Event, Finished, SamplingParams
from m3.engine.scheduler import QueueFull
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse


class Engine:
    """Completes lists of prompts on the caller's thread.

    Args:
        core: computes the tokens; nobody else may use it meanwhile.
        tokenizer: for prompts that are text, and for text out; None: tokens only.
        seed: of the seeds that are drawn for requests without one.
    """

    def __init__(self, core: Core, tokenizer: Tokenizer | None = None, *, seed: int | None = None) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self.failure: BaseException | None = None
        self._intake = Intake(tokenizer, seed)
        self._in_use = threading.Lock()

    @classmethod
    def from_model(cls, name: str | Path, config: EngineConfig | None = None, **options: Any) -> Self:
        """An engine over a model by name or folder; options as in m3.engine.open.open_core: weights, draft, ..."""
        from m3.engine.open import open_core

        core, tokenizer = open_core(name, config, **options)
        return cls(core, tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars | None:
        """For SamplingParams.grammar; None without a tokenizer."""
        return grammars_of(self.core, self.tokenizer)

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        skip_special_tokens: bool = True,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> list[Completion]:
        """The completion of every prompt, in their order.

        Ctrl-C, or an exception of ``progress``, aborts all of them; the core is then without requests.

        Args:
            prompts: texts or token ids. params: of all prompts, or one each.
            progress: called as (finished requests, all requests, tokens so far) after every step.

        Raises:
            ValueError: a prompt that can never be served, before any is started.
            EngineDead: a step of the core failed, now or before.
        """
        done: dict[int, Completion] = {}
        with contextlib.closing(
            self.completions(prompts, params, skip_special_tokens=skip_special_tokens, progress=progress)
        ) as completions:
            done.update(completions)
        return [done[index] for index in range(len(done))]

    def stream(self, prompt: Prompt, params: SamplingParams = GREEDY) -> Generator[str]:
        """Pieces of text of one prompt as they come. Closing it aborts the request; raises as generate()."""
        if not self._in_use.acquire(blocking=False):
            raise EngineBusy("engine: stream: want one call at a time; got another one that is not over")
        try:
            if self.failure is not None:
                raise core_failed(self.failure)
            (assembly,) = self._open([prompt], [params], True)
            yield from self._stream(assembly)
        finally:
            self._in_use.release()

    def completions(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        skip_special_tokens: bool = True,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Generator[tuple[int, Completion]]:
        """As generate(), but yields (index of the prompt, completion) as they finish. Closing it aborts the rest."""
        if not self._in_use.acquire(blocking=False):
            raise EngineBusy("engine: generate: want one call at a time; got another one that is not over")
        try:
            if self.failure is not None:
                raise core_failed(self.failure)
            assemblies = self._open(prompts, params, skip_special_tokens)
            yield from self._run(assemblies, progress)
        finally:
            self._in_use.release()

    def chat(self, messages: Sequence[Message], params: SamplingParams = GREEDY, **variables: Any) -> Completion:
        """The answer to one conversation, rendered by the model's own template with these variables."""
        return self.generate([self._intake.chat(messages, variables)], params)[0]

    def _open(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams], skip_special_tokens: bool
    ) -> list[Assembly]:
        if isinstance(prompts, str):
            raise refuse("engine", "prompts", "a list of prompts", "a str")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise refuse("engine", "params", f"one for each of {len(prompts)} prompts", f"{len(each)}")
        assemblies = [
            self._intake.assembly(prompt, one, None, skip_special_tokens=skip_special_tokens)
            for prompt, one in zip(prompts, each, strict=True)
        ]
        for assembly in assemblies:
            self.core.check(assembly.request)
        return assemblies

    def _run(
        self, assemblies: list[Assembly], progress: Callable[[int, int, int], None] | None
    ) -> Iterator[tuple[int, Completion]]:
        prompts = {assembly.request.id: index for index, assembly in enumerate(assemblies)}
        outside = deque(assemblies)
        inside: dict[str, Assembly] = {}
        finished = 0
        try:
            while outside or inside:
                while outside and self._add(outside[0], inside):
                    outside.popleft()
                if not inside:
                    raise EngineBusy("engine: generate: want a core with room for a request; got a full one")
                over = []
                for event in self._step():
                    assembly = inside.get(event.id)
                    if assembly is None:
                        continue
                    if apply(event, assembly):
                        self.core.abort(event.id, "stop")
                    if isinstance(event, Finished):
                        over.append(inside.pop(event.id))
                finished += len(over)
                if progress is not None:
                    progress(
                        finished, len(assemblies), sum(assembly.usage.completion_tokens for assembly in assemblies)
                    )
                for assembly in over:
                    yield prompts[assembly.request.id], Completion.of(assembly.request.prompt, [assembly.take()])
        finally:
            self._clear(inside)

    def _stream(self, assembly: Assembly) -> Iterator[str]:
        inside: dict[str, Assembly] = {}
        try:
            if not self._add(assembly, inside):
                raise EngineBusy("engine: stream: want a core with room for a request; got a full one")
            while inside:
                for event in self._step():
                    if event.id not in inside:
                        continue
                    if apply(event, assembly):
                        self.core.abort(event.id, "stop")
                    if isinstance(event, Finished):
                        del inside[event.id]
                if assembly.has_output and (text := assembly.take().text):
                    yield text
        finally:
            self._clear(inside)

    def _clear(self, inside: dict[str, Assembly]) -> None:
        """Aborts what the core still has, and waits for it."""
        for id in inside if self.failure is None else ():
            self.core.abort(id)
        while self.failure is None and inside and self.core.has_work():
            for event in self._step():
                if isinstance(event, Finished):
                    inside.pop(event.id, None)

    def _add(self, assembly: Assembly, inside: dict[str, Assembly]) -> bool:
        request = assembly.request
        inside[request.id] = assembly  # before the core has it: an interrupt in between leaves nothing behind
        try:
            self.core.add(request)
        except QueueFull:
            del inside[request.id]
            return False
        return True

    def _step(self) -> list[Event]:
        with _interrupts_after():
            try:
                return self.core.step()
            except BaseException as error:
                self.failure = error
                if not isinstance(error, Exception):
                    raise
                raise core_failed(error) from error


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Ctrl-C that comes in the block is raised at its end, unless the program has its own answer to it."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
