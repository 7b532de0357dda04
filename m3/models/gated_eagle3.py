"""The draft model of tree speculation: EAGLE-3 with a sigmoid gate on the attention output.

    h_0 = fc([a_1; ..; a_n])                 fused hidden states of n layers of the target at position t
    e   = rmsnorm(E[x_{t+1+i}])              embedding of the token that follows, shifted once more at every step i
    u   = [e ; rmsnorm(h_i)]                 2 D wide, the input of Q, K, V and of the gate
    y   = attention(rope(Q u), rope(K u), V u) * sigmoid(G u)          per head, per element, or ungated
    r   = h_i + O y;   h_{i+1} = r + mlp(rmsnorm(r));   logits = head rmsnorm(h_{i+1})

At step i, position t predicts token t + 2 + i. The query of step i sees the keys of step 0 at positions <= t (made from
true hidden states) and its own keys of steps 1 .. i: what a drafting loop with a key cache sees, for all positions at
once (training-time test). The head covers V_d of the V tokens of the target: target id = draft id + d2t[draft id].

Sources: EAGLE-3, arXiv 2503.01840; EAGLE-3.1 (a norm per layer, post-norm feedback), arXiv 2605.09992; the gate: Gated
Attention, arXiv 2505.06708. Parameter names are those of SpecForge and SGLang.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3.models.decoder import Decoder, DecoderConfig, Mlp, RopeConfig
from m3kernels.checks import refuse

GATES = ("none", "headwise", "elementwise")
INIT_STD = 0.02
OPEN_GATE = 4.0  # sigmoid(4) = 0.982: nearly the ungated function
KeyValue = tuple[Tensor, Tensor]  # (B, H_kv, S, head_dim) each


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedEagle3Config:
    """Sizes and options of a draft.

    ``aux_layers[j]`` is the number of layers of the target that have run when its j-th hidden state is taken: 0 is the
    embedding output; for a target of L layers, L is the output of the last one before the final norm. They ascend, as
    serving engines take hidden states in the order in which layers run.
    """

    hidden_size: int
    target_hidden_size: int
    num_aux: int = 3
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # of the target
    draft_vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    gate: str
    gate_bias: bool = False
    norm_before_residual: bool = False  # the residual is rmsnorm(h_i) in place of h_i
    norm_before_fc: bool = False  # one norm over the concatenated hidden states (input_norm)
    fc_norm: bool = False  # one norm for each of them
    norm_output: bool = False  # the next step gets rmsnorm(h_{i+1})
    aux_layers: tuple[int, ...]
    max_position_embeddings: int

    def __post_init__(self) -> None:
        op = "GatedEagle3Config"
        sizes = (
            "hidden_size target_hidden_size num_aux intermediate_size num_heads num_kv_heads head_dim vocab_size"
            " draft_vocab_size max_position_embeddings"
        )
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise refuse(op, name, "at least 1", getattr(self, name))
        if self.gate not in GATES:
            raise refuse(op, "gate", " or ".join(GATES), repr(self.gate))
        if self.gate_bias and self.gate == "none":
            raise refuse(op, "gate_bias", "False without a gate", self.gate_bias)
        if self.num_heads % self.num_kv_heads:
            raise refuse(op, "num_kv_heads", f"a divisor of {self.num_heads} heads", self.num_kv_heads)
        if self.head_dim % 2:
            raise refuse(op, "head_dim", "an even number", self.head_dim)
        if self.draft_vocab_size > self.vocab_size:
            raise refuse(op, "draft_vocab_size", f"at most vocab_size = {self.vocab_size}", self.draft_vocab_size)
        if self.norm_before_fc and self.fc_norm:
            raise refuse(op, "fc_norm", "False with norm_before_fc: one or the other", self.fc_norm)
        ascending = list(self.aux_layers) == sorted({layer for layer in self.aux_layers if layer >= 0})
        if len(self.aux_layers) != self.num_aux or not ascending:
            want = f"num_aux = {self.num_aux} ascending numbers of layers >= 0"
            raise refuse(op, "aux_layers", want, self.aux_layers)

    @property
    def gate_rows(self) -> int:
        """Rows of the gate's weight."""
        return {"none": 0, "headwise": self.num_heads, "elementwise": self.num_heads * self.head_dim}[self.gate]

    @classmethod
    def for_target(
        cls, target: DecoderConfig, *, draft_vocab_size: int, gate: str, aux_layers: tuple[int, ...] | None = None
    ) -> GatedEagle3Config:
        """A draft with the sizes of one layer of the target; other options by dataclasses.replace.

        Args:
            aux_layers: default 2, L / 2 and L - 3 (for targets of 1 to 4 layers, what is distinct among them).
        """
        if aux_layers is None:
            layers = target.num_layers
            aux_layers = tuple(sorted({min(2, layers), layers // 2, max(layers - 3, 0)}))
        return cls(
            hidden_size=target.hidden_size,
            target_hidden_size=target.hidden_size,
            num_aux=len(aux_layers),
            intermediate_size=target.intermediate_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rms_norm_eps=target.rms_norm_eps,
            rope=target.rope,
            gate=gate,
            aux_layers=aux_layers,
            max_position_embeddings=target.max_position_embeddings,
        )


class DraftAttention(nn.Module):
    """Grouped-query attention over the 2 D wide input, gated before o_proj."""

    def __init__(self, config: GatedEagle3Config) -> None:
        super().__init__()
        wide, rows = 2 * config.hidden_size, config.num_heads * config.head_dim
        kv_rows = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(wide, rows, bias=False)
        self.k_proj = nn.Linear(wide, kv_rows, bias=False)
        self.v_proj = nn.Linear(wide, kv_rows, bias=False)
        self.o_proj = nn.Linear(rows, config.hidden_size, bias=False)
        self.attn_gate = nn.Linear(wide, config.gate_rows, bias=config.gate_bias) if config.gate_rows else None
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 2 D) -> q (B, H, T, head_dim), k and v (B, H_kv, T, head_dim); q and k rotated."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, H, T, head_dim) of the queries of x -> (B, T, D)."""
        y = y.transpose(1, 2)  # (B, T, H, head_dim)
        if self.attn_gate is not None:
            y = y * self.attn_gate(x).sigmoid().unflatten(-1, (self.heads, -1))  # (B, T, H, 1 or head_dim)
        return self.o_proj(y.flatten(2))

    def causal(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        gqa = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, enable_gqa=gqa)

    def diagonal(self, q: Tensor, past: list[KeyValue], hidden: Tensor) -> Tensor:
        """Queries over the keys of step 0 where ``hidden`` (.., T, T) is False, and over their own keys of past[1:]."""
        batch, heads, tokens, head_dim = q.shape
        groups, shared = self.kv_heads, heads // self.kv_heads  # heads of a group are rows over one set of keys
        q = q * (1 / math.sqrt(head_dim))
        first, own = past[0], past[1:]
        scores = q.reshape(batch, groups, shared * tokens, head_dim) @ first[0].transpose(2, 3)
        scores = scores.view(batch, groups, shared, tokens, tokens).masked_fill(hidden, -math.inf)
        grouped = q.view(batch, groups, shared, tokens, head_dim)
        columns = [(grouped * k[:, :, None]).sum(-1, keepdim=True) for k, _ in own]
        weights = torch.cat((scores, *columns), dim=-1).softmax(dim=-1)
        y = weights[..., :tokens].reshape(batch, groups, shared * tokens, tokens) @ first[1]
        y = y.view(batch, groups, shared, tokens, head_dim)
        for step, (_, v) in enumerate(own):
            y = y + weights[..., tokens + step, None] * v[:, :, None]
        return y.flatten(1, 2)


class DraftMlp(nn.Module):
    """W2 (silu(G x) * U x)."""

    def __init__(self, config: GatedEagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The one layer. ``wide`` makes its input and residual, ``finish`` is what follows the attention."""

    def __init__(self, config: GatedEagle3Config) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DraftMlp(config)
        self.norm_before_residual = config.norm_before_residual

    def wide(self, embeds: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        return torch.cat((self.input_layernorm(embeds), normed), dim=-1), residual

    def finish(self, y: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        r = residual + self.self_attn.output(y, x)
        return r + self.mlp(self.post_attention_layernorm(r))


class GatedEagle3(nn.Module):
    """A draft over the target's embedding, which is neither a parameter nor in the state_dict.

    Args:
        config: sizes and options.
        embedding: (V, D), the target's table or the draft's own.
    """

    embedding: Tensor
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: GatedEagle3Config, embedding: Tensor) -> None:
        super().__init__()
        size, wide = config.hidden_size, config.num_aux * config.target_hidden_size
        if embedding.ndim != 2 or embedding.shape[0] != config.vocab_size or embedding.shape[1] != size:
            want = f"({config.vocab_size}, {size}): the draft's own table where its hidden size is not the target's"
            raise refuse("GatedEagle3", "embedding", want, embedding)
        self.config = config
        self.fc = nn.Linear(wide, size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.norm = nn.RMSNorm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.input_norm = nn.RMSNorm(wide, eps=config.rms_norm_eps) if config.norm_before_fc else None
        norms = [nn.RMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(config.num_aux)]
        self.fc_norm = nn.ModuleList(norms) if config.fc_norm else None
        self.register_buffer("embedding", embedding.detach(), persistent=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        self._freq = config.rope.frequencies(config.head_dim)

    @property
    def layer(self) -> DraftLayer:
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def set_vocabulary(self, tokens: Tensor) -> None:
        """The V_d distinct target ids that the draft can propose; draft ids follow their ascending order."""
        config = self.config
        ids = tokens.unique()
        if len(ids) != config.draft_vocab_size or tokens.numel() != len(ids):
            raise refuse("set_vocabulary", "tokens", f"{config.draft_vocab_size} distinct token ids", tokens)
        if int(ids[0]) < 0 or int(ids[-1]) >= config.vocab_size:
            got = f"{int(ids[0])} .. {int(ids[-1])}"
            raise refuse("set_vocabulary", "tokens", f"ids in 0 .. {config.vocab_size - 1}", got)
        self.d2t.copy_(ids - torch.arange(len(ids), device=ids.device))
        self.t2d.zero_()
        self.t2d[ids.to(self.t2d.device)] = True

    # -- parts --------------------------------------------------------------------------------------------------------
    def embed(self, tokens: Tensor) -> Tensor:
        """(..) int64 target ids -> (.., D)."""
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def fuse(self, aux: Tensor) -> Tensor:
        """(.., n D_t) hidden states of the target, in the order of config.aux_layers -> (.., D)."""
        x = aux.to(self.fc.weight.dtype)
        if self.input_norm is not None:
            x = self.input_norm(x)
        if self.fc_norm is not None:
            parts = x.split(self.config.target_hidden_size, dim=-1)
            x = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(x)

    def logits(self, out: Tensor) -> Tensor:
        """Output of the layer (.., D) -> (.., V_d)."""
        return self.lm_head(self.norm(out))

    def feedback(self, out: Tensor) -> Tensor:
        """What the next step takes as its hidden state."""
        return self.norm(out) if self.config.norm_output else out

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(T,) or (B, 1, T) integer positions -> cos and sin (.., T, head_dim), the first half of sin negated."""
        angles = positions[..., None].float() * self._freq.to(positions.device)
        cos, sin = angles.cos(), angles.sin()
        dtype = self.fc.weight.dtype
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)

    # -- training-time test -------------------------------------------------------------------------------------------
    def step(
        self,
        embeds: Tensor,  # (B, T, D)
        hidden: Tensor,  # (B, T, D)
        cos: Tensor,  # (T, head_dim)
        sin: Tensor,  # (T, head_dim)
        past: list[KeyValue],  # of the steps before this one, step 0 first
        blocked: Tensor | None = None,  # (T, T) or (B, 1, 1, T, T) bool, True where step 0 is not seen; None: causal
    ) -> tuple[Tensor, KeyValue]:
        """One step for all positions: (output (B, T, D), its keys and values)."""
        layer, attention = self.layer, self.layer.self_attn
        x, residual = layer.wide(embeds, hidden)
        q, k, v = attention.project(x, cos, sin)
        if past:
            if blocked is None:
                blocked = _after(q.shape[2], q.device)
            y = attention.diagonal(q, [*past, (k, v)], blocked)
        else:
            y = attention.causal(q, k, v, None if blocked is None else ~blocked.squeeze(1), causal=blocked is None)
        return layer.finish(y, x, residual), (k, v)

    def rollout_hidden(self, tokens: Tensor, aux: Tensor, *, steps: int, mask: Tensor | None = None) -> list[Tensor]:
        """Output of the layer (B, T, D) at each step of the training-time test; ``logits`` of the rows one needs.

        Args:
            tokens: (B, T) int64.
            aux: (B, T, n D_t), hidden states of the target at these tokens.
            steps: number of steps, at least 1.
            mask: None, or (B, T) bool, True at real tokens, or (B, T) integer numbers of the documents packed into a
                row: a position sees positions of its own document only. Which outputs mean something: ``valid``.
        """
        if tokens.ndim != 2 or aux.shape != (*tokens.shape, self.fc.in_features):
            raise refuse("rollout", "aux", f"(B, T, {self.fc.in_features}) for tokens {tuple(tokens.shape)}", aux)
        if steps < 1:
            raise refuse("rollout", "steps", "at least 1", steps)
        if mask is not None and mask.shape != tokens.shape:
            raise refuse("rollout", "mask", f"(B, T) = {tuple(tokens.shape)}", mask)
        length = tokens.shape[1]
        blocked = _blocked(mask)
        embeds = F.pad(self.embed(tokens), (0, 0, 0, steps))
        cos, sin = self.rotary(torch.arange(length + steps, device=tokens.device))
        hidden = self.fuse(aux if mask is None else aux.masked_fill((mask == 0)[..., None], 0))  # 0 * NaN is NaN
        past: list[KeyValue] = []
        outputs = []
        for shift in range(1, steps + 1):
            window = slice(shift, shift + length)
            out, key_value = self.step(embeds[:, window], hidden, cos[window], sin[window], past, blocked)
            past.append(key_value)
            outputs.append(out)
            hidden = self.feedback(out)
        return outputs

    def rollout(self, tokens: Tensor, aux: Tensor, *, steps: int, mask: Tensor | None = None) -> list[Tensor]:
        """Logits (B, T, V_d) of every step: step i at position t predicts token t + 2 + i. As ``rollout_hidden``."""
        return [self.logits(out) for out in self.rollout_hidden(tokens, aux, steps=steps, mask=mask)]

    # -- drafting -----------------------------------------------------------------------------------------------------
    def extend(
        self,
        embeds: Tensor,  # (B, T, D)
        hidden: Tensor,  # (B, T, D)
        positions: Tensor,  # (T,) or (B, 1, T): position of the token that is embedded
        cache: KeyValue | None = None,  # keys and values (B, H_kv, S, head_dim) so far
        mask: Tensor | None = None,  # broadcastable to (B, 1, T, S + T) bool, True where seen; None: causal
    ) -> tuple[Tensor, KeyValue]:
        """Run T more inputs over a cache: (output (B, T, D), the cache with T more)."""
        layer, attention = self.layer, self.layer.self_attn
        x, residual = layer.wide(embeds, hidden)
        q, k, v = attention.project(x, *self.rotary(positions))
        length = k.shape[2]
        if cache is not None:
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            if mask is None:
                total = k.shape[2]
                mask = torch.ones(length, total, dtype=torch.bool, device=k.device).tril(total - length)
        return layer.finish(attention.causal(q, k, v, mask, causal=mask is None), x, residual), (k, v)

    # -- start --------------------------------------------------------------------------------------------------------
    @classmethod
    def warm_start(
        cls, config: GatedEagle3Config, target: Decoder, tokens: Tensor, *, seed: int = 0, fc_scale: float = 1.0
    ) -> GatedEagle3:
        """A draft to train from, in fp32: the same for the same arguments.

        Where shapes fit, the target's last layer gives o_proj, the MLP, the half of q, k, v over the hidden state and
        the norms before them; its head and final norm give lm_head and norm; fc hands on ``fc_scale`` times the last
        hidden state of config.aux_layers. The gate's weight is 0 (and its bias open), other norms are ones, everything
        else is normal with standard deviation 0.02.

        Args:
            tokens: (V_d,) target ids that the draft can propose, as in ``set_vocabulary``.
        """
        draft = cls(config, target.embedding.float())
        draft.set_vocabulary(tokens)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in draft.named_parameters():
            if "norm" in name:
                nn.init.ones_(weight)
            else:
                nn.init.normal_(weight, std=INIT_STD, generator=generator)
        with torch.no_grad():
            draft._take_last_layer(target)
            _take(draft.lm_head.weight, target.head, draft.t2d)
            _copy(draft.norm.weight, target.norm.weight)
            if config.hidden_size == config.target_hidden_size:
                draft.fc.weight.zero_()[:, -config.hidden_size :].fill_diagonal_(fc_scale)
            gate = draft.layer.self_attn.attn_gate
            if gate is not None:
                gate.weight.zero_()
                if config.gate_bias:
                    gate.bias.fill_(OPEN_GATE)
        return draft

    def _take_last_layer(self, target: Decoder) -> None:
        config, last, layer = self.config, target.blocks[-1], self.layer
        attention, mlp, theirs = layer.self_attn, layer.mlp, target.config
        _take(attention.o_proj.weight, last.attention.o)
        _copy(layer.hidden_norm.weight, last.attention_norm.weight)
        _copy(layer.post_attention_layernorm.weight, last.mlp_norm.weight)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        if heads == (theirs.num_heads, theirs.num_kv_heads, theirs.head_dim) and not theirs.qk_norm:
            projections = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
            both = torch.cat(projections)[:, -config.hidden_size :].contiguous()
            _take(both, last.attention.qkv)
            for weight, rows in zip(projections, both.split([len(weight) for weight in projections]), strict=True):
                weight[:, -config.hidden_size :] = rows
        if isinstance(last.mlp, Mlp) and config.intermediate_size == theirs.intermediate_size:
            both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
            _take(both, last.mlp.gate_up)
            mlp.gate_proj.weight.copy_(both[: config.intermediate_size])
            mlp.up_proj.weight.copy_(both[config.intermediate_size :])
            _take(mlp.down_proj.weight, last.mlp.down)


def valid(mask: Tensor, step: int) -> Tensor:
    """(B, T) bool: where the logits of ``step`` and the token that they predict, t + 2 + step, are of one document.

    Args:
        mask: (B, T) bool, True at real tokens, or integer numbers of the documents packed into a row, 0 at padding.
    """
    numbers = mask.to(torch.int64)
    ahead = F.pad(numbers, (0, step + 2))[:, step + 2 :]
    return (numbers == ahead) & (numbers != 0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _after(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _blocked(mask: Tensor | None) -> Tensor | None:
    """(B, 1, 1, T, T) bool, True where a position may not look; None where "later positions" says it all."""
    if mask is None:
        return None
    numbers = mask.to(torch.int64)
    padded_right = (numbers[:, 1:] == numbers[:, :-1]) | (numbers[:, 1:] == 0)
    one_document = (numbers == 0) | (numbers == numbers[:, :1])
    if bool((padded_right & one_document[:, 1:]).all()):
        return None
    other = numbers[:, :, None] != numbers[:, None, :]
    return (other | _after(numbers.shape[1], mask.device))[:, None, None]


def _copy(weight: Tensor, other: Tensor) -> None:
    if weight.shape == other.shape:
        weight.copy_(other)


def _take(weight: Tensor, linear: nn.Module, rows: Tensor | None = None) -> None:
    """Copy the (rows of the) dense weight of a linear of any format, if its shape is that of ``weight``."""
    if isinstance(linear, nn.Linear):
        dense = linear.weight
    else:
        device = next(iter(linear.buffers()), weight).device
        identity = torch.eye(weight.shape[1], device=device)
        try:
            dense = (linear(identity) - linear(torch.zeros_like(identity[:1]))).T
        except ValueError:  # another number of input features: nothing to take
            return
    _copy(weight, dense if rows is None else dense[rows.to(dense.device)])
