"""Models as programs: the target's pass and the draft's two passes, over paged caches.

A pass holds its caches and a Program of m3kernels.decoder; ``rebuild`` makes the program anew after weights were
exchanged. Everything between products is fp32, whatever the weights are held in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from m3.models.decoder import Concat, Decoder, Experts, Mlp, Moe, RopeConfig
from m3.models.gated_eagle3 import GatedEagle3Config
from m3.models.int4_experts import Int4Experts
from m3.models.int4_linear import Int4Linear
from m3kernels.checks import refuse
from m3kernels.decoder.program import Cache, Columns, Program
from m3kernels.int4 import Int4Weight
from m3kernels.int4.quantize import quantize_weight


def new_caches(
    layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[Cache]:
    """Zeroed caches, so that a key that nobody has written is finite."""
    shape = (layers, pages, page_size, kv_heads, head_dim)
    keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return [Cache(k, v) for k, v in zip(keys, values, strict=True)]
    scales = [torch.zeros(shape[:-1], device=device) for _ in range(2)]
    return [Cache(*parts) for parts in zip(keys, values, *scales, strict=True)]


def cache_bytes(caches: list[Cache]) -> int:
    """Bytes of keys, values and scales."""
    tensors = [each for cache in caches for each in (cache.keys, cache.values, cache.k_scale, cache.v_scale)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def angles(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, (positions, head_dim / 2) fp32."""
    angle = torch.outer(torch.arange(positions).float(), rope.frequencies(head_dim))
    return angle.cos().to(device), angle.sin().to(device)


def add_linear(program: Program, to: Columns, source: Columns, module: nn.Module) -> None:
    """to = module(source), for every kind of linear that the loader builds."""
    if isinstance(module, Concat):
        first = 0
        for part in module.parts:
            width = part.out_features
            assert isinstance(width, int)
            add_linear(program, to.part(first, width), source, part)
            first += width
    elif isinstance(module, Int4Linear):
        bias = None if module.bias is None else module.bias.float()
        program.linear(to, source, module.weight.int4, bias, activations=module.activations)
    elif isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach().float()
        program.linear(to, source, module.weight.detach().contiguous(), bias)
    else:
        raise refuse("engine", "model", "linears of m3.models", type(module).__name__)


