"""The bench of one large layer, on a small one: its checkpoint, what passes its check, what its experts get."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import quantize_layer
from m3.checkpoint import Checkpoint

SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 96}
ROUTER = "model.layers.0.mlp.gate.weight"


@pytest.fixture
def plan(monkeypatch, tmp_path):
    for name, value in SMALL.items():
        monkeypatch.setitem(quantize_layer.QWEN3_235B_A22B, name, value)
    plan = quantize_layer.Plan(
        folder=tmp_path, samples=4, tokens=16, iterations=2, least_tokens=9, group_size=32, threads=1, experts=16
    )
    quantize_layer.make_layer(plan.model, plan.shape)
    return plan


@pytest.mark.parametrize("arm", ["rtn", "gptq", "autoround"])
def test_an_arm_passes(plan, arm):
    cost = quantize_layer.quantise(plan, arm)
    assert sum(cost["phases_s"].values()) == pytest.approx(cost["wall_s"])
    quantize_layer.check(Checkpoint(plan.model), Checkpoint(plan.folder / arm), cost["hidden_error"])
    with pytest.raises(ValueError, match=r"want an error below 0\.1; got 0\.2"):
        quantize_layer.check(Checkpoint(plan.model), Checkpoint(plan.folder / arm), 0.2)


def test_a_router_that_was_touched_does_not_pass(plan):
    quantize_layer.quantise(plan, "rtn")
    after = Checkpoint(plan.folder / "rtn")
    path = plan.folder / "rtn" / after.file_of(ROUTER)
    tensors = load_file(path)
    tensors[ROUTER] = tensors[ROUTER].float()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the rest as it was; got \['model.layers.0.mlp.gate.weight'\]"):
        quantize_layer.check(Checkpoint(plan.model), Checkpoint(plan.folder / "rtn"), 0.01)


def test_tokens_of_the_experts(plan):
    ids = quantize_layer.token_ids(plan)
    covered = quantize_layer.coverage(plan.model, ids)
    assert plan.shape["num_experts_per_tok"] == 1
    assert covered.counts.shape == (4, 1, 16)
    assert covered.counts.sum((1, 2)).tolist() == [16] * 4  # each token to one expert
    assert torch.equal(ids, quantize_layer.token_ids(dataclasses.replace(plan, iterations=3)))
