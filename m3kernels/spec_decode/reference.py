"""Tree drafting and verification in plain torch, fp64: the contract that every other room is tested against.

    draft_topk       l = log_softmax(row); best k of each row, best k of all F * k path scores
    tree_finalize    the best N - 1 of all candidates and the root; parents, ancestors, positions, links
    tree_attention   out = sigmoid(gate) * sum_j softmax_j(scale * q . k_j) v_j over the prefix and the ancestors;
                     k_j = k_cache_j * k_scale_j, v_j = v_cache_j * v_scale_j where the caches are int8
    tree_verify      the walk: at each node draw the next token by the target's law, follow it if it is a child
    tree_commit      keys and values of the accepted path move to the slots that plain decoding would have filled
    tree_budget      how many nodes are worth their cost

The law of a row and its noise: law.py. Why the walk is lossless: docs/numerics.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import refuse
from m3kernels.spec_decode import law
from m3kernels.spec_decode.arguments import check_walks
from m3kernels.spec_decode.sgl_reference import (
    build_tree_kernel_efficient,
    chain_speculative_sampling,
    reconstruct_indices_from_tree_mask,
    tree_speculative_sampling_target_only,
    verify_tree_greedy,
)
from m3kernels.spec_decode.types import BITS

__all__ = [
    "build_tree_kernel_efficient",
    "chain_speculative_sampling",
    "draft_topk",
    "reconstruct_indices_from_tree_mask",
    "tree_attention",
    "tree_budget",
    "tree_commit",
    "tree_finalize",
    "tree_speculative_sampling_target_only",
    "tree_verify",
    "verify_tree_greedy",
]

# Attention and log-probabilities against fp64: a multiple c of the error of torch in the same dtype, plus eps relative
# to the largest value. Indices, tokens, masks and links are equal, tokens drawn at a coin within rounding of a
# breakpoint aside.
TOLERANCE = {"c": 1.5, "eps": 1e-6}


def unsupported(op: str, *args: Any) -> str:
    return f"{op} needs data: meta tensors have none" if args and args[0].is_meta else ""


def make_inputs(
    requests: int,
    nodes: int,
    vocabulary: int,
    *,
    topk: int = 4,
    depth: int = 4,
    sharpness: float = 3.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random trees with siblings that are distinct, and logits under which a few drafts are accepted.

    Returns candidates, parents, mask_bits, positions, next_token, next_sibling, as in types.Tree, and logits (B, N, V).
    Half of the rows favour one of the children, as a useful draft would have it.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    logits = torch.randn(requests, nodes, vocabulary, generator=generator) * sharpness
    parents = torch.full((requests, nodes), -1, dtype=torch.int32)
    candidates = torch.empty(requests, nodes, dtype=torch.int64)
    for b in range(requests):
        depths = [0]
        for i in range(1, nodes):
            open_nodes = [j for j in range(i) if depths[j] < depth and int((parents[b] == j).sum()) < topk]
            parents[b, i] = open_nodes[choose(len(open_nodes))] if open_nodes else 0
            depths.append(depths[int(parents[b, i])] + 1)
        candidates[b, 0] = choose(vocabulary)
        for i in range(nodes):
            children = (parents[b] == i).nonzero()[:, 0]
            tokens = torch.randperm(vocabulary, generator=generator)[: len(children)]
            candidates[b, children[: len(tokens)]] = tokens
            candidates[b, children[len(tokens) :]] = tokens[-1:] if len(tokens) else 0
            if len(tokens) and choose(2):
                logits[b, i, tokens[choose(len(tokens))]] = logits[b, i].max()
    depth_of, mask_bits, next_token, next_sibling = links(parents)
    return {
        "candidates": candidates,
        "parents": parents,
        "mask_bits": mask_bits,
        "positions": depth_of + 7,
        "next_token": next_token,
        "next_sibling": next_sibling,
        "logits": logits.to(dtype),
    }


# -- trees ------------------------------------------------------------------------------------------------------------
def links(parents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depths (B, N), mask_bits (B, N, W), next_token and next_sibling (B, N) of trees given by parents (B, N)."""
    requests, nodes = parents.shape
    ancestors = torch.zeros(requests, nodes, -(-nodes // BITS) * BITS, dtype=torch.int64, device=parents.device)
    next_token, next_sibling = (torch.full((requests, nodes), -1, device=parents.device) for _ in range(2))
    for b, row in enumerate(parents.tolist()):
        last: dict[int, int] = {}
        for i, parent in enumerate(row):
            ancestors[b, i, i] = 1
            if parent < 0:
                continue
            ancestors[b, i] |= ancestors[b, parent]
            if parent in last:
                next_sibling[b, last[parent]] = i
            else:
                next_token[b, parent] = i
            last[parent] = i
    words = ancestors.unflatten(-1, (-1, BITS)) << torch.arange(BITS, device=parents.device)
    return ancestors.sum(-1) - 1, words.sum(-1).to(torch.int32), next_token, next_sibling


def draft_topk(
    logits: Tensor, scores: Tensor, d2t: Tensor | None, seed: Tensor | None, position: Tensor | None, k: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    z = law.clean(logits, None)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    if d2t is not None:
        ids = ids + d2t
    if seed is not None and position is not None:
        noise = law.race(seed[:, None], position[:, None], ids[None])
        z = z - noise.log()[:, None]
    order = z.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    tokens = ids[order]
    sums = scores.double()[..., None] + z.log_softmax(-1).gather(-1, order)
    cum_scores = sums.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)  # nan: no token of the row is possible
    best = cum_scores.flatten(1).sort(dim=-1, descending=True, stable=True)
    flat, next_scores = best.indices[:, :k].contiguous(), best.values[:, :k].contiguous()
    next_ids = tokens.flatten(1).gather(1, flat)
    parents = flat if step == 0 else flat + k + (step - 1) * k * k
    return tokens, cum_scores, next_ids, next_scores, (flat // k).int(), parents


def tree_finalize(
    scores: Tensor,
    tokens: Tensor,
    parent_list: Tensor,
    bonus: Tensor,
    seq_lens: Tensor,
    budget: Tensor | None,
    topk: int,
    num_nodes: int,
) -> tuple[Tensor, ...]:
    requests, device = len(scores), scores.device
    order = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    selected = torch.full((requests, num_nodes - 1), -1, device=device)
    candidates = torch.full((requests, num_nodes), -1, device=device)
    parents = torch.full((requests, num_nodes), -1, dtype=torch.int32, device=device)
    candidates[:, 0] = bonus
    for b in range(requests):
        kept = num_nodes if budget is None else min(max(int(budget[b]), 1), num_nodes)
        chosen = order[b, : kept - 1].sort().values
        selected[b, : len(chosen)] = chosen
        node_of = {index: node for node, index in enumerate(chosen.tolist(), start=1)}
        placed = {0}
        for index, node in node_of.items():
            column = index // topk
            parent = 0 if column == 0 else node_of.get(_entry(parent_list, b, column), -1)
            if parent in placed and parent < node:
                parents[b, node], candidates[b, node] = parent, tokens[b, index]
                placed.add(node)
    depths, mask_bits, next_token, next_sibling = links(parents)
    return candidates, parents, mask_bits, depths + seq_lens[:, None], next_token, next_sibling, selected


def _entry(parent_list: Tensor, b: int, column: int) -> int:
    return int(parent_list[b, column]) if column < parent_list.shape[1] else -1


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    mask_bits: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
    window: int,
    tree_lens: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    page_size, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for b, (start, stop) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        length = stop - start if tree_lens is None else int(tree_lens[b])
        prefix = int(cache_seqlens[b]) - length
        if stop > start and int(cache_seqlens[b]) > block_table.shape[1] * page_size:
            want = f"room for the {int(cache_seqlens[b])} keys of request {b}"
            raise refuse("tree_attention", "block_table", want, block_table)
        if stop > start and not 0 <= length <= int(cache_seqlens[b]):
            raise refuse("tree_attention", "tree_lens", f"values in 0..{int(cache_seqlens[b])}", f"{length}")
        for t in range(start, stop):
            slots = torch.arange(length, device=q.device)
            if mask_bits is None:
                tree = slots[: t - start + 1]
            else:
                tree = slots[(mask_bits[t, slots // BITS] >> (slots % BITS).int()) & 1 == 1]
            attended = torch.cat([torch.arange(prefix, device=q.device), prefix + tree])
            if window:
                attended = attended[-window:]
            if not len(attended):
                continue
            pages = block_table[b, attended // page_size].long()
            if not 0 <= int(pages.min()) <= int(pages.max()) < len(k_cache):
                want = f"block ids in 0..{len(k_cache) - 1} for the keys of request {b}"
                raise refuse("tree_attention", "block_table", want, f"{int(pages.min())}..{int(pages.max())}")
            at = (pages, attended % page_size)
            found = (
                cache[at].double() if scale is None else cache[at].double() * scale[at].double()[..., None]
                for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
            )
            k, v = (each.repeat_interleave(group, 1) for each in found)
            weights = (torch.einsum("hd,jhd->hj", q[t].double(), k) * softmax_scale).softmax(-1)
            out[t] = torch.einsum("hj,jhd->hd", weights, v)
    if gate is not None:
        out *= gate.double().sigmoid().view(*gate.shape[:2], -1)
    return out.to(q.dtype)


# -- verification -----------------------------------------------------------------------------------------------------
class _Request:
    """One request's walk through its tree."""

    def __init__(self, b: int, call: dict[str, Any]) -> None:
        def of(name: str, default: Any = None) -> Any:
            return default if call[name] is None else call[name][b]

        self.mode, self.logprobs, self.width = call["mode"], call["logprobs"], call["width"]
        self.logits, self.candidates = of("logits"), of("candidates").tolist()
        self.first_child, self.sibling = of("next_token").tolist(), of("next_sibling").tolist()
        self.temperature, self.top_p, self.min_p = (
            float(of(name, default)) for name, default in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))
        )
        self.top_k = int(of("top_k", 0))
        self.seed, self.position = of("seed"), of("position")
        self.coins, self.final_coins = of("coins"), of("final_coins")
        self.draft_probs, self.bits = of("draft_probs"), of("grammar_bits")
        if self.temperature == 0:
            self.mode = "greedy"

    def children(self, node: int) -> list[int]:
        """Elder siblings first. A link that does not lead to a larger index ends them, as in every room."""
        found, last, child = [], node, self.first_child[node]
        while last < child < len(self.candidates):
            found.append(child)
            last, child = child, self.sibling[child]
        return found

    def coin(self, node: int, depth: int) -> float:
        if self.coins is not None:
            return float(self.coins[node])
        return float(law.coin(self.seed, self.position + depth, law.NODE_COIN))

    def final_coin(self, depth: int) -> float:
        if self.final_coins is not None:
            return float(self.final_coins)
        return float(law.coin(self.seed, self.position + depth, law.FINAL_COIN))

    def step(self, node: int, depth: int, children: list[int]) -> tuple[int, int, float]:
        """(token emitted after node, child that it leads to or -1, its log-probability)."""
        z = law.clean(self.logits[node], None if self.bits is None else self.bits[node])
        if not len(z) or z.max() == -torch.inf:
            return -1, -1, 0.0
        if self.mode == "greedy":
            p = (torch.arange(len(z), device=z.device) == int(z.argmax())).double()
        else:
            p = law.probabilities(z, self.temperature, self.top_k, self.top_p, self.min_p)
        token = self.draw(p, z, node, depth, children)
        if isinstance(token, tuple):
            token, child = token
        else:
            child = next((c for c in children if self.candidates[c] == token), -1)
        if self.logprobs == "raw":
            return token, child, float(law.clean(self.logits[node], None).log_softmax(-1)[token])
        return token, child, float(p[token].log())

    def draw(self, p: Tensor, z: Tensor, node: int, depth: int, children: list[int]) -> int | tuple[int, int]:
        """A token; with the child accepted (or -1) where the walk, and not equality of tokens, decides that."""
        if self.mode == "greedy":
            return int(p.argmax())
        if self.mode == "coupled":
            noise = law.race(self.seed, self.position + depth, torch.arange(len(p), device=p.device))
            return int(((z - z.max()) / self.temperature - noise.log()).where(p > 0, -torch.inf).argmax())
        rest = p.clone()
        if self.mode == "target_only":
            mass = 0.0
            for child in children:
                token = self.candidates[child]
                weight = float(rest[token]) if 0 <= token < len(p) else 0.0
                mass += weight
                if weight > 0 and self.coin(node, depth) < mass:
                    return token, child
                if 0 <= token < len(p):
                    rest[token] = 0.0
        elif children:
            q = self.draft_probs[node].double()
            q = q.where((q >= 0) & (q <= 1), 0.0)
            token = self.candidates[children[0]]
            if 0 <= token < len(p) and q[token] > 0 and self.coin(node, depth) * q[token] < p[token]:
                return token, children[0]
            rest = (p - q).clamp(min=0)
        if not rest.sum() > 0:
            rest = p
        return law.invert(rest, self.final_coin(depth)), -1

    def walk(self) -> tuple[list[int], list[int], list[float]]:
        """Tokens, path and log-probabilities."""
        tokens: list[int] = []
        path, logprobs = [0], []
        for depth in range(self.width):
            children = self.children(path[-1]) if depth + 1 < self.width else []
            token, child, logprob = self.step(path[-1], depth, children)
            tokens.append(token)
            logprobs.append(logprob)
            if child < 0:
                break
            path.append(child)
        return tokens, path, logprobs


def tree_verify(
    logits: Tensor,
    candidates: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    coins: Tensor | None,
    final_coins: Tensor | None,
    draft_probs: Tensor | None,
    grammar_bits: Tensor | None,
    mode: str,
    width: int,
    logprobs: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = dict(locals())
    check_walks(next_token, next_sibling, temperature, top_p, min_p, coins, final_coins)
    requests, device = len(logits), logits.device
    tokens = torch.full((requests, width), -1, device=device)
    accept_index = torch.full((requests, width), -1, dtype=torch.int32, device=device)
    accept_length = torch.zeros(requests, dtype=torch.int32, device=device)
    token_logprobs = torch.zeros(requests, 0 if logprobs == "none" else width, device=device)
    for b in range(requests):
        emitted, path, values = _Request(b, call).walk()
        tokens[b, : len(emitted)] = torch.tensor(emitted, device=device)
        accept_index[b, : len(path)] = torch.tensor(path, dtype=torch.int32, device=device)
        accept_length[b] = len(path) - 1
        if logprobs != "none":
            token_logprobs[b, : len(values)] = torch.tensor(values, device=device)
    return tokens, accept_index, accept_length, token_logprobs


def tree_commit(
    accept_index: Tensor,
    accept_length: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    requests, width = accept_index.shape
    accepted = torch.zeros(0, device=accept_index.device)
    if hidden is not None:
        accepted = hidden.new_zeros(requests, width, hidden.shape[2])
    for b in range(requests):
        path = accept_index[b, : int(accept_length[b]) + 1].long()
        prefix = int(cache_seqlens[b])
        if hidden is not None:
            accepted[b, : len(path)] = hidden[b, path]
        if not k_caches:
            continue
        pages, page_size = k_caches[0].shape[:2]
        source, target = prefix + path, prefix + torch.arange(len(path), device=path.device)
        blocks = block_table[b].long()
        for slots in (source, target):
            if int(slots.max()) // page_size >= len(blocks) or not bool(
                ((blocks[slots // page_size] >= 0) & (blocks[slots // page_size] < pages)).all()
            ):
                want = f"block ids in 0..{pages - 1} for the {prefix + int(path.max()) + 1} keys of request {b}"
                raise refuse("tree_commit", "block_table", want, f"{blocks.tolist()[:8]}")
        for cache in (*k_caches, *v_caches):
            moved = cache[blocks[source // page_size], source % page_size]
            cache[blocks[target // page_size], target % page_size] = moved
    return (cache_seqlens + accept_length + 1).int(), accepted


def tree_budget(scores: Tensor, cost_table: Tensor, num_experts: int, topk_experts: int, expert_cost: float) -> Tensor:
    requests, device = len(scores), scores.device
    most = min(scores.numel() + requests, len(cost_table) - 1)
    gain, order = scores.double().exp().nan_to_num(0.0, 0.0, 0.0).flatten().sort(descending=True, stable=True)
    tokens = torch.arange(requests, most + 1, device=device)
    accepted = requests + torch.cat([gain.new_zeros(1), gain.cumsum(0)])[: len(tokens)]
    cost = cost_table.double()[tokens]
    if num_experts:
        cost = cost + expert_cost * expected_experts(tokens, num_experts, topk_experts)
    chosen = order[: int((accepted / cost).argmax())] if requests else order
    return 1 + torch.bincount(chosen // max(1, scores.shape[1]), minlength=requests).int()


def expected_experts(tokens: Tensor, num_experts: int, topk_experts: int) -> Tensor:
    """Distinct experts that a layer reads for m tokens, routed uniformly and independently: E (1 - (1 - k / E)^m)."""
    return num_experts * (1 - (1 - topk_experts / num_experts) ** tokens.double())
