"""Keeps what people wrote in a chat from being read as control tokens.

A chat template writes control tokens as text ("<|im_start|>"), and the tokenizer finds them again, in the template's
words as in everybody else's. So the special tokens' text in messages is replaced by a placeholder before the template
is rendered, and put back after the rendered text was cut at the control tokens that the template itself wrote: what
stands between two of these is encoded without any. Placeholders are digits that nobody can guess, drawn anew for each
rendering: templates that strip, split or escape text leave them whole.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from typing import Any

DIGITS = 32  # of the unguessable part
PLACES = 3  # of the number of a special token


class Placeholders:
    """Of one rendering. ``specials``: texts of special tokens, at most 1000."""

    def __init__(self, specials: Iterable[str]) -> None:
        self._texts = sorted(specials, key=lambda text: (-len(text), text))  # the longest first: it is found first
        self._number = {text: number for number, text in enumerate(self._texts)}
        self._secret = "".join(secrets.choice("0123456789") for _ in range(DIGITS))
        self._special = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._hidden = re.compile(self._secret + rf"([0-9]{{{PLACES}}})")
        self.mark = "".join(secrets.choice("0123456789") for _ in range(DIGITS))  # stands for a whole message

    def hide(self, value: Any, key: str | None = None) -> Any:
        """The same value, special tokens' texts replaced in all its strings but a message's role."""
        if isinstance(value, str):
            return value if key == "role" else self._special.sub(self._replace, value)
        if isinstance(value, dict):
            return {self.hide(name): self.hide(each, name) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(each) for each in value]
        return value

    def _replace(self, match: re.Match[str]) -> str:
        return f"{self._secret}{self._number[match[0]]:0{PLACES}d}"

    def show(self, text: str) -> str:
        """The text as it was written."""
        return self._hidden.sub(lambda match: self._texts[int(match[1])], text)

    def has(self, text: str) -> bool:
        """Whether there is a placeholder in it."""
        return self._secret in text
