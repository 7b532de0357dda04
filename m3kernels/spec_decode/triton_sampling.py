"""Verification by given probabilities, with sgl-kernel's names and buffers: greedy, trees and chains.

One program walks one request. As in sgl_reference.py, probabilities are compared in fp32 and sums over a row are taken
in fp64; what is not emitted stays as the caller left it. Links are followed at most N times and indices that lie
outside end the walk, so nothing in memory can keep it from ending or lead it elsewhere.
"""
# In kernels, `if BLOCKS:` decides at compile time and the next `if` at run time.
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.sgl_reference import SMALLEST_THRESHOLD
from m3kernels.spec_decode.triton_arithmetic import NOWHERE, block, case, launch
from m3kernels.triton_compile import CompileCase

BLOCK = 4096  # tokens per step
NUM_WARPS = 8


@triton.jit
def _link(links, at, nodes):
    """The node that ``links`` has at ``at``, or -1."""
    node = tl.load(links + at).to(tl.int32)
    return tl.where((node > 0) & (node < nodes), node, -1)


# Grid: (requests). One thread's work: a path of a few nodes.
@triton.jit(do_not_specialize=["nodes", "width"])
def _greedy_kernel(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
    nodes,
    width,
    total,
):
    b = tl.program_id(0).to(tl.int64)
    candidates += b * nodes
    retrive_index += b * nodes
    retrive_next_token += b * nodes
    retrive_next_sibling += b * nodes
    accept_index += b * width
    last = tl.load(retrive_index)
    accepted = 0
    steps = 0
    tl.store(accept_index, last)
    known = (last >= 0) & (last < total)
    target = tl.load(target_predict + last, mask=known, other=-1)
    child = tl.full((), -1, tl.int32)
    if width > 1:
        child = _link(retrive_next_token, 0, nodes)
    while known & (child >= 0) & (steps < nodes):
        steps += 1
        if tl.load(candidates + child) == target:
            tl.store(predicts + last, target)
            accepted += 1
            last = tl.load(retrive_index + child)
            tl.store(accept_index + accepted, last)
            known = (last >= 0) & (last < total)
            target = tl.load(target_predict + last, mask=known, other=-1)
            child = _link(retrive_next_token, child, nodes)
            if accepted + 1 >= width:
                child = tl.full((), -1, tl.int32)
        else:
            child = _link(retrive_next_sibling, child, nodes)
    tl.store(accept_token_num + b, accepted)
    tl.store(predicts + last, target, mask=known)


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
    requests, nodes = candidates.shape
    launch(
        _greedy_kernel,
        (requests,),
        candidates,
        predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
        target_predict, nodes, accept_index.shape[1], requests * nodes,
        num_warps=1,
    )  # fmt: skip


# -- sampling ---------------------------------------------------------------------------------------------------------
@triton.jit
def _proposal(q):
    """What is no probability counts 0."""
    return tl.where((q >= 0.0) & (q <= 1.0), q, 0.0)


@triton.jit
def _residual(
    row, draft_row, scale, v, vocabulary, first, candidates, next_sibling, nodes,
    TREE: tl.constexpr, DRAFT: tl.constexpr
):  # fmt: skip
    """Mass of tokens v, fp64: scale * target less what is not to be drawn again, where that is above 0.

    TREE: less the draft row (DRAFT) or without the tokens of the children from ``first`` on; else less the proposal.
    """
    p = tl.load(row + v, mask=v < vocabulary, other=0.0).to(tl.float32)
    if TREE:
        if DRAFT:
            p -= tl.load(draft_row + v, mask=v < vocabulary, other=0.0).to(tl.float32)
        else:
            child = first
            steps = 0
            while (child >= 0) & (steps < nodes):
                p = tl.where(v == tl.load(candidates + child), 0.0, p)
                child = _link(next_sibling, child, nodes)
                steps += 1
    else:
        p = scale * p
        if DRAFT:
            p -= _proposal(tl.load(draft_row + v, mask=v < vocabulary, other=0.0).to(tl.float32))
    return tl.where(p > 0.0, p, 0.0).to(tl.float64)


