"""Every documented error of drafting, trees, attention, verification and commit, with its message; bad block ids."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels import BackendError
from m3kernels.spec_decode import draft_topk, tree_attention, tree_budget, tree_commit, tree_finalize, tree_verify
from m3kernels.spec_decode.reference import make_inputs

NAN, INF, BIG = float("nan"), float("inf"), 10**400
DTYPES = "float32, bfloat16 or float16"
INTS = "int32 or int64"
TREES = make_inputs(2, 5, 40)
LOGITS = TREES["logits"]
LINKS = {name: TREES[name] for name in ("candidates", "next_token", "next_sibling")}
ONES, ZEROS = torch.ones(2), torch.zeros(2, dtype=torch.int64)


def with_value(x: Tensor, at: tuple[int, ...], value: float) -> Tensor:
    """A copy of x with one element changed."""
    x = x.clone()
    x[at] = value
    return x


def grown(x: Tensor) -> Tensor:
    """A copy of x that wants a gradient."""
    return x.clone().requires_grad_()


# -- refusals ---------------------------------------------------------------------------------------------------------
DRAFT = dict(logits=torch.randn(2, 3, 40), scores=torch.zeros(2, 3), k=3, step=1, d2t=torch.arange(40))
NOISE = dict(seed=ZEROS, position=ZEROS)
FINALIZE = dict(
    scores=-torch.rand(2, 12), tokens=torch.arange(24).view(2, 12), parent_list=torch.tensor([[-1, 0, 1, 2]] * 2),
    bonus=ZEROS, seq_lens=ZEROS, topk=3, num_nodes=5, budget=ZEROS,
)  # fmt: skip
CACHE = torch.randn(6, 4, 2, 8)
ATTENTION = dict(
    q=torch.randn(5, 4, 8), k_cache=CACHE, v_cache=CACHE.neg(), block_table=torch.tensor([[0, 2, 4], [1, 3, 5]]),
    cache_seqlens=torch.tensor([9, 7]), cu_seqlens_q=torch.tensor([0, 2, 5]),
    mask_bits=torch.ones(5, 1, dtype=torch.int32), gate=torch.randn(5, 4),
)  # fmt: skip
BATCHED = dict(
    q=torch.randn(2, 2, 4, 8), k_cache=CACHE, v_cache=CACHE, block_table=ATTENTION["block_table"],
    cache_seqlens=ATTENTION["cache_seqlens"], mask_bits=torch.ones(2, 2, 1, dtype=torch.int32),
    gate=torch.randn(2, 2, 4, 8),
)  # fmt: skip
VERIFY = dict(
    logits=LOGITS, **LINKS, temperature=ONES, top_k=ZEROS, top_p=ONES, min_p=torch.zeros(2), seed=ZEROS, position=ZEROS,
    grammar_bits=torch.full((2, 5, 2), -1, dtype=torch.int32),
)  # fmt: skip
COINS = dict(coins=torch.rand(2, 5), final_coins=torch.rand(2))
TARGET = dict(logits=LOGITS, **LINKS, mode="target_only", **COINS)
CHAIN = dict(logits=LOGITS, **LINKS, mode="chain", **COINS, draft_probs=LOGITS.softmax(-1))
COMMIT = dict(
    accept_index=torch.tensor([[0, 2, 4], [0, -1, -1]], dtype=torch.int32),
    accept_length=torch.tensor([2, 0], dtype=torch.int32), k_caches=[CACHE, CACHE.clone()],
    v_caches=(CACHE.clone(), CACHE.clone()), block_table=ATTENTION["block_table"], cache_seqlens=torch.tensor([3, 11]),
    hidden=torch.randn(2, 5, 7),
)  # fmt: skip
BUDGET = dict(scores=-torch.rand(2, 12), cost_table=torch.ones(20), num_experts=8, topk_experts=2, expert_cost=0.1)

PATHS = f"logits: want (B, F, V) {DTYPES}; got "
PATH_SCORES = "scores: want (2, 3) float32; got "
STEP = "step: want an integer in 0..1023; got "
K = "k: want an integer in 1..40; got "
D2T = "d2t: want (40,) int64; got "
ALL_SCORES = "scores: want (B, M) float32; got "
ALL_TOKENS = "tokens: want (2, 12) int64; got "
LISTED = "parent_list: want (2, L) int64; got "
TOPK = "topk: want an integer in 1..2147483647; got "
NODES = "num_nodes: want an integer in 1..1024; got "
QUERIES = f"q: want (T, H, D) or (B, N, H, D) {DTYPES}; got "
CACHES = "want (P, page_size, G, D) float32, bfloat16, float16 or int8; got "
K_CACHE, V_CACHE = "k_cache: " + CACHES, "v_cache: " + CACHES
LIKE_FIRST = "want (6, 4, 2, 8) torch.float32, page_size at least 1, like the first; got "
TABLE = f"block_table: want (B, max_pages) {INTS}; got "
SEQLENS = f"cache_seqlens: want (2,) {INTS}; got "
CU = f"cu_seqlens_q: want (3,) {INTS}; got "
CU_ORDER = "cu_seqlens_q: want 0 = cu[0] <= ... <= cu[-1] = 5; got "
BITS = "mask_bits: want (5, W) int32; got "
GATE = "gate: want (5, 4) or (5, 4, 8) float32 or torch.float32; got "
SCALE = "softmax_scale: want a number that is finite in float32; got "
WINDOW = "window: want an integer in 0..2147483647; got "
NO_GRAD = "want no gradient (call under torch.no_grad()); got requires_grad"
ROWS = f"logits: want (B, N, V) {DTYPES}; got "
SIZES = "logits: want 1..1024 nodes, a vocabulary of at least 1; got "
MODE = "mode: want 'greedy', 'target_only', 'chain', 'coupled'; got "
LOGPROBS = "logprobs: want 'none', 'raw', 'sampling'; got "
WIDTH = "width: want an integer in 1..1024; got "
TEMPERATURE = "temperature: want 0, or a finite number of at least 1e-6; got "
TOP_P, MIN_P = "top_p: want values in (0, 1]; got ", "min_p: want values in [0, 1]; got "
UNIT = "want values in [0, 1); got "
FURTHER = "want -1, or an index greater than the node's own and below 5; got "
PROBS = "draft_probs: want (2, 5, 40) float32; got "
GRAMMAR = "grammar_bits: want (2, 5, 2) int32; got "
INDEX = "accept_index: want (B, S) int32 with S at least 1; got "
ASCENDING = "accept_index: want ascending nodes in 0..4 along each path; got "
LENGTHS = "accept_length: want values in 0..2; got "
LAYERS = "k_caches: " + CACHES
HIDDEN = f"hidden: want (2, N, C) {DTYPES}; got "
COSTS = "cost_table: want (L + 1,) float32 or float64, L at least 2; got "
COST_VALUES = "cost_table: want finite values above 0 from m = 1 on; got others"
EXPERTS = "num_experts: want an integer in 0..2147483647; got "
EXPERT_COST = "expert_cost: want a finite number of at least 0; got "

Change = dict[str, Any]
ERRORS: dict[Callable[..., Any], tuple[dict[str, Any], dict[str, tuple[Change, str]]]] = {
    draft_topk: (DRAFT, {
        "logits_rank": (dict(logits=torch.randn(3, 40)), PATHS + "(3, 40) float32"),
        "logits_dtype": (dict(logits=torch.randn(2, 3, 40).double()), PATHS + "(2, 3, 40) float64"),
        "logits_sparse": (dict(logits=torch.ones(2, 3, 40).to_sparse()), PATHS + "(2, 3, 40) float32 sparse_coo"),
        "logits_list": (dict(logits=[[[0.0]]]), PATHS + "list"),
        "logits_no_rows": (
            dict(logits=torch.randn(2, 0, 40)),
            "logits: want a row or more of each request, a vocabulary of at least 1; got (2, 0, 40) float32",
        ),
        "logits_no_vocabulary": (
            dict(logits=torch.randn(2, 3, 0)),
            "logits: want a row or more of each request, a vocabulary of at least 1; got (2, 3, 0) float32",
        ),
        "logits_meta": (
            dict(logits=torch.empty(2, 3, 40, device="meta")),
            "scores: want (2, 3) float32 on meta; got (2, 3) float32",
        ),
        "logits_gradient": (dict(logits=grown(DRAFT["logits"])), "logits: " + NO_GRAD),
        "scores_shape": (dict(scores=torch.zeros(2, 1)), PATH_SCORES + "(2, 1) float32"),
        "scores_dtype": (dict(scores=torch.zeros(2, 3).half()), PATH_SCORES + "(2, 3) float16"),
        "scores_none": (dict(scores=None), PATH_SCORES + "None"),
        "scores_meta": (dict(scores=torch.zeros(2, 3, device="meta")), PATH_SCORES + "(2, 3) float32 on meta"),
        "scores_gradient": (dict(scores=grown(DRAFT["scores"])), "scores: " + NO_GRAD),
        "k_zero": (dict(k=0), K + "0"),
        "k_above_the_vocabulary": (dict(k=41), K + "41"),
        "k_bool": (dict(k=True), K + "True"),
        "k_float": (dict(k=2.0), K + "2.0"),
        "step_negative": (dict(step=-1), STEP + "-1"),
        "step_large": (dict(step=1024), STEP + "1024"),
        "step_none": (dict(step=None), STEP + "None"),
        "d2t_shape": (dict(d2t=torch.arange(39)), D2T + "(39,) int64"),
        "d2t_dtype": (dict(d2t=torch.arange(40, dtype=torch.int32)), D2T + "(40,) int32"),
        "seed_alone": (dict(seed=ZEROS), "position: want both seed and position, or neither; got one"),
        "position_alone": (dict(position=ZEROS), "seed: want both seed and position, or neither; got one"),
        "seed_dtype": ({**NOISE, "seed": ZEROS.int()}, "seed: want (2,) int64; got (2,) int32"),
        "seed_shape": ({**NOISE, "seed": ZEROS[:1]}, "seed: want (2,) int64; got (1,) int64"),
        "position_dtype": ({**NOISE, "position": ONES}, f"position: want (2,) {INTS}; got (2,) float32"),
    }),
    tree_finalize: (FINALIZE, {
        "scores_rank": (dict(scores=torch.zeros(12)), ALL_SCORES + "(12,) float32"),
        "scores_dtype": (dict(scores=torch.zeros(2, 12).bfloat16()), ALL_SCORES + "(2, 12) bfloat16"),
        "scores_gradient": (dict(scores=grown(FINALIZE["scores"])), "scores: " + NO_GRAD),
        "tokens_shape": (dict(tokens=torch.zeros(2, 11).long()), ALL_TOKENS + "(2, 11) int64"),
        "tokens_dtype": (dict(tokens=torch.zeros(2, 12).int()), ALL_TOKENS + "(2, 12) int32"),
        "tokens_meta": (
            dict(tokens=torch.zeros(2, 12, dtype=torch.int64, device="meta")), ALL_TOKENS + "(2, 12) int64 on meta"
        ),
        "parents_rank": (dict(parent_list=ZEROS), LISTED + "(2,) int64"),
        "parents_requests": (dict(parent_list=ZEROS[None]), LISTED + "(1, 2) int64"),
        "parents_dtype": (dict(parent_list=ZEROS[:, None].int()), LISTED + "(2, 1) int32"),
        "bonus_shape": (dict(bonus=ZEROS[:1]), f"bonus: want (2,) {INTS}; got (1,) int64"),
        "bonus_number": (dict(bonus=7), f"bonus: want (2,) {INTS}; got 7"),
        "seq_lens_dtype": (dict(seq_lens=ONES), f"seq_lens: want (2,) {INTS}; got (2,) float32"),
        "budget_shape": (dict(budget=ZEROS[None]), f"budget: want (2,) {INTS}; got (1, 2) int64"),
        "topk_zero": (dict(topk=0), TOPK + "0"),
        "topk_large": (dict(topk=2**31), TOPK + "2147483648"),
        "topk_text": (dict(topk="3"), TOPK + "3"),
        "nodes_zero": (dict(num_nodes=0), NODES + "0"),
        "nodes_large": (dict(num_nodes=1025), NODES + "1025"),
        "nodes_float": (dict(num_nodes=4.0), NODES + "4.0"),
    }),
    tree_attention: (ATTENTION, {
        "q_rank": (dict(q=torch.randn(4, 8)), QUERIES + "(4, 8) float32"),
        "q_dtype": (dict(q=torch.randn(5, 4, 8).double()), QUERIES + "(5, 4, 8) float64"),
        "q_none": (dict(q=None), QUERIES + "None"),
        "q_gradient": (dict(q=grown(ATTENTION["q"])), "q: " + NO_GRAD),
        "k_rank": (dict(k_cache=CACHE[0]), K_CACHE + "(4, 2, 8) float32"),
        "k_dtype": (dict(k_cache=CACHE.int()), K_CACHE + "(6, 4, 2, 8) int32"),
        "k_meta": (dict(k_cache=CACHE.to("meta")), K_CACHE + "(6, 4, 2, 8) float32 on meta"),
        "k_pages_of_nothing": (
            dict(k_cache=CACHE[:, :0]),
            "k_cache: want (6, 0, 2, 8) torch.float32, page_size at least 1, like the first; got (6, 0, 2, 8) float32",
        ),
        "k_head_size": (
            dict(k_cache=CACHE[..., :7], v_cache=CACHE[..., :7]),
            "k_cache: want head size 8, as q; got (6, 4, 2, 7) float32",
        ),
        "k_heads": (
            dict(q=torch.randn(5, 3, 8)), "k_cache: want kv heads that divide 3; got (6, 4, 2, 8) float32"
        ),
        "k_no_heads": (
            dict(k_cache=CACHE[:, :, :0], v_cache=CACHE[:, :, :0]),
            "k_cache: want kv heads that divide 4; got (6, 4, 0, 8) float32",
        ),
        "k_gradient": (dict(k_cache=grown(CACHE)), "k_cache: " + NO_GRAD),
        "v_list": (dict(v_cache=[]), V_CACHE + "list"),
        "v_pages": (dict(v_cache=CACHE[1:]), f"v_cache: {LIKE_FIRST}(5, 4, 2, 8) float32"),
        "v_dtype": (dict(v_cache=CACHE.half()), f"v_cache: {LIKE_FIRST}(6, 4, 2, 8) float16"),
        "table_rank": (dict(block_table=ZEROS), TABLE + "(2,) int64"),
        "table_dtype": (dict(block_table=ZEROS[None].short()), TABLE + "(1, 2) int16"),
        "table_narrow": (
            dict(block_table=ZEROS[:, None]), "block_table: want room for 3 pages a request; got (2, 1) int64"
        ),
        "seqlens_shape": (dict(cache_seqlens=ZEROS[:1]), SEQLENS + "(1,) int64"),
        "seqlens_dtype": (dict(cache_seqlens=ONES), SEQLENS + "(2,) float32"),
        "seqlens_below_the_queries": (
            dict(cache_seqlens=torch.tensor([9, 2])),
            "cache_seqlens: want at least the queries of each request; got [9, 2]",
        ),
        "seqlens_beyond_32_bits": (
            dict(cache_seqlens=torch.tensor([2**32 + 9, 7])),
            "block_table: want room for 536870912 pages a request; got (2, 3) int64",
        ),
        "cu_none": (dict(cu_seqlens_q=None), f"cu_seqlens_q: want (3,) {INTS}, with q (T, H, D); got None"),
        "cu_shape": (dict(cu_seqlens_q=torch.tensor([0, 5])), CU + "(2,) int64"),
        "cu_first": (dict(cu_seqlens_q=torch.tensor([1, 2, 5])), CU_ORDER + "[1, 2, 5]"),
        "cu_order": (dict(cu_seqlens_q=torch.tensor([0, 6, 5])), CU_ORDER + "[0, 6, 5]"),
        "cu_last": (dict(cu_seqlens_q=torch.tensor([0, 2, 4])), CU_ORDER + "[0, 2, 4]"),
        "mask_rows": (dict(mask_bits=torch.ones(4, 1).int()), BITS + "(4, 1) int32"),
        "mask_dtype": (dict(mask_bits=torch.ones(5, 1).long()), BITS + "(5, 1) int64"),
        "mask_words": (
            dict(mask_bits=torch.ones(5, 0).int()), "mask_bits: want at least 3 bits a row; got (5, 0) int32"
        ),
        "gate_shape": (dict(gate=torch.ones(5, 4, 1)), GATE + "(5, 4, 1) float32"),
        "gate_dtype": (dict(gate=torch.ones(5, 4).half()), GATE + "(5, 4) float16"),
        "gate_gradient": (dict(gate=torch.ones(5, 4, requires_grad=True)), "gate: " + NO_GRAD),
        "scale_nan": (dict(softmax_scale=NAN), SCALE + "nan"),
        "scale_infinite": (dict(softmax_scale=1e39), SCALE + "1e+39"),
        "scale_huge": (dict(softmax_scale=BIG), SCALE + "1000"),
        "scale_text": (dict(softmax_scale="1"), SCALE + "1"),
        "window_negative": (dict(window=-1), WINDOW + "-1"),
        "window_large": (dict(window=2**31), WINDOW + "2147483648"),
        "window_none": (dict(window=None), WINDOW + "None"),
    }),
    tree_verify: (VERIFY, {
        "logits_rank": (dict(logits=LOGITS[0]), ROWS + "(5, 40) float32"),
        "logits_dtype": (dict(logits=LOGITS.long()), ROWS + "(2, 5, 40) int64"),
        "logits_no_nodes": (dict(logits=LOGITS[:, :0]), SIZES + "(2, 0, 40) float32"),
        "logits_many_nodes": (
            dict(logits=LOGITS[:, :1].expand(2, 1025, 40)), SIZES + "(2, 1025, 40) float32"
        ),
        "logits_no_vocabulary": (
            dict(logits=LOGITS[..., :0]), SIZES + "(2, 5, 0) float32"
        ),
        "logits_gradient": (dict(logits=grown(LOGITS)), "logits: " + NO_GRAD),
        "candidates_shape": (
            dict(candidates=LINKS["candidates"][:, 1:]), "candidates: want (2, 5) int64; got (2, 4) int64"
        ),
        "candidates_dtype": (
            dict(candidates=LINKS["candidates"].int()), "candidates: want (2, 5) int64; got (2, 5) int32"
        ),
        "child_dtype": (dict(next_token=torch.zeros(2, 5)), "next_token: want (2, 5) int64; got (2, 5) float32"),
        "child_of_itself": (dict(next_token=with_value(LINKS["next_token"], (1, 0), 0)), "next_token: " + FURTHER),
        "child_beyond": (dict(next_token=with_value(LINKS["next_token"], (1, 4), 5)), "next_token: " + FURTHER),
        "child_minus_two": (dict(next_token=with_value(LINKS["next_token"], (0, 4), -2)), "next_token: " + FURTHER),
        "sibling_shape": (dict(next_sibling=ZEROS), "next_sibling: want (2, 5) int64; got (2,) int64"),
        "siblings_in_a_ring": (
            dict(next_sibling=torch.tensor([[-1, 2, 1, -1, -1]] * 2)), "next_sibling: " + FURTHER
        ),
        "mode": (dict(mode="typical"), MODE + "typical"),
        "mode_none": (dict(mode=None), MODE + "None"),
        "logprobs": (dict(logprobs=True), LOGPROBS + "True"),
        "width_zero": (dict(width=0), WIDTH + "0"),
        "width_large": (dict(width=1025), WIDTH + "1025"),
        "width_bool": (dict(width=True), WIDTH + "True"),
        "coupled_without_a_seed": (dict(seed=None), "seed: want a tensor for mode 'coupled'; got None"),
        "coupled_without_a_position": (dict(position=None), "position: want a tensor for mode 'coupled'; got None"),
        "seed_dtype": (dict(seed=ZEROS.int()), "seed: want (2,) int64; got (2,) int32"),
        "position_shape": (dict(position=ZEROS[:1]), f"position: want (2,) {INTS}; got (1,) int64"),
        "temperature_shape": (dict(temperature=ONES[:1]), "temperature: want (2,) float32; got (1,) float32"),
        "temperature_number": (dict(temperature=1.0), "temperature: want (2,) float32; got 1.0"),
        "temperature_negative": (dict(temperature=-ONES), TEMPERATURE),
        "temperature_too_cold": (dict(temperature=ONES * 2**-20), TEMPERATURE),
        "temperature_infinite": (dict(temperature=ONES * INF), TEMPERATURE),
        "temperature_nan": (dict(temperature=ONES * NAN), TEMPERATURE),
        "top_k_dtype": (dict(top_k=ONES), f"top_k: want (2,) {INTS}; got (2,) float32"),
        "top_p_zero": (dict(top_p=ONES * 0), TOP_P),
        "top_p_above_one": (dict(top_p=ONES * 1.5), TOP_P),
        "top_p_dtype": (dict(top_p=ONES.double()), "top_p: want (2,) float32; got (2,) float64"),
        "min_p_negative": (dict(min_p=-ONES), MIN_P),
        "min_p_nan": (dict(min_p=ONES * NAN), MIN_P),
        "grammar_words": (dict(grammar_bits=torch.ones(2, 5, 1).int()), GRAMMAR + "(2, 5, 1) int32"),
        "grammar_dtype": (dict(grammar_bits=torch.ones(2, 5, 2)), GRAMMAR + "(2, 5, 2) float32"),
        "coins_alone": (
            dict(coins=COINS["coins"]), "final_coins: want both coins and final_coins, or neither; got None"
        ),
        "final_coins_alone": (
            dict(final_coins=COINS["final_coins"]), "coins: want both coins and final_coins, or neither; got None"
        ),
    }),
    tree_commit: (COMMIT, {
        "index_rank": (dict(accept_index=ZEROS.int()), INDEX + "(2,) int32"),
        "index_dtype": (dict(accept_index=COMMIT["accept_index"].long()), INDEX + "(2, 3) int64"),
        "index_no_slots": (dict(accept_index=COMMIT["accept_index"][:, :0]), INDEX + "(2, 0) int32"),
        "index_descends": (dict(accept_index=with_value(COMMIT["accept_index"], (0, 2), 2)), ASCENDING + "[0, 2, 2]"),
        "index_negative": (
            dict(accept_index=with_value(COMMIT["accept_index"], (1, 0), -1)), ASCENDING + "[-1, -1, -1]"
        ),
        "index_beyond": (dict(accept_index=with_value(COMMIT["accept_index"], (0, 2), 5)), ASCENDING + "[0, 2, 5]"),
        "length_shape": (
            dict(accept_length=COMMIT["accept_length"][:1]), "accept_length: want (2,) int32; got (1,) int32"
        ),
        "length_dtype": (dict(accept_length=ZEROS), "accept_length: want (2,) int32; got (2,) int64"),
        "length_negative": (dict(accept_length=torch.tensor([2, -1]).int()), LENGTHS + "[2, -1]"),
        "length_large": (dict(accept_length=torch.tensor([3, 0]).int()), LENGTHS + "[3, 0]"),
        "k_tensor": (dict(k_caches=CACHE), "k_caches: want a list or tuple of tensors; got (6, 4, 2, 8) float32"),
        "k_dtype": (dict(k_caches=[CACHE, CACHE.double()]), LAYERS + "(6, 4, 2, 8) float64"),
        "k_shape": (dict(k_caches=[CACHE, CACHE[:5]]), f"k_caches: {LIKE_FIRST}(5, 4, 2, 8) float32"),
        "k_expanded": (
            dict(k_caches=[CACHE, CACHE[:1].expand(6, 4, 2, 8)]),
            "k_caches: want elements that do not share memory; got an expanded tensor",
        ),
        "k_strides": (
            dict(k_caches=[CACHE, CACHE.mT.contiguous().mT]),
            "k_caches: want a last dimension that is contiguous; got strides (64, 16, 1, 2)",
        ),
        "k_gradient": (dict(k_caches=[CACHE, grown(CACHE)]), "k_caches: " + NO_GRAD),
        "v_none": (dict(v_caches=None), "v_caches: want a list or tuple of tensors; got None"),
        "v_fewer": (dict(v_caches=[CACHE]), "v_caches: want 2 caches, as k_caches; got 1"),
        "v_more_than_no_k": (dict(k_caches=[]), "v_caches: want 0 caches, as k_caches; got 2"),
        "table_requests": (
            dict(block_table=ZEROS[None]), f"block_table: want (2, max_pages) {INTS}; got (1, 2) int64"
        ),
        "seqlens_dtype": (dict(cache_seqlens=ONES), SEQLENS + "(2,) float32"),
        "seqlens_negative": (
            dict(cache_seqlens=torch.tensor([3, -1])), "cache_seqlens: want values in 0..2147483644; got [3, -1]"
        ),
        "seqlens_large": (
            dict(cache_seqlens=torch.tensor([2**40, 0])),
            "cache_seqlens: want values in 0..2147483644; got [2147483647, 0]",
        ),
        "hidden_requests": (dict(hidden=torch.ones(3, 5, 7)), HIDDEN + "(3, 5, 7) float32"),
        "hidden_rank": (dict(hidden=torch.ones(2, 7)), HIDDEN + "(2, 7) float32"),
        "hidden_gradient": (dict(hidden=grown(COMMIT["hidden"])), "hidden: " + NO_GRAD),
    }),
    tree_budget: (BUDGET, {
        "scores_rank": (dict(scores=torch.zeros(12)), ALL_SCORES + "(12,) float32"),
        "scores_dtype": (dict(scores=torch.zeros(2, 12).double()), ALL_SCORES + "(2, 12) float64"),
        "scores_gradient": (dict(scores=grown(BUDGET["scores"])), "scores: " + NO_GRAD),
        "costs_short": (dict(cost_table=torch.ones(2)), COSTS + "(2,) float32"),
        "costs_rank": (dict(cost_table=torch.ones(2, 9)), COSTS + "(2, 9) float32"),
        "costs_dtype": (dict(cost_table=torch.ones(9).int()), COSTS + "(9,) int32"),
        "costs_zero": (dict(cost_table=torch.tensor([1.0, 1.0, 0.0, 1.0])), COST_VALUES),
        "costs_nan": (dict(cost_table=torch.tensor([1.0, 1.0, 2.0, NAN])), COST_VALUES),
        "costs_infinite": (dict(cost_table=torch.tensor([1.0, INF, 2.0])), COST_VALUES),
        "experts_negative": (dict(num_experts=-1), EXPERTS + "-1"),
        "experts_large": (dict(num_experts=2**31), EXPERTS + "2147483648"),
        "experts_of_a_token_none": (dict(topk_experts=0), "topk_experts: want an integer in 1..8; got 0"),
        "experts_of_a_token_many": (dict(topk_experts=9), "topk_experts: want an integer in 1..8; got 9"),
        "experts_of_a_dense_model": (dict(num_experts=0), "topk_experts: want 0; got 2"),
        "expert_cost_negative": (dict(expert_cost=-0.1), EXPERT_COST + "-0.1"),
        "expert_cost_nan": (dict(expert_cost=NAN), EXPERT_COST + "nan"),
        "expert_cost_huge": (dict(expert_cost=BIG), EXPERT_COST + "1000"),
        "expert_cost_bool": (dict(expert_cost=True), EXPERT_COST + "True"),
    }),
}  # fmt: skip
CASES = [
    pytest.param(op, arguments, change, message, id=f"{op.__name__}-{name}")
    for op, (arguments, errors) in ERRORS.items()
    for name, (change, message) in errors.items()
]


def refused(op: Callable[..., Any], message: str, arguments: dict[str, Any]) -> None:
    """ValueError that begins with op: message."""
    with pytest.raises(ValueError, match="^" + re.escape(f"{op.__name__}: {message}")):
        op(**arguments)


rooms = pytest.mark.parametrize("backend", ("spec_decode=cpu", "spec_decode=reference"), indirect=True)


@pytest.mark.parametrize("op", ERRORS)
def test_the_call_that_is_spoiled_is_good(op: Callable[..., Any]) -> None:
    op(**ERRORS[op][0])


@rooms
@pytest.mark.parametrize(("op", "arguments", "change", "message"), CASES)
def test_refusal(backend: str, op: Callable[..., Any], arguments: dict[str, Any], change: Change, message: str) -> None:
    refused(op, message, {**arguments, **change})


BATCHED_ERRORS: dict[str, tuple[Change, str]] = {
    "requests": (dict(q=torch.randn(3, 2, 4, 8)), "q: want 2 requests, as block_table; got (3, 2, 4, 8) float32"),
    "cu_given": (
        dict(cu_seqlens_q=torch.tensor([0, 2, 4])),
        "cu_seqlens_q: want None with q (B, N, H, D); got (3,) int64",
    ),
    "mask": (dict(mask_bits=torch.ones(4, 1).int()), "mask_bits: want (2, 2, W) int32; got (4, 1) int32"),
    "gate": (
        dict(gate=torch.ones(4, 4)),
        "gate: want (2, 2, 4) or (2, 2, 4, 8) float32 or torch.float32; got (4, 4) float32",
    ),
}


@rooms
@pytest.mark.parametrize("name", BATCHED_ERRORS)
def test_refusal_of_batched_queries(backend: str, name: str) -> None:
    change, message = BATCHED_ERRORS[name]
    assert tree_attention(**BATCHED).isfinite().all()
    refused(tree_attention, message, {**BATCHED, **change})


DRAWN_ERRORS: dict[str, tuple[dict[str, Any], Change, str]] = {
    "target_only_without_coins": (
        TARGET, dict(coins=None, final_coins=None),
        "coins: want coins and final_coins, or seed and position, for mode 'target_only'; got neither",
    ),
    "target_only_with_a_seed_alone": (
        TARGET, dict(coins=None, final_coins=None, seed=ZEROS),
        "coins: want coins and final_coins, or seed and position, for mode 'target_only'; got neither",
    ),
    "coins_shape": (
        TARGET, dict(coins=torch.rand(2, 4)), "coins: want (2, 5) float32 or float64; got (2, 4) float32",
    ),
    "coins_dtype": (TARGET, dict(coins=torch.rand(2, 5).half()), "coins: want (2, 5) float32 or float64; got (2, 5) "),
    "coins_one": (TARGET, dict(coins=torch.ones(2, 5)), "coins: " + UNIT),
    "coins_nan": (TARGET, dict(coins=torch.ones(2, 5) * NAN), "coins: " + UNIT),
    "final_coins_shape": (
        TARGET, dict(final_coins=torch.rand(2, 1)), "final_coins: want (2,) float32 or float64; got (2, 1) float32",
    ),
    "final_coins_negative": (TARGET, dict(final_coins=-torch.ones(2)), "final_coins: " + UNIT),
    "chain_without_draft_probs": (
        CHAIN, dict(draft_probs=None), "draft_probs: want (2, 5, 40) float32 for mode 'chain'; got None",
    ),
    "draft_probs_shape": (CHAIN, dict(draft_probs=torch.ones(2, 4, 40)), PROBS + "(2, 4, 40) float32"),
    "draft_probs_dtype": (CHAIN, dict(draft_probs=LOGITS.double()), PROBS + "(2, 5, 40) float64"),
    "draft_probs_gradient": (CHAIN, dict(draft_probs=grown(LOGITS)), "draft_probs: " + NO_GRAD),
}  # fmt: skip


@rooms
@pytest.mark.parametrize("name", DRAWN_ERRORS)
def test_refusal_of_coins_and_draft_probs(backend: str, name: str) -> None:
    arguments, change, message = DRAWN_ERRORS[name]
    assert bool((tree_verify(**arguments).accept_length >= 0).all())
    refused(tree_verify, message, {**arguments, **change})


# -- block ids --------------------------------------------------------------------------------------------------------
BAD_IDS = pytest.mark.parametrize("block", (-1, 6, 2**31 - 1, 2**32, -(2**63)))


@rooms
@BAD_IDS
def test_a_block_id_that_is_needed_must_exist(backend: str, block: int) -> None:
    table = with_value(ATTENTION["block_table"], (1, 1), block)
    refused(tree_attention, "block_table: want ", {**ATTENTION, "block_table": table})


@rooms
@BAD_IDS
@pytest.mark.parametrize("arguments", (COMMIT, {**COMMIT, "cache_seqlens": torch.tensor([2, 11])}), ids=("to", "from"))
def test_a_block_id_that_a_commit_needs_must_exist(backend: str, block: int, arguments: dict[str, Any]) -> None:
    caches = [CACHE.clone(), CACHE.clone()]
    table = with_value(COMMIT["block_table"], (0, 1), block)
    changed = {**arguments, "block_table": table, "k_caches": caches[:1], "v_caches": caches[1:]}
    refused(tree_commit, "block_table: want ", changed)
    assert all(torch.equal(cache, CACHE) for cache in caches)


@rooms
def test_a_commit_needs_room_in_the_block_table(backend: str) -> None:
    refused(tree_commit, "block_table: want ", {**COMMIT, "cache_seqlens": torch.tensor([9, 11])})


@rooms
@BAD_IDS
def test_a_block_id_that_is_not_needed_may_be_anything(backend: str, block: int) -> None:
    expected = tree_attention(**ATTENTION)
    table = with_value(ATTENTION["block_table"], (1, 2), block)
    assert torch.equal(tree_attention(**{**ATTENTION, "block_table": table}), expected)


# -- rooms ------------------------------------------------------------------------------------------------------------
ROOM_CALLS = {op.__name__: (op, arguments) for op, (arguments, _) in ERRORS.items()}


def on_meta(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [on_meta(x) for x in value]
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ROOM_CALLS)
def test_tensors_without_data_are_refused(name: str) -> None:
    op, arguments = ROOM_CALLS[name]
    message = f"m3kernels.spec_decode.{name}: reference: {name} needs data: meta tensors have none"
    with pytest.raises(BackendError, match="^" + re.escape(message) + "$"):
        op(**{key: on_meta(value) for key, value in arguments.items()})


@pytest.mark.parametrize("backend_as_built", ("spec_decode=cuda",), indirect=True)
@pytest.mark.parametrize("name", ROOM_CALLS)
def test_a_room_that_is_not_there_says_why(backend_as_built: str, name: str) -> None:
    op, arguments = ROOM_CALLS[name]
    with pytest.raises(BackendError, match=f"^m3kernels.spec_decode.{name}: cuda: "):
        op(**arguments)
