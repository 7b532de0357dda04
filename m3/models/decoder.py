"""A lean inference-only decoder for Llama, Qwen3 and Qwen3-MoE (and Qwen2, which is Llama with a q/k/v bias).

    h = E[tokens];  per layer:  h += O attention(rope(norm_q(Q n)), rope(norm_k(K n)), V n),  n = rmsnorm(h)
                                h += mlp(rmsnorm(h));       logits = head rmsnorm(h)
    mlp(x) = W2 (silu(G x) * U x), dense, or the weighted sum of the k experts that the router picks.

Q, K, V are one linear, G and U are one linear; any linear may be an Int4Linear and the experts an Int4Experts. Keys
and values live in one preallocated contiguous cache. Hidden states are (B T, D) rows: every sequence of a batch has
the same length and starts at the same position; batching of unequal sequences is the engine's business.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3kernels.checks import refuse

QK_NORM = ("qwen3", "qwen3_moe")
MODEL_TYPES = ("llama", "qwen2", *QK_NORM)
ROPE_TYPES = ("default", "llama3", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: theta, and the scaling of Llama 3 or plain linear interpolation."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def frequencies(self, head_dim: int) -> Tensor:
        """(head_dim / 2,) fp32 angles per position."""
        freq = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if self.kind == "linear":
            return freq / self.factor
        if self.kind == "llama3":
            wavelength = 2 * math.pi / freq
            original = self.original_max_position_embeddings
            low, high = original / self.low_freq_factor, original / self.high_freq_factor
            blend = (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            smooth = (1 - blend) * freq / self.factor + blend * freq
            return torch.where(wavelength > low, freq / self.factor, torch.where(wavelength < high, freq, smooth))
        return freq


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What config.json says, checked, under our names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    num_experts: int = 0  # 0: no layer is a mixture of experts
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP in a model with experts

    @property
    def qk_norm(self) -> bool:
        return self.model_type in QK_NORM

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.json of transformers 4 or 5. Raises ValueError naming the key that is wrong or unsupported."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise refuse("config.json", "model_type", " or ".join(MODEL_TYPES), f"{kind!r}")
        if config.get("hidden_act", "silu") != "silu":
            raise refuse("config.json", "hidden_act", "'silu'", f"{config['hidden_act']!r}")
        if config.get("use_sliding_window"):
            raise refuse("config.json", "use_sliding_window", "false", f"{config['use_sliding_window']!r}")
        hidden = _integer(config, "hidden_size")
        heads = _integer(config, "num_attention_heads")
        kv_heads = _integer(config, "num_key_value_heads", heads)
        head_dim = _integer(config, "head_dim", hidden // heads)
        if heads % kv_heads:
            raise refuse("config.json", "num_key_value_heads", f"a divisor of {heads} attention heads", kv_heads)
        if head_dim % 2:
            raise refuse("config.json", "head_dim", "an even number", head_dim)
        layers = _integer(config, "num_hidden_layers")
        experts: dict[str, Any] = {}
        if kind == "qwen3_moe":
            experts = _expert_keys(config, layers)
        eos = config.get("eos_token_id")
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in eos):
            raise refuse("config.json", "eos_token_id", "an int or a list of ints", f"{eos!r}"[:200])
        return cls(
            model_type=str(kind),
            vocab_size=_integer(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_integer(config, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config),
            max_position_embeddings=_integer(config, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(eos),
            **experts,
        )


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise refuse("config.json", key, "an int in 1 .. 2**31 - 1", f"{value!r}"[:200])
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise refuse("config.json", key, "a positive number", f"{value!r}"[:200])
    return float(value)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise refuse("config.json", "rope_parameters", "an object", f"{scaling!r}"[:200])
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise refuse("config.json", "rope_parameters: rope_type", " or ".join(ROPE_TYPES), f"{kind!r}"[:200])
    theta = _number(scaling if scaling.get("rope_theta") is not None else config, "rope_theta", 10000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    factor = _number(scaling, "factor", 1.0)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=factor)
    low, high = _number(scaling, "low_freq_factor", 1.0), _number(scaling, "high_freq_factor", 4.0)
    if high <= low:
        raise refuse("config.json", "rope_parameters: high_freq_factor", f"more than low_freq_factor = {low}", high)
    return RopeConfig(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(scaling, "original_max_position_embeddings", 8192),
    )


def _expert_keys(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts = _integer(config, "num_local_experts" if "num_local_experts" in config else "num_experts")
    chosen = _integer(config, "num_experts_per_tok")
    if chosen > experts:
        raise refuse("config.json", "num_experts_per_tok", f"at most num_experts = {experts}", chosen)
    step = _integer(config, "decoder_sparse_step", 1)
    named = config.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(isinstance(index, bool) or not isinstance(index, int) for index in named):
        raise refuse("config.json", "mlp_only_layers", "a list of ints", f"{named!r}"[:200])
    sparse = range(step - 1, layers, step)
    dense = set(named) if step == 1 else {index for index in range(layers) if index in named or index not in sparse}
    return {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": _integer(config, "moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "dense_layers": tuple(sorted(dense)),
    }


class KvCache:
    """Keys and values of all layers, (L, B, H_kv, S, head_dim), filled up to ``length``."""

    def __init__(
        self, config: DecoderConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, batch, config.num_kv_heads, max_length, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.layers = [(self.keys[layer], self.values[layer]) for layer in range(config.num_layers)]
        self.max_length = max_length
        self.length = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Where the rows of one forward pass stand: B sequences, T tokens each from position ``start``."""

    batch: int
    tokens: int
    start: int
    cos: Tensor  # (T, 1, head_dim)
    sin: Tensor  # (T, 1, head_dim), first half negated: rope(x) = x cos + swap_halves(x) sin
    mask: Tensor | None  # (T, start + T) bool where a causal flag does not say it


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    eps_tensor: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.size = weight.shape[0]
        self.eps = eps
        self.register_buffer("eps_tensor", torch.tensor(eps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return torch.rms_norm(x, (self.size,), self.weight, self.eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # 5 kernels where torch.rms_norm takes 10 on a CPU
        return torch.addcmul(self.eps_tensor, norm, norm, value=1 / self.size).rsqrt_().mul(x).mul_(self.weight)


class Concat(nn.Module):
    """Linears over the same input whose formats differ, one after another: what a fused linear would give."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over the cache. ``qkv``: (D) -> q rows, k rows, v rows; ``o``: back to (D)."""

    def __init__(
        self, config: DecoderConfig, qkv: nn.Module, o: nn.Module, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> None:
        super().__init__()
        self.qkv, self.o = qkv, o
        self.q_norm = norms[0] if norms else None
        self.k_norm = norms[1] if norms else None
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], span: Span) -> Tensor:
        heads, kv_heads, head_dim = self.heads, self.kv_heads, self.head_dim
        batch, tokens, stop = span.batch, span.tokens, span.start + span.tokens
        qkv = self.qkv(x).view(batch, tokens, heads + 2 * kv_heads, head_dim)
        if self.q_norm is None or self.k_norm is None:
            qk = qkv[:, :, : heads + kv_heads]
        else:
            q, k, _ = qkv.split((heads, kv_heads, kv_heads), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        qk = torch.addcmul(qk * span.cos, qk.roll(head_dim // 2, -1), span.sin)
        keys, values = cache
        keys.narrow(2, span.start, tokens).copy_(qk[:, :, heads:].transpose(1, 2))
        values.narrow(2, span.start, tokens).copy_(qkv[:, :, heads + kv_heads :].transpose(1, 2))
        keys, values = keys.narrow(2, 0, stop), values.narrow(2, 0, stop)
        if tokens == 1:  # the queries of a group are rows over one set of keys: nothing is repeated
            q = qk[:, 0, :heads].view(batch, kv_heads, heads // kv_heads, head_dim)
            return self.o(F.scaled_dot_product_attention(q, keys, values).reshape(batch, heads * head_dim))
        q = qk[:, :, :heads].transpose(1, 2)
        causal = span.mask is None
        y = F.scaled_dot_product_attention(q, keys, values, span.mask, is_causal=causal, enable_gqa=heads != kv_heads)
        return self.o(y.transpose(1, 2).reshape(batch * tokens, heads * head_dim))


class Mlp(nn.Module):
    """W2 (silu(G x) * U x); ``gate_up`` gives G x, then U x."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))


class Experts(nn.Module):
    """Unquantised experts: w13 (E, 2 I, D), gate rows then up rows; w2 (E, D, I)."""

    def __init__(self, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.w13 = nn.Parameter(w13, requires_grad=False)
        self.w2 = nn.Parameter(w2, requires_grad=False)

    def forward(
        self,
        x: Tensor,  # (T, D)
        topk_ids: Tensor,  # (T, k)
        topk_weights: Tensor,  # (T, k)
    ) -> Tensor:
        y = torch.zeros_like(x)
        for expert in topk_ids.unique().tolist():
            rows, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[rows], self.w13[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate).mul_(up), self.w2[expert])
            y.index_add_(0, rows, out * topk_weights[rows, slots, None].to(x.dtype))
        return y


class Moe(nn.Module):
    """The k experts with the largest softmax(router(x)), weighted by it (rescaled to sum 1 if norm_topk_prob)."""

    def __init__(self, config: DecoderConfig, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts
        self.k, self.rescale = config.num_experts_per_tok, config.norm_topk_prob

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).float().softmax(dim=-1).topk(self.k, dim=-1)
        if self.rescale:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self.experts(x, ids, weights)


class Layer(nn.Module):
    """h += attention(norm h); h += mlp(norm h)."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: Mlp | Moe) -> None:
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], span: Span) -> Tensor:
        x = self.attention(self.attention_norm(x), cache, span).add_(x)
        return self.mlp(self.mlp_norm(x)).add_(x)


class Decoder(nn.Module):
    """The whole model. Assembled by m3.models.loader; inference only (parameters carry no gradient).

    Args:
        config: sizes.
        embedding: (V, D), in the compute dtype.
        layers, norm: as the classes above.
        head: (D) -> (V); with tied embeddings, a linear over the same storage as ``embedding``.
    """

    def __init__(
        self, config: DecoderConfig, embedding: Tensor, layers: list[Layer], norm: RMSNorm, head: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList(layers)
        self.blocks = tuple(layers)  # the same objects, by their own type
        self.norm = norm
        self.head = head
        self._cos = self._sin = torch.empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.embedding.dtype

    def new_cache(self, max_length: int, batch: int = 1) -> KvCache:
        """An empty cache for ``batch`` sequences of at most ``max_length`` tokens."""
        return KvCache(self.config, batch, max_length, self.dtype, self.embedding.device)

    def _rotary(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if stop > len(self._cos) or self._cos.dtype != self.dtype or self._cos.device != self.embedding.device:
            length = max(256, 1 << (stop - 1).bit_length())
            freq = self.config.rope.frequencies(self.config.head_dim)
            angles = torch.outer(torch.arange(length).float(), freq)
            cos, sin = angles.cos(), angles.sin()
            self._cos = torch.cat((cos, cos), dim=-1)[:, None].to(self.embedding)
            self._sin = torch.cat((-sin, sin), dim=-1)[:, None].to(self.embedding)
        return self._cos[start:stop], self._sin[start:stop]

    def hidden(self, tokens: Tensor, cache: KvCache) -> Tensor:
        """(B, T) int64 tokens that follow what the cache holds -> (B T, D) final hidden states; the cache grows by T.

        Raises ValueError: tokens of another shape, or more than the cache has room for.
        """
        batch, length = cache.keys.shape[1], tokens.shape[-1]
        if tokens.ndim != 2 or tokens.shape[0] != batch or length < 1:
            raise refuse("decoder", "tokens", f"({batch}, T) with T >= 1", tokens)
        start, stop = cache.length, cache.length + length
        if stop > cache.max_length:
            raise refuse(
                "decoder", "tokens", f"at most {cache.max_length - start} more (cache of {cache.max_length})", tokens
            )
        cos, sin = self._rotary(start, stop)
        mask = None
        if length > 1 and start:
            mask = torch.ones(length, stop, dtype=torch.bool, device=tokens.device).tril(diagonal=start)
        span = Span(batch=batch, tokens=length, start=start, cos=cos, sin=sin, mask=mask)
        x = F.embedding(tokens.reshape(-1), self.embedding)
        for layer, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = layer(x, layer_cache, span)
        cache.length = stop
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KvCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits (B, T, V), or (B, 1, V) of the last token; in the compute dtype. As ``hidden`` otherwise."""
        if tokens.ndim != 2:
            raise refuse("decoder", "tokens", "(B, T)", tokens)
        batch, length = tokens.shape
        x = self.hidden(tokens, self.new_cache(length, batch) if cache is None else cache)
        if last_only and length > 1:
            x = x.view(batch, length, -1)[:, -1]
        return self.head(x).view(batch, 1 if last_only else length, -1)
