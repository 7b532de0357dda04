"""The output gate of a draft for serving engines: which one a checkpoint has, its tensors apart, its formula."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from m3.draft import layout_tensors as tensors
from m3kernels.checks import refuse

OP = "draft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What gate a checkpoint has, and where.

    ``fused``: None for a tensor of its own, else the order of the rows of q_proj that hold it: "per_head" or
    "per_kv_group".
    """

    kind: str  # "none", "headwise", "elementwise"
    bias: bool
    fused: str | None
    heads: int
    kv_heads: int
    head_dim: int


def gate_of_file(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Gate:
    """The gate of a draft, by the shapes of its tensors; config.json must not contradict them.

    Args:
        shapes: of every tensor, under the file's names.
        config: config.json, flat (SGLang's, SpecForge's or vLLM's form).
    Raises:
        ValueError: q_proj is missing, of no known size, or holds a gate beside a separate one; another gate than
            config.json says; rows of q_proj whose order neither shapes nor config.json tell.
    """
    names = tensors.canonical_names(shapes, None)
    if tensors.Q not in names:
        raise refuse(OP, tensors.Q, "a tensor of the checkpoint", "none")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rows = shapes[names[tensors.Q]][0]
    kind, fused = tensors.fused_gate(rows, heads, head_dim), None
    said_kinds, said_layout = tensors.claimed_gate(config)
    if tensors.GATE in names:
        if kind != "none":
            raise refuse(OP, names[tensors.GATE], f"none: q_proj holds a gate in its {rows} rows", "a second one")
        gate_rows = shapes[names[tensors.GATE]][0]
        kinds = {heads: "headwise", heads * head_dim: "elementwise"}
        if gate_rows not in kinds:
            raise refuse(OP, names[tensors.GATE], f"{' or '.join(map(str, kinds))} rows", gate_rows)
        kind = kinds[gate_rows]
    elif kind != "none":
        fused = said_layout if said_layout in tensors.FUSED else None
        if fused is None and heads != kv_heads:
            want = " or ".join(tensors.FUSED) + f": the order of the {rows} rows of q_proj"
            raise refuse(OP, "config.json: attn_output_gate_layout", want, said_layout)
        fused = fused or "per_head"  # a head a group: both orders are one
    if said_kinds - {kind}:
        raise refuse(
            OP, "config.json: attn_output_gate", f"{kind}, as the tensors say", " and ".join(sorted(said_kinds))
        )
    return Gate(
        kind=kind, bias=tensors.GATE_BIAS in names, fused=fused, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )


def kind_of_config(config: Mapping[str, Any]) -> str:
    """The gate that config.json says; raises ValueError if it says two."""
    kinds, _ = tensors.claimed_gate(config)
    if len(kinds) > 1:
        raise refuse(OP, "config.json: attn_output_gate", "one kind of gate", " and ".join(sorted(kinds)))
    return next(iter(kinds), "none")


def separate(state: Mapping[str, Tensor], gate: Gate) -> dict[str, Tensor]:
    """The tensors of a draft under the names of m3.models.gated_eagle3, the gate's weight apart from the queries'."""
    found = {ours: state[name] for ours, name in tensors.canonical_names(state, None).items()}
    if gate.fused is not None:
        sizes = (gate.heads, gate.kv_heads, gate.head_dim)
        found[tensors.Q], found[tensors.GATE] = tensors.split_gate(found[tensors.Q], gate.kind, *sizes, gate.fused)
    return found


def gated(y: Tensor, gate: Tensor, heads: int) -> Tensor:
    """Attention output (.., heads x head_dim) times the sigmoid of its gate, (.., heads) or (.., heads x head_dim)."""
    y = y.unflatten(-1, (heads, -1))
    return (y * gate.sigmoid().unflatten(-1, (heads, -1))).flatten(-2)
