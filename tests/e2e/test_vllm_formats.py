"""Every 4-bit form in vLLM with our plug-in, dense and with experts; and what vLLM alone does with them on this CPU.

M3_VLLM_PYTHON as in test_vllm_serve.py. The checkpoints are tiny and written word by word (int4_formats); the reference
is transformers in fp32 on the weights that they stand for. One process loads them all, one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from int4_formats import QUANTIZATION, rewrite
from logits_elsewhere import NEW_TOKENS
from tiny_models import make_checkpoint

from bench.vllm_server import environment
from m3kernels import _cpu_ext

pytestmark = pytest.mark.slow
DENSE = tuple(kind for kind in QUANTIZATION if kind != "gptq-some-dense")
EXPERTS = ("gptq-symmetric", "gptq-act-order", "awq", "compressed-tensors")
CASES = (
    *(("llama-wide", kind) for kind in DENSE),
    ("qwen2-wide", "awq"),  # with biases
    *(("qwen3_moe-wide", kind) for kind in EXPERTS),
)
TWO_RANKS = (("llama-wide", "awq"), ("qwen3_moe-wide", "compressed-tensors"))
PROMPT = list(range(3, 27))
FAR = 1e-3  # RMS of the difference of logits over RMS: int16 activations in three layers
REFUSALS = {  # of vLLM alone, on any CPU without AMX
    ("llama-wide", "gptq-v1"): "sym=False",
    ("llama-wide", "gptq-v2"): "sym=False",
    ("llama-wide", "gptq-act-order"): "desc_act=True",
    ("llama-wide", "auto-round"): "INC on CPU: unsupported config",
    ("qwen3_moe-wide", "gptq-symmetric"): "No WNA16 MoE backend supports the deployment configuration",
    ("qwen3_moe-wide", "awq"): "No WNA16 MoE backend supports the deployment configuration",
    ("qwen3_moe-wide", "compressed-tensors"): "Failed to find a kernel that can implement the WNA16 linear layer",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[tuple[str, str], tuple[Path, torch.Tensor, list[int]]]:
    """(family, form) -> folder, logits after the prompt, greedy continuation."""
    found = {}
    for family, kind in CASES:
        folder = tmp_path_factory.mktemp(f"{family}-{kind}")
        reference = make_checkpoint(folder, family)
        rewrite(folder, kind, reference)
        rows = torch.tensor([PROMPT])
        reference.generation_config.eos_token_id = None
        with torch.no_grad():
            logits = reference(rows).logits[0, -1]
            out = reference.generate(rows, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        found[family, kind] = (folder, logits, out[0, len(PROMPT) :].tolist())
    return found


def read_by(loader: str, checkpoints: dict, place: Path) -> dict[tuple[str, str], dict]:
    python = os.environ.get("M3_VLLM_PYTHON")
    if not python:
        pytest.skip("M3_VLLM_PYTHON names no interpreter that has vLLM")
    (place / "ids.json").write_text(json.dumps(PROMPT))
    folders = {case: str(folder) for case, (folder, _, _) in checkpoints.items()}
    script = Path(__file__).with_name("logits_elsewhere.py")
    command = [python, str(script), loader, str(place / "ids.json"), str(place / "found.pt"), *folders.values()]
    variables = environment(place, plugin=loader != "vllm", threads=1)
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    found = torch.load(place / "found.pt")
    return {case: found[folder] for case, folder in folders.items()}


@pytest.fixture(scope="module")
def with_plugin(checkpoints, tmp_path_factory):
    return read_by("vllm-m3", checkpoints, tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def stock(checkpoints, tmp_path_factory):
    return read_by("vllm", checkpoints, tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_and_text_are_those_of_the_dequantised_weights(with_plugin, checkpoints, case):
    found, (_, wanted, following) = with_plugin[case], checkpoints[case]
    assert "refused" not in found, found["refused"]
    difference = (found["logits"][0] - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert difference <= FAR
    assert found["next"] == following


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints, tmp_path_factory):
    chosen = {case: checkpoints[case] for case in TWO_RANKS}
    return read_by("vllm-m3-two-ranks", chosen, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", TWO_RANKS, ids="-".join)
def test_two_ranks_say_the_same(on_two_ranks, checkpoints, case):
    assert "refused" not in on_two_ranks[case], on_two_ranks[case]["refused"]
    assert on_two_ranks[case]["next"] == checkpoints[case][2]


@pytest.mark.parametrize("case", REFUSALS, ids="-".join)
def test_vllm_alone_refuses(stock, case):
    if case[0] == "qwen3_moe-wide" and torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has AMX, for which vLLM has kernels")
    assert REFUSALS[case] in stock[case]["refused"]


@pytest.mark.parametrize("kind", ["gptq-symmetric", "awq", "compressed-tensors"])
def test_vllm_alone_serves_dense_models_where_there_is_avx512(stock, checkpoints, kind):
    """So there our plug-in is a choice, not a need; on AVX2 vLLM has no such product at all."""
    found = stock["llama-wide", kind]
    if _cpu_ext.get_isa().startswith("avx512"):
        assert found["next"] == checkpoints["llama-wide", kind][2]
    else:
        assert "cpu_gemm_wna16" in found["refused"]
