"""How the answers of POST /v1/chat/completions look, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from m3.serve.backend import CallDelta, Delta, TokenText
from m3.serve.chat_schema import ChatRequest
from m3.serve.completions import prompt_logprobs_json


class ChatShape:
    """A Shape (answers.py) of chats."""

    def __init__(self, request: ChatRequest) -> None:
        self._request = request
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        self._choices = [_Choice(index) for index in range(request.n)]
        self._begun: set[int] = set()
        self._prompt: Sequence[TokenText] | None = None

    def chunks(self, delta: Delta) -> Iterator[dict[str, Any]]:
        first = delta.index not in self._begun
        self._begun.add(delta.index)
        row: dict[str, Any] = {"role": "assistant"} if first else {}
        if delta.reasoning:
            row["reasoning_content"] = delta.reasoning
        if delta.text or (first and not delta.reasoning and not delta.calls):
            row["content"] = delta.text
        if delta.calls:
            row["tool_calls"] = [_call_chunk(call) for call in delta.calls]
        if row or delta.tokens:
            yield self._chunk(delta.index, row, _logprobs(delta.tokens))
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, None, delta.finish_reason)

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": []}

    def add(self, delta: Delta) -> None:
        self._choices[delta.index].add(delta)
        if delta.prompt is not None and self._prompt is None:
            self._prompt = delta.prompt.tokens

    def whole(self) -> dict[str, Any]:
        logprobs = self._request.logprobs
        row = {
            **self._head,
            "object": "chat.completion",
            "choices": [choice.to_json(logprobs) for choice in self._choices],
        }
        if self._prompt is not None and self._request.prompt_logprobs is not None:
            row["prompt_logprobs"] = prompt_logprobs_json(self._prompt)
        return row


class _Choice:
    """One answer, put together."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._tokens: list[TokenText] = []
        self._finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self._tokens += delta.tokens or ()
        self._finish_reason = delta.finish_reason or self._finish_reason
        for call in delta.calls:
            if call.index not in self._calls:
                function = {"name": call.name, "arguments": ""}
                self._calls[call.index] = {"id": call.id, "type": "function", "function": function}
            self._calls[call.index]["function"]["arguments"] += call.arguments

    def to_json(self, logprobs: bool) -> dict[str, Any]:
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := "".join(self._reasoning):
            message["reasoning_content"] = reasoning
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
            message["content"] = text or None
        told = _logprobs(self._tokens) if logprobs else None
        return {"index": self._index, "message": message, "logprobs": told, "finish_reason": self._finish_reason}


def _call_chunk(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _logprobs(tokens: Sequence[TokenText] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    rows = [{**_token(token), "top_logprobs": [_token(one) for one in token.top or ()]} for token in tokens]
    return {"content": rows, "refusal": None}


def _token(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
