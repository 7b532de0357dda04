"""Splits an answer into reasoning and content where it comes as <think> reasoning </think> content.

An answer is inside from its start where the chat template opened the tag; otherwise where it begins with the tag. A tag
may come in any number of pieces: text that could still become one is held back. Space around the tags is dropped.
"""

from __future__ import annotations

from typing import Literal

OPEN, CLOSE = "<think>", "</think>"


def held(text: str, tag: str) -> int:
    """Characters at the end of a text that could begin the tag, and do not complete it."""
    longest = min(len(text), len(tag) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(tag[:size])), 0)


class ReasoningSplitter:
    """One answer. ``inside``: the prompt ended with an open tag."""

    def __init__(self, *, inside: bool) -> None:
        self.state: Literal["start", "inside", "content"] = "inside" if inside else "start"
        self.reasoned = inside
        self._held = ""
        self._strip = inside  # space at the beginning of what comes next is dropped

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that are certain now."""
        self._held += text
        reasoning = content = ""
        if self.state == "start":
            self._begin()
        if self.state == "inside":
            reasoning = self._reason()
        if self.state == "content":
            content = self._take(len(self._held))
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """(reasoning, content) that were held back; nothing comes any more."""
        rest, self._held = self._held, ""
        if self.state == "inside":
            return rest.lstrip() if self._strip else rest, ""
        return "", rest

    def _begin(self) -> None:
        word = self._held.lstrip()
        if word.startswith(OPEN):
            self._held = word[len(OPEN) :]
            self.state, self.reasoned, self._strip = "inside", True, True
        elif not OPEN.startswith(word):
            self.state = "content"

    def _reason(self) -> str:
        before, closed, after = self._held.partition(CLOSE)
        if closed:
            reasoning = self._take(len(before)).rstrip()
            self._held = after
            self.state, self._strip = "content", True
            return reasoning
        certain = self._held[: len(self._held) - held(self._held, CLOSE)]
        return self._take(len(certain.rstrip()))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        if self._strip:
            taken = taken.lstrip()
            self._strip = not taken
        return taken
