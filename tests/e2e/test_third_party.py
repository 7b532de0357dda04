"""A GPTQ checkpoint of SmolLM2 made by a third party, auto-round, loads and means here what it means there.

auto-round runs in this interpreter, or in the one that M3_AUTOROUND_PYTHON names (`pip install auto-round==0.16.1
torch==2.13.0` in an environment of its own).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m3.checkpoint import SINGLE
from m3.models.hub import resolve
from m3.models.int4_linear import Int4Linear
from m3.models.loader import attention_parts, load_model, mlp_parts
from m3kernels.int4 import int4_dequantize
from m3kernels.int4.reference import TOLERANCE

pytestmark = pytest.mark.slow
LAYERS = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    python = os.environ.get("M3_AUTOROUND_PYTHON")
    if not python and importlib.util.find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed here, and M3_AUTOROUND_PYTHON names no interpreter that has it")
    target = tmp_path_factory.mktemp("autoround") / "export"
    script = Path(__file__).with_name("autoround_export.py")
    command = [python or sys.executable, str(script), str(resolve("SmolLM2-135M-Instruct")), str(target), str(LAYERS)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return target


def dequantise(tensors: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """(N, K) fp32 from what is stored, in numpy: GPTQ v1, (q - (z + 1)) * s."""
    shifts = np.arange(8, dtype=np.uint32) * 4
    words = tensors[f"{name}.qweight"].numpy().view(np.uint32)
    q = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1]).astype(np.float32)
    points = tensors[f"{name}.qzeros"].numpy().view(np.uint32)
    z = ((points[:, :, None] >> shifts) & 15).reshape(len(points), -1).astype(np.float32) + 1
    group = tensors[f"{name}.g_idx"].numpy()
    return ((q - z[group]) * tensors[f"{name}.scales"].float().numpy()[group]).T


def our_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every INT4 linear of our model, dequantised, under its own name."""
    model = load_model(folder, activations="exact")
    found = {}
    hidden = model.config.hidden_size
    for index, layer in enumerate(model.blocks):
        single = [("self_attn.o_proj", hidden)], [("mlp.down_proj", hidden)]
        fused = (layer.attention.qkv, layer.attention.o, layer.mlp.gate_up, layer.mlp.down)
        for module, parts in zip(
            fused, (attention_parts(model.config), single[0], mlp_parts(model.config), single[1]), strict=True
        ):
            assert isinstance(module, Int4Linear)
            pieces = int4_dequantize(module.weight.int4, dtype).split([rows for _, rows in parts])
            found |= {f"model.layers.{index}.{name}": piece for (name, _), piece in zip(parts, pieces, strict=True)}
    return found


@pytest.mark.parametrize("suffix", ["", "-own"], ids=["quant_method-gptq", "quant_method-auto-round"])
def test_weights_equal_what_is_stored_bitwise(exported, suffix):
    folder = exported.with_name(exported.name + suffix)
    tensors = load_file(folder / SINGLE)
    ours = our_weights(folder, torch.float32)
    assert len(ours) == 7 * LAYERS
    assert {
        name: torch.equal(w, torch.from_numpy(dequantise(tensors, name))) for name, w in ours.items()
    } == dict.fromkeys(ours, True)


def test_weights_equal_those_of_its_own_kernel_bitwise(exported):
    theirs = torch.load(exported.with_suffix(".pt"))
    dtype = next(iter(theirs.values())).dtype
    ours = our_weights(exported, dtype)
    assert ours.keys() == theirs.keys()
    assert {name: torch.equal(weight, theirs[name]) for name, weight in ours.items()} == dict.fromkeys(ours, True)


def test_logits_equal_its_dequantised_model(exported):
    """Error against fp64 at most that of transformers in fp32 on the dequantised weights, times c, plus eps."""
    from transformers import AutoConfig, LlamaForCausalLM

    tensors = load_file(exported / SINGLE)
    state = {
        name: value.float() for name, value in tensors.items() if value.is_floating_point() and "scales" not in name
    }
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        state[f"{name}.weight"] = torch.from_numpy(dequantise(tensors, name))
    config = AutoConfig.from_pretrained(exported)
    del config.quantization_config
    config.dtype = torch.float32
    reference = LlamaForCausalLM(config).float().eval()
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert unexpected == []
    reference.tie_weights()
    ids = torch.randint(0, config.vocab_size, (1, 48))
    with torch.no_grad():
        theirs = reference(ids).logits
        truth = reference.double()(ids).logits
    scale = truth.square().mean().sqrt()
    allowed = TOLERANCE["c"] * (theirs - truth).square().mean().sqrt() + TOLERANCE["eps"] * scale
    exact = load_model(exported, activations="exact")(ids)
    assert (exact - truth).square().mean().sqrt() <= allowed
    assert torch.equal(exact.argmax(-1), truth.argmax(-1))
    default = load_model(exported)(ids)
    assert (default - truth).square().mean().sqrt() <= 1e-3 * scale
