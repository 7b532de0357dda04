"""How fast an engine decodes: tokens a second of one request or several, after their prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

from m3.engine.core import EngineCore
from m3.engine.request import SamplingParams, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What a run took. tokens: drawn after the first of each request; seconds: to draw them; steps: of the core."""

    tokens: int
    seconds: float
    steps: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def decode_speed(core: EngineCore, prompts: Sequence[Sequence[int]], tokens: int, *, temperature: float = 0.0) -> Speed:
    """Run all prompts together for ``tokens`` tokens each; their prefill is not counted."""
    params = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        core.add(core.new_request(f"speed {number}", prompt, params, number))
    drawn: dict[str, int] = {}
    while len(drawn) < len(prompts):
        for event in core.step():
            if isinstance(event, Tokens):
                drawn[event.id] = drawn.get(event.id, 0) + len(event.tokens)
    first, steps, start = sum(drawn.values()), 0, time.perf_counter()
    while core.has_work():
        steps += 1
        for event in core.step():
            if isinstance(event, Tokens):
                drawn[event.id] += len(event.tokens)
    seconds = time.perf_counter() - start
    return Speed(tokens=sum(drawn.values()) - first, seconds=seconds, steps=steps)
