"""The gated EAGLE-3 draft in vLLM: its chain of drafts, our checkpoint, every layout of the gate.

vLLM's own EAGLE-3 (Llama) with one thing more, y = attention(..) * sigmoid(G u) before o_proj (formula:
m3.models.gated_eagle3). Which gate a checkpoint has is read from its tensors' shapes, as in m3.draft.layouts: none, a
number a head, a number an element; a tensor of its own, or rows of q_proj.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.transformers_utils.config import get_safetensors_params_metadata

from m3.plugins.draft_gate import Gate, gate_of_file, gated, separate


class GatedAttention(nn.Module):
    """Takes over the parts of vLLM's attention of a draft, and gates its output."""

    def __init__(self, plain: Any, gate: Gate, wide: int, prefix: str) -> None:
        super().__init__()
        self.qkv_proj, self.o_proj = plain.qkv_proj, plain.o_proj
        self.rotary_emb, self.attn = plain.rotary_emb, plain.attn
        self.sizes = (plain.q_size, plain.kv_size, plain.kv_size)
        self.num_heads = plain.num_heads
        rows = plain.total_num_heads * (plain.head_dim if gate.kind == "elementwise" else 1)
        self.attn_gate = ColumnParallelLinear(
            wide, rows, bias=gate.bias, return_bias=False, prefix=f"{prefix}.attn_gate"
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        y = gated(self.attn(q, k, v), self.attn_gate(hidden_states), self.num_heads)
        return self.o_proj(y)[0]


class GatedEagle3ForCausalLM(Eagle3LlamaForCausalLM):
    """vLLM's EAGLE-3 draft; its one layer's attention is gated if the checkpoint's is."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        draft = vllm_config.speculative_config.draft_model_config
        metadata = get_safetensors_params_metadata(draft.model, revision=draft.revision)
        shapes = {name: tuple(facts["shape"]) for name, facts in metadata.items() if name != "__metadata__"}
        self.gate = gate_of_file(shapes, draft.hf_config.to_dict())
        (layer,) = self.model.layers
        if self.gate.kind != "none":
            wide = 2 * self.config.hidden_size
            layer.self_attn = GatedAttention(layer.self_attn, self.gate, wide, "model.layers.0.self_attn")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        return super().load_weights(separate(dict(weights), self.gate).items())
