"""``m3 quantize --method package``: a model that our decoder has not, quantised by auto-round, loads in transformers.

Runs in the interpreter that M3_AUTOROUND_PYTHON names (``pip install auto-round==0.16.1 accelerate .[clinic]``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from m3.quantize.cli import Method
from m3kernels.int4 import int4_dequantize
from m3kernels.int4.convert import from_gptq

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("M3_AUTOROUND_PYTHON")


@pytest.fixture
def olmo2(tmp_path):
    """A small random OLMo-2: norms come after attention and MLP there."""
    torch.manual_seed(0)
    config = transformers.Olmo2Config(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    folder = tmp_path / "model"
    transformers.Olmo2ForCausalLM(config).bfloat16().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:99]
    characters = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def run(python, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "m3", "quantize", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(PYTHON is None, reason="M3_AUTOROUND_PYTHON names no interpreter with auto-round")
def test_another_architecture(olmo2, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A fever of 39 degrees for three days, and a cough.\n" * 40)
    options = ("-o", out, "--group-size", 32, "--samples", 8, "--tokens", 32, "--iterations", 20, "--calibration", text)
    ours = run(sys.executable, olmo2, *options, "--method", "autoround")
    assert ours.returncode == 1
    assert "model_type: want llama or qwen2" in ours.stderr
    done = run(PYTHON, olmo2, *options, "--method", Method.package)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "out.part").exists()
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["bits"], found["group_size"]) == ("gptq", 4, 32)
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    packed = {key: tensors[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales")}
    weight = int4_dequantize(from_gptq(**packed, group_size=32), torch.float32)
    right = load_file(olmo2 / "model.safetensors")[f"{name}.weight"].float()
    assert (weight - right).square().mean() < 0.02 * right.square().mean()


def test_a_missing_package_is_one_line(olmo2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A fever of 39 degrees for three days, and a cough.\n" * 40)
    options = ("--method", "package", "--samples", 4, "--tokens", 32, "--calibration", text, "--group-size", 32)
    done = run(sys.executable, olmo2, "-o", tmp_path / "out", *options)
    assert done.returncode == 1
    assert "--method package: want auto-round and transformers" in done.stderr
    assert not (tmp_path / "out").exists()
