"""The bodies of the endpoints of tokens: completions, tokenize and detokenize, new weights."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from m3.serve.chat_schema import Message, Tool, check_variables, rows_for_template
from m3.serve.schema import MAX_TOP, RequestError, Sampling, Strict, Token

MAX_PROMPTS = 256  # of one request; ours

PromptTokens = Annotated[list[Token], pydantic.Field(min_length=1)]
PromptText = Annotated[str, pydantic.Field(min_length=1)]


class CompletionRequest(Sampling):
    """The body of POST /v1/completions; defaults are OpenAI's.

    A prompt of text is encoded with the tokenizer's special tokens, whose names in it are those tokens: whoever writes
    a raw prompt writes the control tokens too. A prompt of ids is taken as it is.
    """

    prompt: (
        PromptText
        | PromptTokens
        | Annotated[list[PromptText], pydantic.Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[PromptTokens], pydantic.Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    """One or several; choices of prompt p are p * n to p * n + n - 1."""
    max_tokens: Annotated[int, pydantic.Field(ge=0, lt=2**31)] = 16
    """0: with echo or prompt_logprobs, to see the prompt."""
    logprobs: Annotated[int, pydantic.Field(ge=0, le=MAX_TOP)] | None = None
    """The log-probability of each token, under softmax(logits), and of so many likeliest ones."""
    echo: bool = False
    """The answer begins with the prompt."""
    return_token_ids: bool = False
    """Tell the ids of prompt and answer, with the token that ended it. vLLM's."""

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each alone."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(400, "max_tokens: want at least 1 without echo or prompt_logprobs", param="max_tokens")


class TokenizeRequest(Strict):
    """The body of POST /tokenize: a prompt, or messages. vLLM's."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    """Of a prompt: those that the model's tokenizer adds."""
    add_generation_prompt: bool = True
    """Of messages: what the template writes before an answer."""
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("want one of prompt, messages")
        return self

    def check(self) -> None:
        """As Sampling.check."""
        check_variables(self.chat_template_kwargs)

    def for_template(self) -> list[dict[str, Any]]:
        return rows_for_template(self.messages or [])


class DetokenizeRequest(Strict):
    """The body of POST /detokenize. vLLM's."""

    model: str | None = None
    tokens: list[Token]


class WeightsRequest(Strict):
    """The body of POST /update_weights_from_disk; load_format is taken and not used. SGLang's."""

    model_path: str
    weight_version: Annotated[str, pydantic.Field(max_length=64)] | None = None
    load_format: str | None = None
