"""A core without a model for the races of the engines, its callers, and a tokenizer that cuts characters anywhere."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from m3.engine.config import EngineConfig
from m3.engine.engine import AsyncEngine, Output
from m3.engine.kv_cache import PagePool
from m3.engine.request import Event, Finished, PromptLogprobs, Reason, Request, SamplingParams, Tokens
from m3.engine.scheduler import QueueFull, Scheduler
from m3.models.tokenizer import Tokenizer

# -- a tokenizer -------------------------------------------------------------------------------------------------------
TEXT = "The né 🩺🩺日本 STOP and STOPPED ababac. ✚ END\n\nUser: a日b🩺c "
BYTES = TEXT.encode()
LONGEST = 5  # bytes of a token
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def pieces() -> dict[bytes, int]:
    """The vocabulary: every byte, and every run of up to LONGEST bytes of TEXT, whole characters or not."""
    found = {bytes([byte]): byte for byte in range(256)}
    for size in range(2, LONGEST + 1):
        for start in range(len(BYTES) - size + 1):
            found.setdefault(BYTES[start : start + size], len(found))
    return found


PIECES = pieces()
START, END = len(PIECES), len(PIECES) + 1


def make_tokenizer(folder: Path) -> Tokenizer:
    """It encodes text byte by byte (token = byte), and decodes every piece."""
    letters = byte_letters()
    fast = FastTokenizer(models.BPE({"".join(letters[b] for b in piece): token for piece, token in PIECES.items()}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": TEMPLATE}))
    return Tokenizer(folder)


# -- a core ------------------------------------------------------------------------------------------------------------
VOCAB = len(PIECES)
MAX_PROMPT = 64  # tokens of the longest prompt that the toy takes
MAX_TOKENS_A_STEP = 4


def next_token(tokens: list[int], seed: int) -> int:
    """A token that depends on all before it."""
    return hash((tuple(tokens[-8:]), len(tokens), seed)) % VOCAB


def answer(prompt: list[int], params: SamplingParams, seed: int) -> list[int]:
    """What the core draws for a request that nothing cuts short; END ends it and is not part of it."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens and (token := next_token(tokens, seed)) not in (
        params.stop_token_ids
    ):
        tokens.append(token)
    return tokens[len(prompt) :]


