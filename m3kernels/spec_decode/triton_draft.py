"""One drafting step: log-softmax, the best k of each row and the best k of all path scores, in two launches.

A candidate is one int64, ``ordered(value) << 32 | (2^31 - 1 - index)``: distinct for every index, so the k best are k
maxima, each below the last, and equal values come in ascending order of index. Values are logits, or logits minus log E
of the shared noise; the constant that makes them log-probabilities is subtracted last, in fp64.
"""
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.triton_arithmetic import block, case, launch, ordered, race, unordered
from m3kernels.triton_compile import CompileCase

SPAN = 4096  # ids per program
MOST = 128  # tokens kept of a row
CANDIDATES = 4096  # looked at together when spans are merged
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _candidate(value, index):
    return (ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _value(candidate):
    return unordered((candidate >> 32).to(tl.int32))


@triton.jit
def _index(candidate):
    return 0x7FFFFFFF - (candidate & 0xFFFFFFFF)


# Grid: (B * F * spans), spans fastest. A program owns BLOCK ids of one row: reads them once, and from registers finds
# their maximum, the sum of exp and the k best candidates, in order, for ``statistics`` (rows, spans, 2) and ``best``
# (rows, spans, k).
@triton.jit(do_not_specialize=["spans", "frontier"])
def _span_kernel(
    logits,
    d2t,
    seed,
    position,
    statistics,
    best,
    request_stride,
    row_stride,
    frontier,
    vocabulary,
    spans,
    k,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // spans).to(tl.int64)
    span = tl.program_id(0) % spans
    b = row // frontier
    v = span * BLOCK + tl.arange(0, BLOCK)
    inside = v < vocabulary
    at = logits + b * request_stride + (row - b * frontier) * row_stride
    z = tl.load(at + v, mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z > float("-inf"), z, float("-inf"))
    if seed is not None:
        token = v.to(tl.int64)
        if d2t is not None:
            token += tl.load(d2t + v, mask=inside, other=0)
        z -= race(tl.load(seed + b), tl.load(position + b), token)
    top = tl.max(z, 0)
    w = tl.where(z > float("-inf"), tl.exp(z - top), 0.0)
    total = tl.sum(tl.sum(w.reshape(BLOCK // 8, 8), 1).to(tl.float64), 0)
    slot = row * spans + span
    tl.store(statistics + slot * 2, top)
    tl.store(statistics + slot * 2 + 1, total.to(tl.float32))
    rest = tl.where(inside, _candidate(z, v), NOTHING)
    for j in range(k):
        leader = tl.max(rest, 0)
        tl.store(best + slot * k + j, leader)
        rest = tl.where(rest == leader, NOTHING, rest)


# Grid: (requests). A program merges the spans of its rows, BLOCK_F rows at a time, in order: tokens and path scores of
# each row's k best; then the k best of all F * k.
@triton.jit(do_not_specialize=["spans", "frontier", "parent_base"])
def _merge_kernel(
    statistics,
    best,
    scores,
    d2t,
    tokens,
    cum_scores,
    next_ids,
    next_scores,
    src_row,
    parents,
    frontier,
    spans,
    k,
    parent_base,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_FK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    for first in range(0, frontier, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        real = f < frontier
        row = b * frontier + f
        span = tl.arange(0, BLOCK_S)
        mask = real[:, None] & (span < spans)[None, :]
        at = statistics + (row[:, None] * spans + span[None, :]) * 2
        tops = tl.load(at, mask=mask, other=float("-inf"))
        sums = tl.load(at + 1, mask=mask, other=0.0)
        top = tl.max(tops, 1)
        shifts = tl.where(tops > float("-inf"), tl.exp(tops - top[:, None]), 0.0)
        total = tl.sum((sums * shifts).to(tl.float64), 1)
        score = tl.load(scores + row, mask=real, other=0.0).to(tl.float64)
        base = score - top.to(tl.float64) - tl.log(total)
        c = tl.arange(0, BLOCK_C)
        mask = real[:, None] & (c < spans * k)[None, :]
        rest = tl.load(best + row[:, None] * (spans * k) + c[None, :], mask=mask, other=NOTHING)
        for j in range(k):
            leader = tl.max(rest, 1)
            rest = tl.where(rest == leader[:, None], NOTHING, rest)
            token = _index(leader)
            value = _value(leader)
            cum = tl.where(value > float("-inf"), value.to(tl.float64) + base, float("-inf"))
            if d2t is not None:
                token += tl.load(d2t + token, mask=real, other=0)
            tl.store(tokens + row * k + j, token, mask=real)
            tl.store(cum_scores + row * k + j, cum.to(tl.float32), mask=real)
    tl.debug_barrier()
    flat = tl.arange(0, BLOCK_FK)
    inside = flat < frontier * k
    cum = tl.load(cum_scores + b * frontier * k + flat, mask=inside, other=0.0)
    cum = tl.where(cum == cum, cum, float("-inf"))
    rest = tl.where(inside, _candidate(cum, flat), NOTHING)
    for j in range(k):
        leader = tl.max(rest, 0)
        rest = tl.where(rest == leader, NOTHING, rest)
        chosen = _index(leader)
        tl.store(next_ids + b * k + j, tl.load(tokens + b * frontier * k + chosen))
        tl.store(next_scores + b * k + j, tl.load(cum_scores + b * frontier * k + chosen))
        tl.store(src_row + b * k + j, (chosen // k).to(tl.int32))
        tl.store(parents + b * k + j, parent_base + chosen)


def draft_topk(
    logits: Tensor, scores: Tensor, d2t: Tensor | None, seed: Tensor | None, position: Tensor | None, k: int, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    requests, frontier, vocabulary = logits.shape
    spans = triton.cdiv(vocabulary, SPAN)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    statistics = empty(requests, frontier, spans, 2, dtype=torch.float32)
    best = empty(requests, frontier, spans, k, dtype=torch.int64)
    tokens = empty(requests, frontier, k, dtype=torch.int64)
    cum_scores = empty(requests, frontier, k, dtype=torch.float32)
    next_ids, parents = empty(requests, k, dtype=torch.int64), empty(requests, k, dtype=torch.int64)
    next_scores = empty(requests, k, dtype=torch.float32)
    src_row = empty(requests, k, dtype=torch.int32)
    noisy = seed is not None and position is not None
    launch(
        _span_kernel,
        (requests * frontier * spans,),
        logits,
        logits, d2t, seed if noisy else None, position if noisy else None, statistics, best,
        logits.stride(0), logits.stride(1), frontier, vocabulary, spans, k,
        BLOCK=block(vocabulary, SPAN),
        num_warps=8 if vocabulary > 1024 else 4,
    )  # fmt: skip
    block_c = block(spans * k, 1 << 20)
    launch(
        _merge_kernel,
        (requests,),
        logits,
        statistics, best, scores, d2t, tokens, cum_scores, next_ids, next_scores, src_row, parents,
        frontier, spans, k, 0 if step == 0 else k + (step - 1) * k * k,
        BLOCK_F=block(frontier, max(1, CANDIDATES // block_c), 1),
        BLOCK_C=block_c,
        BLOCK_S=block(spans, 1 << 20),
        BLOCK_FK=block(frontier * k, 1 << 20),
        num_warps=8 if block_c > 256 else 4,
    )  # fmt: skip
    return tokens, cum_scores, next_ids, next_scores, src_row, parents


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    """A vocabulary of 151936, k of 8; with noise and a table of a reduced vocabulary, and without."""
    return [
        span_case("bf16", ""),
        span_case("fp32", "d2t *i64, seed *i64, position *i64, "),
        merge_case("", 512, 8),
        merge_case("d2t *i64, ", 4096, 1),
    ]


def span_case(dtype: str, given: str) -> CompileCase:
    return case(
        f"draft_span_{dtype}{'_noise' if given else ''}",
        _span_kernel,
        f"logits *{dtype}, {given}statistics *fp32, best *i64, request_stride i32:16, row_stride i32:16, frontier i32, "
        "vocabulary i32:16, spans i32, k i32",
        8,
        BLOCK=SPAN,
    )


def merge_case(given: str, block_c: int, block_f: int) -> CompileCase:
    return case(
        f"draft_merge_{block_c}",
        _merge_kernel,
        f"statistics *fp32, best *i64, scores *fp32, {given}tokens *i64, cum_scores *fp32, next_ids *i64, "
        "next_scores *fp32, src_row *i32, parents *i64, frontier i32, spans i32, k i32, parent_base i32",
        8,
        BLOCK_F=block_f,
        BLOCK_C=block_c,
        BLOCK_S=64,
        BLOCK_FK=64 if block_c == 512 else 4096,
    )