def _fp32(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


class TargetPass:
    """The target: outputs logits of the picked rows and, with ``aux_layers``, hidden states of all rows.

    Args:
        model: dense or INT4. aux_layers: layers that have run where hidden states are taken, 0 for the embedding.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        pages: int,
        page_size: int,
        kv_dtype: torch.dtype,
        max_context: int,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        config = model.config
        self.model, self.aux_layers, self.max_context = model, aux_layers, max_context
        self.device = model.embedding.device
        sizes = (config.num_kv_heads, config.head_dim)
        self.caches = new_caches(config.num_layers, pages, page_size, *sizes, kv_dtype, self.device)
        self.program = self._program()

    @property
    def aux_width(self) -> int:
        return len(self.aux_layers) * self.model.config.hidden_size

    def rebuild(self) -> None:
        """Look at the model's tensors again."""
        self.program = self._program()

    def _program(self) -> Program:
        model, config = self.model, self.model.config
        heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        program = Program(rotated=head_dim, device=self.device)
        program.angles(*angles(config.rope, head_dim, self.max_context, self.device))
        x, normed = program.buffer(hidden), program.buffer(hidden)
        qkv, attended = program.buffer((heads + 2 * kv_heads) * head_dim), program.buffer(heads * head_dim)
        delta = program.buffer(hidden)
        aux = program.buffer(self.aux_width) if self.aux_layers else None

        def take(done: int) -> None:
            for place, layer in enumerate(self.aux_layers):
                if layer == done and aux is not None:
                    program.copy(aux.part(place * hidden, hidden), x)

        inner: dict[int, tuple[Columns, Columns]] = {}
        scores = program.buffer(config.num_experts) if config.num_experts else None
        program.embed(x, model.embedding.detach().contiguous())
        take(0)
        for index, layer in enumerate(model.blocks):
            attention = layer.attention
            cache = program.cache(self.caches[index])
            program.norm(normed, x, _fp32(layer.attention_norm.weight), layer.attention_norm.eps)
            add_linear(program, qkv, normed, attention.qkv)
            q_norm, k_norm = attention.q_norm, attention.k_norm
            if q_norm is None or k_norm is None:
                program.rotate(qkv, cache, heads)
            else:
                program.rotate(qkv, cache, heads, _fp32(q_norm.weight), _fp32(k_norm.weight), q_norm.eps)
            program.attend(attended, qkv.part(0, heads * head_dim), cache, heads, head_dim**-0.5)
            add_linear(program, delta, attended, attention.o)
            program.add(x, delta)
            program.norm(normed, x, _fp32(layer.mlp_norm.weight), layer.mlp_norm.eps)
            mlp = layer.mlp
            if isinstance(mlp, Moe):
                assert scores is not None
                add_linear(program, scores, normed, mlp.router)
                _add_experts(program, delta, normed, scores, mlp)
            else:
                assert isinstance(mlp, Mlp)
                width = config.intermediate_size
                if width not in inner:
                    inner[width] = program.buffer(2 * width), program.buffer(width)
                gate_up, product = inner[width]
                add_linear(program, gate_up, normed, mlp.gate_up)
                program.silu_mul(product, gate_up)
                add_linear(program, delta, product, mlp.down)
            program.add(x, delta)
            take(index + 1)
        last, logits = program.buffer(hidden, picked=True), program.buffer(config.vocab_size, picked=True)
        program.pick(last, x)
        program.norm(last, last, _fp32(model.norm.weight), model.norm.eps)
        add_linear(program, logits, last, model.head)
        program.store(logits)
        if aux is not None:
            program.store(aux)
        return program


def _add_experts(program: Program, to: Columns, source: Columns, scores: Columns, mlp: Moe) -> None:
    experts = mlp.experts
    if isinstance(experts, Int4Experts):
        w13, w2 = experts.w13.int4, experts.w2.int4
        program.moe(to, source, scores, w13, w2, top_k=mlp.k, rescale=mlp.rescale, activations=experts.activations)
    elif isinstance(experts, Experts):
        pair = experts.w13.detach().contiguous(), experts.w2.detach().contiguous()
        program.moe(to, source, scores, *pair, top_k=mlp.k, rescale=mlp.rescale)
    else:
        raise refuse("engine", "model", "experts of m3.models", type(experts).__name__)


class DraftPass:
    """The draft: ``extend`` runs over tokens with the target's hidden states, ``grow`` over its own outputs.

    Row q of its cache stands for token q + 1 and the hidden state of token q. Both programs give (logits, hidden) of
    the picked rows.

    Args:
        config, tensors: the draft (m3.models.gated_eagle3). embedding: (V, H), the target's unless the draft has one.
        weights: how its products' weights are held: "fp32", "bf16" or "int4".
    """

    def __init__(
        self,
        config: GatedEagle3Config,
        tensors: Mapping[str, Tensor],
        embedding: Tensor,
        *,
        pages: int,
        page_size: int,
        kv_dtype: torch.dtype,
        max_context: int,
        weights: str = "bf16",
        group_size: int = 32,
    ) -> None:
        if weights not in ("fp32", "bf16", "int4"):
            raise refuse("engine", "draft_weights", "'fp32', 'bf16' or 'int4'", repr(weights))
        self.config, self.weights, self.group_size = config, weights, group_size
        self.device = embedding.device
        self.embedding = embedding.detach().contiguous()
        self.d2t = tensors["d2t"].to(self.device, torch.int64)
        sizes = (config.num_kv_heads, config.head_dim)
        self.caches = new_caches(1, pages, page_size, *sizes, kv_dtype, self.device)
        self.tables = angles(config.rope, config.head_dim, max_context, self.device)
        self.products = self._products(tensors)
        self.norms = {name: _fp32(t).to(self.device) for name, t in tensors.items() if t.ndim == 1 and "norm" in name}
        self.extend = self._program(fused=True)
        self.grow = self._program(fused=False)

    def _products(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Int4Weight]:
        layer = "layers.0."
        attention, mlp = (f"{layer}{name}" for name in ("self_attn.", "mlp."))
        qkv = torch.cat([tensors[f"{attention}{name}_proj.weight"] for name in "qkv"])
        gate_up = torch.cat([tensors[f"{mlp}{name}_proj.weight"] for name in ("gate", "up")])
        found = {
            "fc": tensors["fc.weight"],
            "qkv": qkv,
            "o": tensors[f"{attention}o_proj.weight"],
            "gate_up": gate_up,
            "down": tensors[f"{mlp}down_proj.weight"],
            "head": tensors["lm_head.weight"],
        }
        if self.config.gate != "none":
            found["gate"] = tensors[f"{attention}attn_gate.weight"]
        self.gate_bias = None
        if self.config.gate_bias:
            self.gate_bias = _fp32(tensors[f"{attention}attn_gate.bias"]).to(self.device)
        return {name: self._held(weight.detach().float()) for name, weight in found.items()}

    def _held(self, weight: Tensor) -> Tensor | Int4Weight:
        if self.weights == "int4":
            return quantize_weight(weight, group_size=self.group_size, method="weighted").to(self.device)
        dtype = torch.float32 if self.weights == "fp32" else torch.bfloat16
        return weight.to(self.device, dtype).contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that a pass of ``grow`` reads."""
        parts = [weight for name, weight in self.products.items() if name != "fc"]
        sizes = [part.nbytes if isinstance(part, Int4Weight) else part.numel() * part.element_size() for part in parts]
        return sum(sizes)

    def _program(self, *, fused: bool) -> Program:
        config, norms, products = self.config, self.norms, self.products
        heads, kv_heads, head_dim, hidden = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        eps, first = config.rms_norm_eps, "layers.0."
        program = Program(rotated=head_dim, device=self.device)
        program.angles(*self.tables)
        x, both, delta = program.buffer(hidden), program.buffer(2 * hidden), program.buffer(hidden)
        if fused:
            aux = program.buffer(config.num_aux * config.target_hidden_size)
            program.load(aux)
            if config.norm_before_fc:
                program.norm(aux, aux, norms["input_norm.weight"], eps)
            if config.fc_norm:
                for index in range(config.num_aux):
                    part = aux.part(index * config.target_hidden_size, config.target_hidden_size)
                    program.norm(part, part, norms[f"fc_norm.{index}.weight"], eps)
            program.linear(x, aux, products["fc"])
        else:
            program.load(x)
        program.embed(both.part(0, hidden), self.embedding)
        program.norm(both.part(0, hidden), both.part(0, hidden), norms[f"{first}input_layernorm.weight"], eps)
        program.norm(both.part(hidden, hidden), x, norms[f"{first}hidden_norm.weight"], eps)
        if config.norm_before_residual:
            program.copy(x, both.part(hidden, hidden))
        qkv, attended = program.buffer((heads + 2 * kv_heads) * head_dim), program.buffer(heads * head_dim)
        cache = program.cache(self.caches[0])
        program.linear(qkv, both, products["qkv"])
        gate = None
        if config.gate != "none":
            gate = program.buffer(heads if config.gate == "headwise" else heads * head_dim)
            program.linear(gate, both, products["gate"], self.gate_bias)
        program.rotate(qkv, cache, heads)
        program.attend(attended, qkv.part(0, heads * head_dim), cache, heads, head_dim**-0.5, gate)
        program.linear(delta, attended, products["o"])
        program.add(x, delta)
        # only the picked rows go on: of the others only keys and values are wanted
        last, normed = program.buffer(hidden, picked=True), program.buffer(hidden, picked=True)
        change = program.buffer(hidden, picked=True)
        gate_up = program.buffer(2 * config.intermediate_size, picked=True)
        product = program.buffer(config.intermediate_size, picked=True)
        logits = program.buffer(config.draft_vocab_size, picked=True)
        program.pick(last, x)
        program.norm(normed, last, norms[f"{first}post_attention_layernorm.weight"], eps)
        program.linear(gate_up, normed, products["gate_up"])
        program.silu_mul(product, gate_up)
        program.linear(change, product, products["down"])
        program.add(last, change)
        program.norm(normed, last, norms["norm.weight"], eps)
        program.linear(logits, normed, products["head"])
        program.store(logits)
        program.store(normed if config.norm_output else last)
        return program
