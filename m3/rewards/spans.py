"""Rewards of spans of a consultation; the penalty of a step is the special case of a span that is a whole step.

A verifier of steps returns spans: (turn, token start, token end, value, criterion). ``violations`` turns them into what
SPAR takes (names of what each step violates; m3/algorithms/spar.py makes gamma of it). Source of steps and gamma:
Baichuan-M3, arXiv 2602.06570, Eq 7.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanReward:
    """``value`` for tokens [token_start, token_end) of the physician's message of a turn.

    Tokens are counted by whoever made the span: a model's tokenizer where there is one, else the words of
    m3.text.words. ``criterion`` names what was judged ("redundant_question"); ``value`` is lambda in (0, 1) for a
    violation of a step, or any number for a reward of other kinds. ``note`` says why, for a reader.
    """

    turn: int
    token_start: int
    token_end: int
    value: float
    criterion: str
    note: str = ""


def violations(spans: Iterable[SpanReward], turns: int) -> list[set[str]]:
    """Names of what each of ``turns`` steps violates; a span of a turn outside [0, turns) is an error."""
    found: list[set[str]] = [set() for _ in range(turns)]
    for span in spans:
        if not 0 <= span.turn < turns:
            raise ValueError(f"violations: spans: want turns in [0, {turns}); got {span.turn} ({span.criterion})")
        found[span.turn].add(span.criterion)
    return found


def step_gammas(spans: Sequence[SpanReward], turns: int) -> list[float]:
    """gamma_j of each step (Eq 7): the least value of its spans, 1 without any."""
    gammas = [1.0] * turns
    for span in spans:
        if not 0 <= span.turn < turns:
            raise ValueError(f"step_gammas: spans: want turns in [0, {turns}); got {span.turn} ({span.criterion})")
        if not 0 < span.value < 1:
            raise ValueError(f"step_gammas: spans: want lambda in (0, 1); got {span.value} ({span.criterion})")
        gammas[span.turn] = min(gammas[span.turn], span.value)
    return gammas
