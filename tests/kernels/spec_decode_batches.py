"""Batches for the tests of the spec_decode family: one call of each op and mode, of requests as unlike as can be."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import draft_topk, tree_attention, tree_commit, tree_finalize, tree_verify
from m3kernels.spec_decode.reference import make_inputs

INTERPRETED = (  # the room on CPU tensors; on a GPU, test_spec_decode_triton*.py run its kernels compiled
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used where there is no GPU"),
)
IN_TRITON = pytest.param("spec_decode=triton", marks=INTERPRETED)
SLOWLY_IN_TRITON = pytest.param("spec_decode=triton", marks=(*INTERPRETED, pytest.mark.slow))  # seconds each
ROOMS = ("spec_decode=reference", "spec_decode=cpu")
each_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
each_room_and_triton = pytest.mark.parametrize("backend", (*ROOMS, SLOWLY_IN_TRITON), indirect=True)

Arguments = dict[str, Any]
B, N, V, K = 4, 7, 67, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A call: arguments with one row a request, and those that all requests share."""

    op: Callable[..., Any]
    rows: dict[str, Tensor]
    shared: Arguments

    def of(self, requests: slice | list[int]) -> Batch:
        return dataclasses.replace(self, rows={key: value[requests] for key, value in self.rows.items()})

    def changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor replaced, those of lists and caches included."""
        shared = {key: _changed(value, change) for key, value in self.shared.items()}
        return dataclasses.replace(self, rows={key: change(value) for key, value in self.rows.items()}, shared=shared)

    def __call__(self) -> list[Tensor]:
        """The tensors of the result, one row a request each."""
        found = self.op(**self.rows, **self.shared)
        return [found] if isinstance(found, Tensor) else [x for x in found if x is not None]


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_changed(x, change) for x in value]
    return change(value) if isinstance(value, Tensor) else value


def committed(k_caches: list[Tensor], v_caches: list[Tensor], block_table: Tensor, **rest: Any) -> list[Tensor]:
    """What a commit returns, and the pages of each request after it; the caches given stay as they are."""
    after = [[cache.clone() for cache in caches] for caches in (k_caches, v_caches)]
    seqlens, hidden = tree_commit(k_caches=after[0], v_caches=after[1], block_table=block_table, **rest)
    pages = [cache[block_table.long()] for caches in after for cache in caches]
    return [seqlens, *pages] if hidden is None else [seqlens, hidden, *pages]


# -- drafts and trees -------------------------------------------------------------------------------------------------
def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SEED = torch.tensor([3, -9, 2**40, 0])
POSITION = torch.tensor([11, 0, 2**33, 7])


def drafts(frontier: int, noise: bool) -> Batch:
    generator = _generator(1)
    logits = torch.randn(B, frontier, V, generator=generator) * 3
    logits[1, 0, 5:9] = logits[1, 0].max()  # ties
    logits[2, 0, :60] = float("nan")
    rows = {"logits": logits.half().float(), "scores": -torch.rand(B, frontier, generator=generator)}
    if noise:
        rows |= {"seed": SEED, "position": POSITION}
    shared = dict(k=K, step=2 if frontier > 1 else 0, d2t=torch.arange(V).flip(0) if noise else None)
    return Batch(op=draft_topk, rows=rows, shared=shared)


def candidates(nodes: int, *, steps: int = 3, budget: Tensor | None = None) -> Batch:
    """Drafts of a few steps, whose scores fall along each path and tie now and then."""
    generator = _generator(2)
    frontier, parents = torch.zeros(B, 1), [torch.full((B, 1), -1)]
    scores, tokens = [], []
    for step in range(steps):
        gains = -torch.randint(0, 9, (B, frontier.shape[1], K), generator=generator) / 4
        sums = (frontier[..., None] + gains.sort(dim=-1, descending=True).values).flatten(1)
        flat = sums.sort(dim=1, descending=True, stable=True).indices[:, :K]
        scores.append(sums)
        tokens.append(torch.randint(0, V, sums.shape, generator=generator))
        parents.append(flat if step == 0 else flat + K + (step - 1) * K * K)
        frontier = sums.gather(1, flat)
    rows = dict(scores=torch.cat(scores, 1), tokens=torch.cat(tokens, 1), parent_list=torch.cat(parents[:-1], 1))
    rows |= dict(bonus=torch.arange(B), seq_lens=torch.tensor([5, 0, 100, 2**40]))
    if budget is not None:
        rows["budget"] = budget
    return Batch(op=tree_finalize, rows=rows, shared=dict(topk=K, num_nodes=nodes))


# -- attention --------------------------------------------------------------------------------------------------------
PAGE, PAGES, HEADS, KV_HEADS, SIZE = 5, 40, 4, 2, 24


def attention(
    *,
    masked: bool,
    gate: bool = True,
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    some: bool = False,
    int8: bool = False,
) -> Batch:
    """Trees of N nodes, or N queries in a row, behind prefixes of different length. some: trees of more or fewer."""
    generator = _generator(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    seqlens = torch.tensor([N, 33, 12, 21], dtype=torch.int32)
    table = torch.randperm(PAGES, generator=generator)[: 4 * 7].view(B, 7).int()
    rows = dict(q=normal(B, N, HEADS, SIZE), block_table=table, cache_seqlens=seqlens)
    if masked:
        rows["mask_bits"] = make_inputs(B, N, V, seed=4)["mask_bits"]
    if gate:
        rows["gate"] = normal(B, N, HEADS, SIZE)
    caches = dict(k_cache=normal(PAGES, PAGE, KV_HEADS, SIZE), v_cache=normal(PAGES, PAGE, KV_HEADS, SIZE))
    if some:
        rows["tree_lens"] = torch.tensor([N, 20, 12, 3], dtype=torch.int32)
    if int8:
        for name in ("k", "v"):
            caches[f"{name}_cache"] = (caches[f"{name}_cache"] * 30).clamp(-128, 127).to(torch.int8)
            caches[f"{name}_scale"] = torch.rand(PAGES, PAGE, KV_HEADS, generator=generator) / 20
    return Batch(op=tree_attention, rows=rows, shared=dict(**caches, window=window))


# -- verification -----------------------------------------------------------------------------------------------------
SIZES = (N, 1, 4, N)  # of the trees; nodes beyond are padding
PARAMETERS = dict(
    temperature=torch.tensor([0.7, 1.3, 0.0, 1e-6]), top_k=torch.tensor([5, 0, 3, 100], dtype=torch.int32),
    top_p=torch.tensor([1.0, 0.8, 0.5, 1.0]), min_p=torch.tensor([0.0, 0.02, 1.0, 0.0]),
)  # fmt: skip


def padded_trees(requests: int = B, seed: int = 67) -> dict[str, Tensor]:
    x = make_inputs(requests, N, V, seed=seed)
    given = {name: x[name].clone() for name in ("logits", "candidates", "next_token", "next_sibling")}
    given["logits"] = given["logits"].bfloat16().float().clamp(-60, 60)
    for b in range(requests):
        size = SIZES[b % len(SIZES)]
        given["candidates"][b, size:] = -1
        for links in (given["next_token"], given["next_sibling"]):
            links[b] = links[b].where(links[b] < size, -1)
            links[b, size:] = -1
    return given


def verification(mode: str, *, noise: bool = True, width: int | None = None) -> Batch:
    generator = _generator(6)
    rows = {**padded_trees(), **PARAMETERS}
    if noise or mode == "coupled":
        rows |= dict(seed=SEED, position=POSITION)
    else:
        rows |= dict(
            coins=torch.rand(B, N, generator=generator).double() / 2, final_coins=torch.tensor([0, 0.3, 0.6, 0.999])
        )
    bits = torch.randint(-(2**31), 2**31, (B, N, 3), generator=generator).int()
    bits[::2] = -1
    bits[2, 1:] = 0  # nothing may follow what follows the root
    rows["grammar_bits"] = bits
    if mode == "chain":
        rows["draft_probs"] = (rows["logits"] / 2).softmax(-1)
    return Batch(op=tree_verify, rows=rows, shared=dict(mode=mode, width=width, logprobs="sampling"))


def commit(*, hidden: bool) -> Batch:
    generator = _generator(7)
    path = torch.tensor([[0, 2, 5, 6], [0, -1, -1, -1], [0, 1, 2, -1], [0, 4, -1, -1]], dtype=torch.int32)
    rows = dict(
        accept_index=path, accept_length=(path >= 0).sum(1).int() - 1,
        block_table=torch.randperm(PAGES, generator=generator)[: 4 * 7].view(B, 7).int(),
        cache_seqlens=torch.tensor([0, 26, 3, 14], dtype=torch.int32),
    )  # fmt: skip
    if hidden:
        rows["hidden"] = torch.randn(B, N, 9, generator=generator).half()
    caches = [[torch.randn(PAGES, PAGE, KV_HEADS, SIZE, generator=generator) for _ in range(2)] for _ in range(2)]
    return Batch(op=committed, rows=rows, shared=dict(k_caches=caches[0], v_caches=caches[1]))


BATCHES: dict[str, Batch] = {
    "draft": drafts(K, noise=False),
    "draft_first": drafts(1, noise=False),
    "draft_noise": drafts(K, noise=True),
    "finalize": candidates(N),
    "finalize_budget": candidates(33, budget=torch.tensor([33, 1, 9, 20])),
    "finalize_all": candidates(40),
    "attention_causal": attention(masked=False),
    "attention_tree": attention(masked=True),
    "attention_window": attention(masked=True, window=9),
    "attention_half": attention(masked=True, gate=False, dtype=torch.float16),
    "attention_some": attention(masked=True, some=True, window=9),
    "attention_int8": attention(masked=True, int8=True),
    "coupled": verification("coupled"),
    "coupled_short": verification("coupled", width=2),
    "target_only": verification("target_only", noise=False),
    "target_only_noise": verification("target_only"),
    "chain": verification("chain", noise=False),
    "chain_noise": verification("chain"),
    "greedy": verification("greedy"),
    "commit": commit(hidden=False),
    "commit_hidden": commit(hidden=True),
}
every_batch = pytest.mark.parametrize("name", BATCHES)
VERIFICATIONS = [name for name, batch in BATCHES.items() if batch.op is tree_verify]
