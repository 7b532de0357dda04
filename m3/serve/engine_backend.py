"""An engine behind the server: deltas as tokens are drawn, usage with the prompt tokens that were in the cache."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from m3.engine.engine import AsyncEngine, EngineBusy, EngineClosed, EngineDead, Stats
from m3.engine.outputs import Output, TopLogprobs
from m3.engine.request import SamplingParams, choices
from m3.models.tokenizer import Tokenizer
from m3.rollout.chat import Usage
from m3.serve.backend import Delta, PromptText, TokenText
from m3.serve.chat_schema import ChatRequest
from m3.serve.embeddings import EmbeddingRequest
from m3.serve.merging import merged
from m3.serve.reading import AnswerReader
from m3.serve.reasoning import CLOSE, OPEN
from m3.serve.sampling import argument, grammar_of, sampling_params
from m3.serve.schema import RequestError, Sampling
from m3.serve.token_schema import CompletionRequest, DetokenizeRequest, TokenizeRequest, WeightsRequest
from m3kernels.checks import refuse

if TYPE_CHECKING:
    from m3.text.embed import Embedder

MAX_TOKENS = 1024  # of an answer whose request does not say; ours
TIMEOUT = 600.0  # seconds of a request, waiting included; ours
DRAIN = 30.0  # seconds for which requests under way may go on at the end; ours
FAILURES = (ValueError, EngineBusy, EngineClosed, EngineDead)


class EngineBackend:
    """A ChatBackend, TokenBackend, CountedBackend and EmbeddingBackend of one model.

    Args:
        engine: not started yet; lifespan() starts it and shuts it down.
        name: what clients call the model.
        max_tokens: of an answer whose request does not say.
        timeout: seconds of a request; then it ends with status 504.
        weights_from: folder under which checkpoints lie whose weights a client may put in; None: none may.
        embedder: of /v1/embeddings; None: nothing embeds.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        name: str,
        *,
        max_tokens: int = MAX_TOKENS,
        timeout: float = TIMEOUT,
        weights_from: str | Path | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        if engine.tokenizer is None or engine.tokenizer.template is None:
            raise refuse("EngineBackend", "engine", "one whose tokenizer has a chat template", "one without")
        self.engine = engine
        self.tokenizer: Tokenizer = engine.tokenizer
        self._name = name
        self._max_tokens = max_tokens
        self._timeout = timeout
        self._weights_from = None if weights_from is None else Path(weights_from).resolve()
        self._version = 0
        self._embedder = embedder
        self._spelled: dict[int, TokenText] = {}
        template = engine.tokenizer.template
        self._takes_tools = "tools" in template
        tags = [self.tokenizer.fast.token_to_id(tag) for tag in (OPEN, CLOSE, "<tool_call>", "</tool_call>")]
        self._skip_special = not any(self.tokenizer.is_special(tag) for tag in tags if tag is not None)

    def models(self) -> Sequence[str]:
        return (self._name,)

    def failure(self) -> str | None:
        stats = self.engine.stats()
        return None if stats.state == "running" else f"engine {stats.state}"

    def stats(self) -> Stats:
        return self.engine.stats()

    @property
    def max_context(self) -> int:
        config = getattr(self.engine.core, "config", None)
        return int(getattr(config, "max_context", None) or 0)

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        await self.engine.start()
        try:
            yield
        finally:
            await self.engine.shutdown(timeout=DRAIN)

    # -- chats --------------------------------------------------------------------------------------------------------
    async def stream(self, request: ChatRequest) -> AsyncGenerator[Delta]:
        """As ChatBackend.stream.

        Raises:
            RequestError: 400: no message, a prompt or a parameter that the engine cannot take; 503: it is full or
                closed; 504: the time is over; 500: it failed.
        """
        if not request.messages:
            raise RequestError(400, "messages: want one or more", param="messages")
        if request.usable_tools and not self._takes_tools:
            raise RequestError(400, "tools: want none: this model's chat template takes none", param="tools")
        try:
            prompt, inside, params = await asyncio.to_thread(self._ask, request)  # long where the prompt is
            readers = [AnswerReader(inside=inside, tools=bool(request.usable_tools)) for _ in range(request.n)]
            drawn = [_Reasoned(self.tokenizer) for _ in range(request.n)]
            asked = choices(params, request.n)
            streams = [self.engine.generate(prompt, one, skip_special_tokens=self._skip_special) for one in asked]
            async with contextlib.aclosing(merged(streams)) as outputs:
                async for index, output in outputs:
                    _check_reason(output)
                    reader = readers[index]
                    read = reader.push(output.text, last=output.finish_reason is not None)
                    reason = output.finish_reason
                    yield Delta(
                        text=read.content,
                        finish_reason="tool_calls" if reason == "stop" and reader.called else reason,
                        usage=_usage(output, drawn[index].count(output.tokens, reader)),
                        index=index,
                        reasoning=read.reasoning,
                        calls=read.calls,
                        tokens=self._texts(output.tokens, output.logprobs, output.top_logprobs),
                        prompt=self._prompt_text(prompt, output) if output.prompt_logprobs is not None else None,
                    )
        except FAILURES as error:
            raise _told(error, "messages", request) from error

    def _ask(self, request: ChatRequest) -> tuple[list[int], bool, SamplingParams]:
        """(prompt, whether it ends inside <think>, parameters)."""
        tools = [tool.model_dump(exclude_none=True) for tool in request.usable_tools]
        variables: dict[str, Any] = {**(request.chat_template_kwargs or {}), **({"tools": tools} if tools else {})}
        text, prompt = self.tokenizer.chat_prompt(request.for_template(), **variables)
        grammar = grammar_of(request, self.engine.grammars if _wants_grammar(request) else None)
        inside = text.rstrip().endswith(OPEN)
        if inside and grammar is not None:  # the grammar is the content's: there is no reasoning
            prompt = [*prompt, *self.tokenizer.encode(f"\n{CLOSE}\n\n", special_tokens=False)]
            inside = False
        params = sampling_params(
            request,
            max_tokens=request.limit or max(self._max_tokens, request.min_tokens),
            timeout=self._timeout,
            logprobs=request.logprobs,
            top_logprobs=request.top_logprobs or 0,
            prompt_logprobs=request.prompt_logprobs,
            grammar=grammar,
        )
        return prompt, inside, params

    # -- completions --------------------------------------------------------------------------------------------------
    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Delta]:
        """As TokenBackend.complete. The token that ended the answer is one of its ids where these were asked for."""
        try:
            prompts, params = await asyncio.to_thread(self._ask_completion, request)
            asked = choices(params, request.n)
            streams = [self.engine.generate(prompt, one) for prompt in prompts for one in asked]
            tells = request.echo or request.return_token_ids or request.prompt_logprobs is not None
            late = params.prompt_logprobs  # the prompt is told with the output that has them
            told: set[int] = set()
            async with contextlib.aclosing(merged(streams)) as outputs:
                async for index, output in outputs:
                    _check_reason(output)
                    shown = None
                    if tells and index not in told and (not late or output.prompt_logprobs is not None):
                        told.add(index)
                        given = request.prompts[index // request.n]
                        shown = self._prompt_text(prompts[index // request.n], output, given)
                    yield self._completion_delta(request, index, output, shown)
        except FAILURES as error:
            raise _told(error, "prompt", request) from error

    def _ask_completion(self, request: CompletionRequest) -> tuple[list[list[int]], SamplingParams]:
        prompts = [self.tokenizer.encode(each) if isinstance(each, str) else each for each in request.prompts]
        wanted = request.prompt_logprobs
        if request.echo and request.logprobs is not None:
            wanted = max(wanted or 0, request.logprobs)
        return prompts, sampling_params(
            request,
            max_tokens=max(1, request.max_tokens),
            timeout=self._timeout,
            logprobs=request.logprobs is not None,
            top_logprobs=request.logprobs or 0,
            prompt_logprobs=wanted,
            keep_end=request.return_token_ids,
            grammar=grammar_of(request, self.engine.grammars if _wants_grammar(request) else None),
        )

    def _completion_delta(
        self, request: CompletionRequest, index: int, output: Output, prompt: PromptText | None
    ) -> Delta:
        silent = request.max_tokens == 0  # the engine drew a token, which nobody asked for
        tokens = self._texts(output.tokens, output.logprobs, output.top_logprobs)
        usage = _usage(output)
        return Delta(
            text="" if silent else output.text,
            finish_reason="length" if silent and output.finish_reason else output.finish_reason,
            usage=Usage(**{**vars(usage), "completion_tokens": 0}) if silent else usage,
            index=index,
            tokens=[] if silent and tokens is not None else tokens,
            token_ids=output.tokens if request.return_token_ids and not silent else (),
            prompt=prompt,
        )

    # -- tokens -------------------------------------------------------------------------------------------------------
    async def tokenize(self, request: TokenizeRequest) -> Sequence[int]:
        """As TokenBackend.tokenize."""
        try:
            return await asyncio.to_thread(self._tokenize, request)
        except ValueError as error:
            raise _told(error, "messages", request) from error

    def _tokenize(self, request: TokenizeRequest) -> list[int]:
        if request.prompt is not None:
            return self.tokenizer.encode(request.prompt, special_tokens=request.add_special_tokens)
        variables = dict(request.chat_template_kwargs or {})
        if request.tools:
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        rows, more = request.for_template(), request.add_generation_prompt
        return self.tokenizer.chat(rows, add_generation_prompt=more, **variables)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """As TokenBackend.detokenize."""
        most = self.tokenizer.vocab_size
        if any(token >= most for token in request.tokens):
            raise RequestError(400, f"tokens: want ids below {most}", param="tokens")
        text: str = await asyncio.to_thread(self.tokenizer.fast.decode, request.tokens, skip_special_tokens=False)
        return text

    def spell(self, token: int) -> TokenText:
        """As TokenBackend.spell."""
        found = self._spelled.get(token)
        if found is None:
            text: str = self.tokenizer.fast.decode([token], skip_special_tokens=False)
            found = self._spelled[token] = TokenText(
                id=token, text=text, raw=self.tokenizer.token_bytes(token), hidden=self.tokenizer.is_special(token)
            )
        return found

    def _text(
        self, token: int, logprob: float | None = None, top: TopLogprobs | None = None, rank: int | None = None
    ) -> TokenText:
        spelled = self.spell(token)
        if top is not None and rank is None:
            rank = next((place for place, (one, _) in enumerate(top, 1) if one == token), None)
        likely = None if top is None else [self._text(one, value, rank=n) for n, (one, value) in enumerate(top, 1)]
        return dataclasses.replace(spelled, logprob=logprob, rank=rank, top=likely)

    def _texts(
        self, tokens: list[int], logprobs: list[float] | None, top: list[TopLogprobs] | None
    ) -> list[TokenText] | None:
        if logprobs is None:
            return None
        rows: Sequence[TopLogprobs | None] = [None] * len(tokens) if top is None else top
        return [self._text(*each) for each in zip(tokens, logprobs, rows, strict=True)]

    def _prompt_text(self, prompt: list[int], output: Output, given: str | list[int] | None = None) -> PromptText:
        text: str = given if isinstance(given, str) else self.tokenizer.fast.decode(prompt, skip_special_tokens=False)
        if output.prompt_logprobs is None:
            return PromptText(text=text, tokens=[self.spell(token) for token in prompt])
        rest = self._texts(prompt[1:], output.prompt_logprobs, output.prompt_top_logprobs)
        assert rest is not None, "there are log-probabilities"
        return PromptText(text=text, tokens=[self.spell(prompt[0]), *rest])

    # -- embeddings ---------------------------------------------------------------------------------------------------
    def embedding_models(self) -> Sequence[str]:
        return () if self._embedder is None else (self._embedder.name,)

    async def embed(self, request: EmbeddingRequest) -> Sequence[Sequence[float]]:
        """As EmbeddingBackend.embed."""
        assert self._embedder is not None, "one of embedding_models()"
        rows = await asyncio.to_thread(self._embedder, request.texts)
        return [[float(number) for number in row] for row in rows]

    # -- weights ------------------------------------------------------------------------------------------------------
    async def update(self, request: WeightsRequest) -> int:
        """As TokenBackend.update. Requests under way go on with the new weights.

        A version that is a number is told with each token of the engine; without one it is counted.
        """
        if self._weights_from is None:
            raise RequestError(403, "this server takes no weights: start it with --weights-from", code="forbidden")
        try:
            folder = Path(request.model_path).resolve()
        except ValueError as error:  # a NUL
            raise RequestError(400, "model_path: want a path", param="model_path") from error
        if not folder.is_relative_to(self._weights_from):
            raise RequestError(403, "model_path: want a folder where weights may come from", param="model_path")
        said = request.weight_version or ""
        version = int(said) if said.isdecimal() else self._version + 1
        try:
            tensors = await asyncio.to_thread(lambda: dict(_tensors(folder)))
            await self.engine.update_weights(tensors, version)
        except (ValueError, EngineBusy, EngineClosed, EngineDead) as error:
            raise _told(error) from error
        self._version = version
        return version


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a checkpoint's safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise refuse("serve", "model_path", "a folder with *.safetensors", "none there")
    for file in files:
        try:
            yield from load_file(file).items()
        except SafetensorError as error:
            raise refuse("serve", "model_path", "whole safetensors files", f"{file.name}: {error}") from error


class _Reasoned:
    """How many of an answer's tokens are reasoning: those up to the first that completes </think>."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] | None = []
        self._count = 0

    def count(self, tokens: list[int], reader: AnswerReader) -> int:
        """After these tokens."""
        if self._tokens is None:
            return self._count
        self._tokens += tokens
        match reader.state:
            case "start":
                return 0
            case "inside":
                return len(self._tokens)
        low, high = 0, len(self._tokens) if reader.reasoned else 0
        while low < high:
            middle = (low + high) // 2
            text = self._tokenizer.fast.decode(self._tokens[:middle], skip_special_tokens=False)
            low, high = (low, middle) if CLOSE in text else (middle + 1, high)
        self._count, self._tokens = low, None
        return low


def _wants_grammar(request: Sampling) -> bool:
    """Not to load what compiles grammars without need."""
    if request.structured_outputs is not None:
        return True
    if not isinstance(request, ChatRequest):
        return False
    forced = request.tool_choice not in (None, "none", "auto")
    return forced or (request.response_format is not None and request.response_format.type != "text")


def _usage(output: Output, reasoning: int | None = None) -> Usage:
    told = output.usage
    return Usage(
        prompt_tokens=told.prompt_tokens,
        completion_tokens=told.completion_tokens,
        cached_tokens=told.cached_tokens,
        reasoning_tokens=reasoning,
        accepted_tokens=told.accepted_tokens,
        rejected_tokens=told.drafted_tokens - told.accepted_tokens,
    )


def _told(error: Exception, prompt: str = "messages", request: object = None) -> RequestError:
    """What a client is told of it. ``prompt``: how the API calls a prompt."""
    if isinstance(error, ValueError):
        fields = getattr(type(request), "model_fields", WeightsRequest.model_fields)
        return RequestError(400, str(error), param=argument(error, prompt, fields))
    if isinstance(error, EngineDead):
        return RequestError(500, "the engine failed", code="engine_failed")
    return RequestError(503, "the engine takes no request now", code="overloaded", headers={"Retry-After": "1"})


def _check_reason(output: Output) -> None:
    match output.finish_reason:
        case "deadline":
            raise RequestError(504, "the time of a request is over", code="timeout")
        case "abort":
            raise RequestError(503, "the server is shutting down", code="aborted")
        case "error" if (output.error or "").startswith("grammar: "):  # it passed a limit on the way
            raise RequestError(400, str(output.error)[:500], code="grammar_failed")
        case "error":
            raise RequestError(500, "the engine failed", code="engine_failed")