@triton.jit
def _residual_sum(
    row, draft_row, scale, vocabulary, first, candidates, next_sibling, nodes,
    TREE: tl.constexpr, DRAFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        total += _residual(row, draft_row, scale, v, vocabulary, first, candidates, next_sibling, nodes, TREE, DRAFT)
    return tl.sum(total, 0)


@triton.jit
def _draw(
    row, draft_row, scale, coin, vocabulary, first, candidates, next_sibling, nodes,
    TREE: tl.constexpr, DRAFT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First token whose cumulative mass exceeds coin * total; without one the last with mass; without mass the last."""
    total = _residual_sum(row, draft_row, scale, vocabulary, first, candidates, next_sibling, nodes, TREE, DRAFT, BLOCK)
    wanted = (coin * total.to(tl.float32)).to(tl.float64)
    token = vocabulary - 1
    upto = tl.zeros((), tl.float64)
    start = 0
    while (start < vocabulary) & (upto <= wanted):
        v = start + tl.arange(0, BLOCK)
        w = _residual(row, draft_row, scale, v, vocabulary, first, candidates, next_sibling, nodes, TREE, DRAFT)
        here = tl.sum(w, 0)
        if here > 0.0:
            token = tl.max(tl.where(w > 0.0, v, -1), 0)
            if upto + here > wanted:
                beyond = (upto + tl.cumsum(w, 0) > wanted) & (w > 0.0)
                token = tl.minimum(token, tl.min(tl.where(beyond, v, NOWHERE), 0))
        upto += here
        start += BLOCK
    return token


# Grid: (requests). A program walks one tree; the probabilities of the children one by one, the last row twice.
@triton.jit(do_not_specialize=["nodes", "width"])
def _tree_kernel(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    uniform_samples,
    final_samples,
    target_probs,
    draft_probs,
    threshold_single,
    threshold_acc,
    target_request,
    target_node,
    draft_request,
    draft_node,
    nodes,
    width,
    vocabulary,
    total,
    DRAFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    candidates += b * nodes
    retrive_index += b * nodes
    retrive_next_token += b * nodes
    retrive_next_sibling += b * nodes
    accept_index += b * width
    last = tl.load(retrive_index)
    tl.store(accept_index, last)
    known = (last >= 0) & (last < total)
    node = tl.zeros((), tl.int32)
    first = tl.full((), -1, tl.int32)
    accepted = 0
    steps = 0
    going = known & (width > 1)
    while going:
        row = target_probs + b * target_request + node.to(tl.int64) * target_node
        coin = tl.load(uniform_samples + b * nodes + node)
        first = _link(retrive_next_token, node, nodes)
        taken = tl.full((), -1, tl.int32)
        mass = tl.zeros((), tl.float32)
        child = first
        while (child >= 0) & (steps < nodes):
            steps += 1
            token = tl.load(candidates + child)
            inside = (token >= 0) & (token < vocabulary)
            raw = tl.load(row + tl.where(inside, token, 0), mask=inside, other=0.0)
            p = raw.to(tl.float32)
            mass += p
            following = _link(retrive_next_sibling, child, nodes)
            if (p > 0.0) & ((coin < tl.div_rn(mass, threshold_acc)) | (p >= threshold_single)):
                taken = child
                tl.store(predicts + last, token)
                following = tl.full((), -1, tl.int32)
            else:
                if DRAFT:
                    draft_row = draft_probs + b * draft_request + node.to(tl.int64) * draft_node
                    tl.store(draft_row + tl.where(inside, token, 0), p, mask=inside)
            child = following
        going = taken >= 0
        if going:
            node = taken
            accepted += 1
            last = tl.load(retrive_index + node)
            tl.store(accept_index + accepted, last)
            known = (last >= 0) & (last < total)
            first = tl.full((), -1, tl.int32)
            going = known & (accepted + 1 < width)
    tl.store(accept_token_num + b, accepted)
    tl.debug_barrier()
    row = target_probs + b * target_request + node.to(tl.int64) * target_node
    coin = tl.load(final_samples + b)
    token = vocabulary - 1
    if DRAFT:
        draft_row = draft_probs + b * draft_request + node.to(tl.int64) * draft_node
        if accepted + 1 < width:
            token = _draw(
                row, draft_row, 1.0, coin, vocabulary, first, candidates, retrive_next_sibling, nodes, True, True, BLOCK
            )
        else:
            token = _draw(
                row, draft_row, 1.0, coin, vocabulary, -1, candidates, retrive_next_sibling, nodes, True, False, BLOCK
            )
    else:
        token = _draw(
            row, None, 1.0, coin, vocabulary, first, candidates, retrive_next_sibling, nodes, True, False, BLOCK
        )
    tl.store(predicts + last, token, mask=known)


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
    requests, nodes = candidates.shape
    vocabulary = target_probs.shape[2]
    draft_strides = (0, 0) if draft_probs is None else draft_probs.stride()[:2]
    launch(
        _tree_kernel,
        (requests,),
        candidates,
        predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
        uniform_samples, uniform_samples_for_final_sampling, target_probs, draft_probs, float(threshold_single),
        max(float(threshold_acc), SMALLEST_THRESHOLD), *target_probs.stride()[:2], *draft_strides, nodes,
        accept_index.shape[1], vocabulary, requests * nodes,
        DRAFT=draft_probs is not None,
        BLOCK=block(vocabulary, BLOCK),
        num_warps=NUM_WARPS,
    )  # fmt: skip


# Grid: (requests). A program verifies one chain: slot s + 1 holds the token drafted from row s of draft_probs. BLOCKS:
# the longest prefix that passes as a whole, which sums a residual for each prefix that may.
@triton.jit(do_not_specialize=["slots", "width"])
def _chain_kernel(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    uniform_samples,
    final_samples,
    target_probs,
    draft_probs,
    target_request,
    target_node,
    draft_request,
    draft_node,
    coin_stride,
    slots,
    width,
    vocabulary,
    total,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    candidates += b * slots
    retrive_index += b * slots
    target_probs += b * target_request
    draft_probs += b * draft_request
    accepted = tl.zeros((), tl.int32)
    scale = tl.full((), 1.0, tl.float32)
    prefix = tl.full((), 1.0, tl.float32)
    slot = tl.zeros((), tl.int32)
    while slot + 1 < slots:
        token = tl.load(candidates + slot + 1)
        inside = (token >= 0) & (token < vocabulary)
        at = tl.where(inside, token, 0)
        p = tl.load(target_probs + slot.to(tl.int64) * target_node + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(draft_probs + slot.to(tl.int64) * draft_node + at, mask=inside, other=0.0).to(tl.float32)
        coin = tl.load(uniform_samples + b * coin_stride + slot)
        proposed = (q > 0.0) & (q <= 1.0)
        following = slot + 1
        if BLOCKS:
            ratio = tl.minimum(tl.div_rn(prefix * p, tl.where(proposed, q, 1.0)), 1.0)
            prefix = tl.where(proposed & (ratio >= 0.0), ratio, 0.0)
            if coin < prefix:
                chance = prefix
                if (slot + 2 < slots) & (prefix < 1.0):
                    target_row = target_probs + following.to(tl.int64) * target_node
                    draft_row = draft_probs + following.to(tl.int64) * draft_node
                    rest = _residual_sum(
                        target_row, draft_row, prefix, vocabulary, -1, candidates, candidates, slots, False, True, BLOCK
                    ).to(tl.float32)
                    chance = tl.div_rn(rest, rest + 1.0 - prefix)
                if coin < chance:
                    accepted = slot + 1
                    scale = prefix
        else:
            if proposed & (coin * q < p):
                accepted = slot + 1
            else:
                following = tl.full((), NOWHERE, tl.int32) - 1
        slot = following
    last = tl.load(retrive_index)
    tl.store(accept_index + b * width, last)
    for step in range(accepted):
        tl.store(predicts + last, tl.load(candidates + step + 1), mask=(last >= 0) & (last < total))
        last = tl.load(retrive_index + step + 1)
        tl.store(accept_index + b * width + step + 1, last, mask=step + 1 < width)
    tl.store(accept_token_num + b, accepted)
    coin = tl.load(final_samples + b)
    target_row = target_probs + accepted.to(tl.int64) * target_node
    if accepted + 1 < slots:
        draft_row = draft_probs + accepted.to(tl.int64) * draft_node
        token = _draw(
            target_row, draft_row, scale, coin, vocabulary, -1, candidates, candidates, slots, False, True, BLOCK
        )
    else:
        token = _draw(
            target_row, draft_probs, 1.0, coin, vocabulary, -1, candidates, candidates, slots, False, False, BLOCK
        )
    tl.store(predicts + last, token, mask=(last >= 0) & (last < total))


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
    requests, slots = candidates.shape
    vocabulary = target_probs.shape[2]
    launch(
        _chain_kernel,
        (requests,),
        candidates,
        predicts, accept_index, accept_token_num, candidates, retrive_index, uniform_samples,
        uniform_samples_for_final_sampling, target_probs, draft_probs, *target_probs.stride()[:2],
        *draft_probs.stride()[:2], uniform_samples.stride(0), slots, accept_index.shape[1], vocabulary,
        requests * slots,
        BLOCKS=block_verification,
        BLOCK=block(vocabulary, BLOCK),
        num_warps=NUM_WARPS,
    )  # fmt: skip


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    outputs = "predicts *i32, accept_index *i32, accept_token_num *i32, candidates *i64, retrive_index *i64, "
    links = "retrive_next_token *i64, retrive_next_sibling *i64, "
    coins = "uniform_samples *fp32, final_samples *fp32, "
    strides = "target_request i32:16, target_node i32:16, draft_request i32:16, draft_node i32:16, "
    made = [
        case(
            "sgl_greedy", _greedy_kernel,
            f"{outputs}{links}target_predict *i64, nodes i32, width i32, total i32", 1,
        )
    ]  # fmt: skip
    for dtype, draft in (("fp32", True), ("bf16", False)):
        made.append(
            case(
                f"sgl_tree_{dtype}", _tree_kernel,
                f"{outputs}{links}{coins}target_probs *{dtype}, {f'draft_probs *{dtype}, ' if draft else ''}"
                f"threshold_single fp32, threshold_acc fp32, {strides}nodes i32, width i32, vocabulary i32:16, "
                "total i32", NUM_WARPS, DRAFT=draft, BLOCK=BLOCK,
            )
        )  # fmt: skip
    for dtype, blocks in (("fp32", False), ("bf16", True)):
        made.append(
            case(
                f"sgl_chain_{dtype}{'_blocks' if blocks else ''}", _chain_kernel,
                f"{outputs}{coins}target_probs *{dtype}, draft_probs *fp32, {strides}coin_stride i32, slots i32, "
                "width i32, vocabulary i32:16, total i32", NUM_WARPS, BLOCKS=blocks, BLOCK=BLOCK,
            )
        )  # fmt: skip
    return made
