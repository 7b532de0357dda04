"""Draft checkpoints: files of other projects load as those projects mean them; ours round-trip and warn them off."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from m3.checkpoint import Checkpoint, read_json, write_checkpoint, write_json
from m3.draft.layouts import LAYOUTS, build_draft, load_draft, save_draft
from m3.models.decoder import RopeConfig
from tests.m3.draft_files import (
    ATTENTION,
    CONFIG,
    CONFIGS,
    DRAFT_IDS,
    H_T,
    HEAD_DIM,
    HEADS,
    IDS,
    LLAMA3,
    TARGET,
    V_D,
    H,
    V,
    draw,
    refused,
    speculators_config,
    state_of,
    stock_config,
    stock_tensors,
    vocabulary,
    write,
)


# -- stock ungated files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stock_file_loads(tmp_path, layout, layer):
    tensors = stock_tensors(layer)
    write_checkpoint(tmp_path, CONFIGS[layout](), tensors)
    config, state = load_draft(tmp_path, TARGET)
    assert config == CONFIG
    assert state.keys() == {name.replace("midlayer.", "layers.0.") for name in tensors}
    for name, tensor in tensors.items():
        assert torch.equal(state[name.replace("midlayer.", "layers.0.")], tensor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stock_file_loads_by_the_name_of_its_layout(tmp_path, layout):
    assert load_draft(write(tmp_path, CONFIGS[layout]()), TARGET, layout=layout)[0] == CONFIG


def test_a_stock_file_runs(tmp_path):
    config, state = load_draft(write(tmp_path), TARGET)
    draft = build_draft(config, state, draw(V, H))
    logits = draft.rollout(torch.arange(6)[None], draw(1, 6, 3 * H_T), steps=2)
    assert logits[1].shape == (1, 6, V_D)
    assert torch.equal(draft.layer.self_attn.q_proj.weight, state[f"{ATTENTION}q_proj.weight"])


def test_names_with_the_prefix_of_a_model_load(tmp_path):
    prefixed = {f"model.{name}": tensor for name, tensor in stock_tensors("layers.0.").items() if name != "d2t"}
    prefixed["lm_head.weight"] = prefixed.pop("model.lm_head.weight")
    write_checkpoint(tmp_path, stock_config(), {**prefixed, "d2t": vocabulary()["d2t"]})
    assert load_draft(tmp_path, TARGET)[0] == CONFIG


def test_a_full_vocabulary_needs_no_d2t(tmp_path):
    config = {**stock_config(), "draft_vocab_size": None}
    folder = write(tmp_path, config, d2t=None, t2d=None, lm_head__weight=draw(V, H))
    found, state = load_draft(folder, TARGET)
    assert found.draft_vocab_size == V
    assert state["d2t"].tolist() == [0] * V
    assert bool(state["t2d"].all())


# -- (i) numbers of layers --------------------------------------------------------------------------------------------
def with_ids(nested: list[int] | None, top: list[int] | None) -> dict[str, Any]:
    config = stock_config()
    config["eagle_config"] = {"use_aux_hidden_state": True} | ({} if nested is None else {IDS: nested})
    return config if top is None else {**config, IDS: top}


@pytest.mark.parametrize(
    ("nested", "top", "options", "want"),
    [
        ([1, 14, 26], None, {}, (2, 15, 27)),
        ([1, 14, 26], None, {"aux_ids": "sglang"}, (2, 15, 27)),
        (None, [1, 14, 26], {}, (1, 14, 26)),
        (None, [1, 14, 26], {"layout": "vllm"}, (1, 14, 26)),
        ([0, 13, 25], [1, 14, 26], {}, (1, 14, 26)),
        ([3, 4, 5], [1, 14, 26], {"aux_ids": "sglang"}, (4, 5, 6)),
        ([3, 4, 5], [1, 14, 26], {"aux_ids": "vllm"}, (1, 14, 26)),
        ([3, 4, 5], None, {"aux_ids": "vllm"}, (2, 15, 27)),
        (None, [3, 4, 5], {"aux_ids": "sglang"}, (2, 15, 27)),
        (None, None, {}, (2, 15, 27)),
        (None, None, {"layout": "vllm"}, (2, 15, 27)),
        ([3, 4, 5], [1, 14, 26], {"aux_ids": (0, 7, 30)}, (0, 7, 30)),
        ([26, 1, 14], None, {}, (2, 15, 27)),
        ([-1, 14, 28], None, {}, (0, 15, 29)),
        (None, [0, 14, 30], {}, (0, 14, 30)),
    ],
    ids=[
        "nested-is-plus-one",
        "nested-by-name",
        "top-level-as-is",
        "top-level-by-name",
        "both-agree",
        "both-sglang",
        "both-vllm",
        "vllm-ignores-nested",
        "sglang-ignores-top-level",
        "absent",
        "absent-vllm",
        "given",
        "unsorted",
        "embedding-by-sglang",
        "ends-by-vllm",
    ],
)
def test_layer_ids_mean_what_their_engine_does(tmp_path, nested, top, options, want):
    assert load_draft(write(tmp_path, with_ids(nested, top)), TARGET, **options)[0].aux_layers == want


def test_the_ids_of_speculators_are_as_is(tmp_path):
    config = {**speculators_config(), IDS: [1, 14, 26]}
    assert load_draft(write(tmp_path, config), TARGET)[0].aux_layers == (1, 14, 26)


@pytest.mark.parametrize(
    ("nested", "top", "options", "message"),
    [
        (
            [1, 14, 26],
            [1, 14, 26],
            {},
            r"- 1 = \[0, 13, 25\]; give aux_ids='sglang' or aux_ids='vllm'; got \[1, 14, 26",
        ),
        ([1, 14, 26], None, {"layout": "vllm"}, "at the top level .*; give aux_ids=; got"),
        (None, [1, 14, 26], {"layout": "specforge"}, "want it in eagle_config .*; give aux_ids=; got"),
        ([1, 14, 30], None, {}, r"distinct numbers of layers that have run, 0 .. 30; got \(2, 15, 31\)"),
        ([-2, 14, 26], None, {}, "distinct numbers of layers that have run"),
        (None, [2, 2, 27], {}, "distinct numbers of layers that have run"),
        (None, [2, 27], {}, r"want 3 \(the columns of fc\) distinct"),
        (None, [], {}, "want a list of ints; got"),
        ([1.0, 14, 26], None, {}, "want a list of ints; got"),
        (
            None,
            None,
            {"aux_ids": "specforge"},
            "aux_ids: want auto, sglang, vllm or numbers of layers; got 'specforge'",
        ),
        (None, None, {"aux_ids": (1, 2)}, "aux_ids: want 3"),
    ],
    ids=[
        "same-in-both",
        "vllm-nested",
        "specforge-top-level",
        "beyond-the-last",
        "negative",
        "twice",
        "two",
        "none",
        "float",
        "name",
        "given-two",
    ],
)
def test_layer_ids_that_two_engines_read_differently_are_refused(tmp_path, nested, top, options, message):
    refused(write(tmp_path, with_ids(nested, top)), message, **options)


def test_the_columns_of_fc_say_how_many_hidden_states(tmp_path):
    folder = write(tmp_path, with_ids([1, 14], None), fc__weight=draw(H, 2 * H_T))
    assert load_draft(folder, TARGET)[0].num_aux == 2


def test_a_number_of_hidden_states_that_fc_has_not_is_refused(tmp_path):
    refused(
        write(tmp_path, {**stock_config(), "num_aux_hidden_states": 2}), "num_aux_hidden_states: want 3, as fc.weight"
    )


def test_columns_of_fc_that_are_no_multiple_are_refused(tmp_path):
    refused(write(tmp_path, fc__weight=draw(H, 59)), r"fc.weight: want \(20, n x 20\), the target's hidden size; got")


# -- (ii) norm_before_residual ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["specforge", "vllm"])
@pytest.mark.parametrize(("said", "want"), [(None, False), (False, False), (True, True)])
def test_norm_before_residual_of_a_flat_file(tmp_path, layout, said, want):
    folder = write(tmp_path, {**CONFIGS[layout](), "norm_before_residual": said})
    assert load_draft(folder, TARGET)[0].norm_before_residual is want


def test_norm_before_residual_of_speculators_is_read(tmp_path):
    folder = write(tmp_path, {**speculators_config(), "norm_before_residual": True})
    assert load_draft(folder, TARGET)[0].norm_before_residual is True


def test_norm_before_residual_that_speculators_leaves_out_must_be_given(tmp_path):
    config = speculators_config()
    del config["norm_before_residual"]
    folder = write(tmp_path, config)
    refused(folder, "norm_before_residual: want true or false: .*; give norm_before_residual=; got none")
    assert load_draft(folder, TARGET, norm_before_residual=True)[0].norm_before_residual is True


def test_sglang_is_stopped_from_ignoring_norm_before_residual(tmp_path):
    config = dataclasses.replace(CONFIG, norm_before_residual=True)
    save_draft(tmp_path, config, state_of(config))
    assert read_json(tmp_path / "config.json")["architectures"] == ["LlamaForCausalLMEagle3Gated"]
    with pytest.raises(ValueError, match="ungated: want False for a draft with norm_before_residual"):
        save_draft(tmp_path, config, state_of(config), ungated=True)


# -- (iii) positions --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rope", [CONFIG.rope, LLAMA3, RopeConfig(theta=5e5, kind="linear", factor=2.0)], ids=lambda r: r.kind
)
def test_a_draft_counts_from_any_position(rope):
    config = dataclasses.replace(CONFIG, rope=rope)
    draft = build_draft(config, state_of(config), draw(V, H))
    embeds, hidden = draft.embed(torch.arange(9)[None]), draw(1, 9, H)
    from_one, from_zero = (draft.extend(embeds, hidden, torch.arange(9) + start)[0] for start in (1, 0))
    torch.testing.assert_close(from_one, from_zero, rtol=1e-5, atol=1e-5)
    stretched = draft.extend(embeds, hidden, 2 * torch.arange(9))[0]
    assert float((from_one - stretched).detach().abs().max()) > 1e-3


# -- (vi) rope --------------------------------------------------------------------------------------------------------
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": SCALING}, LLAMA3),
        ({"rope_parameters": {**SCALING, "rope_theta": 5e5}}, LLAMA3),
        ({"rope_theta": 5e5, "rope_scaling": SCALING, "rope_parameters": {**SCALING, "rope_theta": 5e5}}, LLAMA3),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            RopeConfig(theta=5e5, kind="linear", factor=2.0),
        ),
        ({}, RopeConfig(theta=1e4)),
    ],
    ids=["theta", "parameters", "scaling", "scaled-parameters", "both", "linear", "absent"],
)
@pytest.mark.parametrize("layout", ["specforge", "speculators"])
def test_rope_is_found_wherever_it_stands(tmp_path, layout, keys, want):
    config = CONFIGS[layout]()
    inner = config["transformer_layer_config"] if layout == "speculators" else config
    del inner["rope_theta"], inner["rope_scaling"]
    inner |= keys
    assert load_draft(write(tmp_path, config), TARGET)[0].rope == want


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta: want one value; got .*'rope_parameters': 1000000.0"),
        ({"rope_scaling": {**SCALING, "rope_theta": 1e6}}, "rope_theta: want one value; got"),
        (
            {"rope_scaling": SCALING, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling: want what rope_parameters",
        ),
        (
            {"rope_scaling": {**SCALING, "factor": 4.0}, "rope_parameters": SCALING},
            "rope_scaling: want what rope_parameters",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type: want default or llama3 or linear; got 'yarn'",
        ),
        ({"rope_parameters": [1]}, "rope_parameters: want an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: want 1; got 0.5"),
    ],
    ids=["theta-twice", "theta-in-scaling", "kinds", "factors", "yarn", "list", "partial"],
)
def test_rope_that_contradicts_itself_is_refused(tmp_path, keys, message):
    refused(write(tmp_path, {**stock_config(), **keys}), message)


# -- (vii) sizes ------------------------------------------------------------------------------------------------------
def test_head_dim_may_differ_from_hidden_size_over_heads(tmp_path):
    assert HEAD_DIM != H // HEADS
    config = stock_config()
    del config["head_dim"]
    assert load_draft(write(tmp_path, config), TARGET)[0].head_dim == HEAD_DIM


def test_a_head_dim_that_the_tensors_have_not_is_refused(tmp_path):
    refused(write(tmp_path, {**stock_config(), "head_dim": 8}), "head_dim: want 6, as the 12 rows of k_proj say; got 8")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vocab_size": 38}, "vocab_size: want the target's, 37; got 38"),
        ({"target_hidden_size": 21}, "target_hidden_size: want the target's, 20; got 21"),
        ({"draft_vocab_size": 12}, "draft_vocab_size: want 11, the rows of lm_head.weight; got 12"),
        ({"hidden_size": 22}, "k_proj.weight: want"),
        ({"num_key_value_heads": 4}, "k_proj.weight: want rows for 4 heads of an even size; got 12 rows"),
        ({"num_hidden_layers": 2}, "num_hidden_layers: want 1; got 2"),
        ({"model_type": "qwen3"}, "model_type: want 'llama'.*; got 'qwen3'"),
        ({"attention_bias": True}, "attention_bias: want false; got True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: want false"),
        ({"logit_scale": 2.0}, "logit_scale: want 1; got 2.0"),
        ({"layer_types": ["sliding_attention"]}, "layer_types: want full attention"),
        ({"hidden_act": "gelu"}, "hidden_act: want 'silu'; got 'gelu'"),
        ({"norm_output": "yes"}, "norm_output: want true or false; got 'yes'"),
        ({"eagle_config": [1]}, "eagle_config: want an object"),
        ({"speculators_model_type": "dflash"}, "speculators_model_type: want 'eagle3' or 'eagle3_gated'; got 'dflash'"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config: want an object; got None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_this_draft_is_refused(tmp_path, keys, message):
    refused(write(tmp_path, {**stock_config(), **keys}), message)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (
            speculators_config,
            "vllm",
            "layout: want 'auto' or 'speculators' for .* speculators_model_type 'eagle3'; got 'vllm'",
        ),
        (stock_config, "speculators", "layout: want 'auto' or 'specforge' for .* no speculators_model_type; got"),
        (stock_config, "sglang", "layout: want auto or specforge or vllm or speculators; got 'sglang'"),
    ],
    ids=["is-speculators", "is-flat", "unknown"],
)
def test_a_layout_that_the_file_is_not_in_is_refused(tmp_path, config, layout, message):
    refused(write(tmp_path, config()), message, layout=layout)


# -- writing ----------------------------------------------------------------------------------------------------------
OPTIONS: dict[str, dict[str, Any]] = {
    "ungated": {},
    "elementwise": {"gate": "elementwise"},
    "headwise-bias": {"gate": "headwise", "gate_bias": True},
    "norm-before-residual": {"norm_before_residual": True},
    "gated-norm-before-residual": {"gate": "headwise", "norm_before_residual": True},
    "norm-before-fc": {"norm_before_fc": True},
    "norm-per-layer": {"fc_norm": True, "norm_output": True},
    "llama3": {"rope": LLAMA3},
    "linear": {"rope": RopeConfig(theta=7.0, kind="linear", factor=2.5)},
    "one-layer": {"num_aux": 1, "aux_layers": (30,)},
    "four-layers": {"num_aux": 4, "aux_layers": (0, 1, 2, 30)},
    "full-vocabulary": {"draft_vocab_size": V},
    "one-kv-head": {"gate": "elementwise", "num_kv_heads": 1},
}


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_and_tensors_round_trip(tmp_path, layout, changes):
    config = dataclasses.replace(CONFIG, **changes)
    state = state_of(config)
    save_draft(tmp_path, config, state, layout=layout)
    found, tensors = load_draft(tmp_path, TARGET, layout=layout)
    assert found == config
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_and_an_embedding_round_trip(tmp_path, layout, dtype):
    config = dataclasses.replace(CONFIG, gate="elementwise")
    state = state_of(config, dtype, own_embedding=True)
    save_draft(tmp_path, config, state, layout=layout)
    found, tensors = load_draft(tmp_path, TARGET)
    assert found == config
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        name: tensor.dtype for name, tensor in state.items()
    }
    assert all(torch.equal(tensors[name], state[name]) for name in state)


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("to", LAYOUTS)
def test_a_stock_file_goes_from_layout_to_layout(tmp_path, source, to):
    config, state = load_draft(write(tmp_path / "stock", CONFIGS[source]()), TARGET)
    save_draft(tmp_path / "copy", config, state, layout=to, ungated=True)
    found, tensors = load_draft(tmp_path / "copy", TARGET)
    assert found == CONFIG
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_what_sglang_reads_of_a_written_file(tmp_path):
    save_draft(tmp_path, CONFIG, state_of(CONFIG))
    config = read_json(tmp_path / "config.json")
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert [index + 1 for index in config["eagle_config"][IDS]] == [2, 15, 27]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0
    assert config["rope_scaling"] is None
    assert "norm_output" not in config  # false would cost SpecForge the final norm
    assert set(Checkpoint(tmp_path).names) == set(stock_tensors("layers.0."))


@pytest.mark.parametrize("layout", ["specforge", "vllm"])
def test_what_vllm_reads_of_a_written_file(tmp_path, layout):
    save_draft(tmp_path, CONFIG, state_of(CONFIG), layout=layout)
    config = read_json(tmp_path / "config.json")
    assert config[IDS] == [2, 15, 27]
    assert config["norm_before_residual"] is False
    assert (config["num_aux_hidden_states"], config["target_hidden_size"]) == (3, H_T)


def test_what_speculators_reads_of_a_written_file(tmp_path):
    save_draft(tmp_path, CONFIG, state_of(CONFIG), layout="speculators", verifier="some/target")
    config = read_json(tmp_path / "config.json")
    assert config["speculators_model_type"] == "eagle3"
    assert config[IDS] == [2, 15, 27]
    assert config["norm_before_residual"] is False
    assert config["speculators_config"]["verifier"]["name_or_path"] == "some/target"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert config["transformer_layer_config"]["head_dim"] == HEAD_DIM


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stock_engines_do_not_know_a_gated_file(tmp_path, layout):
    config = dataclasses.replace(CONFIG, gate="headwise")
    save_draft(tmp_path, config, state_of(config), layout=layout)
    written = read_json(tmp_path / "config.json")
    assert written["architectures"] == ["LlamaForCausalLMEagle3Gated"]
    assert (written["attn_output_gate"], written["attn_output_gate_layout"]) == ("headwise", "separate")
    assert written.get("speculators_model_type") in (None, "eagle3_gated")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gated_draft_is_not_written_as_ungated(tmp_path, layout):
    config = dataclasses.replace(CONFIG, gate="elementwise")
    with pytest.raises(ValueError, match="save_draft: ungated: want False for a draft with gate 'elementwise'"):
        save_draft(tmp_path / "draft", config, state_of(config), layout=layout, ungated=True)
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "save_draft: state: norm.weight: want a tensor; got none"),
        ({"extra": draw(3)}, r"state: extra: want no such tensor for this config; got \(3,\) float32"),
        ({"norm.weight": draw(H + 1)}, r"state: norm.weight: want \(20,\); got \(21,\) float32"),
        ({"d2t": torch.tensor(DRAFT_IDS)}, "d2t: want 11 distinct ids"),
        ({"t2d": torch.arange(V) < V_D}, "d2t: want 11 distinct ids"),
    ],
    ids=["missing", "unknown", "shape", "absolute-ids", "other-t2d"],
)
def test_a_state_that_is_not_the_configs_is_not_written(tmp_path, change, message):
    state = {name: tensor for name, tensor in {**state_of(CONFIG), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        save_draft(tmp_path, CONFIG, state)


def test_an_unknown_layout_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="save_draft: layout: want specforge or vllm or speculators; got 'sglang'"):
        save_draft(tmp_path, CONFIG, state_of(CONFIG), layout="sglang")


# -- files on disk ----------------------------------------------------------------------------------------------------
def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, "model.safetensors: want a safetensors file; got")


def test_shards_load(tmp_path):
    write_checkpoint(tmp_path, stock_config(), stock_tensors(), shard_bytes=4000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert load_draft(tmp_path, TARGET)[0] == CONFIG


def test_a_config_that_lost_a_key_is_named(tmp_path):
    config = read_json(write(tmp_path) / "config.json")
    del config["num_attention_heads"]
    write_json(tmp_path / "config.json", config)
    refused(tmp_path, "config.json: num_attention_heads: want an int")
    assert "num_attention_heads" not in json.loads((tmp_path / "config.json").read_text())
