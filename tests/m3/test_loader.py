"""Loading and writing checkpoints: every INT4 format against transformers with dequantised weights, then mishaps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from int4_formats import QUANTIZATION, rewrite
from safetensors.torch import load_file, save_file
from tiny_models import SMALL, make_checkpoint

from m3.checkpoint import INDEX, SINGLE, Checkpoint, write_checkpoint
from m3.models.decoder import Concat, Moe
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear
from m3.models.loader import load_model
from m3.quantize.export import export_model
from m3.quantize.round_to_nearest import RoundConfig, quantize_model, sizes
from m3kernels.int4 import int4_dequantize

OWN_ORDERS = ("gptq-act-order-each-its-own", "qwen3_moe")
RELATIVE_ERROR = 5e-6  # fp32 in another order of summation, relative to the largest logit


def tokens() -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (1, 29))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


# gate and up of one expert share their input, so GPTQ gives them one order: an order for each is for plain models only
@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, family) for kind in QUANTIZATION for family in ("llama", "qwen3_moe") if (kind, family) != OWN_ORDERS],
)
def test_int4_formats_equal_transformers_with_the_dequantised_weights(kind, family, tmp_path):
    reference = make_checkpoint(tmp_path, family)
    rewrite(tmp_path, kind, reference)
    model = load_model(tmp_path, activations="exact")
    ids = tokens()
    with torch.no_grad():
        assert relative_error(model(ids), reference(ids).logits) <= RELATIVE_ERROR


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("gptq-v1", True), ("gptq-act-order", True), ("gptq-act-order-each-its-own", False), ("gptq-some-dense", False)],
)
def test_qkv_is_fused_where_formats_agree(kind, fused, tmp_path):
    reference = make_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, kind, reference)
    qkv = load_model(tmp_path).blocks[0].attention.qkv
    assert isinstance(qkv, Int4Linear if fused else Concat)


def test_experts_of_an_int4_checkpoint_are_packed(tmp_path):
    reference = make_checkpoint(tmp_path, "qwen3_moe")
    rewrite(tmp_path, "gptq-v1", reference)
    mlp = load_model(tmp_path).blocks[0].mlp
    assert isinstance(mlp, Moe)
    assert isinstance(mlp.experts, Int4Experts)
    assert mlp.experts.num_experts == 6


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied-bias", "qwen3", "qwen3_moe-one-dense-layer"])
@pytest.mark.parametrize(
    "config",
    [
        RoundConfig(group_size=32, method="minmax"),
        RoundConfig(group_size=64, method="mse", symmetric=False),
        RoundConfig(group_size=-1, method="minmax"),
        RoundConfig(group_size=128, method="minmax", scale_dtype=torch.float32),
    ],
    ids=["g32", "g64-asymmetric", "whole-rows", "g128-partial-fp32-scales"],
)
def test_export_and_load_give_the_same_logits_bitwise(family, config, tmp_path):
    make_checkpoint(tmp_path / "dense", family)
    int4 = quantize_model(load_model(tmp_path / "dense"), config)
    export_model(int4, tmp_path / "int4", tmp_path / "dense", dtype=torch.float32)
    ids = tokens()
    assert torch.equal(load_model(tmp_path / "int4")(ids), int4(ids))


def test_export_writes_what_others_read(tmp_path):
    make_checkpoint(tmp_path / "dense", "llama")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    int4 = quantize_model(load_model(tmp_path / "dense"), RoundConfig(group_size=32))
    export_model(int4, tmp_path / "int4", tmp_path / "dense")
    config = json.loads((tmp_path / "int4" / "config.json").read_text())["quantization_config"]
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert wanted.items() <= config.items()
    tensors = load_file(tmp_path / "int4" / SINGLE)
    name = "model.layers.1.self_attn.k_proj"
    assert tensors[f"{name}.qweight"].shape == (8, 48)
    assert tensors[f"{name}.qzeros"].eq(0x77777777).all()
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    q = np.stack([(tensors[f"{name}.qweight"].numpy().view(np.uint32) >> (4 * nibble)) & 15 for nibble in range(8)], 1)
    values = (q.reshape(64, 48).T.astype(np.float32) - 8) * tensors[f"{name}.scales"].float().numpy().T.repeat(
        32, axis=1
    )
    whole = int4_dequantize(int4.blocks[1].attention.qkv.weight.int4, torch.float32)
    assert np.array_equal(values, whole[96:144].numpy())
    assert (tmp_path / "int4" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("family", ["llama-tied", "qwen3_moe"])
def test_dense_models_and_shards_come_back_bitwise(family, tmp_path):
    make_checkpoint(tmp_path / "dense", family)
    model = load_model(tmp_path / "dense")
    export_model(model, tmp_path / "copy", tmp_path / "dense", dtype=torch.float32, shard_bytes=50_000)
    assert (tmp_path / "copy" / INDEX).is_file()
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 2
    ids = tokens()
    assert torch.equal(load_model(tmp_path / "copy")(ids), model(ids))
    assert Checkpoint(tmp_path / "copy").names == Checkpoint(tmp_path / "dense").names or family == "qwen3_moe"


def test_a_quantised_head_is_written_and_read(tmp_path):
    make_checkpoint(tmp_path / "dense", "llama-tied")
    config_path = tmp_path / "dense" / "config.json"
    tensors = load_file(tmp_path / "dense" / SINGLE)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][
        :96
    ].contiguous()  # GPTQ: multiples of 8
    save_file(tensors, tmp_path / "dense" / SINGLE)
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "vocab_size": 96}))
    int4 = quantize_model(load_model(tmp_path / "dense"), RoundConfig(group_size=32, head=True))
    export_model(int4, tmp_path / "int4", tmp_path / "dense", dtype=torch.float32)
    loaded = load_model(tmp_path / "int4")
    assert isinstance(loaded.head, Int4Linear)
    ids = tokens() % 96
    assert torch.equal(loaded(ids), int4(ids))


def test_a_tied_head_shares_the_embedding(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    model = load_model(tmp_path)
    assert model.head.weight.data_ptr() == model.embedding.data_ptr()


def test_sizes_count_every_byte_once(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    model = load_model(tmp_path)
    linears = 3 * (64 * (96 + 48 + 48) + 96 * 64 + 3 * 64 * 96)
    rest = 99 * 64 + 7 * 64
    dense = sizes(model)
    assert (dense.linears, dense.linears_bf16, dense.rest_bf16) == (2 * linears, 2 * linears, 2 * rest)
    packed = sizes(quantize_model(model, RoundConfig(group_size=32)))
    # rows padded to 64: qkv 192, o 64, gate_up 192, down 64; columns 64, 96, 64, 96; one fp16 scale for 32 columns
    padded = 3 * (192 * 64 + 64 * 96 + 192 * 64 + 64 * 96)
    assert (packed.linears, packed.rest_bf16) == (padded // 2 + padded // 32 * 2, 2 * rest)


# -- mishaps ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def int4_folder(tmp_path):
    reference = make_checkpoint(tmp_path, "llama")
    rewrite(tmp_path, "gptq-v1", reference)
    return tmp_path


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE)
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / SINGLE)


Q = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, r"model.norm.weight: want \(64\) float32 or .*; got no such tensor"),
        ("model.norm.weight", torch.zeros(63), r"model.norm.weight: want \(64\) .*; got \(63,\) float32"),
        ("model.norm.weight", torch.zeros(64).int(), r"want \(64\) float32 or bfloat16 or float16; got \(64,\) int32"),
        ("model.embed_tokens.weight", torch.zeros(99, 63), r"want \(99, 64\) .*; got \(99, 63\) float32"),
        (f"{Q}.qweight", None, rf"{Q}.qweight: want \(12, 64\) int32; got no such tensor"),
        (f"{Q}.qweight", torch.zeros(12, 64), r"want \(12, 64\) int32; got \(12, 64\) float32"),
        (f"{Q}.qweight", torch.zeros(11, 64).int(), r"want \(12, 64\) int32; got \(11, 64\) int32"),
        (f"{Q}.scales", torch.zeros(3, 63).half(), r"scales: want \(any, 64\) .*; got \(3, 63\) float16"),
        (f"{Q}.scales", torch.zeros(2, 64).half(), rf"{Q}.*scales: want \(3, 64\) .*; got \(2, 64\) float16"),
        (f"{Q}.scales", torch.full((3, 64), torch.nan).half(), rf"{Q}.*scales: want finite values"),
        (f"{Q}.qzeros", torch.zeros(3, 7).int(), r"qzeros: want \(any, 8\) int32; got \(3, 7\) int32"),
        (f"{Q}.g_idx", torch.zeros(96).int(), rf"{Q}.*g_idx: want 32 columns in every group"),
        (f"{Q}.g_idx", torch.full((96,), -1).int(), rf"{Q}.*g_idx: want values in 0..2; got -1"),
    ],
)
def test_a_malformed_tensor_is_named(int4_folder, name, tensor, message):
    change(int4_folder, name, tensor)
    with pytest.raises(ValueError, match=f"checkpoint: {SINGLE}: .*{message}"):
        load_model(int4_folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 8, r"bits.*want 4; got 8"),
        ("group_size", 48, r"q_proj: from_gptq: g_idx: want 48 columns in every group"),
        ("group_size", "32", "group_size: want -1 or a positive multiple of 16"),
        ("quant_method", "marlin", "quant_method: want gptq or awq or auto-round or compressed-tensors; got 'marlin'"),
        ("checkpoint_format", "exl2", "checkpoint_format.*want None or 'gptq' or 'gptq_v2'; got exl2"),
        ("sym", True, r"qzeros: want zero points of 8"),
    ],
)
def test_a_quantization_config_that_does_not_fit(int4_folder, key, value, message):
    path = int4_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"][key] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(int4_folder)


def test_files_that_are_missing_or_truncated(llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(llama[0], folder)
    with pytest.raises(ValueError, match=r"checkpoint: .*nowhere/config.json: want a file; got none"):
        load_model(tmp_path / "nowhere")
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{SINGLE}: want a safetensors file; got {len(data) // 2} bytes: "):
        load_model(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match=rf"{SINGLE}: want a file; got none"):
        load_model(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json: want a JSON object; got list"):
        load_model(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ([], "weight_map: want an object of tensor name to file name"),
        ({"a": "../model.safetensors"}, r"weight_map\['a'\]: want a \*.safetensors file of this folder"),
        ({"a": "other.safetensors"}, "other.safetensors: want a file; got none"),
        ({"a": SINGLE}, f"{SINGLE}: a: want a tensor, as {INDEX} says; got none of that name"),
    ],
    ids=["no-object", "outside", "no-file", "no-tensor"],
)
def test_an_index_that_lies(weight_map, message, tmp_path):
    write_checkpoint(tmp_path, {}, {"b": torch.zeros(1)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_experts_with_gate_and_up_in_different_orders_are_refused(tmp_path):
    reference = make_checkpoint(tmp_path, "qwen3_moe")
    rewrite(tmp_path, "gptq-act-order-each-its-own", reference)
    with pytest.raises(ValueError, match=r"mlp.experts.0: want gate_proj and up_proj in one format"):
        load_model(tmp_path)


def test_a_model_is_not_quantised_twice(llama):
    int4 = quantize_model(load_model(llama[0]), RoundConfig(group_size=32))
    with pytest.raises(
        ValueError, match="quantize_model: model: want a model that is not quantised yet; got Int4Linear"
    ):
        quantize_model(int4)


def test_export_refuses_two_group_sizes(llama, tmp_path):
    model = load_model(llama[0])
    int4 = quantize_model(model, RoundConfig(group_size=32))
    other = quantize_model(model, RoundConfig(group_size=64))
    int4.blocks[0].attention.o = other.blocks[0].attention.o
    with pytest.raises(ValueError, match=r"want one group size in all INT4 linears; got \[32, 64\]"):
        export_model(int4, tmp_path, llama[0])


def test_dtype_out_of_contract(llama):
    with pytest.raises(ValueError, match=r"load_model: dtype: want float32, bfloat16 or float16; got torch.int8"):
        load_model(llama[0], dtype=torch.int8)
