"""The bench of INT4 methods: what it writes is what a method found, and its intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from quantize_layers import tensors_of

from bench import quantize
from m3.models.loader import load_model
from m3.quantize.block import Block
from m3.quantize.scheme import Scheme, nearest
from m3kernels.int4 import int4_dequantize


@pytest.mark.parametrize("arm", ["rtn", "gptq_act", "autoround"])
def test_an_arm_writes_a_checkpoint_that_loads(arm, llama, tmp_path, capsys):
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(torch.randint(0, 99, (3, 12)).tolist()))
    settings = {"arm": arm, "model": str(llama[0]), "out": str(tmp_path / "out"), "tokens": str(tokens)}
    spent = quantize.quantise({**settings, "group_size": 32, "symmetric": True, "iterations": 3, "batch": 2})
    assert spent["cpu_s"] > 0
    assert spent["peak_bytes"] > 1e6
    assert "layer 2" in capsys.readouterr().out
    down = load_model(tmp_path / "out").blocks[1].mlp.down.weight.int4
    original = Block.from_tensors(*tensors_of(llama[0], 1)).weights["mlp.down_proj"]
    rtn = nearest(original, Scheme(group_size=32)).dequantized()
    assert (down.perm is not None) == (arm == "gptq_act")
    assert torch.equal(int4_dequantize(down, torch.float32), rtn) == (arm == "rtn")
    assert float((int4_dequantize(down, torch.float32) - original).square().mean()) < 4 * float(
        (rtn - original).square().mean()
    )


def test_intervals_are_of_tokens_in_whole_passages():
    values, tokens = np.array([10.0, 40.0]), np.array([10, 20])
    mean, low, high = quantize.interval(values, tokens)
    assert (mean, low, high) == (pytest.approx(50 / 30), pytest.approx(1.0), pytest.approx(2.0))
