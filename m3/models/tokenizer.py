"""A model's tokenizer and chat template, read from tokenizer.json and tokenizer_config.json without transformers."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from m3.checkpoint import read_json
from m3.models.chat_text import Placeholders
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

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for, which may be part of a character; b"" for an id that is no token."""
        piece = self.fast.id_to_token(token)
        if piece is None:
            return b""
        if token not in self._added:
            if self._byte_letters is not None and all(letter in self._byte_letters for letter in piece):
                return bytes(self._byte_letters[letter] for letter in piece)
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
        text: str = self.fast.decode([token], skip_special_tokens=False)
        return text.encode()

    def is_special(self, token: int) -> bool:
        """Whether it is a control token, which is no part of a text."""
        return token in self._special_ids

    def chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Token ids of a conversation of {"role", "content"} in the model's own template.

        Control tokens are those that the template writes; their names in what people wrote are text (chat_text.py).
        """
        return self.chat_prompt(messages, add_generation_prompt=add_generation_prompt, **variables)[1]

    def chat_prompt(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> tuple[str, list[int]]:
        """(text, token ids), as of ``render`` and ``chat``."""
        hidden = self._placeholders()
        rendered = self.render(
            hidden.hide(list(messages)), add_generation_prompt=add_generation_prompt, **hidden.hide(variables)
        )
        return hidden.show(rendered), self._rendered_ids(rendered, hidden)

    def chat_after(self, messages: Sequence[dict[str, Any]], place: int) -> list[int]:
        """Token ids of what ``chat`` has after the content of message ``place``, which another tokenization stands for.

        Raises:
            ValueError: a template that does not render that content once, as it is.
        """
        hidden = self._placeholders()
        rows = hidden.hide(list(messages))
        rows[place] = {**rows[place], "content": hidden.mark}
        before, found, after = self.render(rows).rpartition(hidden.mark)
        if not found or hidden.mark in before:
            raise refuse("tokenizer", "chat_template", f"one that renders message {place} once, as it is", "another")
        return self._rendered_ids(after, hidden)

    def _placeholders(self) -> Placeholders:
        return Placeholders(text for token, text in self._added.items() if token in self._special_ids)

    def _rendered_ids(self, rendered: str, hidden: Placeholders) -> list[int]:
        """Token ids of what the template wrote, or of its end; what people wrote between has no control tokens."""
        if not hidden.has(rendered):
            return self.encode(rendered, special_tokens=False)
        ids: list[int] = []
        whole = self.fast.encode(rendered, add_special_tokens=False)
        start = 0  # of what is not encoded yet
        cuts = [place for token, place in zip(whole.ids, whole.offsets, strict=True) if token in self._added]
        last = 0  # where the last control token ends
        for begin, end in [*cuts, (len(rendered), len(rendered))]:
            piece = rendered[last:begin]
            if hidden.has(piece):
                ids += self.encode(rendered[start:last], special_tokens=False) if last > start else []
                ids += self._plain.encode(hidden.show(piece), add_special_tokens=False).ids
                start = begin
            last = end
        ids += self.encode(rendered[start:], special_tokens=False)
        return ids

    def render(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text whose ids are those of ``chat``, where no message names a control token.

        Raises:
            ValueError: no template; one that fails; variables that the template's own would replace.
        """
        if self.template is None:
            raise refuse("tokenizer", "chat_template", "a model with a chat template", "none: use a plain prompt")
        special = {key: value for key, value in self.special.items() if value is not None}
        taken = {"messages", "add_generation_prompt", *self.special} & variables.keys()
        if taken:
            raise refuse("tokenizer", "chat_template_kwargs", "variables of the template's own", sorted(taken))
        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **special, **variables
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise refuse(
                "tokenizer", "chat_template", "a template that renders these messages", f"{error}"[:200]
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        """The template, with what transformers gives to one."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        assert self.template is not None, "checked before"
        return environment.from_string(self.template)

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        """Text of the added tokens by id: those that are found in any text."""
        return {token: added.content for token, added in self.fast.get_added_tokens_decoder().items()}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """Of these, the control tokens."""
        return frozenset(token for token, added in self.fast.get_added_tokens_decoder().items() if added.special)

    @functools.cached_property
    def _plain(self) -> FastTokenizer:
        """The same tokenizer, which finds no control tokens."""
        row = json.loads(self.fast.to_str())
        row["added_tokens"] = [token for token in row["added_tokens"] if not token["special"]]
        return FastTokenizer.from_str(json.dumps({**row, "post_processor": None}))

    @functools.cached_property
    def _byte_letters(self) -> dict[str, int] | None:
        """The byte of each letter of a byte-level vocabulary (GPT-2's table); None: another one."""
        decoder = self.fast.decoder
        if decoder is None or b"ByteLevel" not in decoder.__getstate__():
            return None
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _content(token: Any) -> str | None:
    """The text of a special token, stored plainly or as an object."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=options.get("ensure_ascii", False), indent=indent)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
