"""Reads the text of one answer as it comes: reasoning, content, tool calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from m3.serve.backend import CallDelta
from m3.serve.reasoning import ReasoningSplitter
from m3.serve.tool_calls import ToolCallSplitter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """What is certain of an answer since the last time."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[CallDelta] = ()


class AnswerReader:
    """One answer. ``inside``: the prompt ended with an open <think>; ``tools``: calls are looked for."""

    def __init__(self, *, inside: bool, tools: bool) -> None:
        self._reasoning = ReasoningSplitter(inside=inside)
        self._tools = ToolCallSplitter() if tools else None

    @property
    def state(self) -> Literal["start", "inside", "content"]:
        """Where the answer is: inside its reasoning, after it, or not known yet."""
        return self._reasoning.state

    @property
    def reasoned(self) -> bool:
        """There is reasoning in it."""
        return self._reasoning.reasoned

    @property
    def called(self) -> bool:
        """There was a tool call."""
        return self._tools is not None and self._tools.calls > 0

    def push(self, text: str, *, last: bool) -> Read:
        """Read more; ``last``: nothing comes after it."""
        reasoning, content = self._reasoning.push(text)
        if last:
            rest = self._reasoning.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        calls: list[CallDelta] = []
        if self._tools is not None:
            content, calls = self._tools.push(content)
            if last:
                more, _ = self._tools.finish()
                content += more
        return Read(content=content, reasoning=reasoning, calls=calls)
