"""Native CPU room of the spec_decode family: AVX-512, AVX2, NEON or portable kernels, chosen at the first call."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from m3kernels import _cpu_ext
from m3kernels.checks import refuse
from m3kernels.spec_decode.arguments import gate_rows
from m3kernels.spec_decode.reference import tree_budget as _tree_budget

TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CACHE_TYPE = {**TYPE, torch.int8: 3}
NO_SCALES = ((0, 0, 0, 0),) * 2


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    return "" if first.is_cpu else f"needs CPU tensors, not {first.device.type}"


def _span(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype | None) -> tuple[int, int]:
    """(address, elements) of a contiguous CPU tensor of the given dtype, if one is given; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    if (dtype is not None and tensor.dtype != dtype) or not tensor.is_cpu or not tensor.is_contiguous():
        raise refuse(op, name, f"contiguous {str(dtype or 'elements').removeprefix('torch.')} in CPU memory", tensor)
    return tensor.data_ptr(), tensor.numel()


# -- rows of logits: draft_topk, tree_verify --------------------------------------------------------------------------
MODE = {"greedy": 0, "target_only": 1, "chain": 2, "coupled": 3}
LOGPROB = {"none": 0, "raw": 1, "sampling": 2}


def _choice(op: str, name: str, choices: dict[str, int], value: str) -> int:
    if value not in choices:
        raise refuse(op, name, ", ".join(map(repr, choices)), value)
    return choices[value]


def _rows(
    op: str, name: str, tensor: Tensor | None, dtypes: Collection[torch.dtype]
) -> tuple[int, int, int, int, int, int]:
    """(address, B, rows, columns, elements from request to request, from row to row); zeros for None."""
    if tensor is None:
        return 0, 0, 0, 0, 0, 0
    shape, strides = tensor.shape, tensor.stride()
    if tensor.dtype not in dtypes or not tensor.is_cpu or len(shape) != 3:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise refuse(op, name, f"a tensor of three dimensions, {names}, in CPU memory", tensor)
    if strides[2] != 1 and shape[2] > 1:
        raise refuse(op, name, "rows of contiguous elements", f"a stride of {strides[2]}")
    return tensor.data_ptr(), shape[0], shape[1], shape[2], strides[0], strides[1]


def draft_topk(
    logits: Tensor, scores: Tensor, d2t: Tensor | None, seed: Tensor | None, position: Tensor | None, k: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "draft_topk"
    rows = _rows(op, "logits", logits, TYPE)
    requests, frontier = logits.shape[:2]
    width = max(k, 0)  # a k that is none is refused below
    tokens = torch.empty(requests, frontier, width, dtype=torch.int64)
    cum_scores = torch.empty(requests, frontier, width)
    next_ids, parents = (torch.empty(requests, width, dtype=torch.int64) for _ in range(2))
    next_scores, src_row = torch.empty(requests, width), torch.empty(requests, width, dtype=torch.int32)
    _cpu_ext.spec_decode_draft_topk(
        (rows, TYPE[logits.dtype]),
        _span(op, "scores", scores, torch.float32),
        _span(op, "d2t", d2t, torch.int64),
        _span(op, "seed", seed, torch.int64),
        _span(op, "position", position, torch.int64),
        k,
        step,
        *((each.data_ptr(), each.numel()) for each in (tokens, cum_scores, next_ids, next_scores, src_row, parents)),
        torch.get_num_threads(),
    )
    return tokens, cum_scores, next_ids, next_scores, src_row, parents


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
    op = "tree_verify"
    rows = _rows(op, "logits", logits, TYPE)
    requests, slots = logits.shape[0], max(width, 0)  # a width that is none is refused below
    tokens = torch.empty(requests, slots, dtype=torch.int64)
    accept_index = torch.empty(requests, slots, dtype=torch.int32)
    accept_length = torch.empty(requests, dtype=torch.int32)
    token_logprobs = torch.empty(requests, 0 if logprobs == "none" else slots)
    _cpu_ext.spec_decode_tree_verify(
        (rows, TYPE[logits.dtype]),
        (
            _span(op, "candidates", candidates, torch.int64),
            _span(op, "next_token", next_token, torch.int64),
            _span(op, "next_sibling", next_sibling, torch.int64),
        ),
        (
            _span(op, "temperature", temperature, torch.float32),
            _span(op, "top_k", top_k, torch.int32),
            _span(op, "top_p", top_p, torch.float32),
            _span(op, "min_p", min_p, torch.float32),
        ),
        (
            _span(op, "seed", seed, torch.int64),
            _span(op, "position", position, torch.int64),
            _span(op, "coins", coins, torch.float64),
            _span(op, "final_coins", final_coins, torch.float64),
        ),
        _rows(op, "draft_probs", draft_probs, (torch.float32,)),
        _rows(op, "grammar_bits", grammar_bits, (torch.int32,)),
        _choice(op, "mode", MODE, mode),
        width,
        _choice(op, "logprobs", LOGPROB, logprobs),
        *((each.data_ptr(), each.numel()) for each in (tokens, accept_index, accept_length, token_logprobs)),
        torch.get_num_threads(),
    )
    return tokens, accept_index, accept_length, token_logprobs


# -- attention: tree_attention ----------------------------------------------------------------------------------------


def _attention_tensor(name: str, tensor: Tensor, dtype: torch.dtype | None = None, ndim: int | None = None) -> Tensor:
    """tensor, if it is on CPU, of the given dtype (default: one that attention computes in) and number of dimensions;
    rows along the last dimension may have any distance, their elements none."""
    good = tensor.is_cpu and (tensor.dtype == dtype if dtype else tensor.dtype in TYPE)
    good = good and ndim in (None, tensor.ndim) and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1)
    if not good:
        wanted = f"{dtype or 'float32, bfloat16 or float16'} in CPU memory".removeprefix("torch.")
        raise refuse("tree_attention", name, f"{wanted}, contiguous along the last dimension", tensor)
    return tensor


