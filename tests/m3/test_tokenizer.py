"""The tokenizer wrapper on a small byte-level tokenizer: streaming whole characters, chat templates, mishaps."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from m3.models.tokenizer import Tokenizer

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("text", ["", "a", "37.5 °C → fièvre", "日本語 🩺", "line\n\tline  two"])
def test_text_comes_back(folder, text):
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_stream_breaks_between_characters_only(folder):
    tokenizer = Tokenizer(folder)
    text = "née 🩺 日本"
    tokens = tokenizer.encode(text)
    pieces = list(tokenizer.stream(tokens))
    assert "".join(pieces) == text
    assert len(tokens) > len(pieces) == len(text)


def test_chat_renders_the_template(folder):
    tokenizer = Tokenizer(folder)
    start, end = 256, 257
    tokens = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert tokens[0] == start
    assert tokens == [start, *tokenizer.encode("user: Hi"), end, start, *tokenizer.encode("assistant:")]
    assert tokenizer.eos_token_id == end


def test_a_template_file_wins(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Hi"}])) == "Hi!"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% for %}", "{{ ''.__class__.mro() }}"]
)
def test_a_template_that_fails(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="tokenizer: chat_template: want a template that renders these messages"):
        Tokenizer(folder).chat([{"role": "user", "content": "Hi"}])


def test_no_template(folder):
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="chat_template: want a model with a chat template; got none"):
        Tokenizer(folder).chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2"])
def test_a_broken_file(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer.json: want a tokenizer of the tokenizers library; got"):
        Tokenizer(folder)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer.json: want a file; got none"):
        Tokenizer(tmp_path)
