"""sgl-kernel's ops for trees of drafted tokens, under its names: an engine written for them runs on these, on CPU too.

Argument order, dtypes, index meaning and results are those of SGLang 0.5.23. More is allowed: ``draft_probs`` None,
probabilities in bf16 or fp16 and in strided rows, 1024 nodes in every mask mode. Results are written into the caller's
buffers; entries that sgl-kernel leaves undefined stay as they were. Links and tokens that would lead a walk outside the
buffers, or in a circle, are refused on the CPU; on a GPU they are the caller's to avoid, as with sgl-kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m3kernels.checks import is_strided, refuse
from m3kernels.library import define
from m3kernels.spec_decode.arguments import (
    DTYPE_NAMES,
    DTYPES,
    check_constant,
    is_integer,
    is_number,
    near,
    on,
    want,
    with_rows,
)
from m3kernels.spec_decode.sgl_reference import BIT_PACKED, bytes_per_row
from m3kernels.spec_decode.types import MAX_NODES


# -- building ---------------------------------------------------------------------------------------------------------
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
    """Link the selected candidates into trees of N = draft_token_num nodes, the root included.

    Args:
        parent_list: (B, topk * (depth - 1) + 1) int64; any width if depth is 1. selected_index: (B, N - 1) int64,
            candidates in the order of the nodes; parent of candidate s: the root if s < topk, else the node whose
            candidate is parent_list[s // topk]. verified_seq_len: (B,) int64, tokens before the root.
        tree_mask: contiguous, of any dtype: its bytes are written. positions: (B * N,) int64.
            retrive_index, retrive_next_token, retrive_next_sibling: (B, N) int64, the last two filled with -1.
        tree_mask_mode: 0: for each request N rows of seq_len + N bytes, of which the last N are written; 1: (B, N, N)
            bytes; 2: bits, N padded to 8, 16 or a multiple of 32 a row, in a mask filled with 0.
    Writes:
        Of a node whose parent was not selected: position and mask up to there, no links to it.
    Raises:
        ValueError: an argument out of contract; on CPU also candidates outside parent_list, cycles, a mask too small.
    """
    op = "build_tree_kernel_efficient"
    want(op, "topk", "an integer of at least 1", topk, is_integer(topk) and topk >= 1)
    want(op, "depth", "an integer of at least 1", depth, is_integer(depth) and depth >= 1)
    _check_nodes(op, draft_token_num)
    want(op, "tree_mask_mode", "0, 1 or 2", tree_mask_mode, is_integer(tree_mask_mode, 0, 2))
    width = topk * (depth - 1) + 1
    good = _is_matrix(parent_list, torch.int64) and (depth == 1 or parent_list.shape[1] == width)
    want(op, "parent_list", f"(B, {'L' if depth == 1 else width}) int64", parent_list, good)
    requests, nodes = parent_list.shape[0], draft_token_num
    _check_shape(op, "selected_index", selected_index, (requests, nodes - 1), torch.int64, parent_list)
    _check_shape(op, "verified_seq_len", verified_seq_len, (requests,), torch.int64, parent_list)
    square = requests * nodes * (nodes if tree_mask_mode < BIT_PACKED else bytes_per_row(nodes))
    _check_mask(op, tree_mask, square, parent_list)
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    _check_links(op, positions, links, requests, nodes, parent_list)
    given = (parent_list.contiguous(), selected_index.contiguous(), verified_seq_len.contiguous())
    _build_tree(*given, tree_mask, positions, *links, topk, depth, nodes, int(tree_mask_mode))


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
    """Positions and links of trees that are given by masks: N = draft_token_num, B = batch_size.

    Args:
        tree_mask: contiguous bytes (bool, uint8 or int8), at least B * N * N: row i of a request marks the ancestors of
            node i, the last of which is its parent; bytes from the diagonal on are not read as ancestors.
        verified_seq_len: (B,) int64. positions: (B * N,) int64. The others (B, N) int64.
    Raises:
        ValueError: an argument out of contract.
    """
    op = "reconstruct_indices_from_tree_mask"
    want(op, "batch_size", "an integer of at least 0", batch_size, is_integer(batch_size) and batch_size >= 0)
    _check_nodes(op, draft_token_num)
    good = is_strided(tree_mask) and tree_mask.element_size() == 1
    want(op, "tree_mask", "one byte an element", tree_mask, good)
    _check_mask(op, tree_mask, batch_size * draft_token_num**2, tree_mask)
    _check_shape(op, "verified_seq_len", verified_seq_len, (batch_size,), torch.int64, tree_mask)
    links = (retrive_index, retrive_next_token, retrive_next_sibling)
    _check_links(op, positions, links, batch_size, draft_token_num, tree_mask)
    _reconstruct(tree_mask, verified_seq_len.contiguous(), positions, *links, batch_size, draft_token_num)


# -- walking ----------------------------------------------------------------------------------------------------------
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
    """From each root follow the child whose token the target predicts, until there is none or S - 1 are accepted.

    Args:
        predicts: (B * N,) int32, written at ``retrive_index`` of every node of the path: the token after that node.
        accept_index: (B, S) int32, written: retrive_index of the path, the root first. accept_token_num: (B,) int32,
            written: accepted nodes, the root not counted.
        candidates: (B, N) int64. retrive_index: (B, N) int64, where a node's token lies in predicts and
            target_predict. retrive_next_token, retrive_next_sibling: (B, N) int64, first child and next sibling, or -1.
        target_predict: (B, N) int64, the target's token after each node.
    Raises:
        ValueError: an argument out of contract; on CPU also links that are no tree.
    """
    op = "verify_tree_greedy"
    links = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    requests, nodes = _check_walk(op, predicts, accept_index, accept_token_num, links)
    _check_shape(op, "target_predict", target_predict, (requests, nodes), torch.int64, predicts)
    given = (link.contiguous() for link in (*links, target_predict))
    _verify_greedy(predicts, accept_index, accept_token_num, *given)


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
    draft_probs: Tensor | None = None,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """Walk each tree by the target's probabilities; the law of what is emitted is the target's.

    At a node with coin u: accept the first child of positive probability for which u is below the mass of its elder
    siblings and its own, divided by threshold_acc, or whose probability reaches threshold_single. Without one, the next
    token is drawn by the final coin from max(target - draft, 0); after S - 1 accepted nodes from the target.

    Args:
        predicts .. retrive_next_sibling: as verify_tree_greedy; candidates below V.
        uniform_samples: (B, N) fp32 in [0, 1), a coin for the children of each node.
            uniform_samples_for_final_sampling: (B,) fp32.
        target_probs: (B, N, V) fp32, bf16 or fp16, V contiguous.
        draft_probs: (B, N, V) fp32 or of target_probs' dtype, zeros: rejected tokens get the target's probability, so
            that they are not drawn again. None: they are left out without it; the result is the same.
        threshold_single, threshold_acc: in [0, 1]. Below 1 more is accepted and the law is no longer the target's.
        deterministic: accepted for compatibility; these ops always are.
    Writes:
        If rounding leaves no token for the final coin, the last of positive mass; without any mass V - 1.
    Raises:
        ValueError: an argument out of contract; on CPU also links that are no tree, or tokens that are not below V.
    """
    op = "tree_speculative_sampling_target_only"
    links = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    requests, nodes = _check_walk(op, predicts, accept_index, accept_token_num, links)
    _check_shape(op, "uniform_samples", uniform_samples, (requests, nodes), torch.float32, predicts)
    coins = uniform_samples_for_final_sampling
    _check_shape(op, "uniform_samples_for_final_sampling", coins, (requests,), torch.float32, predicts)
    _check_laws(op, "target_probs", target_probs, requests, nodes, predicts)
    if draft_probs is not None:
        shape, choices = tuple(target_probs.shape), {torch.float32, target_probs.dtype}
        good = is_strided(draft_probs) and draft_probs.shape == shape and draft_probs.dtype in choices
        good = good and near(draft_probs, predicts) and with_rows(draft_probs) is draft_probs
        names = " or ".join(sorted(str(choice).removeprefix("torch.") for choice in choices))
        want(op, "draft_probs", f"{shape} {names}, rows contiguous{on(predicts)}", draft_probs, good)
        check_constant(op, draft_probs=draft_probs)
    for name, value in (("threshold_single", threshold_single), ("threshold_acc", threshold_acc)):
        want(op, name, "a number in [0, 1]", value, is_number(value) and 0 <= value <= 1)
    _sample_tree(
        *(predicts, accept_index, accept_token_num),
        *(link.contiguous() for link in links),
        *(uniform_samples.contiguous(), coins.contiguous(), with_rows(target_probs), draft_probs),
        *(float(threshold_single), float(threshold_acc), bool(deterministic)),
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
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
    *,
    block_verification: bool = False,
) -> None:
    """Verify chains of N - 1 drafts that were drawn from draft_probs; the law of what is emitted is the target's.

    Draft i, of probability q by the draft and p by the target, passes iff 0 < q <= 1 and u_i q < p; the first that does
    not is replaced by a token drawn from max(target - draft, 0) by the final coin, and after all passed one more is
    drawn from the target. With block_verification the longest prefix is accepted that passes as a whole, at least as
    many tokens on average (Sun et al., "Block Verification Accelerates Speculative Decoding", 2024, algorithm 2).

    Args:
        predicts .. retrive_index: as verify_tree_greedy, slot i of a chain being node i; accept_index (B, N).
            retrive_next_token, retrive_next_sibling, threshold_single, threshold_acc, deterministic: not used.
        uniform_samples: (B, at least N - 1) fp32 in [0, 1). uniform_samples_for_final_sampling: (B,) fp32.
        target_probs: (B, N, V) fp32, bf16 or fp16. draft_probs: (B, at least N - 1, V) of any of these, row i the law
            that draft i + 1 was drawn from; what is no probability counts 0. V contiguous.
    Writes, Raises: as tree_speculative_sampling_target_only.
    """
    op = "chain_speculative_sampling"
    links = (candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    requests, nodes = _check_walk(op, predicts, accept_index, accept_token_num, links[:2])
    want(op, "accept_index", f"({requests}, {nodes}) int32", accept_index, accept_index.shape[1] == nodes)
    good = _is_matrix(uniform_samples, torch.float32) and len(uniform_samples) == requests
    good = good and uniform_samples.shape[1] >= nodes - 1 and near(uniform_samples, predicts)
    want(op, "uniform_samples", f"({requests}, at least {nodes - 1}) float32{on(predicts)}", uniform_samples, good)
    coins = uniform_samples_for_final_sampling
    _check_shape(op, "uniform_samples_for_final_sampling", coins, (requests,), torch.float32, predicts)
    _check_laws(op, "target_probs", target_probs, requests, nodes, predicts)
    good = is_strided(draft_probs) and draft_probs.ndim == 3 and draft_probs.dtype in DTYPES
    good = good and draft_probs.shape[::2] == target_probs.shape[::2] and draft_probs.shape[1] >= nodes - 1
    wanted = f"({requests}, at least {nodes - 1}, {target_probs.shape[2]}) {DTYPE_NAMES}{on(predicts)}"
    want(op, "draft_probs", wanted, draft_probs, good and near(draft_probs, predicts))
    check_constant(op, draft_probs=draft_probs)
    _sample_chain(
        *(predicts, accept_index, accept_token_num),
        *(link.contiguous() for link in links),
        *(uniform_samples.contiguous(), coins.contiguous(), with_rows(target_probs), with_rows(draft_probs)),
        *(float(threshold_single), float(threshold_acc), bool(deterministic), bool(block_verification)),
    )


chain_speculative_sampling_triton = chain_speculative_sampling  # as SGLang calls it


# -- checks -----------------------------------------------------------------------------------------------------------
def _is_matrix(value: object, dtype: torch.dtype) -> bool:
    return is_strided(value) and value.ndim == 2 and value.dtype == dtype


def _check_nodes(op: str, nodes: object) -> None:
    want(op, "draft_token_num", f"an integer in 1..{MAX_NODES}", nodes, is_integer(nodes, 1, MAX_NODES))


def _check_shape(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, first: Tensor, out: bool = False
) -> None:
    good = is_strided(value) and value.shape == shape and value.dtype == dtype and near(value, first)
    if not good or (out and not value.is_contiguous()):  # worded only then: a call has many of these checks
        kind = f"{str(dtype).removeprefix('torch.')}{', contiguous' if out else ''}{on(first)}"
        raise refuse(op, name, f"{shape} {kind}", value)


def _check_mask(op: str, tree_mask: Tensor, count: int, first: Tensor) -> None:
    good = is_strided(tree_mask) and tree_mask.is_contiguous() and near(tree_mask, first)
    good = good and tree_mask.numel() * tree_mask.element_size() >= count
    want(op, "tree_mask", f"at least {count} contiguous bytes{on(first)}", tree_mask, good)


def _check_links(
    op: str, positions: Tensor, links: tuple[Tensor, ...], requests: int, nodes: int, first: Tensor
) -> None:
    good = is_strided(positions) and positions.numel() == requests * nodes and positions.dtype == torch.int64
    good = good and positions.is_contiguous() and near(positions, first)
    want(op, "positions", f"({requests * nodes},) int64, contiguous{on(first)}", positions, good)
    names = ("retrive_index", "retrive_next_token", "retrive_next_sibling")
    for name, link in zip(names, links, strict=True):
        _check_shape(op, name, link, (requests, nodes), torch.int64, first, out=True)


def _check_walk(
    op: str, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, links: tuple[Tensor, ...]
) -> tuple[int, int]:
    """Requests and nodes of a call."""
    want(op, "predicts", "a tensor", predicts, is_strided(predicts))
    candidates = links[0]
    good = _is_matrix(candidates, torch.int64) and near(candidates, predicts)
    good = good and 1 <= candidates.shape[1] <= MAX_NODES
    if not good:
        raise refuse(op, "candidates", f"(B, N) int64 with N in 1..{MAX_NODES}{on(predicts)}", candidates)
    requests, nodes = candidates.shape
    _check_shape(op, "predicts", predicts, (requests * nodes,), torch.int32, predicts, out=True)
    good = _is_matrix(accept_index, torch.int32) and len(accept_index) == requests and accept_index.shape[1] >= 1
    good = good and accept_index.is_contiguous() and near(accept_index, predicts)
    if not good:
        raise refuse(op, "accept_index", f"({requests}, S) int32, contiguous, S at least 1{on(predicts)}", accept_index)
    _check_shape(op, "accept_token_num", accept_token_num, (requests,), torch.int32, predicts, out=True)
    names = ("candidates", "retrive_index", "retrive_next_token", "retrive_next_sibling")
    for name, link in zip(names, links, strict=False):
        _check_shape(op, name, link, (requests, nodes), torch.int64, predicts)
    return requests, nodes


def _check_laws(op: str, name: str, laws: Tensor, requests: int, nodes: int, first: Tensor) -> None:
    good = is_strided(laws) and laws.ndim == 3 and laws.dtype in DTYPES and near(laws, first)
    good = good and laws.shape[:2] == (requests, nodes) and laws.shape[2] >= 1
    want(op, name, f"({requests}, {nodes}, V) {DTYPE_NAMES} with V at least 1{on(first)}", laws, good)
    check_constant(op, **{name: laws})


# -- ops --------------------------------------------------------------------------------------------------------------
LINKS = "Tensor({}!) retrive_index, Tensor({}!) retrive_next_token, Tensor({}!) retrive_next_sibling"
WALK = (
    "Tensor(a!) predicts, Tensor(b!) accept_index, Tensor(c!) accept_token_num, Tensor candidates, "
    "Tensor retrive_index, Tensor retrive_next_token, Tensor retrive_next_sibling"
)
COINS = "Tensor uniform_samples, Tensor uniform_samples_for_final_sampling, Tensor target_probs"
THRESHOLDS = "float threshold_single, float threshold_acc, bool deterministic"


def _fake(*args: Any) -> None:
    return None


_build_tree = define(
    __package__,
    "build_tree_kernel_efficient(Tensor parent_list, Tensor selected_index, Tensor verified_seq_len, "
    f"Tensor(a!) tree_mask, Tensor(b!) positions, {LINKS.format('c', 'd', 'e')}, "
    "SymInt topk, SymInt depth, SymInt draft_token_num, int tree_mask_mode) -> ()",
    fake=_fake,
)
_reconstruct = define(
    __package__,
    "reconstruct_indices_from_tree_mask(Tensor tree_mask, Tensor verified_seq_len, Tensor(a!) positions, "
    f"{LINKS.format('b', 'c', 'd')}, SymInt batch_size, SymInt draft_token_num) -> ()",
    fake=_fake,
)
_verify_greedy = define(__package__, f"verify_tree_greedy({WALK}, Tensor target_predict) -> ()", fake=_fake)
_sample_tree = define(
    __package__,
    f"tree_speculative_sampling_target_only({WALK}, {COINS}, Tensor(d!)? draft_probs, {THRESHOLDS}) -> ()",
    fake=_fake,
)
_sample_chain = define(
    __package__,
    f"chain_speculative_sampling({WALK}, {COINS}, Tensor draft_probs, {THRESHOLDS}, bool block_verification) -> ()",
    fake=_fake,
)