def _scales(name: str, scales: Tensor | None, cache: Tensor) -> tuple[int, int, int, int]:
    """(address, elements from page to page, slot to slot, head to head) of an int8 cache's scales; zeros for none."""
    if cache.dtype != torch.int8 and scales is None:
        return 0, 0, 0, 0
    if cache.dtype != torch.int8:
        raise refuse("tree_attention", name, f"None with {cache.dtype} caches", scales)
    if scales is None or scales.shape != cache.shape[:3] or scales.dtype != torch.float32 or not scales.is_cpu:
        wanted = f"{tuple(cache.shape[:3])} float32 in CPU memory, with int8 caches"
        raise refuse("tree_attention", name, wanted, scales)
    return scales.data_ptr(), *scales.stride()  # type: ignore[return-value]


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
    op = "tree_attention"
    rows, heads, size = _attention_tensor("q", q, ndim=3).shape
    int8 = k_cache.dtype == torch.int8
    pages, page_size, kv_heads, _ = _attention_tensor("k_cache", k_cache, torch.int8 if int8 else None, 4).shape
    _attention_tensor("v_cache", v_cache, k_cache.dtype, ndim=4)
    if k_cache.shape[3] != size or v_cache.shape != k_cache.shape:
        raise refuse(op, "v_cache", f"caches {(pages, page_size, kv_heads, size)}", v_cache)
    if block_table.ndim != 2 or len(block_table) != cache_seqlens.numel():
        raise refuse(op, "block_table", f"({cache_seqlens.numel()}, max_pages)", block_table)
    table = (pages, page_size, _span(op, "block_table", block_table, torch.int32), block_table.shape[1])
    words = 0
    if mask_bits is not None:
        if mask_bits.ndim != 2 or mask_bits.shape[0] != rows or not mask_bits.shape[1]:
            raise refuse(op, "mask_bits", f"({rows}, W), W at least 1", mask_bits)
        words = mask_bits.shape[1]
    gating = (0, 0, False, 0)
    if gate is not None:
        if gate.shape not in ((rows, heads), (rows, heads, size)):
            raise refuse(op, "gate", f"({rows}, {heads}) or ({rows}, {heads}, {size})", gate)
        if not gate_rows(_attention_tensor("gate", gate)):
            raise refuse(op, "gate", "rows of contiguous elements", f"strides {gate.stride()}")
        gating = (gate.data_ptr(), TYPE[gate.dtype], gate.ndim == 2, gate.stride(0))
    scales = NO_SCALES
    if int8 or k_scale is not None or v_scale is not None:
        scales = (_scales("k_scale", k_scale, k_cache), _scales("v_scale", v_scale, k_cache))
    out = torch.empty((rows, heads, size), dtype=q.dtype)
    _cpu_ext.tree_attention(
        (rows, heads, kv_heads, size),
        (q.data_ptr(), TYPE[q.dtype]),
        q.stride()[:2],
        (k_cache.data_ptr(), *k_cache.stride()[:3]),
        (v_cache.data_ptr(), *v_cache.stride()[:3]),
        CACHE_TYPE[k_cache.dtype],
        *scales,
        table,
        _span(op, "cache_seqlens", cache_seqlens, torch.int32),
        _span(op, "cu_seqlens_q", cu_seqlens_q, torch.int32),
        (_span(op, "mask_bits", mask_bits, torch.int32), words, _span(op, "tree_lens", tree_lens, torch.int32)),
        gating,
        softmax_scale,
        window,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# -- trees: tree_finalize, tree_commit, the drop-in set ---------------------------------------------------------------
def _bytes(op: str, name: str, tensor: Tensor) -> tuple[int, int]:
    address, elements = _span(op, name, tensor, None)
    return address, elements * tensor.element_size()


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
    op, requests = "tree_finalize", scores.shape[0]
    nodes = max(1, num_nodes)  # what is no number of nodes is refused below
    links = [torch.empty(requests, nodes, dtype=torch.int64) for _ in range(4)]
    parents = torch.empty(requests, nodes, dtype=torch.int32)
    bits = torch.empty(requests, nodes, -(-nodes // 32), dtype=torch.int32)
    selected = torch.empty(requests, nodes - 1, dtype=torch.int64)
    out = (links[0], parents, bits, *links[1:], selected)
    given = (tokens, parent_list, bonus, seq_lens)
    names = ("tokens", "parent_list", "bonus", "seq_lens")
    spans = [_span(op, name, value, torch.int64) for name, value in zip(names, given, strict=True)]
    _cpu_ext.spec_decode_tree_finalize(
        [_span(op, "scores", scores, torch.float32), *spans, _span(op, "budget", budget, torch.int32)],
        *(requests, scores.shape[1], parent_list.shape[1], topk, num_nodes),
        [(value.data_ptr(), value.numel()) for value in out],
        torch.get_num_threads(),
    )
    return out


def tree_commit(
    accept_index: Tensor,
    accept_length: Tensor,
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_seqlens: Tensor,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    op = "tree_commit"
    requests, width = accept_index.shape
    new_seqlens = torch.empty_like(cache_seqlens)
    accepted, source = accept_index.new_empty(0, dtype=torch.float32), (0, 0, 0, 0, 0)
    if hidden is not None:
        if hidden.ndim != 3 or not hidden.is_cpu or len(hidden) != requests or not _dense(hidden):
            raise refuse(op, "hidden", f"({requests}, N, C) with contiguous rows on cpu", hidden)
        size = hidden.element_size()
        accepted = hidden.new_empty(requests, width, hidden.shape[2])
        row, column = hidden.stride(0) * size, hidden.stride(1) * size
        source = (hidden.data_ptr(), hidden.shape[1], row, column, hidden.shape[2] * size)
    tensors, caches = [*k_caches, *v_caches], []
    shape = tensors[0].shape[:3] if tensors else torch.Size((0, 1, 0))
    for cache in tensors:
        strides, size = cache.stride(), cache.element_size()
        good = len(strides) == 4 and len(shape) == 3 and cache.shape[:3] == shape and cache.is_cpu
        if not good or not _dense(cache):
            raise refuse(op, "k_caches", "caches (P, page_size, G, any) of one shape, contiguous rows, on cpu", cache)
        row = cache.shape[3] * size
        caches.append((cache.data_ptr(), strides[0] * size, strides[1] * size, strides[2] * size, row))
    _cpu_ext.spec_decode_tree_commit(
        _span(op, "accept_index", accept_index, torch.int32),
        _span(op, "accept_length", accept_length, torch.int32),
        *(requests, width),
        _span(op, "block_table", block_table, torch.int32),
        block_table.shape[1],
        _span(op, "cache_seqlens", cache_seqlens, torch.int32),
        *(tuple(shape), caches, source),
        (accepted.data_ptr(), accepted.numel() * accepted.element_size()),
        (new_seqlens.data_ptr(), new_seqlens.numel()),
        torch.get_num_threads(),
    )
    return new_seqlens, accepted


def _dense(tensor: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def build_tree_kernel_efficient(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    op = "build_tree_kernel_efficient"
    _cpu_ext.spec_decode_build_tree(
        _span(op, "parent_list", parent_list, torch.int64),
        parent_list.shape[1],
        _span(op, "selected_index", selected_index, torch.int64),
        _span(op, "verified_seq_len", verified_seq_len, torch.int64),
        _bytes(op, "tree_mask", tree_mask),
        _link_spans(op, positions, retrive_index, retrive_next_token, retrive_next_sibling),
        *(parent_list.shape[0], topk, draft_token_num, tree_mask_mode, torch.get_num_threads()),
    )


def reconstruct_indices_from_tree_mask(
    tree_mask: Tensor,
    verified_seq_len: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    batch_size: int,
    draft_token_num: int,
) -> None:
    op = "reconstruct_indices_from_tree_mask"
    _cpu_ext.spec_decode_reconstruct_tree(
        _bytes(op, "tree_mask", tree_mask),
        _span(op, "verified_seq_len", verified_seq_len, torch.int64),
        _link_spans(op, positions, retrive_index, retrive_next_token, retrive_next_sibling),
        *(batch_size, draft_token_num, torch.get_num_threads()),
    )


def _link_spans(op: str, *links: Tensor) -> list[tuple[int, int]]:
    names = ("positions", "retrive_index", "retrive_next_token", "retrive_next_sibling")
    return [_span(op, name, link, torch.int64) for name, link in zip(names, links, strict=True)]


def _walk(
    op: str, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, *trees: Tensor | None
) -> list[tuple[int, int]]:
    names = ("candidates", "retrive_index", "retrive_next_token", "retrive_next_sibling")
    outputs = (("predicts", predicts), ("accept_index", accept_index), ("accept_token_num", accept_token_num))
    spans = [_span(op, name, value, torch.int32) for name, value in outputs]
    return spans + [_span(op, name, value, torch.int64) for name, value in zip(names, trees, strict=True)]


def _laws(op: str, name: str, laws: Tensor | None, like: Tensor) -> tuple[int, int, int, int, int]:
    """(address, type, rows, stride of requests, stride of rows) of probabilities (B, rows, V)."""
    if laws is None:
        return 0, 0, 0, 0, 0
    good = laws.ndim == 3 and laws.is_cpu and laws.dtype in TYPE and _dense(laws)
    if not good or (laws.shape[0], laws.shape[2]) != (like.shape[0], like.shape[2]):
        raise refuse(op, name, f"({like.shape[0]}, N, {like.shape[2]}) with contiguous rows on cpu", laws)
    return laws.data_ptr(), TYPE[laws.dtype], laws.shape[1], laws.stride(0), laws.stride(1)


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    op = "verify_tree_greedy"
    trees = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    _cpu_ext.spec_decode_verify_greedy(
        _walk(op, predicts, accept_index, accept_token_num, *trees),
        _span(op, "target_predict", target_predict, torch.int64),
        *(*candidates.shape, accept_index.shape[1], torch.get_num_threads()),
    )


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor | None,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
) -> None:
    op = "tree_speculative_sampling_target_only"
    trees = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    _cpu_ext.spec_decode_sample_tree(
        _walk(op, predicts, accept_index, accept_token_num, *trees),
        _span(op, "uniform_samples", uniform_samples, torch.float32),
        _span(op, "uniform_samples_for_final_sampling", uniform_samples_for_final_sampling, torch.float32),
        _laws(op, "target_probs", target_probs, target_probs),
        _laws(op, "draft_probs", draft_probs, target_probs),
        *(*candidates.shape, accept_index.shape[1], target_probs.shape[2]),
        *(threshold_single, threshold_acc, torch.get_num_threads()),
    )


def chain_speculative_sampling(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float,
    threshold_acc: float,
    deterministic: bool,
    block_verification: bool,
) -> None:
    op = "chain_speculative_sampling"
    _cpu_ext.spec_decode_sample_chain(
        _walk(op, predicts, accept_index, accept_token_num, candidates, retrive_index, None, None),
        _span(op, "uniform_samples", uniform_samples, torch.float32),
        _span(op, "uniform_samples_for_final_sampling", uniform_samples_for_final_sampling, torch.float32),
        uniform_samples.shape[1],
        _laws(op, "target_probs", target_probs, target_probs),
        _laws(op, "draft_probs", draft_probs, target_probs),
        *(*candidates.shape, target_probs.shape[2], block_verification, torch.get_num_threads()),
    )


tree_budget = _tree_budget  # a sort and sums over small tensors: torch's own kernels serve it