def beginning(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    """The first tokens that the core draws for a request."""
    return answer(prompt, SamplingParams(max_tokens=max(1, count)), seed)[:count]


class ToyCore:
    """Several tokens a request and step, a bounded queue, deadlines, exact accounting; it notices a second user.

    Args:
        step_time: seconds that a step sleeps. fail_at: number of the step that raises. on_step: called in every step.
    """

    def __init__(
        self,
        *,
        max_running: int = 8,
        max_waiting: int = 16,
        step_time: float = 0.0,
        fail_at: int = 0,
        on_step: Callable[[int], None] | None = None,
        script: Mapping[int, list[int]] | None = None,
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.step_time = step_time
        self.fail_at = fail_at
        self.on_step = on_step
        self.script = script or {}  # by the first token of the prompt: what is drawn
        self.version = 0
        self.weights: object = None
        self.steps = 0
        self.added: list[str] = []
        self.aborted: dict[str, str] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._told: list[Event] = []
        self._chance = random.Random(0)
        self._user = threading.Lock()

    def is_clean(self) -> bool:
        return not (self.waiting or self.running or self._told)

    def check(self, request: Request) -> None:
        if len(request.prompt) > MAX_PROMPT or not all(0 <= token < END + 1 for token in request.prompt):
            raise ValueError(f"core: prompt: want at most {MAX_PROMPT} tokens below {END + 1}; got {request.prompt}")

    def add(self, request: Request) -> None:
        with self._alone():
            self.check(request)
            if len(self.waiting) >= self.max_waiting:
                raise QueueFull("core: full")
            assert request.id not in {one.id for one in [*self.waiting, *self.running]}
            self.added.append(request.id)
            self.waiting.append(request)

    def abort(self, id: str, reason: str = "abort") -> None:
        with self._alone():
            for request in [*self.waiting, *self.running]:
                if request.id == id:
                    self.aborted[id] = reason
                    self._finish(request, reason)

    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._told)

    def update_weights(self, update: object, version: int) -> None:
        with self._alone():
            if version <= self.version:
                raise ValueError(f"core: version: want one above {self.version}; got {version}")
            if callable(update):
                update()
            else:
                self.weights = update
            self.version = version

    def step(self) -> list[Event]:
        with self._alone():
            self.steps += 1
            if self.on_step is not None:
                self.on_step(self.steps)
            if self.steps == self.fail_at:
                raise ZeroDivisionError("the toy broke")
            if self.step_time:
                time.sleep(self.step_time)
            for request in [*self.waiting, *self.running]:
                deadline = request.params.deadline
                if deadline is not None and time.monotonic() >= request.arrival + deadline:
                    self._finish(request, "deadline")
            while self.waiting and len(self.running) < self.max_running:
                request = self.waiting.popleft()
                request.state, request.cached = "running", len(request.prompt) // 2
                self.running.append(request)
                if request.params.prompt_logprobs:
                    self._told.append(PromptLogprobs(id=request.id, logprobs=[-1.0] * (len(request.prompt) - 1)))
            for request in list(self.running):
                self._draw(request)
            told, self._told = self._told, []
            return told

    def _draw(self, request: Request) -> None:
        params, drawn, reason = request.params, [], None
        for _ in range(self._chance.randint(1, MAX_TOKENS_A_STEP)):
            script = self.script.get(request.prompt[0])
            if script is not None and request.drawn == len(script):
                reason = "stop"
                break
            token = next_token(request.tokens, request.seed) if script is None else script[request.drawn]
            if token in params.stop_token_ids:
                reason = "stop"
                break
            request.tokens.append(token)
            drawn.append(token)
            if request.drawn == params.max_tokens:
                reason = "length"
                break
        if drawn:
            logprobs = None if params.logprobs == "none" else [-float(token) for token in drawn]
            top = [[(token, -float(token))] for token in drawn] if params.top_logprobs else None
            self._told.append(
                Tokens(id=request.id, tokens=drawn, version=self.version, logprobs=logprobs, top_logprobs=top)
            )
        if reason:
            self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        request.state = "finished"
        self._told.append(Finished(id=request.id, reason=reason, cached_tokens=request.cached))

    def _alone(self) -> _Alone:
        return _Alone(self._user)


class ScheduledCore:
    """The engine's own scheduler and pages under tokens without a model."""

    def __init__(self, config: EngineConfig) -> None:
        self.pool = PagePool(config.num_pages, config.page_size)
        self.scheduler = Scheduler(config, self.pool)
        self.steps = 0

    def is_clean(self) -> bool:
        self.scheduler.check()
        return not self.scheduler.has_work() and self.pool.used == 0

    def check(self, request: Request) -> None:
        if len(request.prompt) >= self.scheduler.limit:
            raise ValueError(f"core: prompt: want fewer than {self.scheduler.limit} tokens; got {len(request.prompt)}")

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def abort(self, id: str, reason: Reason = "abort") -> None:
        self.scheduler.abort(id, reason)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def update_weights(self, update: object, version: int) -> None:
        raise ValueError("core: weights: want a core with weights; got this one")

    def step(self) -> list[Event]:
        self.steps += 1
        plan = self.scheduler.plan(time.monotonic())
        events: list[Event] = list(plan.finished)
        for request, _, stop in plan.prefills:
            request.computed = stop
        drawing = [request for request, _, stop in plan.prefills if stop == len(request.tokens)]
        for request in [*plan.decodes, *drawing]:
            token = next_token(request.tokens, request.seed)
            request.computed = len(request.tokens)
            request.tokens.append(token)
            events.append(Tokens(id=request.id, tokens=[token], version=0))
            if request.drawn == request.params.max_tokens:
                events.append(self.scheduler.finish(request, "length"))
        return events


class _Alone:
    """Fails where two threads are in the core at once."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        assert self._lock.acquire(blocking=False), "two users of one core"

    def __exit__(self, *error: object) -> None:
        self._lock.release()


# -- callers -----------------------------------------------------------------------------------------------------------
PATIENCE = 30.0  # seconds after which a test calls it a deadlock
LONG = SamplingParams(max_tokens=100_000, seed=0)
SHORT = SamplingParams(max_tokens=12, seed=0)


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
