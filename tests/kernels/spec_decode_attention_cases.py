"""What the tests of tree_attention share: requests as plain tensors, paged caches full of traps, attention in fp64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from m3kernels.spec_decode import tree_attention
from m3kernels.spec_decode.types import BITS

IMPOSSIBLE = 2**31 - 1  # a block id that no cache has


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Queries, the keys and values before them and their own. parents (n,): of a tree; None: a causal chunk."""

    q: Tensor  # (n, H, D)
    keys: Tensor  # (prefix + n, G, D)
    values: Tensor
    parents: list[int] | None = None
    gate: Tensor | None = None  # (n, H) or (n, H, D)

    @property
    def prefix(self) -> int:
        return len(self.keys) - len(self.q)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to this one; of a causal chunk, all up to it."""
        if self.parents is None:
            return list(range(node + 1))
        path = [node]
        while self.parents[path[-1]] >= 0:
            path.append(self.parents[path[-1]])
        return path[::-1]

    def attended(self, node: int, window: int = 0) -> list[int]:
        """Slots that a node attends to, by logical position."""
        slots = [*range(self.prefix), *(self.prefix + j for j in self.path(node))]
        return slots[-window:] if window else slots

    def along(self, node: int, queries: int) -> Request:
        """Plain decoding of the path to a node: its last ``queries`` tokens as a causal chunk."""
        path = self.path(node)
        slots = self.attended(node)
        rows = torch.tensor(path[len(path) - queries :])
        gate = None if self.gate is None else self.gate[rows]
        return Request(q=self.q[rows], keys=self.keys[slots], values=self.values[slots], gate=gate)

    def to(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> Request:
        return dataclasses.replace(
            self, q=self.q.to(dtype), keys=self.keys.to(cache_dtype), values=self.values.to(cache_dtype)
        )


def make_request(
    prefix: int,
    queries: int,
    *,
    heads: tuple[int, int] = (4, 2),
    size: int = 32,
    tree: bool = False,
    gate: str | None = None,
    seed: int = 0,
) -> Request:
    """Random tensors; a random tree whose deep and shallow nodes are mixed. heads: query heads, kv heads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parents = None
    if tree:
        draws = torch.rand(queries, generator=generator).square().tolist()  # small: near the end of the list
        parents = [i - 1 - int(draw * i) for i, draw in enumerate(draws)]
    shapes = {"head": (queries, heads[0]), "element": (queries, heads[0], size)}
    return Request(
        q=normal(queries, heads[0], size),
        keys=normal(prefix + queries, heads[1], size),
        values=normal(prefix + queries, heads[1], size),
        parents=parents,
        gate=None if gate is None else normal(*shapes[gate]) * 3,
    )


def bits_of(requests: list[Request], words: int) -> Tensor:
    """mask_bits (T, words) of all queries."""
    rows = []
    for request in requests:
        for node in range(len(request.q)):
            row = [0] * words
            for j in request.path(node):
                row[j // BITS] |= 1 << (j % BITS)
            rows.append([word - 2**32 if word >= 2**31 else word for word in row])
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, words)


@dataclasses.dataclass(frozen=True)
class Paged:
    """A call of tree_attention: whatever no query may read is nan, and block ids that no key needs are impossible."""

    call: dict[str, object]
    offsets: list[int]

    @staticmethod
    def of(requests: list[Request], *, page_size: int = 16, seed: int = 0, mask: bool | None = None) -> Paged:
        """mask: pass mask_bits; default: iff some request is a tree. seed: where the pages lie."""
        first = requests[0]
        pages = [math.ceil(len(request.keys) / page_size) for request in requests]
        total, spare = sum(pages), 3
        order = torch.randperm(total + spare, generator=torch.Generator().manual_seed(seed)).tolist()
        shape = (total + spare, page_size, *first.keys.shape[1:])
        k_cache, v_cache = (torch.full(shape, torch.nan, dtype=first.keys.dtype) for _ in range(2))
        block_table = torch.full((len(requests), max(pages, default=0) + 2), IMPOSSIBLE, dtype=torch.int32)
        for b, (request, count) in enumerate(zip(requests, pages, strict=True)):
            own, order = order[:count], order[count:]
            block_table[b, :count] = torch.tensor(own, dtype=torch.int32)
            block_table[b, count + 1 :] = -1
            slots = torch.arange(len(request.keys))
            where = torch.tensor(own, dtype=torch.int64)[slots // page_size], slots % page_size
            k_cache[where], v_cache[where] = request.keys, request.values
        counts = [len(request.q) for request in requests]
        call = {
            "q": torch.cat([request.q for request in requests]),
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": block_table,
            "cache_seqlens": torch.tensor([len(request.keys) for request in requests], dtype=torch.int32),
            "cu_seqlens_q": torch.tensor([0, *counts]).cumsum(0).int(),
        }
        if first.gate is not None:
            call["gate"] = torch.cat([request.gate for request in requests if request.gate is not None])
        if any(request.parents for request in requests) if mask is None else mask:
            call["mask_bits"] = bits_of(requests, math.ceil(max(counts) / BITS) + 1)
        return Paged(call, call["cu_seqlens_q"].tolist())

    def run(self, **options: object) -> list[Tensor]:
        """The rows of each request."""
        out = tree_attention(**{**self.call, **options})
        return [out[a:b] for a, b in zip(self.offsets, self.offsets[1:], strict=False)]


def attend(*requests: Request, page_size: int = 16, seed: int = 0, **options: object) -> list[Tensor]:
    return Paged.of(list(requests), page_size=page_size, seed=seed).run(**options)


def dense(request: Request, dtype: torch.dtype, window: int = 0) -> Tensor:
    """(n, H, D) by torch, in dtype, with a mask: softmax over all keys, those not attended to at -inf."""
    q, keys, values = request.q.to(dtype), request.keys.to(dtype), request.values.to(dtype)
    group = q.shape[1] // keys.shape[1]
    allowed = torch.zeros(len(q), len(keys), dtype=torch.bool)
    for node in range(len(q)):
        allowed[node, request.attended(node, window)] = True
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))
    scores = (q.transpose(0, 1) @ keys.transpose(1, 2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    out = (weights @ values).transpose(0, 1)
    if request.gate is not None:
        out = out * request.gate.to(dtype).sigmoid().view(*request.gate.shape[:2], -1)
    return out
