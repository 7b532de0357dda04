"""The gated EAGLE-3 draft in SGLang: its own draft model with the gate on the attention's output.

SGLang skips tensors that it does not know; so a gated draft under the stock architecture would run without its gate,
and accept little. Here the gate's tensors are found in the checkpoint (m3.plugins.draft_gate), and one that has no
place is an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.models.llama_eagle3 import LlamaForCausalLMEagle3
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from m3.plugins.draft_gate import gate_of_file, gated, kind_of_config, separate
from m3kernels.checks import refuse


class GatedAttention(nn.Module):
    """Takes over the parts of SGLang's attention of a draft, and gates its output.

    The gate has a bias, 0 where the checkpoint has none: SGLang builds a model before it sees tensors.
    """

    def __init__(self, plain: Any, kind: str, wide: int, prefix: str) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = plain.qkv_proj, plain.o_proj
        self.rotary_emb, self.attn = plain.rotary_emb, plain.attn
        self.sizes = (plain.q_size, plain.kv_size, plain.kv_size)
        self.num_heads = plain.num_heads
        rows = plain.total_num_heads * (plain.head_dim if kind == "elementwise" else 1)
        self.attn_gate = ColumnParallelLinear(wide, rows, bias=True, prefix=add_prefix("attn_gate", prefix))
        nn.init.zeros_(self.attn_gate.bias)

    def forward(self, positions: Tensor, hidden_states: Tensor, forward_batch: Any) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        gate, _ = self.attn_gate(hidden_states)
        y = gated(self.attn(q, k, v, forward_batch), gate, self.num_heads)
        return self.o_proj(y)[0]


class LlamaForCausalLMEagle3Gated(LlamaForCausalLMEagle3):
    """SGLang's EAGLE-3 draft of one layer; its attention is gated as config.json says and the tensors confirm."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        found = config.to_dict()
        kind = kind_of_config(found)
        if found.get("norm_before_residual"):
            raise refuse("draft", "config.json: norm_before_residual", "false: SGLang has no such draft", True)
        super().__init__(config, quant_config, prefix)
        self.gate_kind = kind
        (layer,) = self.model.layers
        if self.gate_kind != "none":
            wide = 2 * config.hidden_size
            layer.self_attn = GatedAttention(layer.self_attn, self.gate_kind, wide, add_prefix("self_attn", prefix))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        state = dict(weights)
        gate = gate_of_file({name: tuple(tensor.shape) for name, tensor in state.items()}, self.config.to_dict())
        if gate.kind != self.gate_kind:
            raise refuse("draft", "config.json: attn_output_gate", f"{gate.kind!r}, as the tensors say", "none")
        super().load_weights(separate(state, gate).items())


EntryClass = [LlamaForCausalLMEagle3Gated]
