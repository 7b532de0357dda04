"""Tool calls as Hermes and Qwen write them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

ToolCallSplitter reads them out of a stream; ``forced`` is the grammar that makes a model write one. Arguments are
passed on as they come, in the model's own spelling. What is no call after all is content.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from m3.serve.backend import CallDelta
from m3.serve.chat_schema import NamedTool, Tool
from m3.serve.reasoning import held

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class ToolCallSplitter:
    """One answer. push() and finish() return (content, calls)."""

    def __init__(self) -> None:
        self.calls = 0
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._held = ""
        self._value = _ObjectEnd()

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        self._held += text
        content: list[str] = []
        calls: list[CallDelta] = []
        while self._step(content, calls):
            pass
        return "".join(content), calls

    def finish(self) -> tuple[str, list[CallDelta]]:
        rest, self._held = self._held, ""
        if self._state == "head":
            return OPEN + rest, []
        if self._state == "text" and not (self.calls and not rest.strip()):
            return rest, []
        return "", []

    def _step(self, content: list[str], calls: list[CallDelta]) -> bool:
        """Read on; False: nothing is certain now."""
        match self._state:
            case "text":
                return self._read_text(content)
            case "head":
                return self._read_head(content, calls)
            case "arguments":
                return self._read_arguments(calls)
            case "tail":
                _, closed, after = self._held.partition(CLOSE)
                if closed:
                    self._held, self._state = after, "text"
                return bool(closed)

    def _read_text(self, content: list[str]) -> bool:
        before, opened, after = self._held.partition(OPEN)
        if opened:
            content.append(before.rstrip())
            self._held, self._state = after, "head"
            return True
        certain = self._held[: len(self._held) - held(self._held, OPEN)].rstrip()
        content.append(certain)
        self._held = self._held[len(certain) :]
        return False

    def _read_head(self, content: list[str], calls: list[CallDelta]) -> bool:
        head = HEAD.match(self._held)
        if head is not None and (name := _loaded(head[1])) is not None:
            calls.append(self._begin(name, ""))
            self._held, self._state, self._value = self._held[head.end() :], "arguments", _ObjectEnd()
            return True
        body, closed, after = self._held.partition(CLOSE)
        if not closed:
            return False
        row = _loaded(body)
        name, arguments = _parts(row) if isinstance(row, dict) else (None, "")
        if name is None:
            content.append(OPEN + body + CLOSE)
        else:
            calls.append(self._begin(name, arguments))
        self._held, self._state = after, "text"
        return True

    def _read_arguments(self, calls: list[CallDelta]) -> bool:
        taken = self._value.read(self._held)
        if taken:
            calls.append(CallDelta(index=self.calls - 1, arguments=self._held[:taken]))
            self._held = self._held[taken:]
        if self._value.over:
            self._state = "tail"
        return self._value.over

    def _begin(self, name: str, arguments: str) -> CallDelta:
        self.calls += 1
        return CallDelta(index=self.calls - 1, id=f"call_{uuid.uuid4().hex[:24]}", name=name, arguments=arguments)


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.over = False
        self._depth = 0
        self._quoted = self._escaped = False

    def read(self, text: str) -> int:
        """Characters of the text that belong to the object."""
        for place, char in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = not self._escaped and char == "\\"
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self.over = True
                    return place + 1
        return len(text)


def _loaded(text: str) -> Any:
    """What a JSON text says; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parts(row: dict[str, Any]) -> tuple[str | None, str]:
    """(name, arguments as text) of a call; None where it is none."""
    name, arguments = row.get("name"), row.get("arguments", row.get("parameters", {}))
    if not isinstance(name, str):
        return None, ""
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def forced(tools: Sequence[Tool], choice: str | NamedTool, *, parallel: bool) -> str:
    """A Lark grammar of one call, or of several where ``parallel``: of any tool, or of the one that is named."""
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    lines = ['start: call ("\\n" call)*' if parallel else "start: call"]
    lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head = json.dumps(f'{OPEN}\n{{"name": "{tool.function.name}", "arguments": ')
        schema = {"type": "object", **(tool.function.parameters or {})}
        lines.append(f"call_{number}: {head} arguments_{number} {json.dumps('}' + chr(10) + CLOSE)}")
        lines.append(f"arguments_{number}: %json {json.dumps(schema)}")
    return "\n".join(lines) + "\n"
