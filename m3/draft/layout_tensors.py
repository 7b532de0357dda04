"""The tensors of a draft checkpoint: their names in the wild, the three forms of a gate, the meaning of d2t.

Gate and queries are separate tensors here. Elsewhere they share q_proj, its rows in one of two orders:
    per_head      [q_0 | g_0 | q_1 | g_1 | ..]                       Qwen3-Next (attn_output_gate: true)
    per_kv_group  [q of group 0 | g of group 0 | q of group 1 | ..]  Gated Attention, arXiv 2505.06708
with head_dim rows of gate a head (elementwise) or one (headwise). Where every group is one head, both are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from m3.models.gated_eagle3 import GatedEagle3Config
from m3kernels.checks import refuse

ATTENTION = "layers.0.self_attn."
Q, K, GATE, GATE_BIAS = (
    f"{ATTENTION}{name}" for name in ("q_proj.weight", "k_proj.weight", "attn_gate.weight", "attn_gate.bias")
)
FC, HEAD, INPUT_NORM, FC_NORM, EMBEDDING = (
    "fc.weight",
    "lm_head.weight",
    "input_norm.weight",
    "fc_norm.",
    "embed_tokens.weight",
)
D2T, T2D = "d2t", "t2d"
FUSED = ("per_head", "per_kv_group")
GATE_LAYOUTS = ("separate", *FUSED)
MEANINGS = ("difference", "absolute")
LEGACY = {  # name in older files -> name here
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
    f"{ATTENTION}gate_proj.": f"{ATTENTION}attn_gate.",
}


KNOWN = {
    *(f"{ATTENTION}{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"layers.0.{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
    *(GATE, GATE_BIAS, FC, HEAD, INPUT_NORM, EMBEDDING, D2T, T2D, "norm.weight"),
}


def is_known(name: str) -> bool:
    """Whether a draft of any config can have a tensor of this name."""
    parts = name.removeprefix(FC_NORM).split(".")
    return name in KNOWN or (name.startswith(FC_NORM) and parts[0].isdecimal() and parts[1:] == ["weight"])


def canonical_names(names: Iterable[str], gate_key: str | None) -> dict[str, str]:
    """Our name -> name in the file. ``gate_key``: the file's name of the gate's weight, whatever it is.

    Raises ValueError: no tensor of that name; two tensors that mean the same.
    """
    names = sorted(names)
    given = {}
    if gate_key is not None:
        if gate_key not in names:
            raise refuse("load_draft", "gate_key", "the name of a tensor of the file", repr(gate_key))
        stem = gate_key.removesuffix(".weight")
        given = {gate_key: GATE, f"{stem}.bias": GATE_BIAS} if stem != gate_key else {gate_key: GATE}
    found: dict[str, str] = {}
    for name in names:
        ours = given.get(name) or name.removeprefix("model.")
        for old, new in LEGACY.items():
            if ours.startswith(old):
                ours = new + ours.removeprefix(old)
        if ours in found:
            raise refuse("load_draft", ours, "one tensor", f"{found[ours]} and {name}")
        found[ours] = name
    return found


def shapes(config: GatedEagle3Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a draft, its own embedding aside."""
    size, wide, inner = config.hidden_size, 2 * config.hidden_size, config.intermediate_size
    rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found: dict[str, tuple[int, ...]] = {FC: (size, config.num_aux * config.target_hidden_size)}
    found |= {
        f"layers.0.{name}.weight": (size,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    }
    found |= {Q: (rows, wide), K: (kv_rows, wide), f"{ATTENTION}v_proj.weight": (kv_rows, wide)}
    found[f"{ATTENTION}o_proj.weight"] = (size, rows)
    if config.gate != "none":
        found[GATE] = (config.gate_rows, wide)
    if config.gate_bias:
        found[GATE_BIAS] = (config.gate_rows,)
    found |= {f"layers.0.mlp.{name}_proj.weight": (inner, size) for name in ("gate", "up")}
    found |= {
        "layers.0.mlp.down_proj.weight": (size, inner),
        "norm.weight": (size,),
        HEAD: (config.draft_vocab_size, size),
    }
    if config.norm_before_fc:
        found[INPUT_NORM] = (config.num_aux * config.target_hidden_size,)
    if config.fc_norm:
        found |= {f"{FC_NORM}{index}.weight": (config.target_hidden_size,) for index in range(config.num_aux)}
    return {**found, D2T: (config.draft_vocab_size,), T2D: (config.vocab_size,)}


# -- gate -------------------------------------------------------------------------------------------------------------
def fused_gate(rows: int, heads: int, head_dim: int) -> str:
    """Gate that a q_proj of so many rows holds: "none", "headwise" or "elementwise"."""
    kinds = {heads * head_dim: "none", heads * (head_dim + 1): "headwise", 2 * heads * head_dim: "elementwise"}
    if rows not in kinds:
        want = ", ".join(f"{count} ({kind})" for count, kind in kinds.items())
        raise refuse("load_draft", Q, f"rows for {heads} heads of {head_dim}: {want}", f"{rows} rows")
    return kinds[rows]


def claimed_gate(config: Mapping[str, Any]) -> tuple[set[str], str | None]:
    """(kinds, layout) that config.json names, in our keys, Qwen3-Next's or those of arXiv 2505.06708."""
    kinds, layout = set(), config.get("attn_output_gate_layout")
    if layout not in (None, *GATE_LAYOUTS):
        raise refuse(
            "load_draft", "config.json: attn_output_gate_layout", " or ".join(GATE_LAYOUTS), f"{layout!r}"[:200]
        )
    gate = config.get("attn_output_gate")
    if gate is True:
        kinds.add("elementwise")
        layout = layout or "per_head"
    elif gate in ("none", "headwise", "elementwise"):
        kinds.add(gate)
    elif gate not in (None, False):
        want = "none, headwise, elementwise, true or false"
        raise refuse("load_draft", "config.json: attn_output_gate", want, f"{gate!r}"[:200])
    for kind in ("headwise", "elementwise"):
        if config.get(f"{kind}_attn_output_gate"):
            kinds.add(kind)
            layout = layout or "per_kv_group"
    return kinds, layout


def split_gate(
    weight: Tensor, kind: str, heads: int, kv_heads: int, head_dim: int, layout: str | None
) -> tuple[Tensor, Tensor]:
    """Rows of a q_proj that holds a gate -> (queries, gate). Raises ValueError where the order of the rows is open."""
    if layout not in FUSED:
        if heads != kv_heads or layout is not None:
            got = f"{len(weight)} rows, which fit both" if layout is None else f"{layout!r} for {len(weight)} rows"
            want = f"gate_layout='{FUSED[0]}' or gate_layout='{FUSED[1]}'"
            raise refuse("load_draft", f"{Q}: order of the {kind} gate's rows", want, got)
        layout = FUSED[0]
    groups = heads if layout == "per_head" else kv_heads
    per_group = heads // groups
    gate_dim = 1 if kind == "headwise" else head_dim
    queries, gate = weight.view(groups, -1, weight.shape[1]).split((per_group * head_dim, per_group * gate_dim), dim=1)
    return queries.reshape(-1, weight.shape[1]), gate.reshape(-1, weight.shape[1])


# -- vocabulary -------------------------------------------------------------------------------------------------------
def differences(d2t: Tensor, t2d: Tensor | None, vocab_size: int, meaning: str) -> Tensor:
    """d2t as target id - draft id, int64, whichever of the two it held, checked against t2d.

    Args:
        meaning: "difference", "absolute" (target ids), or "auto": what the values and t2d allow.
    Raises:
        ValueError: ids out of range or repeated, another set than t2d's, or both meanings possible.
    """
    if meaning not in ("auto", *MEANINGS):
        raise refuse("load_draft", "d2t", " or ".join(("auto", *MEANINGS)), repr(meaning))
    index = torch.arange(len(d2t))
    readings = {"difference": d2t.long() + index, "absolute": d2t.long()}
    tried = [meaning] if meaning != "auto" else list(MEANINGS)
    good = {name: readings[name] for name in tried if _is_vocabulary(readings[name], t2d, vocab_size)}
    if not good:
        of = "" if t2d is None else f", the {int(t2d.sum())} of t2d"
        low, high = (int(d2t.min()), int(d2t.max())) if len(d2t) else (0, 0)
        want = f"{len(d2t)} distinct ids in 0 .. {vocab_size - 1}{of}, or their differences to 0, 1, .."
        raise refuse("load_draft", "d2t", want, f"neither: values {low} .. {high}")
    first, *others = good.values()
    if others and not torch.equal(first, others[0]):
        raise refuse("load_draft", "d2t", "d2t='difference' or d2t='absolute'", "values that fit both, and no t2d")
    return first - index


def _is_vocabulary(ids: Tensor, t2d: Tensor | None, vocab_size: int) -> bool:
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        return False
    named = torch.zeros(vocab_size, dtype=torch.bool)
    named[ids] = True
    return int(named.sum()) == len(ids) and (t2d is None or torch.equal(named, t2d))
