"""A request's parameters as the engine takes them, and its grammar."""

from __future__ import annotations

import json
from typing import Any

from m3.engine.grammars import Grammar, Grammars
from m3.engine.request import SamplingParams
from m3.serve.chat_schema import ChatRequest, JsonObjectFormat, JsonSchemaFormat, TextFormat
from m3.serve.schema import RequestError, Sampling, StructuredOutputs
from m3.serve.tool_calls import forced


def sampling_params(
    request: Sampling,
    *,
    max_tokens: int,
    timeout: float,
    logprobs: bool,
    top_logprobs: int = 0,
    prompt_logprobs: int | None = None,
    keep_end: bool = False,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """Raises ValueError: a parameter that the engine does not take."""
    return SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        frequency_penalty=request.frequency_penalty,
        presence_penalty=request.presence_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.biases,
        seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop=request.stops,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        keep_end=keep_end,
        logprobs="raw" if logprobs else "none",
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs is not None,
        top_prompt_logprobs=prompt_logprobs or 0,
        grammar=grammar,
        deadline=timeout,
    )


def grammar_of(request: Sampling, grammars: Grammars | None) -> Grammar | None:
    """What the answer is held to; compiles, which can take a while.

    Raises:
        RequestError: 400: a schema, a pattern or a grammar that cannot be compiled.
    """
    if grammars is None:
        return None
    try:
        if request.structured_outputs is not None:
            param = "structured_outputs"
            return _structured(request.structured_outputs, grammars)
        if not isinstance(request, ChatRequest):
            return None
        if request.tool_choice not in (None, "none", "auto"):
            param = "tools"
            several = request.parallel_tool_calls is not False
            return grammars.ebnf(forced(request.usable_tools, request.tool_choice, parallel=several))
        param = "response_format"
        match request.response_format:
            case JsonSchemaFormat():
                return grammars.json_schema(request.response_format.json_schema.schema_)
            case JsonObjectFormat():
                return grammars.json_object()
            case TextFormat() | None:
                return None
    except ValueError as error:
        raise RequestError(400, f"{param}: {error}", param=param) from error


def _structured(asked: StructuredOutputs, grammars: Grammars) -> Grammar:
    if asked.json_ is not None:
        return grammars.json_schema(asked.json_)
    if asked.regex is not None:
        return grammars.regex(asked.regex)
    if asked.choice is not None:
        return grammars.ebnf("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in asked.choice))
    assert asked.grammar is not None, "one of the four"
    return grammars.ebnf(asked.grammar)


def argument(error: ValueError, prompt: str, fields: Any) -> str | None:
    """The argument's name in "op: argument: want ...", as the API calls it; ``prompt``: how it calls a prompt."""
    parts = str(error).split(": ")
    named = parts[1] if len(parts) > 2 else ""
    if named in ("prompt", "messages", "chat_template"):
        return prompt
    named = {"top_prompt_logprobs": "prompt_logprobs"}.get(named, named)
    return named if named in fields else None
