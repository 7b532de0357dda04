"""What the spec_decode benchmark runs on: named cases and the inputs that they stand for.

Trees grow as a dynamic draft tree does, best path first, from a draft that ranks the target's likely tokens almost
right and misses the likeliest at some nodes. Rows of logits have a head of 50 tokens with probabilities falling as
1 / rank^2.5 that together hold 0.97, over a Gaussian background, so that a walk visits about three rows. Sizes of
attention: the heads of SmolLM2-135M (9 query, 3 key-value heads of 64) and Qwen3-8B (32, 8 heads of 128);
vocabularies: theirs, 49152 and 151936.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
import random
from typing import ClassVar

import torch
from torch import Tensor

from bench.workloads import look_up
from m3kernels.spec_decode import reference
from m3kernels.spec_decode.reference import links

TOP_K, TOP_P = 20, 0.95  # what "filtered" means
HEAD = 50  # tokens of a row that stand out
HEAD_MASS = 0.97
RANK_POWER = 2.5
BACKGROUND = 1.5  # standard deviation of the logits of the others
STRIDE = 2971  # prime: steps from one head token to the next, so that they are distinct
TREE_TOPK, TREE_DEPTH = 8, 6
DRAFT_NOISE = 0.7  # of the draft's ranking, in nats
DRAFT_MISSES = 0.2  # share of nodes for which it does not propose the target's likeliest token
PAGE_SIZE = 16
RANK_SUM = sum(rank**-RANK_POWER for rank in range(1, HEAD + 1))
RANK_LOGPROBS = [math.log(HEAD_MASS / RANK_SUM) - RANK_POWER * math.log(rank) for rank in range(1, HEAD + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyCase:
    """tree_verify of B requests with N nodes each over a vocabulary; ``span`` different batches in a visit."""

    op: ClassVar[str] = "tree_verify"
    name: str
    requests: int
    nodes: int
    vocabulary: int
    mode: str
    filtered: bool = False
    span: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """tree_attention of ``queries`` over ``context`` keys and themselves, in ``span`` layers.

    A tree, one query (decoding), or causal over no context (prefill).
    """

    op: ClassVar[str] = "tree_attention"
    name: str
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    queries: int
    tree: bool
    span: int = 1
    requests: int = 1

    @property
    def prefill(self) -> bool:
        """Causal attention of the queries among themselves alone."""
        return not self.tree and self.context == 0

    @property
    def cache_elements(self) -> int:
        """Of the keys and values of one layer that the queries of all requests attend to."""
        return 2 * self.requests * (self.context + self.queries) * self.kv_heads * self.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftCase:
    """draft_topk of B requests with F frontier rows over a draft vocabulary."""

    op: ClassVar[str] = "draft_topk"
    name: str
    requests: int
    frontier: int
    vocabulary: int
    k: int = TREE_TOPK
    span: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalizeCase:
    """tree_finalize of B requests: ``steps`` steps of k, then k * k candidates each, cut to N nodes."""

    op: ClassVar[str] = "tree_finalize"
    name: str
    requests: int
    nodes: int
    steps: int = 5
    k: int = TREE_TOPK
    span: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommitCase:
    """tree_commit of B requests in the caches of all layers."""

    op: ClassVar[str] = "tree_commit"
    name: str
    requests: int
    layers: int
    kv_heads: int
    head_dim: int
    nodes: int = 32
    accepted: int = 3
    span: int = 1


Case = VerifyCase | AttentionCase | DraftCase | FinalizeCase | CommitCase


def verify_cases() -> list[VerifyCase]:
    small = {"requests": 1, "nodes": 8, "vocabulary": 49152, "span": 32}
    cases = [VerifyCase(name="verify.n8.v49152.greedy", mode="greedy", **small)]
    for mode in ("coupled", "target_only"):
        cases.append(VerifyCase(name=f"verify.n8.v49152.{mode}.filtered", mode=mode, filtered=True, **small))
    for requests, span in ((1, 8), (8, 2), (64, 1)):
        large = {"requests": requests, "nodes": 32, "vocabulary": 151936, "span": span}
        stem = f"verify.n32.v151936.b{requests}"
        cases.append(VerifyCase(name=f"{stem}.greedy", mode="greedy", **large))
        for mode, filtered in itertools.product(("target_only", "coupled"), (False, True)):
            name = f"{stem}.{mode}{'.filtered' if filtered else ''}"
            cases.append(VerifyCase(name=name, mode=mode, filtered=filtered, **large))
    return cases


def attention_cases() -> list[AttentionCase]:
    cases = []
    for stem, heads, kv_heads, head_dim in (("smollm2-135m", 9, 3, 64), ("qwen3-8b", 32, 8, 128)):
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        found = [
            AttentionCase(name=f"{stem}.{what}.c{context}", context=context, queries=queries, tree=queries > 1, **sizes)
            for context in (256, 2048, 8192)
            for what, queries in (("decode", 1), ("verify8", 8), ("verify32", 32))
        ]
        found.append(AttentionCase(name=f"{stem}.prefill512", context=0, queries=512, tree=False, **sizes))
        for case in found:  # as many layers as push each other out of L2, at most 16
            span = min(max((32 << 20) // (4 * case.cache_elements), 2), 16) if case.queries < 512 else 2
            cases.append(dataclasses.replace(case, span=span))
    return cases


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *verify_cases(),
        *attention_cases(),
        DraftCase(name="draft.first.v32000.b1", requests=1, frontier=1, vocabulary=32000, span=32),
        DraftCase(name="draft.next.v32000.b1", requests=1, frontier=8, vocabulary=32000, span=16),
        DraftCase(name="draft.next.v32000.b8", requests=8, frontier=8, vocabulary=32000, span=4),
        FinalizeCase(name="finalize.n32.b1", requests=1, nodes=32, span=32),
        FinalizeCase(name="finalize.n32.b8", requests=8, nodes=32, span=16),
        FinalizeCase(name="finalize.n32.b64", requests=64, nodes=32, span=4),
        CommitCase(name="commit.smollm2-135m.b1", requests=1, layers=30, kv_heads=3, head_dim=64, span=4),
        CommitCase(name="commit.qwen3-8b.b8", requests=8, layers=36, kv_heads=8, head_dim=128, span=2),
    )
}


def find_case(name: str) -> Case:
    """The case of that name."""
    return look_up(name, CASES)


# -- trees and logits -------------------------------------------------------------------------------------------------
def grow_tree(nodes: int, chance: random.Random) -> tuple[list[int], list[int]]:
    """(parent, rank of the token among the target's likely tokens) of each node; -1, 0 for the root.

    Best path first, at most 8 children a node and 6 levels; the draft sees the target's log-probabilities with noise.
    """
    parents, ranks = [-1], [0]
    heap: list[tuple[float, int, int, int]] = []  # (cost, parent, rank, depth)

    def expand(node: int, cost: float, depth: int) -> None:
        seen = sorted((logprob + chance.gauss(0, DRAFT_NOISE), rank) for rank, logprob in enumerate(RANK_LOGPROBS))
        missed = chance.random() < DRAFT_MISSES
        for score, rank in seen[: -TREE_TOPK - 1 : -1]:
            if not (missed and rank == 0):
                heapq.heappush(heap, (cost - score, node, rank, depth))

    expand(0, 0.0, 1)
    while len(parents) < nodes:
        cost, parent, rank, depth = heapq.heappop(heap)
        parents.append(parent)
        ranks.append(rank)
        if depth < TREE_DEPTH:
            expand(len(parents) - 1, cost, depth + 1)
    return parents, ranks


def peaked_logits(rows: int, vocabulary: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, V) fp32 and the (rows, 50) int64 tokens of each row's head, the likeliest first."""
    pool = torch.randn(vocabulary + 8192, generator=random).mul_(BACKGROUND)
    level = math.log(vocabulary) + BACKGROUND**2 / 2 - math.log(1 - HEAD_MASS)  # log of the sum over the vocabulary
    starts = torch.randint(8192, (rows,), generator=random).tolist()
    logits = torch.empty(rows, vocabulary)
    for row, start in zip(logits, starts, strict=True):
        row.copy_(pool[start : start + vocabulary])
    first = torch.randint(vocabulary, (rows, 1), generator=random)
    tokens = (first + torch.arange(HEAD) * STRIDE) % vocabulary
    logits.scatter_(1, tokens, (torch.tensor(RANK_LOGPROBS) + level).expand(rows, HEAD))
    return logits, tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyProblem:
    """One batch, everything that any arm takes. Cases of one size share it, see ``of``."""

    case: VerifyCase
    logits: Tensor
    candidates: Tensor
    next_token: Tensor
    next_sibling: Tensor
    temperature: Tensor
    seed: Tensor
    position: Tensor
    coins: Tensor  # (B, N) fp32
    final_coins: Tensor  # (B,) fp32
    memo: dict[tuple[str, bool], Tensor] = dataclasses.field(default_factory=dict)  # of emitted(); of all its cases

    def of(self, case: VerifyCase) -> VerifyProblem:
        """The same batch in another mode or with other filters."""
        temperature = torch.full((case.requests,), 0.0 if case.mode == "greedy" else 1.0)
        return dataclasses.replace(self, case=case, temperature=temperature)

    @property
    def width(self) -> int:
        return TREE_DEPTH + 1

    @property
    def filters(self) -> dict[str, Tensor]:
        """top_k and top_p of every request, where the case is filtered."""
        if not self.case.filtered:
            return {}
        requests = self.case.requests
        return {"top_k": torch.full((requests,), TOP_K, dtype=torch.int32), "top_p": torch.full((requests,), TOP_P)}

    def emitted(self, mode: str) -> Tensor:
        """(B, S) int64: what the reference room emits in a mode; -1 after the last."""
        key = (mode, self.case.filtered)
        if key not in self.memo:
            coins = (self.coins.double(), self.final_coins.double()) if mode == "target_only" else (None, None)
            self.memo[key] = reference.tree_verify(
                *(self.logits, self.candidates, self.next_token, self.next_sibling, self.temperature),
                *(self.filters.get("top_k"), self.filters.get("top_p"), None, self.seed, self.position, *coins),
                *(None, None, mode, self.width, "none"),
            )[0]
        return self.memo[key]

    @property
    def expected(self) -> Tensor:
        """What the case's own mode emits."""
        return self.emitted(self.case.mode)

    @property
    def expected_by_coins(self) -> Tensor:
        """What target_only emits: the same law as coupled, other draws."""
        return self.emitted("target_only")

    @property
    def visited_rows(self) -> int:
        """Rows of logits that a walk has to read, over all requests."""
        return int((self.expected >= 0).sum())


def make_verify(case: VerifyCase, seed: int = 0) -> VerifyProblem:
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    requests, nodes = case.requests, case.nodes
    logits, heads = peaked_logits(requests * nodes, case.vocabulary, generator)
    trees = [grow_tree(nodes, chance) for _ in range(requests)]
    parents = torch.tensor([parents for parents, _ in trees], dtype=torch.int32)
    ranks = torch.tensor([ranks for _, ranks in trees])
    _, _, next_token, next_sibling = links(parents)
    heads = heads.view(requests, nodes, HEAD)
    owner = heads[torch.arange(requests)[:, None], parents.clamp(min=0).long()]  # heads of the parents' rows
    candidates = owner.gather(2, ranks[..., None])[..., 0]
    return VerifyProblem(
        case=case,
        logits=logits.view(requests, nodes, case.vocabulary),
        candidates=candidates,
        next_token=next_token,
        next_sibling=next_sibling,
        temperature=torch.full((requests,), 0.0 if case.mode == "greedy" else 1.0),
        seed=torch.randint(1 << 62, (requests,), generator=generator),
        position=torch.randint(4096, (requests,), generator=generator),
        coins=torch.rand(requests, nodes, generator=generator),
        final_coins=torch.rand(requests, generator=generator),
    )


# -- attention --------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """One layer: a paged cache with its pages in random order, queries, gate and the mask of the tree."""

    case: AttentionCase
    q: Tensor  # (T, H, D)
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    mask_bits: Tensor | None
    gate: Tensor  # (T, H, D)
    slots: Tensor  # (B, L) int64: where key j of a request lies in the flattened cache

    def gathered(self, cache: Tensor) -> Tensor:
        """(B, G, L, D): keys or values one after another."""
        return cache.flatten(0, 1)[self.slots].transpose(1, 2).contiguous()

    def folded(self, rows: Tensor) -> Tensor:
        """(T, H, D) -> (B, G, R * N, D): the query heads of a key-value head as further queries."""
        case = self.case
        rows = rows.view(case.requests, case.queries, case.kv_heads, -1, case.head_dim)
        return rows.permute(0, 2, 3, 1, 4).reshape(case.requests, case.kv_heads, -1, case.head_dim)

    def unfolded(self, rows: Tensor) -> Tensor:
        """The way back."""
        case = self.case
        rows = rows.view(case.requests, case.kv_heads, -1, case.queries, case.head_dim)
        return rows.permute(0, 3, 1, 2, 4).reshape(self.q.shape)

    def allowed(self) -> Tensor:
        """(B, 1, R * N, L) bool: which keys each folded query sees."""
        case, device = self.case, self.q.device
        requests, queries = case.requests, case.queries
        own = torch.ones(queries, queries, dtype=torch.bool, device=device).tril().expand(requests, -1, -1)
        if self.mask_bits is not None:
            bits, slots = self.mask_bits.view(requests, queries, -1), torch.arange(queries, device=device)
            own = (bits[..., slots // 32] >> (slots % 32).int()) & 1 == 1
        before = torch.ones(requests, queries, case.context, dtype=torch.bool, device=device)
        seen = torch.cat([before, own], 2)
        return seen.repeat(1, case.heads // case.kv_heads, 1)[:, None]

    @functools.cached_property
    def expected(self) -> Tensor:
        """(T, H, D) fp64, without the gate."""
        k, v = (self.gathered(cache).double() for cache in (self.k_cache, self.v_cache))
        scores = self.folded(self.q).double() @ k.transpose(2, 3) / math.sqrt(self.case.head_dim)
        return self.unfolded(scores.masked_fill_(~self.allowed(), -torch.inf).softmax(-1) @ v)


def make_attention(case: AttentionCase, seed: int = 0) -> AttentionProblem:
    generator, requests, queries = torch.Generator().manual_seed(seed), case.requests, case.queries
    length = case.context + queries
    each = -(-length // PAGE_SIZE)
    pages = requests * each + 3
    shape = (pages, PAGE_SIZE, case.kv_heads, case.head_dim)
    k_cache, v_cache = (torch.randn(shape, generator=generator) for _ in range(2))
    order = torch.randperm(pages, generator=generator)[: requests * each].view(requests, each)
    keys = torch.arange(length)
    mask_bits = None
    if case.tree:
        chance = random.Random(seed)
        parents = [grow_tree(queries, chance)[0] for _ in range(requests)]
        mask_bits = links(torch.tensor(parents, dtype=torch.int32))[1].flatten(0, 1)
    return AttentionProblem(
        case=case,
        q=torch.randn(requests * queries, case.heads, case.head_dim, generator=generator),
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=order.int(),
        cache_seqlens=torch.full((requests,), length, dtype=torch.int32),
        cu_seqlens_q=torch.arange(requests + 1, dtype=torch.int32) * queries,
        mask_bits=mask_bits,
        gate=torch.randn(requests * queries, case.heads, case.head_dim, generator=generator),
        slots=order[:, keys // PAGE_SIZE] * PAGE_SIZE + keys % PAGE_SIZE,
    )


# -- drafting and commits ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftProblem:
    case: DraftCase
    logits: Tensor
    scores: Tensor  # (B, F) nats
    d2t: Tensor

    @property
    def step(self) -> int:
        return 0 if self.case.frontier == 1 else 1

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Of the reference room."""
        return reference.draft_topk(self.logits, self.scores, self.d2t, None, None, self.case.k, self.step)


def make_draft(case: DraftCase, seed: int = 0) -> DraftProblem:
    generator = torch.Generator().manual_seed(seed)
    logits, _ = peaked_logits(case.requests * case.frontier, case.vocabulary, generator)
    logits = logits.view(case.requests, case.frontier, case.vocabulary)
    logits += torch.randn(case.requests, case.frontier, 1, generator=generator)  # no two rows alike
    scores = -torch.rand(case.requests, case.frontier, generator=generator) * 3
    kept = torch.randperm(151936, generator=generator)[: case.vocabulary].sort().values
    return DraftProblem(case=case, logits=logits, scores=scores, d2t=kept - torch.arange(case.vocabulary))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalizeProblem:
    case: FinalizeCase
    scores: Tensor  # (B, M)
    tokens: Tensor  # (B, M)
    parent_list: Tensor  # (B, 1 + k * (steps - 1))
    bonus: Tensor
    seq_lens: Tensor

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """Of the reference room."""
        given = (self.scores, self.tokens, self.parent_list, self.bonus, self.seq_lens)
        return reference.tree_finalize(*given, None, self.case.k, self.case.nodes)


def make_finalize(case: FinalizeCase, seed: int = 0) -> FinalizeProblem:
    """Scores of paths as drafting leaves them: each candidate below its parent, the k best of a step expanded next."""
    generator, k, requests = torch.Generator().manual_seed(seed), case.k, case.requests

    def noisy(rows: int, frontier: int) -> Tensor:
        """(rows, frontier, k) log-probabilities of the next tokens."""
        noise = torch.randn(rows, frontier, k, generator=generator) * DRAFT_NOISE
        return (torch.tensor(RANK_LOGPROBS[:k]) + noise).clamp(max=-0.01)

    step = noisy(requests, 1)
    scores, parents = [step.flatten(1)], [torch.full((requests, 1), -1)]
    best = step.flatten(1).topk(k, dim=-1)
    expanded = best.indices
    for number in range(1, case.steps):
        parents.append(expanded)
        step = best.values[..., None] + noisy(requests, k)
        scores.append(step.flatten(1))
        best = step.flatten(1).topk(k, dim=-1)
        expanded = k + (number - 1) * k * k + best.indices
    joined = torch.cat(scores, 1)
    return FinalizeProblem(
        case=case,
        scores=joined,
        tokens=torch.randint(151936, joined.shape, generator=generator),
        parent_list=torch.cat(parents, 1),
        bonus=torch.randint(151936, (requests,), generator=generator),
        seq_lens=torch.randint(1, 8192, (requests,), generator=generator),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommitProblem:
    case: CommitCase
    accept_index: Tensor
    accept_length: Tensor
    k_caches: list[Tensor]
    v_caches: list[Tensor]
    block_table: Tensor
    cache_seqlens: Tensor  # before the tree

    def copied(self) -> CommitProblem:
        """The same with caches of its own."""
        caches = {name: [cache.clone() for cache in getattr(self, name)] for name in ("k_caches", "v_caches")}
        return dataclasses.replace(self, **caches)


def make_commit(case: CommitCase, seed: int = 0) -> CommitProblem:
    generator, requests = torch.Generator().manual_seed(seed), case.requests
    pages_each = -(-(128 + case.nodes) // PAGE_SIZE)
    shape = (requests * pages_each, PAGE_SIZE, case.kv_heads, case.head_dim)
    caches = [torch.randn(shape, generator=generator) for _ in range(2 * case.layers)]
    accept_index = torch.full((requests, TREE_DEPTH + 1), -1, dtype=torch.int32)
    for row in accept_index:
        chosen = torch.randperm(case.nodes - 1, generator=generator)[: case.accepted].sort().values + 1
        row[: case.accepted + 1] = torch.cat([torch.zeros(1, dtype=torch.long), chosen])
    return CommitProblem(
        case=case,
        accept_index=accept_index,
        accept_length=torch.full((requests,), case.accepted, dtype=torch.int32),
        k_caches=caches[: case.layers],
        v_caches=caches[case.layers :],
        block_table=torch.randperm(len(caches[0]), generator=generator).view(requests, -1).int(),
        cache_seqlens=torch.randint(1, 128, (requests,), generator=generator, dtype=torch.int32),
    )
