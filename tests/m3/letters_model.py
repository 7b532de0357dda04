"""A tiny random model that speaks printable ASCII, one token a letter, with a chat template."""

from __future__ import annotations

import json
import string
from pathlib import Path

from tiny_models import make_checkpoint
from tokenizers import AddedToken, Tokenizer, decoders, models

LETTERS = string.printable[:95]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'][0] }}:{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)


def make_letters_model(folder: Path, family: str = "llama") -> Path:
    """Write the checkpoint and its tokenizer."""
    make_checkpoint(folder, family)
    fast = Tokenizer(models.BPE({letter: n for n, letter in enumerate(LETTERS)}, []))
    fast.decoder = decoders.Fuse()
    fast.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": TEMPLATE}))
    return folder
