"""What the vLLM plug-in does without vLLM: reading parts of any format, one rank's share, the gate. With vLLM:
tests/e2e/test_vllm_serve.py and test_vllm_formats.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from int4_formats import QUANTIZATION, Layer

from m3.draft.layout_tensors import ATTENTION, GATE, Q
from m3.models.decoder import RopeConfig
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config
from m3.plugins.draft_gate import Gate, gate_of_file, gated, kind_of_config, separate
from m3.plugins.int4_parts import (
    Parts,
    four_bit_settings,
    is_four_bit,
    joined,
    packed_layers,
    rank_columns,
    rank_rows,
)
from m3kernels.int4 import int4_dequantize

ROWS, COLUMNS, GROUP = 128, 192, 32
PLAIN = [kind for kind in QUANTIZATION if kind != "gptq-some-dense"]


def layer_of(kind: str, rows: int = ROWS, seed: int = 0) -> Layer:
    random = np.random.default_rng(seed)
    g_idx = np.arange(COLUMNS) // GROUP
    if "act-order" in kind:
        g_idx = np.random.default_rng(seed if "each" in kind else 7).permutation(g_idx)
    return Layer(rows, COLUMNS, symmetric=kind == "gptq-symmetric", g_idx=g_idx, random=random)


def tensors_of(kind: str, layer: Layer) -> dict[str, torch.Tensor]:
    if kind == "awq":
        return layer.awq()
    if kind == "compressed-tensors":
        return layer.compressed_tensors()
    return layer.gptq(2 if kind == "gptq-v2" else 1)


def parts_of(kind: str, layers: dict[object, Layer]) -> Parts:
    parts = Parts(torch.device("cpu"))
    for shard, layer in layers.items():
        for part, tensor in tensors_of(kind, layer).items():
            parts.add(shard, part, tensor)
    return parts


# -- weights ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", PLAIN)
def test_parts_become_the_weight_that_they_stand_for(kind):
    layer = layer_of(kind)
    parts = parts_of(kind, {None: layer})
    weight = parts.take(None, "model.o_proj", four_bit_settings(QUANTIZATION[kind]))
    assert torch.equal(int4_dequantize(weight, torch.float32), layer.weight)
    assert weight.scales.dtype == torch.float16
    assert parts.tensors == {}


@pytest.mark.parametrize(("kind", "count"), [("awq", 1), ("gptq-act-order", 1), ("gptq-act-order-each-its-own", 3)])
def test_linears_become_one_weight_if_they_share_an_order(kind, count):
    layers = {name: layer_of(kind, rows, seed) for seed, (name, rows) in enumerate({"q": 64, "k": 64, "v": 64}.items())}
    parts = parts_of(kind, layers)
    weights = joined([parts.take(name, name, four_bit_settings(QUANTIZATION[kind])) for name in "qkv"])
    assert len(weights) == count
    dense = torch.cat([int4_dequantize(weight, torch.float32) for weight in weights])
    assert torch.equal(dense, torch.cat([layer.weight for layer in layers.values()]))


@pytest.mark.parametrize(
    ("rows", "rank", "ranks", "want"), [(32, 2, 4, (64, 96)), (64, 2, 4, (64, 128)), (128, 1, 2, (0, 128))]
)
def test_a_rank_has_its_rows_and_few_heads_are_held_by_several(rows, rank, ranks, want):
    layer = layer_of("awq")
    weight = parts_of("awq", {None: layer}).take(None, "x", four_bit_settings(QUANTIZATION["awq"]))
    got = int4_dequantize(rank_rows("x", weight, rows, rank, ranks), torch.float32)
    assert torch.equal(got, layer.weight[want[0] : want[1]])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_columns_even_within_a_group(rank):
    layer = layer_of("gptq-v1")
    weight = parts_of("gptq-v1", {None: layer}).take(None, "x", four_bit_settings(QUANTIZATION["gptq-v1"]))
    got = int4_dequantize(rank_columns("x", weight, COLUMNS // 2, rank), torch.float32)
    assert torch.equal(got, layer.weight[:, rank * COLUMNS // 2 : (rank + 1) * COLUMNS // 2])


def test_act_order_has_no_part_of_the_columns():
    weight = parts_of("gptq-act-order", {None: layer_of("gptq-act-order")}).take(
        None, "x", four_bit_settings(QUANTIZATION["gptq-act-order"])
    )
    with pytest.raises(ValueError, match=r"checkpoint: mlp\.down_proj: .*no act-order permutation"):
        rank_columns("mlp.down_proj", weight, COLUMNS // 2, 1)


def test_rows_that_no_rank_has_are_refused():
    weight = parts_of("awq", {None: layer_of("awq")}).take(None, "x", four_bit_settings(QUANTIZATION["awq"]))
    with pytest.raises(ValueError, match=re.escape("checkpoint: lm_head: want a multiple of the 192 rows of a rank")):
        rank_rows("lm_head", weight, 192, 0, 1)


def test_a_layer_of_its_own_settings():
    """AutoRound's extra_config: here a layer in another group size than the rest."""
    stored = {**QUANTIZATION["auto-round"], "group_size": 64, "extra_config": {"x": {"group_size": GROUP}}}
    layer = layer_of("auto-round")
    weight = parts_of("auto-round", {None: layer}).take(None, "x", four_bit_settings(stored))
    assert torch.equal(int4_dequantize(weight, torch.float32), layer.weight)


