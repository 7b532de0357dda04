"""Grammars that an answer must keep to: JSON schemas, regular expressions, Lark; compiled by llguidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m3.models.tokenizer import Tokenizer


class Grammar:
    """A text that requests may be held to (SamplingParams.grammar); made by Grammars, shared, never changed.

    kind: "json_schema", "json_object", "regex" or "ebnf". source: as it was given.
    """

    def __init__(self, kind: str, source: str) -> None:
        self.kind, self.source = kind, source


class Grammars:
    """Compiles grammars for one model; what was compiled is kept. Any thread may call, and may wait for a compilation.

    Args:
        tokenizer: spells the model's tokens. vocab_size: of the model's head; ids beyond the tokenizer's are never
            allowed. eos_token_ids: that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, tuple(eos_token_ids)

    def json_schema(self, schema: dict[str, Any] | str) -> Grammar:
        """JSON that the schema admits. Raises ValueError: no schema, one that cannot be compiled, one too large."""
        raise NotImplementedError

    def json_object(self) -> Grammar:
        """Any JSON object."""
        raise NotImplementedError

    def regex(self, pattern: str) -> Grammar:
        """A whole match of a regular expression (Rust's syntax). Raises ValueError."""
        raise NotImplementedError

    def ebnf(self, text: str) -> Grammar:
        """A text of a Lark grammar; its start rule is ``start``. Raises ValueError."""
        raise NotImplementedError


def grammars_of(core: object, tokenizer: Tokenizer | None) -> Grammars | None:
    """Grammars for the model of a core; for the tokenizer's own sizes where it has none. None without a tokenizer."""
    if tokenizer is None:
        return None
    config = getattr(getattr(core, "model", None), "config", None)
    if config is not None:
        return Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
    end = tokenizer.eos_token_id
    return Grammars(tokenizer, tokenizer.vocab_size, () if end is None else (end,))
