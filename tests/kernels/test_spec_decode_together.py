"""The ops of the family together: a small INT4 model decodes speculatively what it decodes token by token, bit for bit.

Drafting (draft_topk, tree_finalize), verification (int4_gemm, tree_attention, tree_verify) and commit (tree_commit) as
an engine would call them. The text must be that of plain decoding with the same seed, and so must the logits of every
accepted node and the keys that are left in the cache.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from m3kernels.int4 import Int4Weight, int4_gemm, quantize_weight
from m3kernels.spec_decode import draft_topk, tree_attention, tree_commit, tree_finalize, tree_verify
from m3kernels.spec_decode.types import Tree
from m3kernels.testing import bitwise_equal
from tests.kernels.spec_decode_cases import Sampling

VOCABULARY, WIDTH, HEADS, KV_HEADS, SIZE, LAYERS = 211, 128, 4, 2, 32, 2
REQUESTS, PROMPT, LENGTH = 3, 19, 24
PAGES = 64


class Layer(NamedTuple):
    """Weights of one layer; the gate's projection stands with those of q, k and v."""

    qkvg: Int4Weight
    out: Int4Weight
    up: Int4Weight
    down: Int4Weight


@dataclasses.dataclass
class Model:
    """A decoder with rotary positions, grouped heads and a sigmoid output gate, in INT4, and its caches."""

    page_size: int
    activations: str
    kv_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(rows: int, columns: int) -> Int4Weight:
            return quantize_weight(torch.randn(rows, columns, generator=generator) * columns**-0.5, group_size=32)

        self.embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
        wide = (2 * HEADS + 2 * KV_HEADS) * SIZE
        self.layers = [
            Layer(weight(wide, WIDTH), weight(WIDTH, WIDTH), weight(2 * WIDTH, WIDTH), weight(WIDTH, 2 * WIDTH))
            for _ in range(LAYERS)
        ]
        self.head = quantize_weight(self.embedding.roll(7, 0) * 0.03, group_size=32)
        shape = (LAYERS, PAGES * 16 // self.page_size + REQUESTS, self.page_size, KV_HEADS, SIZE)
        self.k_caches = list(torch.full(shape, torch.nan, dtype=self.kv_dtype))
        self.v_caches = list(torch.full(shape, torch.nan, dtype=self.kv_dtype))
        pages = shape[1] // REQUESTS
        order = torch.randperm(pages * REQUESTS, generator=generator)
        self.block_table = order.view(REQUESTS, pages).int()

    def product(self, x: Tensor, weight: Int4Weight) -> Tensor:
        return int4_gemm(x, weight, activations=self.activations)

    def attend(self, q: Tensor, *caches: Tensor, mask_bits: Tensor | None, gate: Tensor) -> Tensor:
        return tree_attention(q, *caches, mask_bits=mask_bits, gate=gate)

    def forward(self, tokens: Tensor, positions: Tensor, prefix: Tensor, mask_bits: Tensor | None) -> Tensor:
        """(B, N, V) logits of N new tokens of each request, whose keys go to slots prefix .. prefix + N - 1."""
        count = tokens.shape[1]
        x = self.embedding[tokens.clamp(min=0)]
        slots = prefix[:, None] + torch.arange(count)
        pages = self.block_table.gather(1, slots // self.page_size).long()
        for layer, k_cache, v_cache in zip(self.layers, self.k_caches, self.v_caches, strict=True):
            parts = self.product(normalise(x), layer.qkvg).unflatten(-1, (-1, SIZE))
            q, k, v, gate = parts.split([HEADS, KV_HEADS, KV_HEADS, HEADS], dim=2)
            k_cache[pages, slots % self.page_size] = rotate(k, positions).to(self.kv_dtype)
            v_cache[pages, slots % self.page_size] = v.to(self.kv_dtype)
            caches = k_cache, v_cache, self.block_table, prefix + count
            attended = self.attend(rotate(q, positions), *caches, mask_bits=mask_bits, gate=gate)
            x = x + self.product(attended.flatten(2), layer.out)
            x = x + 0.3 * self.product(torch.tanh(self.product(normalise(x), layer.up)), layer.down)
        return self.product(normalise(x), self.head)


def normalise(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-6).rsqrt()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions; x (B, N, heads, SIZE)."""
    angle = positions[..., None, None] * 100.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """How trees are drafted: steps, nodes expanded per step, nodes kept."""

    steps: int
    topk: int
    nodes: int
    shared_noise: bool = False


SHAPES = {
    "chain": Shape(3, 1, 4),
    "small": Shape(2, 3, 6),
    "wide": Shape(1, 8, 9),
    "deep": Shape(5, 4, 33),
    "shared noise": Shape(4, 3, 16, shared_noise=True),
}


SHARED_CHAIN = dataclasses.replace(SHAPES["chain"], shared_noise=True)


def draft(model: Model, bonus: Tensor, seq_lens: Tensor, shape: Shape, seed: Tensor) -> Tree:
    """Trees by a draft model that sees the last token alone: the target without its layers."""
    requests = len(bonus)
    ids, scores = bonus[:, None], torch.zeros(requests, 1)
    all_tokens, all_scores, parents = [], [], [torch.full((requests, 1), -1)]
    for step in range(shape.steps):
        noise = {"seed": seed, "position": seq_lens.long() + 1 + step} if shape.shared_noise else {}
        logits = normalise(model.embedding[ids]) @ model.embedding.roll(7, 0).T * 0.03
        found = draft_topk(logits, scores, k=shape.topk, step=step, **noise)
        all_tokens.append(found.tokens.flatten(1))
        all_scores.append(found.cum_scores.flatten(1))
        parents.append(found.parents)
        ids, scores = found.next_ids, found.next_scores
    lists = torch.cat(all_scores, 1), torch.cat(all_tokens, 1), torch.cat(parents[:-1], 1)
    return tree_finalize(*lists, bonus, seq_lens, topk=shape.topk, num_nodes=shape.nodes)


class Decoded(NamedTuple):
    """What a run leaves: per request the tokens, the logits each was drawn from, and the keys of the first layer."""

    tokens: list[list[int]]
    logits: list[Tensor]
    keys: list[Tensor]
    passes: int


def decode(model: Model, shape: Shape | None, sampling: Sampling, mode: str) -> Decoded:
    """Prompts, then at least LENGTH tokens a request: by trees of the given shape, or token by token."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(VOCABULARY, (REQUESTS, PROMPT), generator=generator)
    seed = torch.arange(REQUESTS) * 77 - 3
    prefix = torch.zeros(REQUESTS, dtype=torch.int32)
    model.forward(prompt[:, :-1], torch.arange(PROMPT - 1).expand(REQUESTS, -1), prefix, None)
    seq_lens, bonus = prefix + PROMPT - 1, prompt[:, -1]
    tokens: list[list[int]] = [[] for _ in range(REQUESTS)]
    logits: list[list[Tensor]] = [[] for _ in range(REQUESTS)]
    alone = torch.full((REQUESTS, 1), -1)
    passes = 0
    while min(map(len, tokens)) < LENGTH:
        passes += 1
        if shape is None:
            nodes, positions, mask_bits, links = bonus[:, None], seq_lens[:, None].long(), None, (alone, alone)
        else:
            tree = draft(model, bonus, seq_lens, shape, seed)
            nodes, positions, mask_bits = tree.candidates, tree.positions, tree.mask_bits
            links = tree.next_token, tree.next_sibling
        rows = model.forward(nodes, positions, seq_lens, mask_bits)
        parameters = sampling.tensors(REQUESTS) | {"seed": seed, "position": seq_lens.long() + 1}
        found = tree_verify(rows, nodes, *links, mode=mode, **parameters)
        for b in range(REQUESTS):
            path = found.accept_index[b, : int(found.accept_length[b]) + 1].long()
            tokens[b] += found.tokens[b, : len(path)].tolist()
            logits[b] += list(rows[b, path])
        path = found.accept_index, found.accept_length
        seq_lens, _ = tree_commit(*path, model.k_caches, model.v_caches, model.block_table, seq_lens)
        bonus = found.bonus_token
    keys = [model.k_caches[0][row.long()].flatten(0, 1)[: PROMPT - 1 + LENGTH] for row in model.block_table]
    return Decoded([t[:LENGTH] for t in tokens], [torch.stack(rows[:LENGTH]) for rows in logits], keys, passes)


def check_same(model: tuple[int, str, torch.dtype], shape: Shape, sampling: Sampling, mode: str) -> None:
    page_size, activations, dtype = model
    plain = decode(Model(16, activations, dtype), None, sampling, mode)
    fast = decode(Model(page_size, activations, dtype), shape, sampling, mode)
    assert fast.passes < plain.passes
    assert fast.tokens == plain.tokens
    assert all(bitwise_equal(a, b) for a, b in zip(fast.logits, plain.logits, strict=True))
    assert all(bitwise_equal(a, b) for a, b in zip(fast.keys, plain.keys, strict=True))


each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
native = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


@native
@each_shape
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_text_logits_and_cache_are_those_of_plain_decoding(backend, shape, temperature):
    sampling = Sampling(temperature=temperature, top_k=20, top_p=0.95)
    check_same((16, "auto", torch.float32), shape, sampling, "coupled")


@native
@pytest.mark.parametrize("page_size", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_page_size_and_cache_dtype_change_nothing(backend, page_size, dtype):
    check_same((page_size, "auto", dtype), SHAPES["deep"], Sampling(temperature=0.8), "coupled")


@native
@pytest.mark.parametrize("activations", ["exact", "int16", "int8"])
def test_rounding_of_activations_changes_nothing(backend, activations):
    check_same((16, activations, torch.float32), SHAPES["small"], Sampling(temperature=0.8), "coupled")


@native
def test_greedy_decoding_is_the_same(backend):
    check_same((16, "auto", torch.float32), SHAPES["deep"], Sampling(), "greedy")


@native
def test_noise_shared_by_draft_and_target_saves_passes_at_temperature_one(backend):
    runs = [decode(Model(16, "auto"), shape, Sampling(), "coupled") for shape in (SHAPES["chain"], SHARED_CHAIN)]
    assert runs[0].tokens == runs[1].tokens
    assert runs[1].passes < 0.7 * runs[0].passes
