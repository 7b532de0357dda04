"""What a caller gets of a request: pieces as they come (Output) or the whole (Completion), made of a core's events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from m3.engine.detokenizer import Detokenizer
from m3.engine.request import PromptLogprobs, Reason, Request, SamplingParams, Tokens
from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

TopLogprobs = list[tuple[int, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of a request so far. completion_tokens: drawn for it, up to the one that completed a stop string;
    cached_tokens: of the prompt, found in the cache. drafted_tokens: nodes of the draft's trees that were verified for
    it; accepted_tokens: those that became tokens of it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What is new of a request since its last Output.

    text, tokens: to be appended to what came before. With stop strings, tokens are those that the text needs.
    logprobs, top_logprobs: of these tokens, nats; None if not asked for. versions: of the weights, one per token.
    prompt_logprobs, prompt_top_logprobs: of prompt[1:]; in one Output of the request, if asked for.
    seed: that the request is drawn with.
    finish_reason: None but in the last Output; error: what went wrong, where the reason is "error".
    """

    request_id: str
    text: str
    tokens: list[int]
    versions: list[int]
    logprobs: list[float] | None
    top_logprobs: list[TopLogprobs] | None
    prompt_logprobs: list[float] | None
    finish_reason: Reason | None
    error: str | None
    seed: int
    usage: Usage
    prompt_top_logprobs: list[TopLogprobs] | None = None

    @property
    def version(self) -> int | None:
        """Of the weights that drew the last of these tokens."""
        return self.versions[-1] if self.versions else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole request; the fields are those of Output."""

    request_id: str
    prompt: list[int]
    text: str
    tokens: list[int]
    versions: list[int]
    logprobs: list[float] | None
    top_logprobs: list[TopLogprobs] | None
    prompt_logprobs: list[float] | None
    finish_reason: Reason
    error: str | None
    seed: int
    usage: Usage
    prompt_top_logprobs: list[TopLogprobs] | None = None

    @classmethod
    def of(cls, prompt: list[int], outputs: Iterable[Output]) -> Completion:
        """All the outputs of a request, the last one included, put together."""
        pieces = list(outputs)
        last = pieces[-1]
        assert last.finish_reason is not None, "the last output has a finish_reason"
        logprobs = None if last.logprobs is None else [each for piece in pieces for each in piece.logprobs or ()]
        top = None if last.top_logprobs is None else [each for piece in pieces for each in piece.top_logprobs or ()]
        return cls(
            request_id=last.request_id,
            prompt=prompt,
            text="".join(piece.text for piece in pieces),
            tokens=[token for piece in pieces for token in piece.tokens],
            versions=[version for piece in pieces for version in piece.versions],
            logprobs=logprobs,
            top_logprobs=top,
            prompt_logprobs=next((p.prompt_logprobs for p in pieces if p.prompt_logprobs is not None), None),
            finish_reason=last.finish_reason,
            error=last.error,
            seed=last.seed,
            usage=last.usage,
            prompt_top_logprobs=next(
                (p.prompt_top_logprobs for p in pieces if p.prompt_top_logprobs is not None), None
            ),
        )


class _Drawn(NamedTuple):
    token: int
    version: int
    logprob: float
    top: TopLogprobs


class Assembly:
    """The events of one request, made into outputs. What is not taken is merged: there is never more than one waiting.

    Raises:
        ValueError: stop strings without a tokenizer.
    """

    def __init__(
        self, request: Request, tokenizer: Tokenizer | None, *, request_id: str, skip_special_tokens: bool = True
    ) -> None:
        params = request.params
        if tokenizer is None and params.stop:
            raise refuse("engine", "stop", "no stop strings where there is no tokenizer", repr(params.stop)[:200])
        self.request = request
        self.request_id = request_id
        self.finish_reason: Reason | None = None
        self.error: str | None = None
        self._cached_tokens = 0
        self._detokenizer = (
            None
            if tokenizer is None
            else Detokenizer(
                tokenizer, prompt=request.prompt, stop=params.stop, skip_special_tokens=skip_special_tokens
            )
        )
        self._drawn: list[_Drawn] = []  # not taken yet; the last of them may be held back
        self._ready = 0  # of these, that may be taken
        self._text: list[str] = []
        self._prompt_logprobs: list[float] | None = None
        self._prompt_top: list[TopLogprobs] | None = None
        self._completion_tokens = 0
        self._drafted_tokens = 0
        self._accepted_tokens = 0

    @property
    def has_output(self) -> bool:
        """Whether there is something to take."""
        return bool(self._ready or self._text or self._prompt_logprobs is not None or self.finish_reason)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt),
            completion_tokens=self._completion_tokens,
            cached_tokens=self._cached_tokens if self.finish_reason else self.request.cached,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
        )

    def add_tokens(self, event: Tokens) -> bool:
        """Whether a stop string is now complete, which ends the answer; tokens after it are dropped."""
        assert self.finish_reason is None, "the answer is over"
        params = self.request.params
        count = len(event.tokens)
        logprobs = [0.0] * count if params.logprobs == "none" else event.logprobs
        top = [[]] * count if params.top_logprobs == 0 else event.top_logprobs
        assert logprobs is not None and top is not None, "the core gives the log-probabilities that were asked for"
        before = self._completion_tokens
        stopped = False
        for token, logprob, best in zip(event.tokens, logprobs, top, strict=True):
            self._drawn.append(_Drawn(token, event.version, logprob, best))
            self._completion_tokens += 1
            if self._detokenizer is None:
                self._ready += 1
            elif self._detokenizer.push(token):
                stopped = True
                break
        self._drafted_tokens += event.drafted
        self._accepted_tokens += min(event.accepted, self._completion_tokens - before)
        if self._detokenizer is not None:
            self._take_text(self._detokenizer)
        if stopped:
            del self._drawn[self._ready :]
            self._finish("stop")
        return stopped

    def add_prompt_logprobs(self, event: PromptLogprobs) -> None:
        assert self.finish_reason is None, "the answer is over"
        self._prompt_logprobs = list(event.logprobs)
        self._prompt_top = None if event.top_logprobs is None else list(event.top_logprobs)

    def finish(
        self, reason: Reason, *, error: str | None = None, cached_tokens: int | None = None, drafted: int = 0
    ) -> None:
        """The request is over: release what was held back. Does nothing where it was over already."""
        if self.finish_reason is not None:
            return
        self._drafted_tokens += drafted
        if self._detokenizer is not None:
            stopped = self._detokenizer.finish()
            self._take_text(self._detokenizer)
            if stopped:
                del self._drawn[self._ready :]
                reason = "stop" if reason == "length" else reason
        self._finish(reason, error, cached_tokens)

    def take(self) -> Output:
        """Everything since the last call."""
        drawn, text = self._drawn[: self._ready], "".join(self._text)
        del self._drawn[: self._ready]
        self._ready = 0
        self._text.clear()
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        prompt_top, self._prompt_top = self._prompt_top, None
        params: SamplingParams = self.request.params
        return Output(
            request_id=self.request_id,
            text=text,
            tokens=[each.token for each in drawn],
            versions=[each.version for each in drawn],
            logprobs=None if params.logprobs == "none" else [each.logprob for each in drawn],
            top_logprobs=None if params.top_logprobs == 0 else [each.top for each in drawn],
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.finish_reason,
            error=self.error,
            seed=self.request.seed,
            usage=self.usage,
            prompt_top_logprobs=prompt_top,
        )

    def _take_text(self, detokenizer: Detokenizer) -> None:
        text, tokens = detokenizer.take()
        self._ready += tokens
        if text:
            self._text.append(text)

    def _finish(self, reason: Reason, error: str | None = None, cached_tokens: int | None = None) -> None:
        self.finish_reason = reason
        self.error = error
        self._cached_tokens = self.request.cached if cached_tokens is None else cached_tokens
