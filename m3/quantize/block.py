"""One decoder layer as plain differentiable torch: what is reconstructed when its linears are quantised.

    h += O attention(rope(norm_q(Q n)), rope(norm_k(K n)), V n),  n = rmsnorm(h);    h += mlp(rmsnorm(h))

The layer of m3.models.decoder without a cache: whole sequences from position 0, causal, in fp32, over separate linears
with the names they have in a checkpoint. Weights may be held in 16 bits (experts are): they are widened when used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3.models.decoder import DecoderConfig
from m3.models.loader import attention_parts, mlp_parts
from m3kernels.checks import refuse

ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
OUT, DOWN, ROUTER, EXPERT = "self_attn.o_proj", "mlp.down_proj", "mlp.gate", "mlp.experts.{}."
FUSED_GATE_UP, FUSED_DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
IGNORED = ("self_attn.rotary_emb.inv_freq",)  # in old checkpoints; computed here

See = Callable[[str, Tensor], None]  # (name of a linear, its input rows (T, K))


def batches(sequences: Tensor | Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """S sequences (L, D) as (B, L, D) fp32, B at most ``size``, in their order."""
    for start in range(0, len(sequences), size):
        yield stacked(sequences, range(start, min(start + size, len(sequences))))


def stacked(sequences: Tensor | Sequence[Tensor], which: Sequence[int]) -> Tensor:
    """Some sequences (L, D), of one length, as (B, L, D) fp32."""
    return torch.stack([sequences[index] for index in which]).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """What the router of a layer chose for T tokens.

    probabilities: (T, E) softmax of its logits, fp32. ids: (T, k) experts. weights: (T, k) of their outputs.
    """

    probabilities: Tensor
    ids: Tensor
    weights: Tensor

    def tokens_per_expert(self) -> Tensor:
        """(E,) int64."""
        return torch.bincount(self.ids.flatten(), minlength=self.probabilities.shape[1])

    def chosen(self) -> Tensor:
        """(T, E) bool."""
        return torch.zeros_like(self.probabilities, dtype=torch.bool).scatter_(1, self.ids, True)

    def shares(self, extra: Tensor | None = None) -> Tensor:
        """(T, E) weight of each expert in the output of each token; of extra tokens, their probability."""
        shares = torch.zeros_like(self.probabilities).scatter(1, self.ids, self.weights)
        return shares if extra is None else torch.where(extra & ~self.chosen(), self.probabilities, shares)

    def extra(self, least: int) -> Tensor:
        """(T, E) bool: the unchosen tokens of highest probability that bring every expert to ``least`` tokens.

        All unchosen tokens where there are too few.
        """
        chosen = self.chosen()
        found = torch.zeros_like(chosen)
        for expert, count in enumerate(self.tokens_per_expert().tolist()):
            missing = min(least, len(chosen)) - count
            if missing > 0:
                rest = self.probabilities[:, expert].masked_fill(chosen[:, expert], -1.0)
                found[rest.sort(descending=True, stable=True).indices[:missing], expert] = True
        return found


class Block:
    """A decoder layer.

    linears: names of the weights that are quantised ("self_attn.q_proj", "mlp.experts.3.down_proj"), in the order in
        which an input passes them. weights: (N, K) of each. The router is none of them.
    """

    def __init__(self, config: DecoderConfig, weights: dict[str, Tensor], rest: dict[str, Tensor]) -> None:
        self.config, self.weights, self.rest = config, weights, rest
        self.has_experts = f"{ROUTER}.weight" in rest
        self._rotary: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(self.weights)

    @classmethod
    def from_tensors(cls, config: DecoderConfig, tensors: Mapping[str, Tensor]) -> Block:
        """The layer of these tensors, named as in a checkpoint without the layer's prefix; with experts if it has a
        router. Experts may be fused stacks.

        Raises:
            ValueError: a tensor is missing, of another shape or of no float dtype, or one that this layer has no
                use for.
        """
        taken: set[str] = set(IGNORED)

        def take(name: str, shape: tuple[int, ...]) -> Tensor:
            taken.add(name)
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape or not tensor.is_floating_point():
                raise refuse("Block", name, f"{shape} of floats", "no such tensor" if tensor is None else tensor)
            return tensor.detach()

        hidden, inner = config.hidden_size, config.moe_intermediate_size
        rest = {f"{name}.weight": take(f"{name}.weight", (hidden,)).float() for name in (ATTENTION_NORM, MLP_NORM)}
        if config.qk_norm:
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                rest[f"{name}.weight"] = take(f"{name}.weight", (config.head_dim,)).float()
        shapes = {name: (rows, hidden) for name, rows in attention_parts(config)}
        shapes[OUT] = (hidden, config.num_heads * config.head_dim)
        experts = f"{ROUTER}.weight" in tensors
        if not experts:
            shapes |= {name: (rows, hidden) for name, rows in mlp_parts(config)}
            shapes[DOWN] = (hidden, config.intermediate_size)
        weights = {name: take(f"{name}.weight", shape).float() for name, shape in shapes.items()}
        for name, shape in shapes.items():
            if f"{name}.bias" in tensors:
                rest[f"{name}.bias"] = take(f"{name}.bias", shape[:1]).float()
        if experts:
            rest[f"{ROUTER}.weight"] = take(f"{ROUTER}.weight", (config.num_experts, hidden)).float()
            fused = FUSED_GATE_UP in tensors
            if fused:
                gate_up = take(FUSED_GATE_UP, (config.num_experts, 2 * inner, hidden))
                down = take(FUSED_DOWN, (config.num_experts, hidden, inner))
            for expert in range(config.num_experts):
                prefix = EXPERT.format(expert)
                if fused:
                    weights[f"{prefix}gate_proj"], weights[f"{prefix}up_proj"] = gate_up[expert].chunk(2)
                    weights[f"{prefix}down_proj"] = down[expert]
                    continue
                for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden))):
                    weights[prefix + name] = take(f"{prefix}{name}.weight", shape)
                weights[f"{prefix}down_proj"] = take(f"{prefix}down_proj.weight", (hidden, inner))
        if unknown := sorted(set(tensors) - taken):
            raise refuse("Block", unknown[0], f"no such tensor in a layer of {config.model_type}", tensors[unknown[0]])
        return cls(config, weights, rest)

    def replaced(self, weights: Mapping[str, Tensor]) -> Block:
        """The same layer with some linears' weights replaced."""
        if unknown := sorted(set(weights) - set(self.weights)):
            raise refuse("Block.replaced", "weights", f"of {', '.join(self.weights)}"[:200], unknown[0])
        return Block(self.config, {**self.weights, **weights}, self.rest)

    # -- forward pass -------------------------------------------------------------------------------------------------
    def forward(
        self,
        hidden: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        *,
        extra: Tensor | None = None,
        see: See = lambda name, x: None,
    ) -> Tensor:
        """(B, L, D) fp32 -> (B, L, D).

        Args:
            weights: used in place of the layer's own, by name; gradients flow to them.
            extra: (B L, E) bool, tokens that experts get beyond what the router chooses, weighted by its probability.
            see: called with the input rows of every linear before it is used; of an expert, the tokens it got.
        """
        hidden, x = self.attend(hidden, weights, see=see)
        y = self._experts(x, weights or {}, extra, see) if self.has_experts else self.mlp("mlp.", x, weights, see=see)
        return hidden + y.view(hidden.shape)

    def attend(
        self, hidden: Tensor, weights: Mapping[str, Tensor] | None = None, *, see: See = lambda name, x: None
    ) -> tuple[Tensor, Tensor]:
        """The first half: (hidden states (B, L, D) after attention, their norm (B L, D) that the second half gets)."""
        hidden = hidden + self._attention(self._norm(hidden, ATTENTION_NORM), weights or {}, see)
        return hidden, self._norm(hidden, MLP_NORM).flatten(0, 1)

    def mlp(
        self,
        prefix: str,
        x: Tensor,
        weights: Mapping[str, Tensor] | None = None,
        *,
        see: See = lambda name, x: None,
    ) -> Tensor:
        """down (silu(gate x) * up x) of (T, D); prefix "mlp.", or that of an expert."""
        weights = weights or {}
        gate = self._linear(f"{prefix}gate_proj", x, weights, see)
        up = self._linear(f"{prefix}up_proj", x, weights, see)
        return self._linear(f"{prefix}down_proj", F.silu(gate) * up, weights, see)

    def route(self, x: Tensor) -> Routing:
        """What the router makes of (T, D), the second result of ``attend``."""
        probabilities = F.linear(x, self.rest[f"{ROUTER}.weight"]).softmax(dim=-1)
        weights, ids = probabilities.topk(self.config.num_experts_per_tok, dim=-1)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing(probabilities=probabilities, ids=ids, weights=weights)

    @torch.no_grad()
    def inputs(self, hidden: Tensor, *, extra: Tensor | None = None) -> dict[str, Tensor]:
        """What each linear sees: (T, K) rows by name; T = B L, but for experts, whose tokens the router chooses."""
        found: dict[str, Tensor] = {}
        self.forward(hidden, extra=extra, see=found.__setitem__)
        return {name: found.get(name, hidden.new_empty(0, self.weights[name].shape[1])) for name in self.weights}

    @torch.no_grad()
    def routing(self, hidden: Tensor) -> Routing:
        """What the router chooses for the B L tokens of (B, L, D).

        Raises ValueError for a layer without experts.
        """
        if not self.has_experts:
            raise refuse("Block.routing", "self", "a layer with experts", "a dense one")
        return self.route(self.attend(hidden)[1])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.rest[f"{name}.weight"], self.config.rms_norm_eps)

    def _linear(self, name: str, x: Tensor, weights: Mapping[str, Tensor], see: See) -> Tensor:
        see(name, x)
        weight = weights[name] if name in weights else self.weights[name]
        return F.linear(x, weight.float(), self.rest.get(f"{name}.bias"))

    def _attention(self, x: Tensor, weights: Mapping[str, Tensor], see: See) -> Tensor:
        config = self.config
        batch, length, _ = x.shape
        rows = x.flatten(0, 1)
        q, k, v = (
            self._linear(name, rows, weights, see).view(batch, length, -1, config.head_dim)
            for name, _ in attention_parts(config)
        )
        if config.qk_norm:
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        cos, sin = self._angles(length)
        q, k = ((one * cos + one.roll(config.head_dim // 2, -1) * sin).transpose(1, 2) for one in (q, k))
        shared = config.num_heads != config.num_kv_heads
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=shared)
        y = y.transpose(1, 2).reshape(batch * length, config.num_heads * config.head_dim)
        return self._linear(OUT, y, weights, see).view(batch, length, -1)

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (length, 1, head_dim); the first half of sin negated: rope(x) = x cos + swap_halves(x) sin."""
        if length > len(self._rotary[0]):
            angles = torch.outer(torch.arange(length).float(), self.config.rope.frequencies(self.config.head_dim))
            cos, sin = angles.cos(), angles.sin()
            self._rotary = torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]
        return self._rotary[0][:length], self._rotary[1][:length]

    def _experts(self, x: Tensor, weights: Mapping[str, Tensor], extra: Tensor | None, see: See) -> Tensor:
        routing = self.route(x)
        shares, used = routing.shares(extra), routing.chosen()
        if extra is not None:
            used |= extra
        y = torch.zeros_like(x)
        for expert in used.any(dim=0).nonzero().flatten().tolist():
            rows = used[:, expert].nonzero().flatten()
            out = self.mlp(EXPERT.format(expert), x[rows], weights, see=see)
            y = y.index_add(0, rows, out * shares[rows, expert, None])
        return y