def test_a_tensor_that_never_came_is_named():
    parts = parts_of("awq", {None: layer_of("awq")})
    del parts.tensors[None]["scales"]
    with pytest.raises(ValueError, match=re.escape("checkpoint: mlp.up_proj: from_autoround: scales")):
        parts.take(None, "mlp.up_proj", four_bit_settings(QUANTIZATION["awq"]))


def test_parts_are_copies():
    tensor = torch.arange(4)
    parts = Parts(torch.device("cpu"))
    parts.add("q", "g_idx", tensor)
    tensor.zero_()
    assert parts.tensors["q"]["g_idx"].tolist() == [0, 1, 2, 3]


def test_packed_layers_of_headers():
    metadata = {
        "__metadata__": {"format": "pt"},
        "a.q_proj.qweight": {"dtype": "I32", "shape": [8, 8]},
        "a.q_proj.scales": {"dtype": "BF16", "shape": [1, 8]},
        "a.norm.weight": {"dtype": "F32", "shape": [8]},
    }
    assert packed_layers(metadata) == {"a.q_proj": {"qweight": torch.int32, "scales": torch.bfloat16}}
    with pytest.raises(ValueError, match=re.escape("want packed tensors (qweight or weight_packed); got none")):
        packed_layers({"a.norm.weight": {"dtype": "F32"}})
    with pytest.raises(ValueError, match=r"a\.q_proj\.scales: want I32 or .*; got F64"):
        packed_layers({"a.q_proj.scales": {"dtype": "F64"}})


@pytest.mark.parametrize("kind", PLAIN)
def test_four_bits_of_every_form_are_taken(kind):
    assert is_four_bit(QUANTIZATION[kind])


def with_activations() -> dict:
    stored = json.loads(json.dumps(QUANTIZATION["compressed-tensors"]))
    stored["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    return stored


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "fp8"},
        {**QUANTIZATION["gptq-v1"], "bits": 8},
        {**QUANTIZATION["awq"], "bits": 8},
        with_activations(),
    ],
    ids=["fp8", "gptq of 8 bits", "awq of 8 bits", "activations of 8 bits"],
)
def test_what_is_not_four_bits_is_left_to_vllm(stored):
    assert not is_four_bit(stored)


# -- gate -------------------------------------------------------------------------------------------------------------
H, HEADS, KV_HEADS, HEAD_DIM = 24, 4, 2, 6
CONFIG = {"hidden_size": H, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}


