"""The draft model: its training-time test against a drafting loop written apart, its parts, its start, its refusals."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m3.models.decoder import Decoder, DecoderConfig, RopeConfig
from m3.models.gated_eagle3 import GatedEagle3, GatedEagle3Config, valid
from m3.models.int4_linear import Int4Linear
from m3.models.loader import load_model
from tests.m3.tiny_models import make_checkpoint

BASE = GatedEagle3Config(
    hidden_size=20,
    target_hidden_size=20,
    intermediate_size=28,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    vocab_size=37,
    draft_vocab_size=11,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500.0),
    gate="elementwise",
    aux_layers=(1, 2, 3),
    max_position_embeddings=64,
)
LLAMA3 = RopeConfig(theta=500.0, kind="llama3", factor=4.0, original_max_position_embeddings=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "elementwise": {},
    "headwise": {"gate": "headwise"},
    "ungated": {"gate": "none"},
    "gate-bias": {"gate_bias": True},
    "headwise-bias": {"gate": "headwise", "gate_bias": True},
    "norm-before-residual": {"norm_before_residual": True},
    "norm-before-fc": {"norm_before_fc": True},
    "norm-per-layer": {"fc_norm": True},
    "post-norm-feedback": {"norm_output": True},
    "everything": {"norm_before_residual": True, "fc_norm": True, "norm_output": True, "gate_bias": True},
    "no-groups": {"num_kv_heads": 4},
    "one-kv-head": {"num_kv_heads": 1},
    "one-layer": {"num_aux": 1, "aux_layers": (3,)},
    "four-layers": {"num_aux": 4, "aux_layers": (0, 1, 2, 3)},
    "wide-heads": {"head_dim": 14},
    "narrow-target": {"target_hidden_size": 13},
    "rope-llama3": {"rope": LLAMA3},
    "rope-linear": {"rope": RopeConfig(theta=500.0, kind="linear", factor=2.0)},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def make_draft(seed: int = 0, **changes: Any) -> GatedEagle3:
    config = dataclasses.replace(BASE, **changes)
    generator = torch.Generator().manual_seed(seed)
    draft = GatedEagle3(config, torch.randn(config.vocab_size, config.hidden_size, generator=generator))
    with torch.no_grad():
        for name, weight in draft.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(std=1 / math.sqrt(weight.shape[-1]), generator=generator)
    return draft


def make_inputs(draft: GatedEagle3, batch: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    config = draft.config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length), generator=generator)
    return tokens, torch.randn(batch, length, config.num_aux * config.target_hidden_size, generator=generator)


class DraftingLoop:
    """Drafting one token at a time, in fp64, one vector at a time: written from the formulas, shares no code."""

    def __init__(self, draft: GatedEagle3) -> None:
        self.config = draft.config
        self.w = {name: weight.detach().double() for name, weight in draft.state_dict().items()}
        self.table = draft.embedding.double()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + self.config.rms_norm_eps).sqrt() * self.w[f"{name}.weight"]

    def fuse(self, aux: Tensor) -> Tensor:
        config, size = self.config, self.config.target_hidden_size
        if config.norm_before_fc:
            aux = self.norm(aux, "input_norm")
        if config.fc_norm:
            parts = [self.norm(aux[j * size : (j + 1) * size], f"fc_norm.{j}") for j in range(config.num_aux)]
            aux = torch.cat(parts)
        return self.w["fc.weight"] @ aux

    def rope(self, x: Tensor, position: int) -> Tensor:
        """Turn the pairs (x_j, x_{j + d/2}) of one head."""
        half = self.config.head_dim // 2
        y = x.clone()
        for j, frequency in enumerate(self.config.rope.frequencies(self.config.head_dim).tolist()):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            y[j], y[j + half] = x[j] * c - x[j + half] * s, x[j + half] * c + x[j] * s
        return y

    def advance(self, cache: list[tuple[Tensor, Tensor]], token: int, hidden: Tensor, position: int) -> Tensor:
        """One input; its key and value are appended to the cache. Returns the output of the layer."""
        config, heads, dim = self.config, self.config.num_heads, self.config.head_dim
        name, attention = "layers.0", "layers.0.self_attn"
        normed = self.norm(hidden, f"{name}.hidden_norm")
        x = torch.cat((self.norm(self.table[token], f"{name}.input_layernorm"), normed))
        q, k, v = (self.w[f"{attention}.{part}_proj.weight"] @ x for part in "qkv")
        key = torch.stack([self.rope(head, position) for head in k.view(-1, dim)])
        cache.append((key, v.view(-1, dim)))
        y = torch.empty(heads, dim, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // config.num_kv_heads)
            query = self.rope(q.view(heads, dim)[head], position)
            weights = torch.stack([query @ keys[group] for keys, _ in cache]).div(math.sqrt(dim)).softmax(0)
            y[head] = weights @ torch.stack([values[group] for _, values in cache])
        if config.gate != "none":
            gate = self.w[f"{attention}.attn_gate.weight"] @ x
            if config.gate_bias:
                gate = gate + self.w[f"{attention}.attn_gate.bias"]
            y = y / (1 + (-gate).exp()).view(heads, -1)
        r = normed if config.norm_before_residual else hidden
        r = r + self.w[f"{attention}.o_proj.weight"] @ y.flatten()
        n = self.norm(r, f"{name}.post_attention_layernorm")
        gated = self.w[f"{name}.mlp.gate_proj.weight"] @ n
        gated = gated / (1 + (-gated).exp()) * (self.w[f"{name}.mlp.up_proj.weight"] @ n)
        return r + self.w[f"{name}.mlp.down_proj.weight"] @ gated

    def draft(self, tokens: list[int], aux: Tensor, t: int, steps: int) -> list[Tensor]:
        """Logits of ``steps`` steps from position t, each fed the true next token: hidden states are known up to t."""
        cache: list[tuple[Tensor, Tensor]] = []
        logits = []
        for position in range(t + 1):
            out = self.advance(cache, tokens[position + 1], self.fuse(aux[position]), position + 1)
        for step in range(steps):
            if step:
                hidden = self.norm(out, "norm") if self.config.norm_output else out
                out = self.advance(cache, tokens[t + 1 + step], hidden, t + 1 + step)
            logits.append(self.w["lm_head.weight"] @ self.norm(out, "norm"))
        return logits


def by_loop(draft: GatedEagle3, tokens: Tensor, aux: Tensor, steps: int) -> list[Tensor]:
    """(T - step - 1, V_d) logits of each step at every position that has its token."""
    loop, length = DraftingLoop(draft), len(tokens)
    rows = [loop.draft(tokens.tolist(), aux.double(), t, min(steps, length - 1 - t)) for t in range(length - 1)]
    return [torch.stack([row[step] for row in rows if len(row) > step]) for step in range(steps)]


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)  # logits of about 1, sums of <= 80 terms


# -- the training-time test is the drafting loop ----------------------------------------------------------------------
@each_variant
def test_rollout_is_the_drafting_loop_at_every_position(changes):
    draft = make_draft(**changes)
    tokens, aux = make_inputs(draft, 1, 9)
    got = draft.rollout(tokens, aux, steps=4)
    want = by_loop(draft, tokens[0], aux[0], 4)
    close(torch.cat([logits[0, : len(rows)] for logits, rows in zip(got, want, strict=True)]), torch.cat(want))


@pytest.mark.parametrize("length", [2, 3, 19])
def test_rollout_at_other_lengths(length):
    draft = make_draft()
    tokens, aux = make_inputs(draft, 1, length)
    steps = min(3, length - 1)
    want = by_loop(draft, tokens[0], aux[0], steps)
    got = draft.rollout(tokens, aux, steps=steps)
    close(torch.cat([logits[0, : len(rows)] for logits, rows in zip(got, want, strict=True)]), torch.cat(want))


@pytest.mark.parametrize("length", [0, 1])
def test_rollout_of_nothing_to_predict(length):
    draft = make_draft()
    tokens, aux = make_inputs(draft, 2, length)
    got = draft.rollout(tokens, aux, steps=2)
    assert [logits.shape for logits in got] == [(2, length, BASE.draft_vocab_size)] * 2
    assert all(logits.isfinite().all() for logits in got)


def test_rollout_of_a_padded_row_is_that_of_the_row_alone():
    draft = make_draft()
    tokens, aux = make_inputs(draft, 2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    aux[1, 6:] = torch.nan
    tokens[1, 6:] = 0
    got = draft.rollout(tokens, aux, steps=3, mask=mask)
    want = by_loop(draft, tokens[1, :6], aux[1, :6], 3)
    close(torch.cat([logits[1, : len(rows)] for logits, rows in zip(got, want, strict=True)]), torch.cat(want))


def packed() -> Tensor:
    return torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [7, 7, 7, 7, 7, 7, 3, 3, 3, 3]])


@pytest.mark.parametrize(
    ("row", "start", "stop"), [(0, 0, 4), (0, 4, 9), (1, 0, 6), (1, 6, 10)], ids=["first", "middle", "long", "last"]
)
def test_rollout_of_a_packed_document_is_that_of_the_document_alone(row, start, stop):
    draft = make_draft()
    tokens, aux = make_inputs(draft, 2, 10)
    got = draft.rollout(tokens, aux, steps=3, mask=packed())
    want = by_loop(draft, tokens[row, start:stop], aux[row, start:stop], 3)
    rows = [logits[row, start : start + len(alone)] for logits, alone in zip(got, want, strict=True)]
    close(torch.cat(rows), torch.cat(want))


def test_valid_says_where_step_and_predicted_token_are_of_one_document():
    want = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 1, 1, 0, 0]]).bool()
    assert torch.equal(valid(packed(), 0), want)
    want = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    assert torch.equal(valid(packed(), 2), want)


def test_valid_of_a_padding_mask():
    mask = torch.tensor([[True, True, True, False, False]])
    assert valid(mask, 0).tolist() == [[True, False, False, False, False]]


def test_gradients_through_the_rollout_are_those_of_finite_differences():
    draft = make_draft(
        hidden_size=6, target_hidden_size=6, intermediate_size=5, head_dim=2, vocab_size=7, draft_vocab_size=3
    )
    draft = draft.double()
    tokens, aux = make_inputs(draft, 1, 4)
    names = [f"draft.{name}" for name, _ in draft.named_parameters()]

    def loss(*weights: Tensor) -> Tensor:
        call = (tokens, aux.double())
        logits = torch.func.functional_call(Rollout(draft), dict(zip(names, weights, strict=True)), call)
        return torch.stack(logits).square().sum(dim=(0, 1, 3))

    weights = tuple(weight.detach().requires_grad_() for weight in draft.parameters())
    assert torch.autograd.gradcheck(loss, weights, fast_mode=True)


class Rollout(torch.nn.Module):
    def __init__(self, draft: GatedEagle3) -> None:
        super().__init__()
        self.draft = draft

    def forward(self, tokens: Tensor, aux: Tensor) -> list[Tensor]:
        return self.draft.rollout(tokens, aux, steps=2)


# -- drafting over a cache --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [VARIANTS["everything"], VARIANTS["headwise"]], ids=["everything", "headwise"])
def test_extend_drafts_as_the_loop(changes):
    draft = make_draft(**changes)
    tokens, aux = make_inputs(draft, 1, 8)
    want = DraftingLoop(draft).draft(tokens[0].tolist(), aux[0].double(), 4, 3)
    fused = draft.fuse(aux)
    _, cache = draft.extend(draft.embed(tokens[:, 1:3]), fused[:, :2], torch.arange(1, 3))
    out, cache = draft.extend(draft.embed(tokens[:, 3:6]), fused[:, 2:5], torch.arange(3, 6), cache)
    got = [draft.logits(out[:, -1])]
    for position in (6, 7):
        embeds = draft.embed(tokens[:, position : position + 1])
        out, cache = draft.extend(embeds, draft.feedback(out[:, -1:]), torch.tensor([position]), cache)
        got.append(draft.logits(out[:, -1]))
    close(torch.cat(got), torch.stack(want))


def test_extend_with_a_mask_drafts_siblings_apart():
    draft = make_draft()
    tokens, aux = make_inputs(draft, 1, 5)
    out, cache = draft.extend(draft.embed(tokens[:, 1:]), draft.fuse(aux)[:, :4], torch.arange(1, 5))
    siblings = torch.tensor([[3, 9]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 5] = mask[1, 4] = False
    both, _ = draft.extend(draft.embed(siblings), out[:, -1:].expand(1, 2, -1), torch.tensor([5, 5]), cache, mask)
    second, _ = draft.extend(draft.embed(siblings[:, 1:]), out[:, -1:], torch.tensor([5]), cache)
    torch.testing.assert_close(both[:, 1:], second, rtol=1e-5, atol=1e-5)


# -- names, vocabulary, start -----------------------------------------------------------------------------------------
def test_names_are_those_of_the_checkpoint_layout():
    names = set(make_draft(fc_norm=True, gate_bias=True).state_dict())
    layer = "layers.0."
    attention = {f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    gate = {f"{layer}self_attn.attn_gate.weight", f"{layer}self_attn.attn_gate.bias"}
    mlp = {f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {f"{layer}{name}.weight" for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
    others = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", *(f"fc_norm.{j}.weight" for j in range(3))}
    assert names == attention | gate | mlp | norms | others


def test_shapes_are_those_of_the_checkpoint_layout():
    shapes = {
        name: tuple(tensor.shape) for name, tensor in make_draft(head_dim=14, norm_before_fc=True).state_dict().items()
    }
    assert shapes["layers.0.self_attn.q_proj.weight"] == (56, 40)
    assert shapes["layers.0.self_attn.k_proj.weight"] == (28, 40)
    assert shapes["layers.0.self_attn.attn_gate.weight"] == (56, 40)
    assert shapes["layers.0.self_attn.o_proj.weight"] == (20, 56)
    assert shapes["fc.weight"] == (20, 60)
    assert shapes["input_norm.weight"] == (60,)


def test_vocabulary_maps_both_ways():
    draft = make_draft(draft_vocab_size=4)
    draft.set_vocabulary(torch.tensor([30, 2, 0, 36]))
    assert (torch.arange(4) + draft.d2t).tolist() == [0, 2, 30, 36]
    assert draft.t2d.nonzero().flatten().tolist() == [0, 2, 30, 36]


def test_the_embedding_is_no_part_of_the_checkpoint_and_follows_the_dtype():
    draft = make_draft().to(torch.bfloat16)
    assert "embedding" not in draft.state_dict()
    assert draft.embed(torch.tensor([1])).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Decoder:
    folder = tmp_path_factory.mktemp("target")
    make_checkpoint(folder, "llama-tied")
    return load_model(folder)


def start(target: Decoder, seed: int = 0, **changes: Any) -> GatedEagle3:
    config = GatedEagle3Config.for_target(target.config, draft_vocab_size=10, gate="elementwise", aux_layers=(1, 2, 3))
    config = dataclasses.replace(config, **changes)
    return GatedEagle3.warm_start(config, target, torch.arange(3, 33, 3), seed=seed)


def test_warm_start_takes_what_fits_from_the_target(target):
    draft = start(target)
    last, attention, mlp = target.blocks[-1], draft.layer.self_attn, draft.layer.mlp
    assert torch.equal(attention.o_proj.weight, last.attention.o.weight)
    assert torch.equal(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), last.mlp.gate_up.weight)
    assert torch.equal(mlp.down_proj.weight, last.mlp.down.weight)
    queries_keys_values = torch.cat([attention.get_parameter(f"{name}_proj.weight") for name in "qkv"])
    assert torch.equal(queries_keys_values[:, 64:], last.attention.qkv.weight)
    assert torch.equal(draft.lm_head.weight, target.embedding[3:33:3])
    assert draft.t2d.nonzero().flatten().tolist() == list(range(3, 33, 3))


def test_warm_start_takes_the_norms_of_what_it_takes(target):
    draft, last = start(target, fc_norm=True), target.blocks[-1]
    assert torch.equal(draft.norm.weight, target.norm.weight)
    assert torch.equal(draft.layer.hidden_norm.weight, last.attention_norm.weight)
    assert torch.equal(draft.layer.post_attention_layernorm.weight, last.mlp_norm.weight)
    assert draft.layer.input_layernorm.weight.unique().tolist() == [1.0]
    assert draft.get_parameter("fc_norm.1.weight").unique().tolist() == [1.0]


def test_warm_start_hands_on_the_last_hidden_state(target):
    draft = start(target)
    aux = torch.randn(5, 3 * 64)
    assert torch.equal(draft.fuse(aux), aux[:, 128:])


def test_warm_start_opens_the_gate(target):
    attention = start(target, gate_bias=True).layer.self_attn
    assert attention.attn_gate.weight.count_nonzero() == 0
    assert attention.attn_gate.bias.unique().tolist() == [4.0]


def test_warm_start_repeats_and_changes_with_the_seed(target):
    first, again, other = (start(target, seed).layer.self_attn.q_proj.weight for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_warm_start_of_other_sizes_draws_what_does_not_fit(target):
    draft = start(target, intermediate_size=40, num_heads=2, num_kv_heads=1)
    weights = [draft.layer.self_attn.o_proj.weight, draft.layer.mlp.down_proj.weight]
    assert all(0.015 < float(weight.detach().std()) < 0.025 for weight in weights)
    assert torch.equal(draft.lm_head.weight, target.embedding[3:33:3])


def test_warm_start_from_an_int4_target(tmp_path):
    make_checkpoint(tmp_path, "llama-tied")
    packed_target = load_model(tmp_path)
    last = packed_target.blocks[-1]
    dense = last.mlp.down.weight
    last.mlp.down = Int4Linear.from_linear(last.mlp.down, group_size=32, activations="exact")
    weight = start(packed_target).layer.mlp.down_proj.weight
    assert float((weight.detach() - dense).norm() / dense.norm()) < 0.15  # 4 bits
    columns = torch.eye(96)[:7]
    torch.testing.assert_close(weight[:, :7], last.mlp.down(columns).T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("layers", "want"), [(30, (2, 15, 27)), (94, (2, 47, 91)), (3, (0, 1, 2)), (1, (0, 1))])
def test_default_layers(target, layers, want):
    config: DecoderConfig = dataclasses.replace(target.config, num_layers=layers)
    assert GatedEagle3Config.for_target(config, draft_vocab_size=4, gate="none").aux_layers == want


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "sigmoid"}, "GatedEagle3Config: gate: want none or headwise or elementwise; got 'sigmoid'"),
        ({"gate": "none", "gate_bias": True}, "gate_bias: want False without a gate; got True"),
        ({"num_kv_heads": 3}, "num_kv_heads: want a divisor of 4 heads; got 3"),
        ({"head_dim": 5}, "head_dim: want an even number; got 5"),
        ({"draft_vocab_size": 38}, "draft_vocab_size: want at most vocab_size = 37; got 38"),
        ({"aux_layers": (1, 2)}, r"aux_layers: want num_aux = 3 ascending numbers of layers >= 0; got \(1, 2\)"),
        ({"aux_layers": (-1, 1, 2)}, "aux_layers: want num_aux = 3 ascending numbers of layers >= 0"),
        ({"aux_layers": (1, 3, 2)}, "aux_layers: want num_aux = 3 ascending numbers of layers >= 0"),
        ({"aux_layers": (1, 2, 2)}, "aux_layers: want num_aux = 3 ascending numbers of layers >= 0"),
        ({"norm_before_fc": True, "fc_norm": True}, "fc_norm: want False with norm_before_fc"),
        ({"intermediate_size": 0}, "intermediate_size: want at least 1; got 0"),
    ],
    ids=["gate", "bias", "kv-heads", "head-dim", "vocabulary", "two", "negative", "unsorted", "twice", "norms", "0"],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_an_embedding_of_the_targets_width_is_refused_where_the_draft_is_narrower():
    config = dataclasses.replace(BASE, hidden_size=16)
    with pytest.raises(ValueError, match=r"GatedEagle3: embedding: want \(37, 16\): the draft's own table"):
        GatedEagle3(config, torch.zeros(37, 20))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.arange(10), "tokens: want 11 distinct token ids; got \\(10,\\) int64"),
        (torch.zeros(11, dtype=torch.int64), "want 11 distinct token ids"),
        (torch.arange(30, 41), "want ids in 0 .. 36; got 30 .. 40"),
        (torch.arange(-1, 10), "want ids in 0 .. 36; got -1 .. 9"),
    ],
    ids=["too-few", "repeated", "too-large", "negative"],
)
def test_vocabulary_refuses(tokens, message):
    with pytest.raises(ValueError, match=message):
        make_draft().set_vocabulary(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aux": torch.zeros(1, 4, 59)}, r"rollout: aux: want \(B, T, 60\) for tokens \(1, 5\); got \(1, 4, 59\)"),
        ({"steps": 0}, "rollout: steps: want at least 1; got 0"),
        ({"mask": torch.ones(1, 4)}, r"rollout: mask: want \(B, T\) = \(1, 5\); got \(1, 4\)"),
    ],
    ids=["aux", "steps", "mask"],
)
def test_rollout_refuses(change, message):
    arguments = {"tokens": torch.zeros(1, 5, dtype=torch.int64), "aux": torch.zeros(1, 5, 60), "steps": 2, **change}
    with pytest.raises(ValueError, match=message):
        make_draft().rollout(**arguments)
