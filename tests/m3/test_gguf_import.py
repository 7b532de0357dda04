"""Small GGUF files written here: q and k rows go back to halves, names and config to Hugging Face's, text to ids."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tiny_models import make_checkpoint
from tokenizers import pre_tokenizers

from m3.models.gguf_import import halves_from_pairs, import_gguf
from m3.models.loader import load_model
from m3.models.tokenizer import Tokenizer

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, state, *, architecture="llama", pre="smollm"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(24)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*alphabet[:95], "<|a|>", "<|b|>", "ab", "12"])
    writer.add_token_types([1] * 95 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(95)
    writer.add_eos_token_id(96)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in state.items():
        values = tensor.numpy()
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            kind = NAMES[rest.removesuffix(".weight")]
            values = permute(values, {"attn_q": 4, "attn_k": 2}[kind]) if kind in ("attn_q", "attn_k") else values
            name = f"blk.{index}.{kind}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def source(tmp_path):
    """(path of a GGUF file, transformers' model with the same weights)."""
    reference = make_checkpoint(tmp_path / "dense", "llama-tied")
    state = {name: value for name, value in reference.state_dict().items() if name != "lm_head.weight"}
    write_gguf(tmp_path / "model.gguf", state)
    return tmp_path / "model.gguf", reference


def test_logits_equal_the_model_that_was_written(source, tmp_path):
    path, reference = source
    calls = []
    import_gguf(path, tmp_path / "out", dtype=torch.float32, progress=lambda *call: calls.append(call))
    tokens = torch.randint(0, 95, (1, 19))
    with torch.no_grad():
        want = reference(tokens).logits
    assert float((load_model(tmp_path / "out")(tokens) - want).abs().max() / want.abs().max()) <= 5e-6
    assert calls[-1] == (29, 29)


def test_the_permutation_is_undone():
    weight = torch.arange(48.0).reshape(24, 2)
    assert torch.equal(halves_from_pairs(torch.from_numpy(permute(weight.numpy(), 3)), 3), weight)


def test_tokens_and_template(source, tmp_path):
    import_gguf(source[0], tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    ids = [*range(99)]
    vocabulary = {tokenizer.fast.id_to_token(index): index for index in ids}
    assert tokenizer.encode("ab<|b|>1") == [vocabulary["ab"], 96, vocabulary["1"]]
    assert tokenizer.encode("12") == [vocabulary["1"], vocabulary["2"]]  # smollm cuts digits apart before merging
    assert tokenizer.eos_token_id == 96
    assert tokenizer.chat([{"content": "ab"}]) == [vocabulary["ab"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture: want 'llama'; got mamba"),
        ({"pre": "tekken"}, "tokenizer: want gpt2 with pre in smollm, gpt-2; got gpt2 with pre 'tekken'"),
    ],
    ids=["architecture", "tokenizer"],
)
def test_other_models_are_refused(changes, message, tmp_path):
    write_gguf(tmp_path / "model.gguf", {"model.norm.weight": torch.zeros(64)}, **changes)
    with pytest.raises(ValueError, match=f"import_gguf: {message}"):
        import_gguf(tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
