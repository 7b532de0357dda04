"""A decoder layer in plain torch against transformers' own layer, and what its linears see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from quantize_layers import tensors_of
from tiny_models import make_checkpoint

from m3.quantize.block import Block

LAYERS = {
    "llama": ("llama", 0),
    "llama-bias": ("llama-untied-bias", 1),
    "llama-rope-llama3": ("llama-rope-llama3", 2),
    "llama-one-kv-head": ("llama-one-kv-head", 0),
    "qwen2": ("qwen2", 0),
    "qwen3": ("qwen3", 1),
    "experts": ("qwen3_moe", 0),
    "experts-no-rescale": ("qwen3_moe-no-rescale", 1),
    "dense-layer-among-experts": ("qwen3_moe-one-dense-layer", 1),
}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    make_checkpoint(folder, "qwen3_moe")
    return tensors_of(folder, 0)


def theirs(model, layer, hidden):
    """What transformers' layer makes of hidden (B, L, D), inside its whole model."""
    kept = {}
    hooks = [
        model.model.layers[layer].register_forward_pre_hook(
            lambda module, args, kwargs: ((hidden, *args[1:]), kwargs), with_kwargs=True
        ),
        model.model.layers[layer].register_forward_hook(lambda module, args, out: kept.update(out=out)),
    ]
    with torch.no_grad():
        model.model(torch.zeros(hidden.shape[:2], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return kept["out"]


@pytest.mark.parametrize(("family", "layer"), LAYERS.values(), ids=LAYERS)
def test_block_equals_the_layer_of_transformers(family, layer, tmp_path):
    model = make_checkpoint(tmp_path, family)
    block = Block.from_tensors(*tensors_of(tmp_path, layer))
    hidden = torch.randn(3, 17, 64)
    want = theirs(model, layer, hidden)
    got = block.forward(hidden)
    assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_inputs_are_what_the_linears_multiply(llama):
    block = Block.from_tensors(*tensors_of(llama[0], 0))
    hidden = torch.randn(2, 5, 64)
    seen = block.inputs(hidden)
    assert list(seen) == list(block.linears)
    norm = F.rms_norm(hidden, (64,), block.rest["input_layernorm.weight"], block.config.rms_norm_eps).flatten(0, 1)
    torch.testing.assert_close(seen["self_attn.q_proj"], norm)
    out = F.linear(seen["mlp.down_proj"], block.weights["mlp.down_proj"])
    middle = hidden.flatten(0, 1) + F.linear(seen["self_attn.o_proj"], block.weights["self_attn.o_proj"])
    torch.testing.assert_close(block.forward(hidden).flatten(0, 1), middle + out)


def test_experts_see_the_tokens_that_the_router_chose(moe):
    block = Block.from_tensors(*moe)
    hidden = torch.randn(2, 9, 64)
    routing, seen = block.routing(hidden), block.inputs(hidden)
    counts = [len(seen[f"mlp.experts.{expert}.down_proj"]) for expert in range(6)]
    assert counts == routing.tokens_per_expert().tolist()
    assert sum(counts) == 2 * 18
    assert "mlp.gate" not in block.linears


def test_extra_tokens_are_the_likeliest_of_those_not_chosen(moe):
    block = Block.from_tensors(*moe)
    hidden = torch.randn(2, 9, 64)
    routing = block.routing(hidden)
    extra = routing.extra(7)
    seen = block.inputs(hidden, extra=extra)
    counts = routing.tokens_per_expert()
    assert [len(seen[f"mlp.experts.{e}.up_proj"]) for e in range(6)] == counts.clamp(min=7).tolist()
    rare = int(counts.argmin())
    assert counts[rare] < 7
    chosen = (routing.ids == rare).any(1)
    rest = routing.probabilities[:, rare].masked_fill(chosen, -1)
    assert float(rest[extra[:, rare]].min()) >= float(rest[~extra[:, rare]].max())
    assert int(routing.extra(1000).sum()) == 18 * 6 - 36  # all the rest, where there are too few


def test_extra_tokens_add_the_expert_weighted_by_its_probability(moe):
    block = Block.from_tensors(*moe)
    hidden = torch.randn(1, 4, 64)
    routing = block.routing(hidden)
    expert = next(e for e in range(6) if e not in routing.ids[2].tolist())
    extra = torch.zeros(4, 6, dtype=torch.bool)
    extra[2, expert] = True
    x = block.inputs(hidden, extra=extra)[f"mlp.experts.{expert}.gate_proj"][[int((routing.ids[:2] == expert).sum())]]
    gate, up, down = (block.weights[f"mlp.experts.{expert}.{name}_proj"] for name in ("gate", "up", "down"))
    want = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) * routing.probabilities[2, expert]
    got = (block.forward(hidden, extra=extra) - block.forward(hidden))[0]
    torch.testing.assert_close(got[2], want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got[[0, 1, 3]], torch.zeros(3, 64), atol=1e-5, rtol=0)


def test_fused_experts_are_the_same_layer(moe):
    config, tensors = moe
    stacks = {
        "mlp.experts.gate_up_proj": [
            torch.cat([tensors[f"mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up")]) for e in range(6)
        ],
        "mlp.experts.down_proj": [tensors[f"mlp.experts.{e}.down_proj.weight"] for e in range(6)],
    }
    fused = {name: tensor for name, tensor in tensors.items() if "experts" not in name}
    fused |= {name: torch.stack(parts) for name, parts in stacks.items()}
    hidden = torch.randn(1, 5, 64)
    want = Block.from_tensors(config, tensors).forward(hidden)
    got = Block.from_tensors(config, fused).forward(hidden)  # torch's products may differ with where a weight lies
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_replaced_weights_get_gradients(llama):
    block = Block.from_tensors(*tensors_of(llama[0], 0))
    weights = {name: weight.clone().requires_grad_() for name, weight in block.weights.items()}
    hidden = torch.randn(1, 6, 64)
    y = block.forward(hidden, weights)
    assert torch.equal(y, block.forward(hidden))
    y.square().sum().backward()
    assert all(float(weight.grad.abs().max()) > 0 for weight in weights.values())
    zero = block.replaced({"mlp.down_proj": torch.zeros(64, 96), "self_attn.o_proj": torch.zeros(64, 96)})
    assert torch.equal(zero.forward(hidden), hidden)


WRONG = {
    "missing": (lambda t: t.pop("mlp.up_proj.weight"), r"mlp.up_proj.weight: want \(96, 64\) of floats; got no such"),
    "shape": (lambda t: t.update({"mlp.up_proj.weight": torch.zeros(96, 63)}), r"mlp.up_proj.weight: want \(96, 64\)"),
    "ints": (lambda t: t.update({"input_layernorm.weight": torch.zeros(64, dtype=torch.long)}), "input_layernorm"),
    "unknown": (lambda t: t.update({"self_attn.q_norm.weight": torch.ones(24)}), "q_norm.weight: want no such tensor"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_are_refused(llama, spoil, message):
    config, tensors = tensors_of(llama[0], 0)
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        Block.from_tensors(config, tensors)
