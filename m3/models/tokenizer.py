"""A model's tokenizer and chat template, read from tokenizer.json and tokenizer_config.json without transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from m3.checkpoint import read_json
from m3kernels.checks import refuse

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"


class Tokenizer:
    """encode, decode, stream and chat.

    Raises:
        ValueError: a file is missing or malformed; a chat template that fails.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / TOKENIZER
        if not path.is_file():
            raise refuse("tokenizer", str(path), "a file", "none")
        try:
            self.fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise refuse("tokenizer", str(path), "a tokenizer of the tokenizers library", f"{error}"[:200]) from error
        settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        self.special = {
            key: _content(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        template = settings.get("chat_template")
        if (folder / TEMPLATE).is_file():
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
        self.template = template if isinstance(template, str) else None

    @property
    def vocab_size(self) -> int:
        return self.fast.get_vocab_size()

    @property
    def eos_token_id(self) -> int | None:
        token = self.special["eos_token"]
        return None if token is None else self.fast.token_to_id(token)

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids; ``special_tokens``: with what the model's post-processor adds (a BOS token, for some)."""
        return self.fast.encode(text, add_special_tokens=special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        return self.fast.decode(list(tokens), skip_special_tokens=True)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens arrive; a piece ends on a whole character."""
        decoder = DecodeStream(skip_special_tokens=True)
        for token in tokens:
            piece = decoder.step(self.fast, token)
            if piece:
                yield piece

    def chat(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation of {"role", "content"} in the model's own template."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return self.encode(text, special_tokens=False)

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text whose ids are those of ``chat``."""
        if self.template is None:
            raise refuse("tokenizer", "chat_template", "a model with a chat template", "none: use a plain prompt")
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        special = {key: value for key, value in self.special.items() if value is not None}
        try:
            return environment.from_string(self.template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special, **variables
            )
        except jinja2.TemplateError as error:
            raise refuse(
                "tokenizer", "chat_template", "a template that renders these messages", f"{error}"[:200]
            ) from error


def _content(token: Any) -> str | None:
    """The text of a special token, stored plainly or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
