"""The decoder against transformers: logits of every family, prefill, decode with the cache, chunks and batches."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, SMALL, make_checkpoint

from m3.models.decoder import DecoderConfig
from m3.models.loader import load_model

# fp32 against fp32 in another order of summation, relative to the largest logit.
RELATIVE_ERROR = 5e-6


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


def reference_logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """(our model, transformers' model) of one family."""
    folder = tmp_path_factory.mktemp("model")
    reference = make_checkpoint(folder, request.param)
    return load_model(folder), reference


def test_prefill_equals_transformers(pair):
    model, reference = pair
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 37))
    assert relative_error(model(tokens), reference_logits(reference, tokens)) <= RELATIVE_ERROR


def test_decode_with_the_cache_equals_transformers(pair):
    model, reference = pair
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 80))
    cache = model.new_cache(80)
    pieces = [model(tokens[:, :1], cache), model(tokens[:, 1:40], cache), model(tokens[:, 40:71], cache)]
    pieces += [model(tokens[:, index : index + 1], cache) for index in range(71, 80)]
    assert cache.length == 80
    assert relative_error(torch.cat(pieces, dim=1), reference_logits(reference, tokens)) <= RELATIVE_ERROR


def test_a_batch_decodes_like_its_sequences(pair):
    model, _ = pair
    tokens = torch.randint(0, SMALL["vocab_size"], (3, 6))
    cache = model.new_cache(6, batch=3)
    model(tokens[:, :5], cache)
    together = model(tokens[:, 5:], cache)
    alone = torch.cat([model(tokens[index : index + 1], last_only=True) for index in range(3)])
    assert relative_error(together, alone) <= RELATIVE_ERROR


def test_last_only_is_the_last_row(pair):
    model, _ = pair
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 7))
    assert relative_error(model(tokens, last_only=True), model(tokens)[:, -1:]) <= RELATIVE_ERROR


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe-all-experts"])
def test_bf16_is_as_near_to_fp32_as_transformers_in_bf16(family, tmp_path):
    reference = make_checkpoint(tmp_path, family)
    tokens = torch.randint(0, SMALL["vocab_size"], (1, 33))
    exact = reference_logits(reference, tokens)
    theirs = reference_logits(reference.to(torch.bfloat16), tokens).float()
    ours = load_model(tmp_path, dtype=torch.bfloat16)(tokens).float()
    assert float((ours - exact).norm()) <= 1.5 * float((theirs - exact).norm())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"decoder: tokens: want \(B, T\); got \(3,\) int64"),
        (torch.zeros(2, 1, dtype=torch.int64), r"decoder: tokens: want \(1, T\) with T >= 1; got \(2, 1\) int64"),
        (torch.zeros(1, 0, dtype=torch.int64), r"decoder: tokens: want \(1, T\) with T >= 1; got \(1, 0\) int64"),
        (torch.zeros(1, 5, dtype=torch.int64), r"decoder: tokens: want at most 4 more \(cache of 4\); got \(1, 5\)"),
    ],
    ids=["one-dimension", "other-batch", "empty", "more-than-the-cache"],
)
def test_tokens_out_of_contract(llama, tokens, message):
    model = load_model(llama[0])
    with pytest.raises(ValueError, match=message):
        model(tokens, model.new_cache(4))


CONFIG = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
MOE = {**CONFIG, "model_type": "qwen3_moe", "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**CONFIG, "model_type": "mamba"}, "model_type: want llama or qwen2 or qwen3 or qwen3_moe; got 'mamba'"),
        ({}, "model_type: want .*; got None"),
        ({**CONFIG, "hidden_act": "gelu"}, "hidden_act: want 'silu'; got 'gelu'"),
        ({**CONFIG, "use_sliding_window": True}, "use_sliding_window: want false; got True"),
        ({**CONFIG, "vocab_size": "8"}, "vocab_size: want an int in 1 .. 2\\*\\*31 - 1; got '8'"),
        ({**CONFIG, "num_hidden_layers": 0}, "num_hidden_layers: want an int"),
        ({**CONFIG, "num_hidden_layers": True}, "num_hidden_layers: want an int"),
        ({**CONFIG, "num_key_value_heads": 3}, "num_key_value_heads: want a divisor of 2 attention heads; got 3"),
        ({**CONFIG, "head_dim": 3}, "head_dim: want an even number; got 3"),
        ({**CONFIG, "rms_norm_eps": -1}, "rms_norm_eps: want a positive number; got -1"),
        ({**CONFIG, "rope_scaling": {"type": "yarn"}}, "rope_type: want default or llama3 or linear; got 'yarn'"),
        ({**CONFIG, "rope_scaling": [1]}, "rope_parameters: want an object"),
        ({**CONFIG, "eos_token_id": ["a"]}, "eos_token_id: want an int or a list of ints"),
        ({**MOE, "num_experts_per_tok": 3}, "num_experts_per_tok: want at most num_experts = 2; got 3"),
        ({**MOE, "mlp_only_layers": "all"}, "mlp_only_layers: want a list of ints; got 'all'"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_config_out_of_contract(config, message):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        DecoderConfig.from_hf(config)
