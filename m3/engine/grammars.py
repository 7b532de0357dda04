"""Grammars that an answer keeps to: JSON schemas, regular expressions, Lark. llguidance compiles them.

Sets of tokens are Python integers here: bit v is set iff token v is in the set.

What a client sends is hostile until shown otherwise. So a source has at most MAX_SOURCE characters, and llguidance
bounds the rest: nesting, symbols of a grammar, work to build it, work of a step (LIMITS). A grammar beyond a limit at
the start is refused; one that passes it later ends its request with the reason "error".
"""

from __future__ import annotations

import functools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from m3.models.tokenizer import Tokenizer
from m3kernels.checks import refuse

MAX_SOURCE = 2**16  # characters; ours: 2000 properties of a schema compile in half a second
MAX_COMPILED = 32  # grammars that are kept; ours
LIMITS = {"max_lexer_states": 20_000, "verbose_errors": False}  # ours; the rest as llguidance has them
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"  # of JSON between tokens: bounded, or a weak model never stops indenting
END = "<end of a grammar>"
LEXER = "lexer error"  # how an error begins that may be of the lexer's past


class Grammar:
    """A text that requests may be held to (SamplingParams.grammar); made by Grammars, shared, never changed.

    kind: "json_schema", "json_object", "regex" or "ebnf". source: as it was given, a schema as JSON.
    """

    def __init__(
        self, kind: str, source: str, compile: Callable[[], Any], ends: Sequence[int], vocab_size: int, end: int
    ) -> None:
        self.kind, self.source, self.vocab_size = kind, source, vocab_size
        self.ends = sum(1 << token for token in set(ends) if token < vocab_size)
        self._compile = compile
        self._compiled = compile()  # an LLMatcher that has read nothing; its copies share one lexer
        self._end = 1 << end  # how llguidance says that a text may end here
        self._text = ((1 << vocab_size) - 1) & ~self._end & ~self.ends

    def __repr__(self) -> str:
        return f"Grammar({self.kind}, {self.source[:80]!r})"

    def matcher(self) -> Matcher:
        """For one request."""
        return Matcher(self)


class Matcher:
    """Where a request stands in its grammar: a function of the tokens that it has read.

    Requests with the same grammar share a lexer, which grows, and is good for nothing once it has passed a limit. That
    may be another request's doing, or a draft's. So a request whose lexer fails reads its tokens anew with a fresh one,
    which later requests then share; only what fails there is an error.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.read: list[int] = []
        self._ahead = 0  # tokens that were entered
        self._state = grammar._compiled.deep_copy()
        self._mask: int | None = None

    @property
    def error(self) -> str | None:
        """Why the grammar cannot go on from here: a limit was passed."""
        self._look()
        return _said(self._state.get_error()) if self._state.is_error() else None

    @property
    def complete(self) -> bool:
        """Whether the text can end here, and cannot go on."""
        return self.allowed() == (0, True)

    def advance(self, tokens: Sequence[int]) -> None:
        """Read tokens that allowed() had, none of them an end token."""
        self.read += tokens
        self._mask = None
        self._state.consume_tokens(list(tokens))

    def allowed(self) -> tuple[int, bool]:
        """The tokens with which the text can go on, end tokens apart; whether it can end here."""
        found = self._look()
        return found & self.grammar._text, bool(found & self.grammar._end)

    def enter(self, token: int) -> None:
        """Read a token for a look at what follows; leave() takes it back."""
        self._mask = None
        self._ahead += 1
        self._state.consume_token(token)

    def leave(self, path: Sequence[int]) -> None:
        """Take back the last of the tokens that were entered; path: those before it, should it all be read anew."""
        self._mask = None
        self._ahead -= 1
        if self._state.is_error() or not self._state.rollback(1):
            self._state = self.grammar._compiled.deep_copy()
            self._state.consume_tokens([*self.read, *path])

    def _look(self) -> int:
        """llguidance's set of tokens; empty after an error."""
        if self._mask is None:
            self._mask = self._computed()
            if not self._ahead and _said(self._state.get_error()).startswith(LEXER):
                self._state = self.grammar._compile()
                self.grammar._compiled = self._state.deep_copy()
                self._state.consume_tokens(self.read)
                self._mask = self._computed()
        return self._mask

    def _computed(self) -> int:
        found = b"" if self._state.is_error() else self._state.compute_bitmask()
        return 0 if self._state.is_error() else int.from_bytes(found, "little")


