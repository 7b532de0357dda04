"""Physicians for tests of the clinic: one that reads out a script."""

from __future__ import annotations

from collections.abc import Sequence

from m3.environment.case import Phase
from m3.environment.episode import CaseView
from m3.environment.trajectory import Message


class Script:
    """Says its lines one after the other; keeps what it was shown."""

    name = "script"

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        self.seen: list[tuple[CaseView, tuple[Message, ...], Phase, int]] = []

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        self.seen.append((view, tuple(messages), phase, seed))
        return self.lines[len(self.seen) - 1]


def physician(*lines: str) -> list[Message]:
    """A dialogue as a patient hears it: the physician's lines alone."""
    return [Message(role="assistant", content=line, turn=i, phase=Phase.inquiry) for i, line in enumerate(lines)]
