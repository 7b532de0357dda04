"""How the answers of POST /v1/completions look, whole and streamed.

A prompt of ids is taken as it is; what was drawn comes back as ids with a log-probability each, the token that ended
the answer included, where return_token_ids asks for it: what a trainer needs that rolls out elsewhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from m3.serve.backend import Delta, TokenText
from m3.serve.token_schema import CompletionRequest


class CompletionShape:
    """A Shape (answers.py) of completions."""

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._choices = [_Choice(index, request) for index in range(len(request.prompts) * request.n)]

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        choice = self._choices[delta.index]
        row = choice.row(delta)
        if row["text"] or row["finish_reason"] is not None or delta.token_ids or delta.tokens or delta.prompt:
            yield {**self._head, "choices": [row]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "choices": []}

    def add(self, delta: Delta) -> None:
        self._choices[delta.index].add(delta)

    def whole(self) -> dict[str, Any]:
        return {**self._head, "choices": [choice.whole() for choice in self._choices]}


class _Choice:
    """One answer: row by row, or put together."""

    def __init__(self, index: int, request: CompletionRequest) -> None:
        self._index, self._request = index, request
        self._offset = 0  # characters told of the tokens so far
        self._deltas: list[Delta] = []

    def row(self, delta: Delta) -> dict[str, Any]:
        asked = self._request
        echoed = delta.prompt if asked.echo else None
        text = (echoed.text if echoed is not None else "") + delta.text
        row: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "finish_reason": delta.finish_reason,
            "logprobs": None,
        }
        if asked.logprobs is not None:
            told = [*(echoed.tokens if echoed is not None else ()), *(delta.tokens or ())]
            row["logprobs"] = self._logprobs(told)
        if asked.return_token_ids:
            row["token_ids"] = list(delta.token_ids)
            if delta.prompt is not None:
                row["prompt_token_ids"] = [token.id for token in delta.prompt.tokens]
        if asked.prompt_logprobs is not None and delta.prompt is not None:
            row["prompt_logprobs"] = prompt_logprobs_json(delta.prompt.tokens)
        return row

    def add(self, delta: Delta) -> None:
        self._deltas.append(delta)

    def whole(self) -> dict[str, Any]:
        deltas = self._deltas
        known = [delta.tokens for delta in deltas if delta.tokens is not None]
        return self.row(
            Delta(
                text="".join(delta.text for delta in deltas),
                finish_reason=deltas[-1].finish_reason,
                tokens=[token for tokens in known for token in tokens] if known else None,
                token_ids=[token for delta in deltas for token in delta.token_ids],
                prompt=deltas[0].prompt,
            )
        )

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += 0 if token.hidden else len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token) for token in tokens] if self._request.logprobs else None,
            "text_offset": offsets,
        }


def _top(token: TokenText) -> dict[str, float | None] | None:
    """The likeliest tokens by their text, and the token itself; of several with one text the likeliest."""
    if token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for one in (*(token.top or ()), token):
        found.setdefault(one.text, token.logprob if one.id == token.id else one.logprob)
    return found


def prompt_logprobs_json(tokens: Sequence[TokenText]) -> list[dict[str, Any] | None]:
    """vLLM's: by id, the log-probability of each token of a prompt and of the likeliest there; None for the first."""
    rows: list[dict[str, Any] | None] = []
    for token in tokens:
        found = {
            str(one.id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
            for one in (*(token.top or ()), token)
        }
        rows.append(None if token.logprob is None else found)
    return rows
