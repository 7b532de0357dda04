"""The command line on a tiny model: what it writes, and one clear line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from int4_formats import rewrite
from quantize_files import add_tokenizer
from tiny_models import make_checkpoint
from typer.testing import CliRunner

from m3.cli import app
from m3.models.int4_linear import Int4Linear
from m3.models.loader import load_model


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with a tokenizer of its own: 99 printable characters."""
    make_checkpoint(tmp_path / "model", "llama")
    add_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def test_quantize_then_generate(folder, tmp_path):
    text = run("quantize", folder, "-o", tmp_path / "int4", "--group-size", 32)
    assert "linears 0.2 MB in bf16 -> " in text
    assert "note:" not in text
    assert isinstance(load_model(tmp_path / "int4").blocks[0].mlp.down, Int4Linear)
    answers = [run("generate", tmp_path / "int4", "--prompt", "chest pain", "--max-tokens", 5) for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(answers[0].strip("\n")) <= 5


def test_a_group_size_that_does_not_divide_is_noted(folder, tmp_path):
    assert "note: 64 does not divide every width" in run(
        "quantize", folder, "-o", tmp_path / "int4", "--group-size", 64
    )


def test_a_seed_repeats(folder):
    options = ("generate", folder, "-p", "pain", "--max-tokens", 12, "--temperature", 2, "--top-p", 0.9)
    assert run(*options, "--seed", 1) == run(*options, "--seed", 1)
    assert run(*options, "--seed", 1) != run(*options, "--seed", 2)


def test_doctor_names_what_there_is(monkeypatch, tmp_path):
    tmp_path = tmp_path / ("a-long-name" * 9)
    monkeypatch.setenv("M3_CACHE", str(tmp_path))
    text = run("doctor")
    for word in ("m3kernels", torch.__version__, "int4_gemm", "SmolLM2-135M-Instruct", "not fetched"):
        assert word in text
    assert str(tmp_path) in "".join(text.split()), "a long path goes over several lines"


def test_mistakes_are_one_line(folder, tmp_path):
    text = run("generate", tmp_path / "nowhere", "-p", "x", code=1)
    assert text.startswith("error: no folder ")
    assert len(text.strip().splitlines()) == 1
    assert "Traceback" not in text


def test_a_damaged_checkpoint_is_one_line(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    text = run("generate", folder, "-p", "x", code=1)
    assert "model.safetensors: want a safetensors file; got 100 bytes" in text
    assert len(text.strip().splitlines()) == 1


def test_an_error_is_one_line_without_the_clinic(tmp_path):
    """With the extra m3 alone: what only the extra clinic brings is not there."""
    absent = ("json_source_map", "bm25s", "redis", "openai", "uvicorn", "transformers")
    command = ["generate", str(tmp_path / "nowhere"), "-p", "x"]
    program = f"import sys\nsys.modules |= dict.fromkeys({absent})\nfrom m3.cli import app\napp({command})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "nowhere" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "nowhere"), "-p", "x", "--debug"])
    assert type(result.exception).__name__ == "FetchError"


def test_quantize_does_not_overwrite(folder):
    assert "quantize: OUT: want a new or empty folder" in run("quantize", folder, "-o", folder, code=1)


def test_quantize_refuses_an_int4_model(folder, tmp_path):
    reference = make_checkpoint(tmp_path / "int4", "llama")
    rewrite(tmp_path / "int4", "gptq-v1", reference)
    (tmp_path / "int4" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    text = run("quantize", tmp_path / "int4", "-o", tmp_path / "out", code=1)
    assert "want a model that is not quantised yet" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--top-p", 2), "top_p: want 1e-6 <= top_p <= 1; got 2.0"),
        (("--temperature", 100), "temperature: want 0, or 1e-6 <= temp"),
    ],
)
def test_sampling_mistakes(folder, option, message):
    assert message in run("generate", folder, "-p", "x", *option, code=1)


def test_generate_uses_the_chat_template_unless_raw(folder):
    settings = {"chat_template": "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = run("generate", folder, "-p", "pain", "--system", "be kind", "--max-tokens", 8)
    assert chat == run(
        "generate", folder, "-p", "systembekinduserpain".replace("bekind", "be kind"), "--raw", "--max-tokens", 8
    )
