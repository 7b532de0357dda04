"""A real AsyncEngine over the toy core, which says what a test tells it to: for the text side of the server.

The template shows the tools and the last message only (the toy takes short prompts), and opens <think> where it is told
to. A token is a byte, and comes with up to three others.
"""

from __future__ import annotations

import json
from pathlib import Path

from toy_core import START, ToyCore, make_tokenizer

from m3.engine.engine import AsyncEngine
from m3.models.tokenizer import Tokenizer
from m3.serve.engine_backend import EngineBackend

TEMPLATE = (
    "<|start|>{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    "{% for call in messages[-1].tool_calls or [] %}"
    "{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "{{ messages[-1].content }}<|end|>{% if enable_thinking %}<think>\n{% endif %}"
)


class ScriptedEngine:
    """A backend, "toy", whose next answers are ``say``."""

    def __init__(self, folder: Path) -> None:
        make_tokenizer(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
        self.tokenizer = Tokenizer(folder)
        self.core = ToyCore(max_running=32)
        self.backend = EngineBackend(AsyncEngine(self.core, self.tokenizer), "toy", max_tokens=4000)
        self.core.script = {}

    def say(self, text: str) -> None:
        self.core.script = {START: list(text.encode())}
