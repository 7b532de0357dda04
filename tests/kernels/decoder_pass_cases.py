"""Small decoders as programs, requests on pages, and batches of them: what the tests of the pass share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3kernels.decoder.program import Batch, Cache, Columns, Program
from m3kernels.int4 import Int4Weight
from m3kernels.int4.quantize import quantize_weight

EPS = 1e-5
VOCABULARY = 97
POSITIONS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder: its sizes and how its tensors are held."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    rotated: int = 16
    inner: int = 96
    weights: str = "fp32"  # fp32, bf16, fp16, int4
    group_size: int = 32
    symmetric: bool = True
    activations: str = "auto"
    bias: bool = False
    table: torch.dtype = torch.float32
    norms: bool = False  # of queries and keys
    gate: str = "none"  # none, head, element
    experts: int = 0
    top_k: int = 2
    rescale: bool = True
    kv: torch.dtype = torch.float32


DENSE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Weights:
    """Random tensors, the same for the same shape and name."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.count = shape, 0

    def normal(self, *sizes: int, scale: float = 1.0) -> Tensor:
        self.count += 1
        return torch.randn(*sizes, generator=torch.Generator().manual_seed(self.count)) * scale

    def product(self, n: int, k: int, *lead: int) -> Tensor | Int4Weight:
        shape, weight = self.shape, self.normal(*lead, n, k, scale=k**-0.5)
        if shape.weights != "int4":
            return weight.to(DENSE[shape.weights])
        return quantize_weight(weight, group_size=shape.group_size, symmetric=shape.symmetric, method="minmax")

    def norm(self, size: int) -> Tensor:
        return 1.0 + self.normal(size, scale=0.2)


def new_cache(shape: Shape, pages: int, page_size: int) -> Cache:
    """A cache in which nobody has written: nan, or the largest integers with scales that are nan."""
    sizes = (pages, page_size, shape.kv_heads, shape.size)
    if shape.kv == torch.int8:
        keys, values = (torch.full(sizes, 127, dtype=torch.int8) for _ in range(2))
        return Cache(keys, values, *(torch.full(sizes[:3], torch.nan) for _ in range(2)))
    return Cache(*(torch.full(sizes, torch.nan, dtype=shape.kv) for _ in range(2)))


def tables(rotated: int) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(POSITIONS).float(), 1e4 ** (-torch.arange(0, rotated, 2) / rotated))
    return angle.cos(), angle.sin()


def decoder(shape: Shape, *, pages: int = 40, page_size: int = 4) -> Program:
    """Embedding, layers, head. Outputs: logits of the picked rows, the last hidden state of all rows."""
    weights, program = Weights(shape), Program(rotated=shape.rotated)
    program.angles(*tables(shape.rotated))
    heads, kv_heads, size, hidden = shape.heads, shape.kv_heads, shape.size, shape.hidden
    x, normed, delta = (program.buffer(hidden) for _ in range(3))
    qkv, attended = program.buffer((heads + 2 * kv_heads) * size), program.buffer(heads * size)
    gate = None if shape.gate == "none" else program.buffer(heads if shape.gate == "head" else heads * size)

    def linear(to: Columns, source: Columns) -> None:
        bias = weights.normal(to.width, scale=0.1) if shape.bias else None
        program.linear(to, source, weights.product(to.width, source.width), bias, activations=shape.activations)

    program.embed(x, weights.normal(VOCABULARY, hidden).to(shape.table))
    for _ in range(shape.layers):
        cache = program.cache(new_cache(shape, pages, page_size))
        program.norm(normed, x, weights.norm(hidden), EPS)
        linear(qkv, normed)
        norms = (weights.norm(size), weights.norm(size)) if shape.norms else (None, None)
        program.rotate(qkv, cache, heads, *norms, EPS)
        if gate is not None:
            linear(gate, normed)
        program.attend(attended, qkv.part(0, heads * size), cache, heads, size**-0.5, gate)
        linear(delta, attended)
        program.add(x, delta)
        program.norm(normed, x, weights.norm(hidden), EPS)
        feed_forward(program, shape, weights, delta, normed)
        program.add(x, delta)
    last, logits = program.buffer(hidden, picked=True), program.buffer(VOCABULARY, picked=True)
    program.pick(last, x)
    program.norm(last, last, weights.norm(hidden), EPS)
    linear(logits, last)
    program.store(logits)
    program.store(x)
    return program


def feed_forward(program: Program, shape: Shape, weights: Weights, to: Columns, source: Columns) -> None:
    if shape.experts:
        scores = program.buffer(shape.experts)
        program.linear(scores, source, weights.normal(shape.experts, shape.hidden, scale=0.3))
        w13 = weights.product(2 * shape.inner, shape.hidden, shape.experts)
        w2 = weights.product(shape.hidden, shape.inner, shape.experts)
        facts: dict[str, Any] = {"top_k": shape.top_k, "rescale": shape.rescale, "activations": shape.activations}
        program.moe(to, source, scores, w13, w2, **facts)
        return
    gate_up, product = program.buffer(2 * shape.inner), program.buffer(shape.inner)
    for part in (gate_up.part(0, shape.inner), gate_up.part(shape.inner, shape.inner)):
        program.linear(part, source, weights.product(part.width, source.width), activations=shape.activations)
    program.silu_mul(product, gate_up)
    program.linear(to, product, weights.product(to.width, product.width), activations=shape.activations)