def state(gate_rows: int, *, legacy: bool = False) -> dict[str, torch.Tensor]:
    found = {Q: torch.randn(HEADS * HEAD_DIM, 2 * H)}
    if gate_rows:
        found[GATE] = torch.randn(gate_rows, 2 * H)
    return {name.replace("layers.0.", "midlayer.") if legacy else name: tensor for name, tensor in found.items()}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("rows", "kind"),
    [(0, "none"), (HEADS, "headwise"), (HEADS * HEAD_DIM, "elementwise")],
    ids=["none", "head", "element"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_gate_is_read_from_the_tensors(rows, kind, legacy):
    tensors = state(rows, legacy=legacy)
    gate = gate_of_file(shapes(tensors), CONFIG)
    assert gate == Gate(kind=kind, bias=False, fused=None, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    assert set(separate(tensors, gate)) == {Q, GATE} if rows else {Q}


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
@pytest.mark.parametrize("layout", ["per_head", "per_kv_group"])
def test_a_gate_within_q_proj_is_taken_apart(kind, layout):
    width = 1 if kind == "headwise" else HEAD_DIM
    q, gate = torch.randn(HEADS, HEAD_DIM, 2 * H), torch.randn(HEADS, width, 2 * H)
    groups = HEADS if layout == "per_head" else KV_HEADS
    both = torch.cat((q.reshape(groups, -1, 2 * H), gate.reshape(groups, -1, 2 * H)), dim=1).flatten(0, 1)
    config = {**CONFIG, "attn_output_gate": kind, "attn_output_gate_layout": layout}
    found = gate_of_file({Q: tuple(both.shape)}, config)
    assert (found.kind, found.fused) == (kind, layout)
    apart = separate({Q: both}, found)
    assert torch.equal(apart[Q], q.flatten(0, 1))
    assert torch.equal(apart[GATE], gate.flatten(0, 1))


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, CONFIG, f"{Q}: want a tensor of the checkpoint; got none"),
        ({Q: (2 * HEADS * HEAD_DIM, 2 * H)}, CONFIG, "attn_output_gate_layout: want per_head or per_kv_group"),
        ({Q: (2 * HEADS * HEAD_DIM, 2 * H), GATE: (HEADS, 2 * H)}, CONFIG, "a second one"),
        ({Q: (HEADS * HEAD_DIM, 2 * H), GATE: (5, 2 * H)}, CONFIG, "want 4 or 24 rows; got 5"),
        (
            {Q: (HEADS * HEAD_DIM, 2 * H), GATE: (HEADS, 2 * H)},
            {**CONFIG, "attn_output_gate": "elementwise"},
            "want headwise, as the tensors say; got elementwise",
        ),
    ],
    ids=["no queries", "order open", "two gates", "another size", "config.json says another"],
)
def test_gates_that_are_refused(tensors, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gate_of_file(tensors, config)


@pytest.mark.parametrize(
    ("config", "kind"),
    [({}, "none"), ({"attn_output_gate": True}, "elementwise"), ({"headwise_attn_output_gate": True}, "headwise")],
)
def test_the_gate_that_config_json_says(config, kind):
    assert kind_of_config(config) == kind


@pytest.mark.parametrize("kind", ["headwise", "elementwise"])
def test_the_formula_is_that_of_our_draft(kind):
    config = GatedEagle3Config(
        hidden_size=H,
        target_hidden_size=H,
        intermediate_size=8,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        vocab_size=16,
        draft_vocab_size=16,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1e4),
        gate=kind,
        aux_layers=(1, 2, 3),
        max_position_embeddings=16,
    )
    attention = GatedEagle3(config, torch.randn(16, H)).layer.self_attn
    y, x = torch.randn(1, HEADS, 5, HEAD_DIM), torch.randn(1, 5, 2 * H)
    with torch.no_grad():
        rows = y.transpose(1, 2).flatten(2)[0]
        got = attention.o_proj(gated(rows, attention.attn_gate(x[0]), HEADS))
        torch.testing.assert_close(got, attention.output(y, x)[0])


def test_the_names_of_a_gate_escape_vllms_renaming():
    """vLLM and SGLang turn ``.gate_proj`` into ``.gate_up_proj``."""
    assert ".gate_proj" not in GATE
    assert GATE.startswith(ATTENTION)


# -- the entry point --------------------------------------------------------------------------------------------------
def test_importing_the_entry_point_loads_nothing_heavy():
    code = (
        "import sys, m3.plugins.vllm; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'vllm')))"
    )
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
