"""Tree drafting and verification: public functions, their checks, and the ops m3kernels::{draft_topk, tree_*}.

Every room is deterministic and row-invariant: what a row gives depends on that row, its request's parameters and what
it attends to, not on its neighbours, the shape of the tree, the page size or the threads. Formulas: reference.py.
Values (links, temperatures, coins) are checked on CPU, by the room that reads them; on a GPU that would synchronise,
and a kernel touches no memory outside its arguments whatever they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.library import define
from m3kernels.spec_decode.arguments import (
    DTYPE_NAMES,
    INTEGERS,
    MOST,
    all_positive,
    as_int32,
    check_block_table,
    check_caches,
    check_constant,
    check_paths,
    check_queries,
    check_scale,
    check_scales,
    expect,
    gate_rows,
    is_integer,
    is_number,
    logits_like,
    near,
    on,
    packed,
    readable,
    vector,
    want,
    with_rows,
)
from m3kernels.spec_decode.types import BITS, LOGPROBS, MAX_NODES, MODES, Committed, Drafts, Tree, Verified


# -- drafting ---------------------------------------------------------------------------------------------------------
def draft_topk(
    logits: Tensor,
    scores: Tensor,
    *,
    k: int,
    step: int,
    d2t: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
) -> Drafts:
    """One step of drafting: the k best tokens of each frontier row, and the k best of all paths to expand next.

    Args:
        logits: (B, F, V) fp32, bf16 or fp16 of the draft; F rows of the frontier, 1 at step 0, k later. NaN is -inf.
        scores: (B, F) fp32, log-probability of the path to each row, nats.
        k: 1..V. step: 0 for the first, below 1024.
        d2t: (V,) int64, target id minus draft id of each draft token; None: the vocabularies are one.
        seed, position: (B,) int64. With both, tokens are ranked with the noise by which tree_verify's mode "coupled"
            draws the token at this position, so that draft and target tend to agree; which token is emitted does not
            depend on it. position is that of the drafted tokens; pass logits over the request's temperature. It pays
            where sampling is close to the model's own law, and costs where filters have cut that law to few tokens.
    Returns:
        Drafts. Ties go to the lower draft id and the lower flat index. Scores carry fp32 rounding.
    Raises:
        ValueError: an argument out of contract. BackendError: a room forced by name cannot serve the call.
    Source: Li et al. (2024), arXiv:2406.16858, section 4.1: expansion of a dynamic draft tree.
    """
    op = "draft_topk"
    want(op, "logits", "(B, F, V) " + DTYPE_NAMES, logits, logits_like(logits, 3))
    requests, frontier, vocabulary = logits.shape
    want(op, "logits", "a row or more of each request, a vocabulary of at least 1", logits, frontier * vocabulary > 0)
    expect(op, "scores", scores, logits, (requests, frontier), (torch.float32,))
    if not (is_integer(k) and 1 <= k <= vocabulary):
        raise refuse(op, "k", f"an integer in 1..{vocabulary}", k)
    want(op, "step", "an integer in 0..1023", step, is_integer(step, 0, MAX_NODES - 1))
    if d2t is not None:
        expect(op, "d2t", d2t, logits, (vocabulary,), (torch.int64,))
    if (seed is None) != (position is None):
        raise refuse(op, "position" if position is None else "seed", "both seed and position, or neither", "one")
    seed = None if seed is None else vector(op, "seed", seed, logits, (torch.int64,), torch.int64)
    position = None if position is None else vector(op, "position", position, logits, INTEGERS, torch.int64)
    check_constant(op, logits=logits, scores=scores)
    found = _draft_topk(with_rows(logits), scores.contiguous(), packed(d2t), seed, position, k, step)
    return Drafts(*found)


def tree_finalize(
    scores: Tensor,
    tokens: Tensor,
    parent_list: Tensor,
    bonus: Tensor,
    seq_lens: Tensor,
    *,
    topk: int,
    num_nodes: int,
    budget: Tensor | None = None,
) -> Tree:
    """The tree of the best candidates of all steps, with everything that the target model and tree_verify need.

    Args:
        scores: (B, M) fp32, cum_scores of all steps in order, flattened: M = k + (steps - 1) k^2.
        tokens: (B, M) int64, likewise. parent_list: (B, L) int64: a column of -1, then ``parents`` of every step but
            the last. topk: k.
        bonus: (B,) int32 or int64, the root's token. seq_lens: (B,) int32 or int64, keys in the cache before the root.
        num_nodes: N, root included, 1..1024. budget: (B,) int32 or int64, nodes each request keeps (1..N); None: N.
    Returns:
        Tree of the N - 1 best candidates (ties to the lower index) and the root, siblings in the order of their index.
        Nodes beyond those kept are padding: token -1, no links, they see the prefix and themselves.
    Raises: as draft_topk.
    Source: Li et al. (2024), arXiv:2406.16858, section 4.2 (reranking); index meaning of SGLang 0.5.23.
    """
    op = "tree_finalize"
    good = is_strided(scores) and scores.ndim == 2 and scores.dtype == torch.float32
    want(op, "scores", "(B, M) float32", scores, good)
    requests, count = scores.shape
    expect(op, "tokens", tokens, scores, (requests, count), (torch.int64,))
    good = is_strided(parent_list) and parent_list.ndim == 2 and len(parent_list) == requests
    if not (good and parent_list.dtype == torch.int64 and near(parent_list, scores)):
        raise refuse(op, "parent_list", f"({requests}, L) int64{on(scores)}", parent_list)
    want(op, "topk", "an integer in 1..2147483647", topk, is_integer(topk, 1, MOST))
    want(op, "num_nodes", "an integer in 1..1024", num_nodes, is_integer(num_nodes, 1, MAX_NODES))
    bonus = vector(op, "bonus", bonus, scores, INTEGERS, torch.int64)
    seq_lens = vector(op, "seq_lens", seq_lens, scores, INTEGERS, torch.int64)
    budget = None if budget is None else vector(op, "budget", budget, scores, INTEGERS, torch.int32)
    check_constant(op, scores=scores)
    given = (scores.contiguous(), tokens.contiguous(), parent_list.contiguous(), bonus, seq_lens, budget)
    return Tree(*_tree_finalize(*given, topk, num_nodes))


# -- attention --------------------------------------------------------------------------------------------------------
def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    mask_bits: Tensor | None = None,
    tree_lens: Tensor | None = None,
    gate: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    window: int = 0,
) -> Tensor:
    """Attention over a paged cache, with a sigmoid output gate: prefill, decoding and verification of trees alike.

        out[t] = sigmoid(gate[t]) * sum_j softmax_j(softmax_scale * q[t] . k_j) v_j

    Query t of request b attends to every key before the request's tree, and in the tree to the ones whose bit is set
    (its ancestors and itself). The tree is the request's own queries, or its last tree_lens keys: then the queries may
    be any nodes of it, which is how a tree is drafted step by step. Without mask_bits a query attends to itself and to
    all keys before it. Bitwise, a row of the result depends on its q, its gate and the keys and values it attends to,
    in order, and on nothing else: a node of a tree gives what plain decoding of the same tokens gives.

    Args:
        q: (T, H, D) with cu_seqlens_q, or (B, N, H, D): fp32, bf16 or fp16.
        k_cache, v_cache: (P, page_size, G, D), H a multiple of G, one dtype of the same three or int8; any page size.
        block_table: (B, max_pages) int32 or int64. cache_seqlens: (B,) int32 or int64: keys of a request, those of the
            queries included.
        cu_seqlens_q: (B + 1,) int32 or int64, 0 = cu[0] <= ... <= cu[B] = T; with q (B, N, H, D): None.
        mask_bits: (T, W) or (B, N, W) int32, bit j that of the tree's key j; 32 * W at least the keys of a tree; None:
            causal.
        tree_lens: (B,) int32 or int64, keys of each request's tree, 0..cache_seqlens; None: as many as queries. Only
            with mask_bits.
        gate: logits of the gate, (..., H) one a head or (..., H, D), fp32 or q's dtype, leading sizes of q.
        k_scale, v_scale: (P, page_size, G) fp32, with int8 caches: a key is its row of k_cache times its k_scale, a
            value likewise.
        softmax_scale: default D ** -0.5. window: number of last positions that are attended to; 0: all. A node's
            position is that of the prefix plus its depth.
    Returns:
        Like q. fp32 softmax and accumulation. A query that attends to nothing gives zeros.
    Raises:
        ValueError: an argument out of contract; on CPU also a block id outside 0..P-1 that is needed (on a GPU such a
        row is NaN).
    Source of the gate: Qiu et al., "Gated Attention for Large Language Models" (2025).
    """
    op = "tree_attention"
    batched = is_strided(q) and q.ndim == 4
    want(op, "q", f"(T, H, D) or (B, N, H, D) {DTYPE_NAMES}", q, logits_like(q, 4 if batched else 3))
    check_caches(op, [k_cache], [v_cache], q)
    if k_cache.dtype == torch.int8 or k_scale is not None or v_scale is not None:
        check_scale(op, "k_scale", k_scale, k_cache)
        check_scale(op, "v_scale", v_scale, v_cache)
    heads, size = q.shape[-2:]
    kv_heads = k_cache.shape[2]
    if k_cache.shape[3] != size:
        raise refuse(op, "k_cache", f"head size {size}, as q", k_cache)
    if kv_heads == 0 or heads % kv_heads:
        raise refuse(op, "k_cache", f"kv heads that divide {heads}", k_cache)
    lead = q.shape[:-2]
    requests = check_block_table(op, block_table, q)
    cache_seqlens = vector(op, "cache_seqlens", cache_seqlens, q, INTEGERS, torch.int32, requests)
    if batched:
        want(op, "cu_seqlens_q", "None with q (B, N, H, D)", cu_seqlens_q, cu_seqlens_q is None)
        want(op, "q", f"{requests} requests, as block_table", q, q.shape[0] == requests)
        cu_seqlens_q = torch.arange(requests + 1, device=q.device, dtype=torch.int32) * q.shape[1]
    elif not is_strided(cu_seqlens_q):
        wanted = f"({requests + 1},) int32 or int64{on(q)}, with q (T, H, D)"
        raise refuse(op, "cu_seqlens_q", wanted, cu_seqlens_q)
    else:
        cu_seqlens_q = vector(op, "cu_seqlens_q", cu_seqlens_q, q, INTEGERS, torch.int32, requests + 1)
    if mask_bits is not None:
        good = is_strided(mask_bits) and mask_bits.shape[:-1] == lead and mask_bits.ndim == len(lead) + 1
        if not (good and mask_bits.dtype == torch.int32 and near(mask_bits, q)):
            raise refuse(op, "mask_bits", f"({''.join(f'{size}, ' for size in lead)}W) int32{on(q)}", mask_bits)
    if tree_lens is not None:
        want(op, "tree_lens", "None without mask_bits", tree_lens, mask_bits is not None)
        tree_lens = vector(op, "tree_lens", tree_lens, q, INTEGERS, torch.int32, requests)
    if gate is not None:
        shapes = (torch.Size((*lead, heads)), torch.Size((*lead, heads, size)))
        good = is_strided(gate) and gate.shape in shapes
        if not (good and gate.dtype in (torch.float32, q.dtype) and near(gate, q)):
            wanted = f"{tuple(shapes[0])} or {tuple(shapes[1])} float32 or {q.dtype}{on(q)}"
            raise refuse(op, "gate", wanted, gate)
    scale = max(size, 1) ** -0.5 if softmax_scale is None else softmax_scale
    want(op, "softmax_scale", "a number that is finite in float32", scale, is_number(scale))
    want(op, "window", "an integer in 0..2147483647", window, is_integer(window, 0, MOST))
    check_constant(op, q=q, gate=gate)
    rows = q.flatten(0, -3) if batched else q
    if not rows.shape[0] or not heads or not size:
        return torch.empty_like(q)
    check_queries(op, cu_seqlens_q, cache_seqlens, block_table, rows, k_cache.shape[1], mask_bits, tree_lens)
    if gate is not None:
        gate = gate.reshape(len(rows), *gate.shape[len(lead) :]) if batched else gate
        gate = gate if gate_rows(gate) else gate.contiguous()
    out = _tree_attention(
        with_rows(rows),
        with_rows(k_cache),
        with_rows(v_cache),
        as_int32(block_table),
        cache_seqlens,
        cu_seqlens_q,
        None if mask_bits is None else mask_bits.flatten(0, -2).contiguous(),
        gate,
        float(scale),
        window,
        tree_lens,
        k_scale,
        v_scale,
    )
    return out.view(q.shape)


# -- verification -----------------------------------------------------------------------------------------------------
def tree_verify(
    logits: Tensor,
    candidates: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    *,
    mode: str = "coupled",
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seed: Tensor | None = None,
    position: Tensor | None = None,
    coins: Tensor | None = None,
    final_coins: Tensor | None = None,
    draft_probs: Tensor | None = None,
    grammar_bits: Tensor | None = None,
    width: int | None = None,
    logprobs: str = "none",
) -> Verified:
    """Walk each tree by the target's law, straight from its logits; read only the rows on the accepted path.

    The tokens emitted have exactly the law of plain sampling from the target (docs/numerics.md has the proof). In mode
    "coupled" they are plain sampling: the token at a position is a function of the row, the seed and the position, so
    the same seed gives the same tokens for every tree. On a tree of one node the op is a sampler.

    Args:
        logits: (B, N, V) fp32, bf16 or fp16, of every node; V contiguous, other strides free. NaN is -inf.
        candidates, next_token, next_sibling: (B, N) int64, the tree (types.py). Siblings should be distinct; a
            repeated one is never accepted.
        mode: "coupled": position-keyed noise, needs seed and position. "target_only": accepts a child with the mass of
            its elder siblings and its own; the most that a rule with fixed siblings can. "chain": min(1, p / q) on
            first children that were drawn from draft_probs. "greedy": the most likely token.
        temperature: (B,) fp32, 0 (greedy for this request) or at least 1e-6; default 1. The modes other than greedy may
            be mixed with it.
        top_k: (B,) int32 or int64, 0: none. top_p: (B,) fp32 in (0, 1], 1: none. min_p: (B,) fp32 in [0, 1], 0: none.
            Applied in this order; tokens that tie at a threshold are all kept.
        seed: (B,) int64. position: (B,) int32 or int64, of the first token that this call emits.
        coins: (B, N) and final_coins: (B,) fp32 or fp64 in [0, 1), for target_only and chain; default: from seed and
            position. coins[b, i] decides which child of node i is accepted, final_coins[b] the bonus token.
        draft_probs: (B, N, V) fp32, for chain: row i is the law from which node i's child was drawn, filters included.
        grammar_bits: (B, N, ceil(V / 32)) int32: bit v % 32 of word v // 32 is set iff token v may follow the node.
        width: S, slots of a path: at most S - 1 drafts are accepted. Default N.
        logprobs: "raw": log-probabilities of the emitted tokens under the logits as given; "sampling": under the law
            after temperature and filters; "none".
    Returns:
        Verified. A row that allows no token emits -1.
    Raises:
        ValueError: an argument out of contract. BackendError: a room forced by name cannot serve the call.
    """
    op = "tree_verify"
    want(op, "logits", "(B, N, V) " + DTYPE_NAMES, logits, logits_like(logits, 3))
    requests, nodes, vocabulary = logits.shape
    want(op, "logits", "1..1024 nodes, a vocabulary of at least 1", logits, 1 <= nodes <= MAX_NODES and vocabulary >= 1)
    check_constant(op, logits=logits)
    shape, integers, floats = (requests, nodes), (torch.int64,), (torch.float32,)
    for name, value in (("candidates", candidates), ("next_token", next_token), ("next_sibling", next_sibling)):
        expect(op, name, value, logits, shape, integers)
    if mode not in MODES:
        raise refuse(op, "mode", ", ".join(map(repr, MODES)), mode)
    if logprobs not in LOGPROBS:
        raise refuse(op, "logprobs", ", ".join(map(repr, LOGPROBS)), logprobs)
    width = nodes if width is None else width
    want(op, "width", "an integer in 1..1024", width, is_integer(width, 1, MAX_NODES))
    seeded, drawn = seed is not None and position is not None, coins is not None and final_coins is not None
    if mode == "coupled" and not seeded:
        raise refuse(op, "seed" if seed is None else "position", "a tensor for mode 'coupled'", None)
    if mode in ("target_only", "chain") and not seeded and not drawn:
        raise refuse(op, "coins", f"coins and final_coins, or seed and position, for mode {mode!r}", "neither")
    if (coins is None) != (final_coins is None):
        name = "final_coins" if final_coins is None else "coins"
        raise refuse(op, name, "both coins and final_coins, or neither", None)
    if mode == "chain" and draft_probs is None:
        raise refuse(op, "draft_probs", f"{tuple(logits.shape)} float32 for mode 'chain'", None)
    if temperature is None:
        temperature = torch.ones(requests, device=logits.device)
    given = (
        vector(op, "temperature", temperature, logits, floats, torch.float32),
        None if top_k is None else vector(op, "top_k", top_k, logits, INTEGERS, torch.int32),
        None if top_p is None else vector(op, "top_p", top_p, logits, floats, torch.float32),
        None if min_p is None else vector(op, "min_p", min_p, logits, floats, torch.float32),
        None if seed is None else vector(op, "seed", seed, logits, integers, torch.int64),
        None if position is None else vector(op, "position", position, logits, INTEGERS, torch.int64),
    )
    if coins is not None and final_coins is not None:
        either = (torch.float32, torch.float64)
        coins = expect(op, "coins", coins, logits, shape, either).double().contiguous()
        final_coins = expect(op, "final_coins", final_coins, logits, (requests,), either).double().contiguous()
    if draft_probs is not None:
        draft_probs = with_rows(expect(op, "draft_probs", draft_probs, logits, tuple(logits.shape), floats))
    if grammar_bits is not None:
        words = (requests, nodes, -(-vocabulary // BITS))
        grammar_bits = with_rows(expect(op, "grammar_bits", grammar_bits, logits, words, (torch.int32,)))
    found = _tree_verify(
        with_rows(logits),
        candidates.contiguous(),
        next_token.contiguous(),
        next_sibling.contiguous(),
        *given,
        coins,
        final_coins,
        draft_probs,
        grammar_bits,
        mode,
        width,
        logprobs,
    )
    return Verified(*found)


# -- after verification -----------------------------------------------------------------------------------------------
def tree_commit(
    accept_index: Tensor,
    accept_length: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    hidden: Tensor | None = None,
    *,
    k_scales: Sequence[Tensor] = (),
    v_scales: Sequence[Tensor] = (),
) -> Committed:
    """Move keys and values of the accepted path, in all layers, to the slots that plain decoding would have filled.

        slot prefix + j  <-  slot prefix + accept_index[b, j],   j = 0 .. accept_length[b]

    Args:
        accept_index: (B, S) int32, accept_length: (B,) int32, of tree_verify: nodes in ascending order.
        k_caches, v_caches: (P, page_size, G, D) of every layer, changed in place; one shape and dtype, D contiguous.
        block_table: (B, max_pages) int32 or int64. cache_seqlens: (B,) int32 or int64: keys before the tree.
        hidden: (B, N, C) fp32, bf16 or fp16 hidden states of the nodes, to gather along the path; None.
        k_scales, v_scales: (P, page_size, G) fp32 of every layer whose caches are int8: they move with the rows.
    Returns:
        Committed: cache_seqlens + accept_length + 1, and hidden (B, S, C), zeros after the path.
    Raises: as tree_attention.
    """
    op = "tree_commit"
    good = is_strided(accept_index) and accept_index.ndim == 2 and accept_index.dtype == torch.int32
    want(op, "accept_index", "(B, S) int32 with S at least 1", accept_index, good and accept_index.shape[1] >= 1)
    requests = len(accept_index)
    accept_length = vector(op, "accept_length", accept_length, accept_index, (torch.int32,), torch.int32)
    check_caches(op, k_caches, v_caches, accept_index)
    check_scales(op, "k_scales", k_scales, k_caches)
    check_scales(op, "v_scales", v_scales, v_caches)
    check_block_table(op, block_table, accept_index, requests)
    cache_seqlens = vector(op, "cache_seqlens", cache_seqlens, accept_index, INTEGERS, torch.int32)
    if hidden is not None:
        good = logits_like(hidden, 3) and len(hidden) == requests and near(hidden, accept_index)
        want(op, "hidden", f"({requests}, N, C) {DTYPE_NAMES}{on(accept_index)}", hidden, good)
        check_constant(op, hidden=hidden)
    check_paths(op, accept_index, accept_length, cache_seqlens, MAX_NODES if hidden is None else hidden.shape[1])
    # A scale is the row of one element of a cache beside the caches.
    keys = [*k_caches, *(scale.unsqueeze(-1) for scale in k_scales)]
    values = [*v_caches, *(scale.unsqueeze(-1) for scale in v_scales)]
    args = (accept_index.contiguous(), accept_length, keys, values, as_int32(block_table))
    seqlens, accepted = _tree_commit(*args, cache_seqlens, None if hidden is None else hidden.contiguous())
    return Committed(seqlens, None if hidden is None else accepted)


def tree_budget(
    scores: Tensor,
    cost_table: Tensor,
    *,
    num_experts: int = 0,
    topk_experts: int = 0,
    expert_cost: float = 0.0,
) -> Tensor:
    """How many nodes each request should keep: the most expected tokens per cost of the pass that verifies them.

        maximise (B + sum of exp(score) of the m - B best candidates of the batch) / cost(m),
        cost(m) = cost_table[m] + expert_cost * E (1 - (1 - k / E)^m)

    Args:
        scores: (B, M) fp32, as for tree_finalize: a candidate's estimated probability of being accepted is exp(score).
        cost_table: (L + 1,) fp32 or fp64, positive: cost of a target pass over m tokens, m = 0..L, in any unit;
            L at least B. More than L tokens are never chosen.
        num_experts: E routed experts of a layer, 0 for a dense model. topk_experts: k that a token is routed to, 1..E.
        expert_cost: cost of reading one expert in every layer, in the unit of cost_table, which then is the rest.
            Routing is taken as uniform and independent: an upper bound of the experts that are read.
    Returns:
        (B,) int32, nodes with the root: ``budget`` of tree_finalize.
    Raises: ValueError: an argument out of contract.
    """
    op = "tree_budget"
    good = is_strided(scores) and scores.ndim == 2 and scores.dtype == torch.float32
    want(op, "scores", "(B, M) float32", scores, good)
    good = is_strided(cost_table) and cost_table.ndim == 1 and cost_table.dtype in (torch.float32, torch.float64)
    good = good and len(cost_table) > max(1, len(scores)) and near(cost_table, scores)
    want(
        op, "cost_table", f"(L + 1,) float32 or float64{on(scores)}, L at least {max(1, len(scores))}", cost_table, good
    )
    if readable(cost_table):
        want(op, "cost_table", "finite values above 0 from m = 1 on", "others", all_positive(cost_table[1:]))
    want(op, "num_experts", f"an integer in 0..{MOST}", num_experts, is_integer(num_experts, 0, MOST))
    good = is_integer(topk_experts) and (1 <= topk_experts <= num_experts or topk_experts == num_experts == 0)
    want(op, "topk_experts", f"an integer in 1..{num_experts}" if num_experts else "0", topk_experts, good)
    want(op, "expert_cost", "a finite number of at least 0", expert_cost, is_number(expert_cost) and expert_cost >= 0)
    check_constant(op, scores=scores, cost_table=cost_table)
    return _tree_budget(scores.contiguous(), cost_table.contiguous(), num_experts, topk_experts, float(expert_cost))


# -- ops --------------------------------------------------------------------------------------------------------------
def _fake_draft_topk(logits: Tensor, scores: Tensor, d2t: Any, seed: Any, position: Any, k: int, step: int) -> Any:
    requests, frontier, _ = logits.shape
    tokens, cum_scores = (scores.new_empty(requests, frontier, k, dtype=dtype) for dtype in (torch.int64, scores.dtype))
    dtypes = (torch.int64, scores.dtype, torch.int32, torch.int64)
    return tokens, cum_scores, *(scores.new_empty(requests, k, dtype=dtype) for dtype in dtypes)


def _fake_tree_finalize(scores: Tensor, *rest: Any) -> Any:
    nodes = rest[-1]
    links = [scores.new_empty(len(scores), nodes, dtype=torch.int64) for _ in range(4)]
    parents = scores.new_empty(len(scores), nodes, dtype=torch.int32)
    bits = scores.new_empty(len(scores), nodes, -(-nodes // BITS), dtype=torch.int32)
    return links[0], parents, bits, *links[1:], scores.new_empty(len(scores), nodes - 1, dtype=torch.int64)


def _fake_tree_verify(logits: Tensor, *rest: Any) -> Any:
    _, width, logprobs = rest[-3:]
    tokens = logits.new_empty(len(logits), width, dtype=torch.int64)
    index = logits.new_empty(len(logits), width, dtype=torch.int32)
    length = logits.new_empty(len(logits), dtype=torch.int32)
    return tokens, index, length, logits.new_empty(len(logits), 0 if logprobs == "none" else width, dtype=torch.float32)


def _fake_tree_commit(
    accept_index: Tensor, accept_length: Tensor, k: Any, v: Any, table: Any, seqlens: Tensor, hidden: Tensor | None
) -> Any:
    shape = (0,) if hidden is None else (*accept_index.shape, hidden.shape[2])
    dtype = torch.float32 if hidden is None else hidden.dtype
    return torch.empty_like(accept_length), accept_length.new_empty(shape, dtype=dtype)


_draft_topk = define(
    __package__,
    "draft_topk(Tensor logits, Tensor scores, Tensor? d2t, Tensor? seed, Tensor? position, SymInt k, SymInt step) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_draft_topk,
)
_tree_finalize = define(
    __package__,
    "tree_finalize(Tensor scores, Tensor tokens, Tensor parent_list, Tensor bonus, Tensor seq_lens, Tensor? budget, "
    "SymInt topk, SymInt num_nodes) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_tree_finalize,
)
_tree_attention = define(
    __package__,
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cache_seqlens, "
    "Tensor cu_seqlens_q, Tensor? mask_bits, Tensor? gate, float softmax_scale, SymInt window, "
    "Tensor? tree_lens=None, Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor",
    fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
)
_tree_verify = define(
    __package__,
    "tree_verify(Tensor logits, Tensor candidates, Tensor next_token, Tensor next_sibling, Tensor temperature, "
    "Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor? seed, Tensor? position, Tensor? coins, Tensor? final_coins, "
    "Tensor? draft_probs, Tensor? grammar_bits, str mode, SymInt width, str logprobs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_tree_verify,
)
_tree_commit = define(
    __package__,
    "tree_commit(Tensor accept_index, Tensor accept_length, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, "
    "Tensor block_table, Tensor cache_seqlens, Tensor? hidden) -> (Tensor, Tensor)",
    fake=_fake_tree_commit,
)
_tree_budget = define(
    __package__,
    "tree_budget(Tensor scores, Tensor cost_table, int num_experts, int topk_experts, float expert_cost) -> Tensor",
    fake=lambda scores, *_: scores.new_empty(len(scores), dtype=torch.int32),
)
