"""CUDA room of the spec_decode family, for NVIDIA GPUs of compute capability 8.0 or newer.

Launches are asynchronous, on the current stream; they read no device memory on the host and allocate by torch.empty
alone, so calls can be captured in a CUDA graph. What the CPU rooms refuse after reading values, a kernel survives: it
touches no memory that is not the call's. Every result is deterministic and depends on its own row and request only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from m3kernels import _cuda_ext
from m3kernels.checks import refuse
from m3kernels.cuda import on_device, refusal, span, stream
from m3kernels.spec_decode import cuda_attention, cuda_commit
from m3kernels.spec_decode.cuda_attention import tree_attention as tree_attention
from m3kernels.spec_decode.cuda_commit import tree_commit as tree_commit
from m3kernels.spec_decode.types import BITS

TYPE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODE = {"greedy": 0, "target_only": 1, "chain": 2, "coupled": 3}
LOGPROB = {"none": 0, "raw": 1, "sampling": 2}
MOST_VOCABULARY = 2**20
RANKS = 0  # blocks that share a request of tree_verify: 1, 2, 4, 8, 16; 0: as many as the device has room for


REFUSALS: dict[str, Callable[..., str]] = {"tree_attention": cuda_attention.refusal, "tree_commit": cuda_commit.refusal}


def unsupported(op: str, first: Tensor, *args: Any) -> str:
    if op == "tree_verify" and first.shape[2] > MOST_VOCABULARY:
        return f"vocabularies of at most {MOST_VOCABULARY} tokens, not {first.shape[2]}"
    return refusal(first) or (REFUSALS[op](first, *args) if op in REFUSALS else "")


def _rows(
    op: str, name: str, tensor: Tensor | None, dtypes: Collection[torch.dtype], like: Tensor
) -> tuple[int, int, int, int, int, int]:
    """(address, B, rows, columns, elements from request to request, from row to row); zeros for None."""
    if tensor is None:
        return 0, 0, 0, 0, 0, 0
    shape, strides = tensor.shape, tensor.stride()
    if tensor.dtype not in dtypes or tensor.device != like.device or len(shape) != 3:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise refuse(op, name, f"a tensor of three dimensions, {names}, on {like.device}", tensor)
    if strides[2] != 1 and shape[2] > 1:
        raise refuse(op, name, "rows of contiguous elements", f"a stride of {strides[2]}")
    return tensor.data_ptr(), shape[0], shape[1], shape[2], strides[0], strides[1]


def _choice(op: str, name: str, choices: dict[str, int], value: str) -> int:
    if value not in choices:
        raise refuse(op, name, ", ".join(map(repr, choices)), value)
    return choices[value]


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
    rows = _rows(op, "logits", logits, TYPE, logits)
    requests, slots, device = logits.shape[0], max(width, 0), logits.device  # a width that is none is refused below
    tokens = torch.empty(requests, slots, dtype=torch.int64, device=device)
    accept_index = torch.empty(requests, slots, dtype=torch.int32, device=device)
    accept_length = torch.empty(requests, dtype=torch.int32, device=device)
    token_logprobs = torch.empty(requests, 0 if logprobs == "none" else slots, device=device)
    links = (("candidates", candidates), ("next_token", next_token), ("next_sibling", next_sibling))
    filters = (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    )
    noise = (
        ("seed", seed, torch.int64),
        ("position", position, torch.int64),
        ("coins", coins, torch.float64),
        ("final_coins", final_coins, torch.float64),
    )
    with on_device(logits):
        _cuda_ext.spec_decode_tree_verify(
            rows,
            TYPE[logits.dtype],
            [span(op, name, value, torch.int64, logits) for name, value in links],
            [span(op, name, value, dtype, logits) for name, value, dtype in filters],
            [span(op, name, value, dtype, logits) for name, value, dtype in noise],
            _rows(op, "draft_probs", draft_probs, (torch.float32,), logits),
            _rows(op, "grammar_bits", grammar_bits, (torch.int32,), logits),
            _choice(op, "mode", MODE, mode),
            width,
            _choice(op, "logprobs", LOGPROB, logprobs),
            [(each.data_ptr(), each.numel()) for each in (tokens, accept_index, accept_length, token_logprobs)],
            RANKS,
            stream(logits),
        )
    return tokens, accept_index, accept_length, token_logprobs


# -- trees: tree_finalize, the drop-in set ----------------------------------------------------------------------------
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
    op, requests, device = "tree_finalize", scores.shape[0], scores.device
    nodes = max(1, num_nodes)  # what is no number of nodes is refused below
    links = [torch.empty(requests, nodes, dtype=torch.int64, device=device) for _ in range(4)]
    parents = torch.empty(requests, nodes, dtype=torch.int32, device=device)
    bits = torch.empty(requests, nodes, -(-nodes // BITS), dtype=torch.int32, device=device)
    selected = torch.empty(requests, nodes - 1, dtype=torch.int64, device=device)
    out = (links[0], parents, bits, *links[1:], selected)
    given = (("tokens", tokens), ("parent_list", parent_list), ("bonus", bonus), ("seq_lens", seq_lens))
    with on_device(scores):
        _cuda_ext.spec_decode_tree_finalize(
            [
                span(op, "scores", scores, torch.float32, scores),
                *(span(op, name, value, torch.int64, scores) for name, value in given),
                span(op, "budget", budget, torch.int32, scores),
            ],
            *(requests, scores.shape[1], parent_list.shape[1], topk, num_nodes),
            [(value.data_ptr(), value.numel()) for value in out],
            stream(scores),
        )
    return out


def _bytes(op: str, name: str, tensor: Tensor, like: Tensor) -> tuple[int, int]:
    address, elements = span(op, name, tensor, tensor.dtype, like)
    return address, elements * tensor.element_size()


def _links(op: str, like: Tensor, *links: Tensor) -> list[tuple[int, int]]:
    names = ("positions", "retrive_index", "retrive_next_token", "retrive_next_sibling")
    return [span(op, name, link, torch.int64, like) for name, link in zip(names, links, strict=True)]


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
    with on_device(parent_list):
        _cuda_ext.spec_decode_build_tree(
            span(op, "parent_list", parent_list, torch.int64, parent_list),
            parent_list.shape[1],
            span(op, "selected_index", selected_index, torch.int64, parent_list),
            span(op, "verified_seq_len", verified_seq_len, torch.int64, parent_list),
            _bytes(op, "tree_mask", tree_mask, parent_list),
            _links(op, parent_list, positions, retrive_index, retrive_next_token, retrive_next_sibling),
            *(parent_list.shape[0], topk, draft_token_num, tree_mask_mode),
            stream(parent_list),
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
    with on_device(tree_mask):
        _cuda_ext.spec_decode_reconstruct_tree(
            _bytes(op, "tree_mask", tree_mask, tree_mask),
            span(op, "verified_seq_len", verified_seq_len, torch.int64, tree_mask),
            _links(op, tree_mask, positions, retrive_index, retrive_next_token, retrive_next_sibling),
            *(batch_size, draft_token_num),
            stream(tree_mask),
        )


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
    outputs = (("predicts", predicts), ("accept_index", accept_index), ("accept_token_num", accept_token_num))
    inputs = (
        ("candidates", candidates),
        ("retrive_index", retrive_index),
        ("retrive_next_token", retrive_next_token),
        ("retrive_next_sibling", retrive_next_sibling),
        ("target_predict", target_predict),
    )
    with on_device(candidates):
        _cuda_ext.spec_decode_verify_greedy(
            [
                *(span(op, name, value, torch.int32, candidates) for name, value in outputs),
                *(span(op, name, value, torch.int64, candidates) for name, value in inputs),
            ],
            *(*candidates.shape, accept_index.shape[1]),
            stream(candidates),
        )
