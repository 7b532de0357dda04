"""Tensors of draft checkpoints: gates in three layouts, vocabularies in two, norms; nothing unknown is skipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3.draft.layouts import build_draft, load_draft
from tests.m3.draft_files import (
    ATTENTION,
    CONFIG,
    DRAFT_IDS,
    H_T,
    HEAD_DIM,
    HEADS,
    IDS,
    TARGET,
    V_D,
    H,
    V,
    draw,
    refused,
    stock_config,
    stock_tensors,
    vocabulary,
    write,
)

# -- (iv) gates -------------------------------------------------------------------------------------------------------
GATE_ROWS = {"headwise": HEADS, "elementwise": HEADS * HEAD_DIM}
Q_PLAIN = stock_tensors("layers.0.")[f"{ATTENTION}q_proj.weight"]


def gate_of(kind: str) -> Tensor:
    return draw(GATE_ROWS[kind], 2 * H, seed=20)


def fused(kind: str, layout: str) -> Tensor:
    """q_proj that holds the gate, row by row from the description of the layout."""
    per_head = 1 if kind == "headwise" else HEAD_DIM
    q = [Q_PLAIN[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in range(HEADS)]
    g = [gate_of(kind)[head * per_head : (head + 1) * per_head] for head in range(HEADS)]
    if layout == "per_head":
        return torch.cat([part for head in range(HEADS) for part in (q[head], g[head])])
    return torch.cat([*q[:2], *g[:2], *q[2:], *g[2:]])


def is_gated(folder: Path, kind: str, **options: Any) -> None:
    config, state = load_draft(folder, TARGET, **options)
    assert config == dataclasses.replace(CONFIG, gate=kind)
    assert torch.equal(state[f"{ATTENTION}q_proj.weight"], Q_PLAIN)
    assert torch.equal(state[f"{ATTENTION}attn_gate.weight"], gate_of(kind))


@pytest.mark.parametrize("kind", GATE_ROWS)
@pytest.mark.parametrize("name", ["attn_gate", "gate_proj"])
def test_a_separate_gate_is_known_by_its_rows(tmp_path, kind, name):
    is_gated(write(tmp_path, **{f"layers__0__self_attn__{name}__weight": gate_of(kind)}), kind)


@pytest.mark.parametrize("kind", GATE_ROWS)
def test_a_gate_of_any_name_loads_once_it_is_pointed_at(tmp_path, kind):
    folder = write(tmp_path, layers__0__output_gate__weight=gate_of(kind))
    refused(
        folder, "model.safetensors: layers.0.output_gate.weight: want a tensor of .* give gate_key=.*; got an unknown"
    )
    is_gated(folder, kind, gate_key="layers.0.output_gate.weight")


def test_a_gate_that_the_config_names_and_the_loader_knows_not_is_pointed_out(tmp_path):
    folder = write(
        tmp_path, {**stock_config(), "attn_output_gate": "headwise"}, layers__0__g__weight=gate_of("headwise")
    )
    refused(folder, "model.safetensors: layers.0.g.weight: want .* give gate_key=")


def test_a_gate_key_that_is_no_tensor_is_refused(tmp_path):
    refused(write(tmp_path), "gate_key: want the name of a tensor of the file; got 'gate'", gate_key="gate")


def test_a_gate_proj_of_the_mlp_is_no_gate(tmp_path):
    assert load_draft(write(tmp_path), TARGET)[0].gate == "none"


@pytest.mark.parametrize("kind", GATE_ROWS)
@pytest.mark.parametrize("layout", ["per_head", "per_kv_group"])
def test_a_gate_inside_q_proj_by_the_layout_given(tmp_path, kind, layout):
    folder = write(tmp_path, layers__0__self_attn__q_proj__weight=fused(kind, layout))
    is_gated(folder, kind, gate_layout=layout)


@pytest.mark.parametrize(
    ("claim", "kind", "layout"),
    [
        ({"attn_output_gate": True}, "elementwise", "per_head"),
        ({"headwise_attn_output_gate": True}, "headwise", "per_kv_group"),
        ({"elementwise_attn_output_gate": True}, "elementwise", "per_kv_group"),
        ({"attn_output_gate_layout": "per_head"}, "headwise", "per_head"),
        ({"attn_output_gate": "elementwise", "attn_output_gate_layout": "per_kv_group"}, "elementwise", "per_kv_group"),
    ],
    ids=["qwen3-next", "headwise-paper", "elementwise-paper", "ours-per-head", "ours-per-group"],
)
def test_a_gate_inside_q_proj_by_what_the_config_says(tmp_path, claim, kind, layout):
    folder = write(tmp_path, {**stock_config(), **claim}, layers__0__self_attn__q_proj__weight=fused(kind, layout))
    is_gated(folder, kind)


@pytest.mark.parametrize("kind", GATE_ROWS)
def test_a_gate_inside_q_proj_in_unsaid_order_is_refused(tmp_path, kind):
    folder = write(tmp_path, layers__0__self_attn__q_proj__weight=fused(kind, "per_head"))
    refused(folder, f"order of the {kind} gate's rows: want gate_layout='per_head' or gate_layout='per_kv_group'; got")


def test_where_every_group_is_one_head_both_orders_are_one(tmp_path):
    config = {**stock_config(), "num_key_value_heads": HEADS}
    changes = {f"layers__0__self_attn__{name}_proj__weight": draw(HEADS * HEAD_DIM, 2 * H) for name in "kv"}
    folder = write(tmp_path, config, layers__0__self_attn__q_proj__weight=fused("elementwise", "per_head"), **changes)
    state = load_draft(folder, TARGET)[1]
    assert torch.equal(state[f"{ATTENTION}attn_gate.weight"], gate_of("elementwise"))


@pytest.mark.parametrize(
    ("config", "changes", "options", "message"),
    [
        (
            {},
            {"q_proj": draw(23, 2 * H)},
            {},
            r"rows for 4 heads of 6: 24 \(none\), 28 \(headwise\), 48 \(elementwise\); got 23",
        ),
        (
            {},
            {"attn_gate": draw(5, 2 * H)},
            {},
            r"attn_gate.weight: want 4 rows \(headwise\) or 24 rows \(elementwise\)",
        ),
        ({}, {"attn_gate": draw(4, H)}, {}, r"attn_gate.weight: want \(any, 40\)"),
        (
            {},
            {"attn_gate": draw(4, 2 * H), "q_proj": draw(28, 2 * H)},
            {},
            "want none: q_proj holds a gate in its 28 rows",
        ),
        (
            {},
            {"attn_gate": draw(4, 2 * H), "gate_proj": draw(4, 2 * H)},
            {},
            "want one tensor; got .*attn_gate.* and .*gate_proj",
        ),
        (
            {"attn_output_gate": "elementwise"},
            {},
            {},
            "attn_output_gate: want none, as the tensors say; got 'elementwise'",
        ),
        (
            {"attn_output_gate": "none"},
            {"attn_gate": draw(4, 2 * H)},
            {},
            "want headwise, as the tensors say; got 'none'",
        ),
        (
            {"attn_output_gate": "both"},
            {},
            {},
            "attn_output_gate: want none, headwise, elementwise, true or false; got 'both'",
        ),
        (
            {"attn_output_gate_layout": "rows"},
            {},
            {},
            "attn_output_gate_layout: want separate or per_head or per_kv_group",
        ),
        ({"attn_output_gate_layout": "separate"}, {"q_proj": draw(28, 2 * H)}, {}, "order of the headwise gate's rows"),
        (
            {"attn_output_gate_layout": "per_head"},
            {"attn_gate": draw(4, 2 * H)},
            {},
            "gate_layout: want 'auto' or 'separate'",
        ),
        ({}, {}, {"gate_layout": "per_head"}, "gate_layout: want 'auto' for a file without a gate; got 'per_head'"),
        ({}, {}, {"gate_layout": "rows"}, "gate_layout: want auto or separate or per_head or per_kv_group; got 'rows'"),
    ],
    ids=[
        "odd-rows",
        "odd-gate",
        "narrow-gate",
        "two-gates",
        "two-names",
        "claimed",
        "denied",
        "unknown-kind",
        "unknown-layout",
        "separate-but-fused",
        "fused-but-separate",
        "layout-of-nothing",
        "layout-name",
    ],
)
def test_gates_that_do_not_add_up_are_refused(tmp_path, config, changes, options, message):
    named = {
        f"layers__0__self_attn__{name}__weight".replace("q_proj__w", "q_proj__w"): t for name, t in changes.items()
    }
    refused(write(tmp_path, {**stock_config(), **config}, **named), message, **options)


# -- (iv) unknown and missing tensors, (v) a draft without fc ---------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "layers.0.self_attn.q_norm.weight",
        "layers.0.self_attn.q_proj.bias",
        "layers.1.mlp.up_proj.weight",
        "mask_hidden",
        "verifier_lm_head.weight",
        "fc.bias",
        "fc_norm.x.weight",
    ],
)
def test_an_unknown_tensor_is_refused_by_name(tmp_path, name):
    refused(
        write(tmp_path, **{name.replace(".", "__"): draw(4)}), f"model.safetensors: {name}: want a tensor of an EAGLE-3"
    )


@pytest.mark.parametrize("name", [name for name in stock_tensors("layers.0.") if name != "t2d"])
def test_a_missing_tensor_is_named(tmp_path, name):
    refused(
        write(tmp_path, **{name.replace(".", "__"): None}), f"model.safetensors: {name}: want .*; got no such tensor"
    )


@pytest.mark.parametrize(("name", "shape"), [("layers.0.mlp.up_proj.weight", (29, H)), ("norm.weight", (H + 1,))])
def test_a_tensor_of_another_shape_is_named(tmp_path, name, shape):
    refused(write(tmp_path, **{name.replace(".", "__"): draw(*shape)}), f"model.safetensors: {name}: want .*; got")


def test_a_tensor_of_integers_is_named(tmp_path):
    refused(write(tmp_path, norm__weight=torch.ones(H, dtype=torch.int64)), "norm.weight: want .* float32 or bfloat16")


def test_a_draft_of_the_first_kind_is_refused(tmp_path):
    """EAGLE-1: fc joins the embedding and one hidden state, q, k and v take D."""
    changes = {f"layers__0__self_attn__{name}_proj__weight": draw(12, H) for name in "kv"}
    folder = write(tmp_path, fc__weight=draw(H, 2 * H), layers__0__self_attn__q_proj__weight=draw(24, H), **changes)
    refused(folder, r"k_proj.weight: want \(any, 40\)")


def test_a_draft_over_one_hidden_state_is_refused(tmp_path):
    config = {**stock_config(), "eagle_config": {"use_aux_hidden_state": False}}
    refused(write(tmp_path, config), "use_aux_hidden_state: want true")


# -- vocabulary -------------------------------------------------------------------------------------------------------
IDS_TENSOR = torch.tensor(DRAFT_IDS)


@pytest.mark.parametrize("with_t2d", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("absolute", [False, True], ids=["difference", "absolute"])
def test_d2t_is_read_as_what_it_holds(tmp_path, absolute, dtype, with_t2d):
    held = IDS_TENSOR if absolute else IDS_TENSOR - torch.arange(V_D)
    changes = {} if with_t2d else {"t2d": None}
    state = load_draft(write(tmp_path, d2t=held.to(dtype), **changes), TARGET)[1]
    assert (state["d2t"] + torch.arange(V_D)).tolist() == DRAFT_IDS
    assert state["d2t"].dtype == torch.int64
    assert torch.equal(state["t2d"], vocabulary()["t2d"])


def both_fit() -> Tensor:
    return 2 * torch.arange(V_D)  # ids 0, 2, .. 20, or differences to 0, 3, .. 30


@pytest.mark.parametrize(("meaning", "last"), [("difference", 30), ("absolute", 20)])
def test_d2t_that_fits_both_meanings_is_decided_by_t2d_or_by_the_caller(tmp_path, meaning, last):
    folder = write(tmp_path / "without", d2t=both_fit(), t2d=None)
    refused(folder, "d2t: want d2t='difference' or d2t='absolute'; got values that fit both, and no t2d")
    given = load_draft(folder, TARGET, d2t=meaning)[1]
    assert int(given["d2t"][-1]) + V_D - 1 == last
    folder = write(tmp_path / "with", d2t=both_fit(), t2d=given["t2d"])
    assert torch.equal(load_draft(folder, TARGET)[1]["d2t"], given["d2t"])


@pytest.mark.parametrize(
    ("d2t", "t2d", "options", "message"),
    [
        (IDS_TENSOR + 1, None, {}, "d2t: want 11 distinct ids in 0 .. 36, or .*; got neither: values 1 .. 37"),
        (IDS_TENSOR - 20, None, {}, "d2t: want 11 distinct ids in 0 .. 36"),
        (torch.full((V_D,), 30), None, {}, "d2t: want 11 distinct ids"),
        (IDS_TENSOR, torch.arange(V) < V_D, {}, "d2t: want 11 distinct ids in 0 .. 36, the 11 of t2d, or"),
        (IDS_TENSOR, torch.arange(V) < V_D + 1, {}, "the 12 of t2d"),
        (IDS_TENSOR, vocabulary()["t2d"], {"d2t": "difference"}, "d2t: want 11 distinct ids"),
        (IDS_TENSOR, vocabulary()["t2d"], {"d2t": "ids"}, "d2t: want auto or difference or absolute; got 'ids'"),
        (IDS_TENSOR, torch.arange(V), {}, "t2d: want 0 and 1; got values 0 .. 36"),
        (IDS_TENSOR[:-1], vocabulary()["t2d"], {}, r"d2t: want \(11\) int64 or int32"),
        (IDS_TENSOR.float(), vocabulary()["t2d"], {}, r"d2t: want \(11\) int64 or int32"),
        (IDS_TENSOR, torch.ones(V - 1).bool(), {}, r"t2d: want \(37\) bool"),
    ],
    ids=[
        "beyond",
        "negative",
        "repeated",
        "other-set",
        "other-count",
        "forced",
        "meaning",
        "not-a-mask",
        "short",
        "float",
        "short-mask",
    ],
)
def test_d2t_that_is_neither_is_refused(tmp_path, d2t, t2d, options, message):
    refused(write(tmp_path, d2t=d2t, t2d=t2d), message, **options)


def test_a_mask_of_bytes_is_read(tmp_path):
    state = load_draft(write(tmp_path, t2d=vocabulary()["t2d"].to(torch.uint8)), TARGET)[1]
    assert torch.equal(state["t2d"], vocabulary()["t2d"])


# -- norms before fc, post-norm feedback, the draft's own embedding --------------------------------------------------
FC_NORMS = {f"fc_norm__{index}__weight": draw(H_T, seed=40 + index) for index in range(3)}
LEGACY_NORMS = dict(
    zip(("aux_norm_low__weight", "aux_norm_mid__weight", "aux_norm_high__weight"), FC_NORMS.values(), strict=True)
)


@pytest.mark.parametrize(
    ("keys", "changes"),
    [({"fc_norm": True}, FC_NORMS), ({"use_aux_norm": True}, LEGACY_NORMS), ({}, FC_NORMS)],
    ids=["flag", "legacy", "tensors-only"],
)
def test_norms_of_each_hidden_state(tmp_path, keys, changes):
    config, state = load_draft(write(tmp_path, {**stock_config(), **keys}, **changes), TARGET)
    assert config == dataclasses.replace(CONFIG, fc_norm=True)
    want = list(FC_NORMS.values())
    assert all(torch.equal(state[f"fc_norm.{index}.weight"], want[index]) for index in range(3))


@pytest.mark.parametrize(
    "keys",
    [{"norm_before_fc": True}, {"eagle_config": {IDS: [1, 14, 26], "norm_before_fc": True}}],
    ids=["top", "nested"],
)
def test_one_norm_over_all_hidden_states(tmp_path, keys):
    weight = draw(3 * H_T, seed=50)
    config, state = load_draft(write(tmp_path, {**stock_config(), **keys}, input_norm__weight=weight), TARGET)
    assert config == dataclasses.replace(CONFIG, norm_before_fc=True)
    assert torch.equal(state["input_norm.weight"], weight)


def test_post_norm_feedback(tmp_path):
    assert load_draft(write(tmp_path, {**stock_config(), "norm_output": True}), TARGET)[0].norm_output is True


@pytest.mark.parametrize(
    ("keys", "changes", "message"),
    [
        ({"fc_norm": False}, FC_NORMS, "fc_norm: want true for a file with fc_norm.0.weight; got False"),
        ({"fc_norm": True}, {}, "fc_norm.0.weight: want .*; got no such tensor"),
        ({}, {"fc_norm__0__weight": draw(H_T)}, "fc_norm.1.weight: want .*; got no such tensor"),
        ({}, {**FC_NORMS, "fc_norm__3__weight": draw(H_T)}, "fc_norm.3.weight: want a tensor of an EAGLE-3 draft"),
        (
            {},
            {**FC_NORMS, "aux_norm_low__weight": draw(H_T)},
            "fc_norm.0.weight: want one tensor; got aux_norm_low.* and fc_",
        ),
        ({"norm_before_fc": True}, {}, "input_norm.weight: want .*; got no such tensor"),
        ({"norm_before_fc": False}, {"input_norm__weight": draw(3 * H_T)}, "norm_before_fc: want true for a file with"),
    ],
    ids=["off", "missing", "one-of-three", "four", "two-names", "no-input-norm", "input-norm-off"],
)
def test_norms_that_contradict_their_flags_are_refused(tmp_path, keys, changes, message):
    refused(write(tmp_path, {**stock_config(), **keys}, **changes), message)


def test_a_draft_with_its_own_embedding(tmp_path):
    own = draw(V, H, seed=60)
    config, state = load_draft(write(tmp_path, embed_tokens__weight=own), TARGET)
    assert torch.equal(build_draft(config, state, torch.zeros(V, H)).embedding, own)


def test_a_draft_of_another_width_needs_its_own_embedding(tmp_path):
    wide = dataclasses.replace(TARGET, hidden_size=30)
    changes = {"fc__weight": draw(H, 90)}
    folder = write(tmp_path / "without", **changes)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: want \(37, 20\).*; got no such tensor"):
        load_draft(folder, wide)
    folder = write(tmp_path / "with", embed_tokens__weight=draw(V, H), **changes)
    config, state = load_draft(folder, wide)
    draft = build_draft(config, state, torch.zeros(V, 30))
    assert draft.fuse(draw(2, 90)).shape == (2, H)