# -- requests ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens of one request from position ``start`` on. ``parents``: they are nodes of a tree behind the first
    ``start`` tokens, each with its parent, -1 for none; ``nodes``: only these of them go through the pass."""

    request: int
    start: int
    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    nodes: tuple[int, ...] | None = None

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(range(len(self.tokens))) if self.nodes is None else self.nodes

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child to ``node``; under the causal mask all before it."""
        if self.parents is None:
            return list(range(node + 1))
        above = [] if self.parents[node] < 0 else self.path(self.parents[node])
        return [*above, node]


def words(request: int, count: int) -> tuple[int, ...]:
    """The first tokens of a request."""
    generator = torch.Generator().manual_seed(1000 + request)
    return tuple(torch.randint(VOCABULARY, (POSITIONS,), generator=generator)[:count].tolist())


@dataclasses.dataclass(frozen=True)
class Paging:
    """Which pages belong to a request: every `requests`-th of the order, from the request's number on."""

    page_size: int = 4
    pages: int = 40
    requests: int = 4
    order: int = 0  # seed of a permutation

    def table(self, request: int) -> Tensor:
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(self.order))
        return order[request :: self.requests]

    def slots(self, request: int, positions: Tensor) -> Tensor:
        return self.table(request)[positions // self.page_size] * self.page_size + positions % self.page_size


def make_batch(chunks: Sequence[Chunk], paging: Paging, picked: Sequence[int] | None = None) -> Batch:
    """Causal chunks first, then trees. Pages beyond a request's last key are no pages at all."""
    causal = [chunk for chunk in chunks if chunk.parents is None]
    trees = [chunk for chunk in chunks if chunk.parents is not None]
    ordered = [*causal, *trees]
    rows = [(chunk, node) for chunk in ordered for node in chunk.rows]
    slots = [paging.slots(chunk.request, torch.tensor(chunk.start + node)) for chunk, node in rows]
    seqlens = [chunk.start + len(chunk.tokens) for chunk in ordered]
    used = [-(-count // paging.page_size) for count in seqlens]
    block_table = torch.full((len(ordered), max(used, default=0) + 1), -1)
    for row, (chunk, count) in enumerate(zip(ordered, used, strict=True)):
        block_table[row, :count] = paging.table(chunk.request)[:count]
    width = -(-max((len(chunk.tokens) for chunk in trees), default=0) // 32)
    paths = [chunk.path(node) for chunk in trees for node in chunk.rows]
    masks = torch.zeros(len(paths), width, dtype=torch.int64)
    for row, path in enumerate(paths):
        for above in path:
            masks[row, above // 32] |= 1 << above % 32
    ends = torch.tensor([0, *(len(chunk.rows) for chunk in ordered)]).cumsum(0)
    tree_lens = torch.tensor([len(chunk.tokens) for chunk in ordered], dtype=torch.int32)
    return Batch(
        tokens=torch.tensor([chunk.tokens[node] for chunk, node in rows], dtype=torch.int64),
        positions=torch.tensor([chunk.start + len(chunk.path(node)) - 1 for chunk, node in rows], dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        cu_seqlens=ends.int(),
        cache_seqlens=torch.tensor(seqlens, dtype=torch.int32),
        block_table=block_table.int(),
        picked=torch.arange(len(rows)) if picked is None else torch.tensor(picked, dtype=torch.int64),
        causal=len(causal),
        tree_lens=tree_lens if trees else None,
        mask_bits=masks.where(masks < 2**31, masks - 2**32).int() if trees else None,
    )


def run_pass(
    program: Program, chunks: Sequence[Chunk], paging: Paging | None = None, runner: Any = None
) -> list[Tensor]:
    """One pass with every row picked, by the native pass unless another runner is given."""
    batch = make_batch(chunks, paging or Paging())
    return program.run(batch) if runner is None else runner.run(batch, ())


TREE = (-1, -1, 0, 0, 1, 2, 5)  # parents
HISTORY: tuple[tuple[Chunk, ...], ...] = (  # passes: prefill, a mixed batch, steps of drafting, a decode
    (Chunk(0, 0, words(0, 13)), Chunk(1, 0, words(1, 6)), Chunk(2, 0, words(2, 1))),
    (Chunk(0, 13, words(3, 1)), Chunk(1, 6, words(4, 7), TREE), Chunk(2, 1, words(5, 8)), Chunk(3, 0, words(6, 3))),
    (Chunk(0, 14, words(7, 4), TREE[:4]), Chunk(1, 6, words(1, 9)[6:])),
    (Chunk(0, 14, words(7, 7), TREE, (4, 5, 6)), Chunk(3, 3, words(8, 1))),
    (Chunk(2, 9, words(9, 1)),),
)


def play(program: Program, runner: Any = None, paging: Paging | None = None) -> list[Tensor]:
    """The history's outputs, each over all of its passes."""
    found = [run_pass(program, chunks, paging, runner) for chunks in HISTORY]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]