class Grammars:
    """Compiles grammars for one model; what was compiled is kept. Any thread may call, and may wait for a compilation.

    Args:
        tokenizer: spells the model's tokens. vocab_size: of the model's head; ids beyond the tokenizer's are never
            allowed. eos_token_ids: that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.tokenizer, self.vocab_size, self.eos_token_ids = tokenizer, vocab_size, tuple(eos_token_ids)
        self._compiled: OrderedDict[tuple[str, str], Grammar] = OrderedDict()
        self._lock = threading.Lock()
        self._spelling: tuple[Any, int] | None = None

    def json_schema(self, schema: dict[str, Any] | str) -> Grammar:
        """JSON that the schema admits, properties in its order, at most 40 characters of whitespace in one place.

        Raises ValueError: no schema, keywords that cannot be enforced, nothing that it admits, a limit.
        """
        try:
            source = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise refuse("grammars", "schema", "a JSON schema", f"{error}") from error
        return self._grammar("json_schema", "schema", source)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self._grammar("json_object", "schema", '{"type": "object"}')

    def regex(self, pattern: str) -> Grammar:
        """A whole match of a regular expression, in Rust's syntax. Raises ValueError."""
        return self._grammar("regex", "pattern", pattern)

    def ebnf(self, text: str) -> Grammar:
        """A text of a grammar in llguidance's form of Lark; its start rule is ``start``. Raises ValueError."""
        return self._grammar("ebnf", "text", text)

    def _grammar(self, kind: str, argument: str, source: str) -> Grammar:
        if not isinstance(source, str):
            raise refuse("grammars", argument, "a str", repr(source)[:200])
        if len(source) > MAX_SOURCE:
            raise refuse("grammars", argument, f"at most {MAX_SOURCE} characters", f"{len(source)}")
        key = (kind, source)
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = self._compile(kind, argument, source)
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(key)
            return self._compiled[key]

    def _compile(self, kind: str, argument: str, source: str) -> Grammar:
        library = _library()
        spelling, end = self._spelled(library)
        form = library.LLMatcher
        match kind:
            case "regex":
                written = form.grammar_from_regex(source)
            case "ebnf":
                written = form.grammar_from_lark(source)
            case _:
                try:
                    written = form.grammar_from_json_schema(source, defaults={"whitespace_pattern": WHITESPACE})
                except ValueError as error:
                    raise refuse("grammars", argument, "a JSON schema", f"{error}"[:200]) from error
        limits = library.LLParserLimits(**LIMITS)
        compile = functools.partial(form, spelling, written, log_level=0, limits=limits)
        grammar = Grammar(kind, source, compile, self.eos_token_ids, self.vocab_size, end)
        first = grammar.matcher()
        if first._state.is_error():
            raise refuse("grammars", argument, "one that can be compiled", first.error)
        if first.error is not None or first.allowed() == (0, False):
            got = "none that the model's tokens spell" if first.error is None else first.error
            raise refuse("grammars", argument, "one that some text matches", got)
        return grammar

    def _spelled(self, library: Any) -> tuple[Any, int]:
        """llguidance's tokenizer, and the id of a token of our own that stands for the end.

        The model's end tokens would not do: it may have none, and they may lie beyond the tokenizer.
        """
        if self._spelling is None:
            written = json.loads(self.tokenizer.fast.to_str())
            if (written.get("decoder") or {}).get("type") == "Fuse":  # tokens that are their text
                written["decoder"] = {"type": "ByteFallback"}
            known = [*_ids(written["model"].get("vocab", {})), *(each["id"] for each in written["added_tokens"])]
            end = max(known) + 1
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            written["added_tokens"].append({"id": end, "content": END, "special": True, **plain})
            try:
                size = max(self.vocab_size, end + 1)
                made = library.LLTokenizer(json.dumps(written), n_vocab=size, eos_token=[end])
            except ValueError as error:
                raise refuse("grammars", "tokenizer", "one that llguidance reads", f"{error}"[:200]) from error
            self._spelling = made, end
        return self._spelling


def grammars_of(core: object, tokenizer: Tokenizer | None) -> Grammars | None:
    """Grammars for the model of a core; for the tokenizer's own sizes where it has none. None without a tokenizer."""
    if tokenizer is None:
        return None
    config = getattr(getattr(core, "model", None), "config", None)
    if config is not None:
        return Grammars(tokenizer, config.vocab_size, config.eos_token_ids)
    end = tokenizer.eos_token_id
    return Grammars(tokenizer, tokenizer.vocab_size, () if end is None else (end,))


def _ids(vocabulary: dict[str, int] | list[Any]) -> Sequence[int]:
    """Ids of a tokenizer.json's vocabulary: by token, or in the order of a list."""
    return list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))


def _said(error: str) -> str:
    """llguidance's message without its state."""
    return " ".join(error.split("\n<")[0].split())[:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RuntimeError('grammars: want llguidance: pip install "m3-clinical[m3]"') from error
    return llguidance
