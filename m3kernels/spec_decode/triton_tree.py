"""Trees: chosen from candidates, and read back from links or masks; parallel over nodes.

The best candidates are those above a threshold of their scores, found by bisection on integers that have the order of
the scores, and the first of those that equal it; written by ascending index, so that a parent is found by binary
search. Every node then walks its own ancestors: its bits, its depth and whether it hangs on the root follow, and its
children and siblings are the nodes with the same parent, looked up in all of them at once.
"""
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.sgl_reference import BIT_PACKED, FULL_MASK, bytes_per_row
from m3kernels.spec_decode.triton_arithmetic import NOWHERE, block, case, launch, ordered
from m3kernels.spec_decode.types import BITS
from m3kernels.triton_compile import CompileCase

NODES = 32  # per program of a walk
OTHERS = 64  # nodes that they are compared with at a time
CANDIDATES = 4096  # looked at together
FULL = tl.constexpr(FULL_MASK)
PACKED = tl.constexpr(BIT_PACKED)


@triton.jit
def _score_key(scores, at, count):
    score = tl.load(scores + at, mask=at < count, other=float("-inf"))
    return tl.where(at < count, ordered(tl.where(score == score, score, float("-inf"))), -0x80000000)


@triton.jit
def _at_least(scores, candidates, threshold, BLOCK: tl.constexpr):
    """Candidates whose key is at least ``threshold``."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, candidates, BLOCK):
        total += (_score_key(scores, start + tl.arange(0, BLOCK), candidates) >= threshold).to(tl.int32)
    return tl.sum(total, 0)


# Grid: (requests). A program finds the best candidates of its request, writes them to ``selected`` and the parent of
# each node, which may itself hang on nothing, to ``raw`` (-1: none).
@triton.jit(do_not_specialize=["nodes", "columns"])
def _select_kernel(
    scores,
    parent_list,
    budget,
    selected,
    raw,
    candidates,
    columns,
    topk,
    nodes,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    scores += b * candidates
    parent_list += b * columns
    selected += b * (nodes - 1)
    raw += b * nodes
    kept = nodes
    if budget is not None:
        kept = tl.minimum(tl.maximum(tl.load(budget + b), 1), nodes)
    kept = tl.minimum(kept - 1, candidates)
    low = tl.full((), -0x80000000, tl.int64)  # at least ``kept`` keys are as large
    high = tl.full((), 0x7FFFFFFF, tl.int64)  # fewer are
    if kept > 0:
        while high - low > 1:
            middle = (low + high) >> 1
            if _at_least(scores, candidates, middle.to(tl.int32), BLOCK) >= kept:
                low = middle
            else:
                high = middle
    threshold = low.to(tl.int32)
    ties = kept - _at_least(scores, candidates, high.to(tl.int32), BLOCK)
    found = 0
    tied = 0
    for start in range(0, candidates, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = _score_key(scores, at, candidates)
        tie = ((key == threshold) & (at < candidates)).to(tl.int32)
        taken = ((key > threshold) | ((tie == 1) & (tied + tl.cumsum(tie, 0) <= ties))).to(tl.int32)
        taken = tl.where(kept > 0, taken, 0)
        tl.store(selected + found + tl.cumsum(taken, 0) - 1, at.to(tl.int64), mask=taken == 1)
        found += tl.sum(taken, 0)
        tied += tl.sum(tie, 0)
    for start in range(0, nodes, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        tl.store(selected + i, tl.full((BLOCK_N,), -1, tl.int64), mask=(i >= found) & (i < nodes - 1))
    tl.debug_barrier()
    for start in range(0, nodes, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        real = (i > 0) & (i <= found)
        column = tl.load(selected + i - 1, mask=real, other=0) // topk
        wanted = tl.load(parent_list + column, mask=real & (column > 0) & (column < columns), other=-1)
        lower = tl.zeros((BLOCK_N,), tl.int32)  # entries of ``selected`` below what is wanted
        upper = tl.zeros((BLOCK_N,), tl.int32) + found
        for _ in range(SEARCH):
            middle = (lower + upper) // 2
            less = (lower < upper) & (tl.load(selected + middle, mask=lower < upper, other=0) < wanted)
            upper = tl.where(less, upper, middle)
            lower = tl.where(less, middle + 1, lower)
        hit = (lower < found) & (tl.load(selected + lower, mask=lower < found, other=-1) == wanted) & (wanted >= 0)
        parent = tl.where(hit & (lower + 1 < i), lower + 1, -1)
        parent = tl.where(column == 0, 0, parent)
        tl.store(raw + i, tl.where(real, parent, -1), mask=i < nodes)


@triton.jit
def _ancestors(raw, i, nodes, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """(bits of the ancestors but the root, their number, where the walk ends: 0 the root, -1 nothing)."""
    word = tl.arange(0, WORDS)
    bits = tl.zeros((BLOCK, WORDS), tl.int32)
    depth = tl.zeros((BLOCK,), tl.int32)
    above = tl.load(raw + i, mask=(i > 0) & (i < nodes), other=-1)
    steps = 0
    while (tl.max(above, 0) > 0) & (steps < nodes):
        on = above > 0
        here = on[:, None] & (word[None, :] == (above // 32)[:, None])
        bits |= tl.where(here, (1 << (above % 32))[:, None], 0)
        depth += on.to(tl.int32)
        above = tl.where(on, tl.load(raw + above, mask=on, other=-1), above)
        steps += 1
    return bits, depth, tl.where(i == 0, 0, above)


@triton.jit
def _family(raw, i, nodes, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """(first child, next younger sibling) of nodes i by their parents; NOWHERE if there is none."""
    parent = tl.load(raw + i, mask=(i > 0) & (i < nodes), other=-1)
    child = tl.full((BLOCK,), NOWHERE, tl.int32)
    sibling = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, nodes, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other = tl.load(raw + j, mask=(j > 0) & (j < nodes), other=-1)
        of = (other[None, :] == i[:, None]) & (j > 0)[None, :] & (j < nodes)[None, :]
        child = tl.minimum(child, tl.min(tl.where(of, j[None, :], NOWHERE), 1))
        of = (other[None, :] == parent[:, None]) & (parent >= 0)[:, None] & (j[None, :] > i[:, None])
        sibling = tl.minimum(sibling, tl.min(tl.where(of, j[None, :], NOWHERE), 1))
    return child, sibling


# Grid: (requests, blocks of NODES nodes). A program walks up from its nodes and writes all that is known of them. A
# node that does not reach the root is padding.
@triton.jit(do_not_specialize=["nodes"])
def _finalize_kernel(
    tokens,
    bonus,
    seq_lens,
    selected,
    raw,
    out_tokens,
    parents,
    mask_bits,
    positions,
    next_token,
    next_sibling,
    candidates,
    nodes,
    words,
    NODES: tl.constexpr,
    WORDS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NODES + tl.arange(0, NODES)
    inside = i < nodes
    raw += b * nodes
    bits, depth, end = _ancestors(raw, i, nodes, NODES, WORDS)
    placed = end == 0
    depth = tl.where(placed & (i > 0), depth + 1, 0)
    word = tl.arange(0, WORDS)
    bits = tl.where(placed[:, None], bits | (word == 0).to(tl.int32)[None, :], 0)
    bits |= tl.where(word[None, :] == (i // 32)[:, None], (1 << (i % 32))[:, None], 0)
    row = b * nodes + i
    tl.store(mask_bits + row[:, None] * words + word[None, :], bits, mask=inside[:, None] & (word < words)[None, :])
    chosen = tl.load(selected + b * (nodes - 1) + i - 1, mask=inside & (i > 0) & placed, other=0)
    token = tl.load(tokens + b * candidates + chosen, mask=inside & (i > 0) & placed, other=-1)
    token = tl.where(i == 0, tl.load(bonus + b), token)
    tl.store(out_tokens + row, token, mask=inside)
    parent = tl.load(raw + i, mask=inside & placed, other=-1)
    tl.store(parents + row, parent, mask=inside)
    tl.store(positions + row, tl.load(seq_lens + b) + depth, mask=inside)
    child, sibling = _family(raw, i, nodes, NODES, OTHERS)
    child = tl.where(placed & (child < nodes), child, -1)
    sibling = tl.where(placed & (sibling < nodes), sibling, -1)
    tl.store(next_token + row, child.to(tl.int64), mask=inside)
    tl.store(next_sibling + row, sibling.to(tl.int64), mask=inside)


def tree_finalize(
    scores: Tensor,
    tokens: Tensor,
    parent_list: Tensor,
    bonus: Tensor,
    seq_lens: Tensor,
    budget: Tensor | None,
    topk: int,
    num_nodes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    requests, candidates = scores.shape
    words = triton.cdiv(num_nodes, BITS)

    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=scores.device)

    selected = empty(requests, num_nodes - 1)
    raw = empty(requests, num_nodes, dtype=torch.int32)
    out_tokens, positions, next_token, next_sibling = (empty(requests, num_nodes) for _ in range(4))
    parents = empty(requests, num_nodes, dtype=torch.int32)
    mask_bits = empty(requests, num_nodes, words, dtype=torch.int32)
    launch(
        _select_kernel,
        (requests,),
        scores,
        scores, parent_list, budget, selected, raw, candidates, parent_list.shape[1], topk, num_nodes,
        BLOCK=block(candidates, CANDIDATES),
        BLOCK_N=block(num_nodes, 256),
        SEARCH=num_nodes.bit_length(),
        num_warps=8 if candidates > 1024 else 4,
    )  # fmt: skip
    launch(
        _finalize_kernel,
        (requests, triton.cdiv(num_nodes, NODES)),
        scores,
        tokens, bonus, seq_lens, selected, raw, out_tokens, parents, mask_bits, positions, next_token, next_sibling,
        candidates, num_nodes, words,
        NODES=NODES,
        WORDS=block(words, 32, 1),
        OTHERS=OTHERS,
    )  # fmt: skip
    return out_tokens, parents, mask_bits, positions, next_token, next_sibling, selected


# -- sgl-kernel's -----------------------------------------------------------------------------------------------------
# Grid: (requests, blocks of NODES nodes). A program finds the parent of its nodes: the first selected index that is the
# entry of its column.
@triton.jit(do_not_specialize=["nodes", "columns"])
def _parents_kernel(parent_list, selected_index, raw, columns, topk, nodes, NODES: tl.constexpr, OTHERS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NODES + tl.arange(0, NODES)
    real = (i > 0) & (i < nodes)
    selected_index += b * (nodes - 1)
    index = tl.load(selected_index + i - 1, mask=real, other=-1)
    column = index // topk
    reachable = real & (index >= 0) & (column > 0) & (column < columns)
    wanted = tl.load(parent_list + b * columns + column, mask=reachable, other=-1)
    place = tl.full((NODES,), NOWHERE, tl.int32)
    for start in range(0, nodes - 1, OTHERS):
        j = start + tl.arange(0, OTHERS)
        other = tl.load(selected_index + j, mask=j < nodes - 1, other=-1)
        same = (other[None, :] == wanted[:, None]) & (j < nodes - 1)[None, :]
        place = tl.minimum(place, tl.min(tl.where(same, j[None, :] + 1, NOWHERE), 1))
    parent = tl.where(reachable & (place < nodes), place, -1)
    parent = tl.where(real & (index >= 0) & (column == 0), 0, parent)
    tl.store(raw + b * nodes + i, parent, mask=i < nodes)


# Grid: (requests, blocks of NODES nodes). Links that exist are written, the caller's -1 stay elsewhere.
@triton.jit(do_not_specialize=["nodes"])
def _build_kernel(
    raw,
    verified_seq_len,
    mask_bits,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    nodes,
    words,
    NODES: tl.constexpr,
    WORDS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NODES + tl.arange(0, NODES)
    inside = i < nodes
    raw += b * nodes
    bits, depth, _ = _ancestors(raw, i, nodes, NODES, WORDS)
    word = tl.arange(0, WORDS)
    bits |= tl.where(word[None, :] == (i // 32)[:, None], (1 << (i % 32))[:, None], 0)
    bits |= (word == 0).to(tl.int32)[None, :]
    row = b * nodes + i
    tl.store(mask_bits + row[:, None] * words + word[None, :], bits, mask=inside[:, None] & (word < words)[None, :])
    tl.store(positions + row, tl.load(verified_seq_len + b) + depth + (i > 0).to(tl.int32), mask=inside)
    tl.store(retrive_index + row, row, mask=inside)
    child, sibling = _family(raw, i, nodes, NODES, OTHERS)
    tl.store(retrive_next_token + row, child.to(tl.int64), mask=inside & (child < nodes))
    tl.store(retrive_next_sibling + row, sibling.to(tl.int64), mask=inside & (sibling < nodes))


# Grid: (requests * nodes). A program writes the mask of one node as bytes, one a node or packed, never beyond ``size``.
@triton.jit(do_not_specialize=["nodes"])
def _mask_kernel(
    mask_bits, verified_seq_len, tree_mask, size, nodes, words, width, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    b = row // nodes
    i = row - b * nodes
    at = row * width
    if MODE == FULL:
        before = b * 0
        for other in range(b):
            before += tl.load(verified_seq_len + other)
        length = tl.load(verified_seq_len + b)
        at = nodes * (before + b * nodes) + (length + nodes) * i + length
    room = tl.where(at >= 0, tl.minimum(size - at, width), 0)
    for start in range(0, width, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = j < room
        if MODE == PACKED:
            word = tl.load(mask_bits + row * words + j // 4, mask=mask, other=0)
            byte = (word >> (8 * (j % 4))) & 0xFF
            old = tl.load(tree_mask + at + j, mask=mask & (j > 0), other=0).to(tl.int32)
            byte |= old
        else:
            word = tl.load(mask_bits + row * words + j // 32, mask=mask, other=0)
            byte = (word >> (j % 32)) & 1
        tl.store(tree_mask + at + j, byte.to(tl.uint8), mask=mask)


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
    requests, nodes = len(parent_list), draft_token_num
    words, grid = triton.cdiv(nodes, BITS), (requests, triton.cdiv(nodes, NODES))
    raw = torch.empty(requests, nodes, dtype=torch.int32, device=parent_list.device)
    mask_bits = torch.empty(requests, nodes, words, dtype=torch.int32, device=parent_list.device)
    launch(
        _parents_kernel, grid, parent_list, parent_list, selected_index, raw, parent_list.shape[1], topk, nodes,
        NODES=NODES, OTHERS=OTHERS,
    )  # fmt: skip
    launch(
        _build_kernel, grid, parent_list,
        raw, verified_seq_len, mask_bits, positions, retrive_index, retrive_next_token, retrive_next_sibling, nodes,
        words, NODES=NODES, WORDS=block(words, 32, 1), OTHERS=OTHERS,
    )  # fmt: skip
    width = bytes_per_row(nodes) if tree_mask_mode == BIT_PACKED else nodes
    raw_mask = tree_mask.view(-1).view(torch.uint8)
    launch(
        _mask_kernel, (requests * nodes,), parent_list,
        mask_bits, verified_seq_len, raw_mask, raw_mask.numel(), nodes, words, width,
        MODE=tree_mask_mode, BLOCK=block(width, 1024), num_warps=1,
    )  # fmt: skip


# Grid: (requests, blocks of NODES nodes). Parent of each node: its nearest set bit to the left; depth: their number.
@triton.jit(do_not_specialize=["nodes"])
def _read_kernel(
    tree_mask,
    verified_seq_len,
    positions,
    retrive_index,
    retrive_next_token,
    raw,
    nodes,
    NODES: tl.constexpr,
    OTHERS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NODES + tl.arange(0, NODES)
    inside = i < nodes
    square = tree_mask + b * nodes * nodes
    parent = tl.full((NODES,), -1, tl.int32)
    depth = tl.zeros((NODES,), tl.int32)
    child = tl.full((NODES,), NOWHERE, tl.int32)
    for start in range(0, nodes, OTHERS):
        j = start + tl.arange(0, OTHERS)
        mask = inside[:, None] & (j < nodes)[None, :]
        left = mask & (j[None, :] < i[:, None])
        up = tl.load(square + i[:, None].to(tl.int64) * nodes + j[None, :], mask=left, other=0) != 0
        parent = tl.maximum(parent, tl.max(tl.where(up, j[None, :], -1), 1))
        depth += tl.sum(up.to(tl.int32), 1)
        below = mask & (j[None, :] > i[:, None])
        down = tl.load(square + j[None, :].to(tl.int64) * nodes + i[:, None], mask=below, other=0) != 0
        child = tl.minimum(child, tl.min(tl.where(down, j[None, :], NOWHERE), 1))
    row = b * nodes + i
    tl.store(raw + row, parent, mask=inside)
    tl.store(positions + row, tl.load(verified_seq_len + b) + depth, mask=inside)
    tl.store(retrive_index + row, row, mask=inside)
    tl.store(retrive_next_token + row, tl.where(child < nodes, child, -1).to(tl.int64), mask=inside)


# Grid: (requests, blocks of NODES nodes). Next younger node with the same parent.
@triton.jit(do_not_specialize=["nodes"])
def _siblings_kernel(raw, retrive_next_sibling, nodes, NODES: tl.constexpr, OTHERS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * NODES + tl.arange(0, NODES)
    _, sibling = _family(raw + b * nodes, i, nodes, NODES, OTHERS)
    sibling = tl.where(sibling < nodes, sibling, -1).to(tl.int64)
    tl.store(retrive_next_sibling + b * nodes + i, sibling, mask=i < nodes)


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
    grid = (batch_size, triton.cdiv(draft_token_num, NODES))
    raw = torch.empty(batch_size, draft_token_num, dtype=torch.int32, device=tree_mask.device)
    square = tree_mask.view(-1).view(torch.uint8)
    launch(
        _read_kernel, grid, tree_mask,
        square, verified_seq_len, positions, retrive_index, retrive_next_token, raw, draft_token_num,
        NODES=NODES, OTHERS=OTHERS,
    )  # fmt: skip
    launch(_siblings_kernel, grid, tree_mask, raw, retrive_next_sibling, draft_token_num, NODES=NODES, OTHERS=OTHERS)


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    """Trees of up to 64 nodes from a few hundred candidates, and of 1024 nodes from thousands."""
    links = "next_token *i64, next_sibling *i64, "
    sgl_links = "retrive_index *i64, retrive_next_token *i64, retrive_next_sibling *i64, "
    sizes = (("small", 512, 64, 2, 4), ("large", CANDIDATES, 256, 32, 8))
    made = []
    for name, most, block_n, words, warps in sizes:
        made += [
            case(
                f"select_{name}", _select_kernel,
                "scores *fp32, parent_list *i64, budget *i32, selected *i64, raw *i32, candidates i32, columns i32, "
                "topk i32, nodes i32", warps, BLOCK=most, BLOCK_N=block_n, SEARCH=7 if words == 2 else 11,
            ),
            case(
                f"finalize_{name}", _finalize_kernel,
                "tokens *i64, bonus *i64, seq_lens *i64, selected *i64, raw *i32, out_tokens *i64, parents *i32, "
                f"mask_bits *i32, positions *i64, {links}candidates i32, nodes i32, words i32",
                NODES=NODES, WORDS=words, OTHERS=OTHERS,
            ),
            case(
                f"build_{name}", _build_kernel,
                f"raw *i32, verified_seq_len *i64, mask_bits *i32, positions *i64, {sgl_links}nodes i32, words i32",
                NODES=NODES, WORDS=words, OTHERS=OTHERS,
            ),
        ]  # fmt: skip
    pair = dict(NODES=NODES, OTHERS=OTHERS)
    made.append(
        case(
            "parents", _parents_kernel,
            "parent_list *i64, selected_index *i64, raw *i32, columns i32, topk i32, nodes i32", **pair,
        )
    )  # fmt: skip
    for name, mode in (("full", FULL_MASK), ("packed", BIT_PACKED)):
        made.append(
            case(
                f"mask_{name}", _mask_kernel,
                "mask_bits *i32, verified_seq_len *i64, tree_mask *u8, size i64, nodes i32, words i32, width i32", 1,
                MODE=mode, BLOCK=64,
            )
        )  # fmt: skip
    made.append(
        case(
            "read", _read_kernel,
            "tree_mask *u8, verified_seq_len *i64, positions *i64, retrive_index *i64, retrive_next_token *i64, "
            "raw *i32, nodes i32", **pair,
        )
    )  # fmt: skip
    made.append(case("siblings", _siblings_kernel, "raw *i32, retrive_next_sibling *i64, nodes i32", **pair))
    return made
