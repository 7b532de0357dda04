"""Tokens into text as they arrive: whole characters only, up to a stop string that may begin and end inside any token.

Text is held back while it could still change: bytes of a character that is not whole, and the longest end of the text
that begins a stop string. A match is decided at the character that completes it, so the text never depends on how the
tokens were grouped into deliveries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from m3.models.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
CHARACTER_TOKENS = 4  # a character of UTF-8 has at most as many bytes, and a token at least one
CONTEXT = 6  # tokens of the prompt that the first token is read after: some decoders strip a leading space


class StopMatcher:
    """How much of a stop string the text ends with, one character at a time (Knuth, Morris, Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._borders = [0] * len(stop)  # of stop[: i + 1]: its longest beginning that is also its end
        for index in range(1, len(stop)):
            border = self._borders[index - 1]
            while border and stop[border] != stop[index]:
                border = self._borders[border - 1]
            self._borders[index] = border + (stop[border] == stop[index])

    def feed(self, char: str) -> bool:
        """Whether the text now ends with the stop string. Not to be called again when it does."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        self.matched += self.stop[self.matched] == char
        return self.matched == len(self.stop)


class Detokenizer:
    """The text of one answer.

    Args:
        tokenizer: of the model.
        prompt: tokens before the answer; the last few are context and never part of the text.
        stop: non-empty strings; the text ends before the first to be complete (before the longest, if several end on
            the same character).
        skip_special_tokens: leave the tokenizer's special tokens out of the text.

    ``count`` is the number of tokens pushed; ``stopped`` says that a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._fast = tokenizer.fast
        self._skip = skip_special_tokens
        added = self._fast.get_added_tokens_decoder() if skip_special_tokens else {}
        self._special = {token for token, details in added.items() if details.special}
        self._matchers = [StopMatcher(text) for text in stop]
        context = [token for token in prompt[-CONTEXT:] if self._is_text(token)]
        self._window = [] if self._decode(context).endswith(BROKEN) else context  # tokens since a whole character
        self._shown = len(self._decode(self._window))  # characters of the window that have been read
        self._fresh = 0  # tokens of the window that have not ended on a whole character
        self._length = 0  # characters read
        self._released = 0  # of these, handed out or ready to be
        self._held = ""  # those that are not: they begin a stop string
        self._ends: deque[int] = deque()  # of each token that is not released: characters read after it
        self._covered = 0  # characters read after the last released token
        self._text: list[str] = []  # ready to be taken
        self._tokens = 0
        self.count = 0
        self.stopped = False

    def push(self, token: int) -> bool:
        """Read one token; True when it completes a stop string. Nothing may be pushed after that."""
        assert not self.stopped, "the text has ended"
        self.count += 1
        text = self._whole_characters(token)
        self._ends.append(self._length + len(text))
        return self._read(text)

    def finish(self) -> bool:
        """The answer is over: release everything; True if the last characters complete a stop string."""
        if self.stopped:
            return True
        text = self._decode(self._window)[self._shown :]
        self._window, self._shown, self._fresh = [], 0, 0
        if self._ends:
            self._ends[-1] += len(text)
        if not self._read(text):
            self._release(self._length)
            self._tokens += len(self._ends)
            self._ends.clear()
        return self.stopped

    def take(self) -> tuple[str, int]:
        """(text, number of tokens) released since the last call; the tokens are those that the text needs."""
        text, tokens = "".join(self._text), self._tokens
        self._text.clear()
        self._tokens = 0
        return text, tokens

    def _is_text(self, token: int) -> bool:
        return token not in self._special and self._fast.id_to_token(token) is not None

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._fast.decode(tokens, skip_special_tokens=self._skip)
        return text

    def _whole_characters(self, token: int) -> str:
        """The characters that are certain now that this token has come."""
        if not self._is_text(token):
            return ""
        self._window.append(token)
        self._fresh += 1
        whole = self._decode(self._window)
        if whole.endswith(BROKEN):
            # Some decoders write one sign for each byte of a character that is not whole, others one for all of them.
            certain = len(whole.rstrip(BROKEN)) if self._fresh < CHARACTER_TOKENS else len(whole) - 1
            text = whole[self._shown : certain]
            self._shown = max(self._shown, certain)
            return text
        text = whole[self._shown :]
        self._window = self._window[-self._fresh :]
        self._fresh = 0
        self._shown = len(self._decode(self._window))
        return text

    def _read(self, text: str) -> bool:
        start = self._length
        self._held += text
        self._length += len(text)
        for position, char in enumerate(text, start + 1) if self._matchers else ():
            found = [len(matcher.stop) for matcher in self._matchers if matcher.feed(char)]
            if found:
                self.stopped = True
                self._release(position - max(found))
                return True
        self._release(self._length - max((matcher.matched for matcher in self._matchers), default=0))
        if not self._matchers:  # no token can be taken back
            self._tokens += len(self._ends)
            self._ends.clear()
        return False

    def _release(self, length: int) -> None:
        """Hand out the text up to this many characters, and the tokens that it needs."""
        piece = self._held[: length - self._released]
        if piece:
            self._text.append(piece)
        self._held = self._held[length - self._released :]
        self._released = length
        while self._covered < length and self._ends:
            self._covered = self._ends.popleft()
            self._tokens += 1
