"""Tree verification: one program walks the tree of one request and reads only the rows on the accepted path.

A row's tokens are compared by ``key``, the bits of |x| with x = (z - max z) / T <= 0: integers in the order of
decreasing x, so that the filters are thresholds on integers. The largest key that a filter keeps is found exactly, so
ties at a threshold share its fate: top_k by counting digits, top_p by bisection. Every sum over the vocabulary is one
of fp32 values in fp64, a few neighbours in fp32 first, in an order that only the vocabulary fixes. Where few tokens
pass top_k, or have the mass that top_p wants, they are gathered once, by ascending id, and what follows reads the list.

The law, the walk of each mode and the noise: law.py and reference.py.
"""
# In kernels, `if MODE == CHAIN:` decides at compile time and the next `if` at run time.
# ruff: noqa: SIM102, SIM108, SIM109
# The arguments of a Triton kernel have no Python type.
# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3kernels.spec_decode.triton_arithmetic import (
    FINAL_COIN,
    LARGEST,
    NODE_COIN,
    NOWHERE,
    block,
    case,
    coin,
    launch,
    race,
    race_of_four,
)
from m3kernels.spec_decode.types import LOGPROBS, MODES
from m3kernels.triton_compile import CompileCase

# Tokens per step of a pass, and warps: what stays in registers. A chain reads two rows.
PASS = {"greedy": (4096, 8), "target_only": (4096, 8), "chain": (2048, 16), "coupled": (4096, 8)}
AMD_WARPS = 8  # at most: a warp has 64 lanes there
FEW = 1024  # tokens that a list holds
CLIP = tl.constexpr(1e30)
GREEDY, TARGET_ONLY, CHAIN, COUPLED = (tl.constexpr(index) for index in range(4))
NONE, RAW, SAMPLING = (tl.constexpr(index) for index in range(3))


# -- a row ------------------------------------------------------------------------------------------------------------
@triton.jit
def _clean(row, grammar, v, inside):
    """z of tokens v: nan and forbidden tokens are -inf, as is everything outside."""
    z = tl.load(row + v, mask=inside, other=float("-inf")).to(tl.float32)
    z = tl.where(z > float("-inf"), tl.minimum(tl.maximum(z, -CLIP), CLIP), float("-inf"))
    if grammar is not None:
        word = tl.load(grammar + v // 32, mask=inside, other=0)
        z = tl.where(((word >> (v % 32)) & 1) == 1, z, float("-inf"))
    return z


@triton.jit
def _scaled(z, top, temperature):
    return tl.div_rn(z - top, temperature + tl.zeros_like(z))


@triton.jit
def _key(x):
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _tile(row, grammar, few, few_ids, count, top, temperature, start, vocabulary, BLOCK: tl.constexpr):
    """(tokens, x) of one step: of the list if it holds ``count`` >= 0 tokens, else of the row. Outside x is -inf."""
    at = start + tl.arange(0, BLOCK)
    v = at
    if count >= 0:
        x = tl.load(few + at, mask=at < count, other=float("-inf"))
        v = tl.load(few_ids + at, mask=at < count, other=-1)
    else:
        x = _scaled(_clean(row, grammar, at, at < vocabulary), top, temperature)
    return v, x


@triton.jit
def _lanes(w, BLOCK: tl.constexpr):
    """Sums of fp32 neighbours, in fp64."""
    return tl.sum(w.reshape(BLOCK // 8, 8), 1).to(tl.float64)


@triton.jit
def _maximum(row, grammar, vocabulary, BLOCK: tl.constexpr):
    """(max z, the first token that has it); -inf if no token is allowed."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.full((BLOCK,), NOWHERE, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        z = _clean(row, grammar, v, v < vocabulary)
        token = tl.where(z > best, v, token)
        best = tl.maximum(z, best)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, token, NOWHERE), 0)


@triton.jit
def _count(row, grammar, top, temperature, limit, vocabulary, BLOCK: tl.constexpr):
    """Tokens with a key of at most ``limit``."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        x = _scaled(_clean(row, grammar, v, v < vocabulary), top, temperature)
        total += (_key(x) <= limit).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _mass(row, grammar, few, few_ids, count, top, temperature, limit, vocabulary, BLOCK: tl.constexpr):
    """Sum of w over keys of at most ``limit``, fp64."""
    total = tl.zeros((BLOCK // 8,), tl.float64)
    for start in range(0, vocabulary if count < 0 else count, BLOCK):
        _, x = _tile(row, grammar, few, few_ids, count, top, temperature, start, vocabulary, BLOCK)
        total += _lanes(tl.where(_key(x) <= limit, tl.exp(x), 0.0), BLOCK)
    return tl.sum(total, 0)


@triton.jit
def _digits(row, grammar, top, temperature, level, prefix, vocabulary, BLOCK: tl.constexpr):
    """How many finite keys have each value of 11 bits from bit 20 on (level 0), or of the next 10, or of the last 10.

    Levels 1 and 2 count the keys whose bits above are ``prefix``; the other keys fall into bin 2047.
    """
    shift = 20 - 10 * level
    counts = tl.zeros((2048,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        v = start + tl.arange(0, BLOCK)
        key = _key(_scaled(_clean(row, grammar, v, v < vocabulary), top, temperature))
        digit = (key >> shift) & tl.where(level == 0, 2047, 1023)
        counted = (key <= LARGEST) & ((level == 0) | ((key >> tl.minimum(shift + 10, 30)) == prefix))
        counts += tl.histogram(tl.where(counted, digit, 2047), 2048)
    return tl.where(tl.arange(0, 2048) == 2047, 0, counts)


@triton.jit
def _top_k_limit(row, grammar, top, temperature, k, vocabulary, BLOCK: tl.constexpr):
    """Key of the k-th largest x, at most LARGEST: digit by digit."""
    prefix = tl.zeros((), tl.int32)
    wanted = k
    for level in range(3):
        counts = _digits(row, grammar, top, temperature, level, prefix, vocabulary, BLOCK)
        upto = tl.cumsum(counts, 0)
        digit = tl.minimum(tl.sum((upto < wanted).to(tl.int32), 0), tl.where(level == 0, 2047, 1023))
        wanted -= tl.sum(tl.where(tl.arange(0, 2048) < digit, counts, 0), 0)
        prefix = (prefix << 10) | digit
    return tl.minimum(prefix, LARGEST)


@triton.jit
def _few_limit(row, grammar, top, temperature, vocabulary, FEW: tl.constexpr, BLOCK: tl.constexpr):
    """A limit that at most FEW keys keep, by their leading digit; -1 if the first digit has more."""
    upto = tl.cumsum(_digits(row, grammar, top, temperature, 0, 0, vocabulary, BLOCK), 0)
    return tl.minimum((tl.sum((upto <= FEW).to(tl.int32), 0) << 20) - 1, LARGEST)


@triton.jit
def _top_p_limit_of_few(few, count, limit, wanted, FEW: tl.constexpr):
    """As ``_top_p_limit``, of a list that lies in registers."""
    at = tl.arange(0, FEW)
    x = tl.load(few + at, mask=at < count, other=float("-inf"))
    key = _key(x)
    w = tl.exp(x).to(tl.float64)
    low = tl.full((), 0, tl.int32)
    high = limit
    if tl.sum(tl.where(key < limit, w, 0.0), 0) < wanted:
        low = limit
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum(tl.where(key < middle, w, 0.0), 0) < wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _top_p_limit(row, grammar, few, few_ids, top, temperature, limit, wanted, vocabulary, BLOCK: tl.constexpr):
    """The largest key of at most ``limit`` above which, strictly, lies less than the mass ``wanted``."""
    low = tl.full((), 0, tl.int32)
    high = limit
    if _mass(row, grammar, few, few_ids, -1, top, temperature, limit - 1, vocabulary, BLOCK) < wanted:
        low = limit
    while high - low > 1:
        middle = low + (high - low) // 2
        if _mass(row, grammar, few, few_ids, -1, top, temperature, middle - 1, vocabulary, BLOCK) < wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _min_p_limit(min_p):
    """The largest key with x >= log(min_p); min_p above 0."""
    most = -tl.log(min_p.to(tl.float64))
    nearest = most.to(tl.float32)
    key = _key(nearest)
    return tl.where(nearest.to(tl.float64) > most, key - 1, key)


@triton.jit
def _gather(row, grammar, few, few_ids, top, temperature, limit, vocabulary, BLOCK: tl.constexpr):
    """Write the tokens with a key of at most ``limit`` to the list, by ascending id, and return their number."""
    found = 0
    for start in range(0, vocabulary, BLOCK):
        v, x = _tile(row, grammar, few, few_ids, -1, top, temperature, start, vocabulary, BLOCK)
        taken = (_key(x) <= limit).to(tl.int32)
        number = tl.sum(taken, 0)
        if number > 0:
            at = found + tl.cumsum(taken, 0) - 1
            tl.store(few + at, x, mask=taken == 1)
            tl.store(few_ids + at, v, mask=taken == 1)
        found += number
    tl.debug_barrier()
    return found


# -- drawing ----------------------------------------------------------------------------------------------------------
@triton.jit
def _race_winner(
    row, grammar, few, few_ids, count, top, temperature, limit, seed, position, vocabulary, BLOCK: tl.constexpr
):
    """The kept token with the largest x - log E, the lowest id of several."""
    FOURS: tl.constexpr = BLOCK // 4
    best = float("-inf")
    winner = tl.full((), NOWHERE, tl.int32)
    if count >= 0:
        for start in range(0, count, BLOCK):
            v, x = _tile(row, grammar, few, few_ids, count, top, temperature, start, vocabulary, BLOCK)
            score = tl.where(_key(x) <= limit, x - race(seed, position, v.to(tl.int64)), float("-inf"))
            highest = tl.max(score, 0)
            if highest > best:
                winner = tl.min(tl.where(score == highest, v, NOWHERE), 0)
                best = highest
    else:
        for start in range(0, vocabulary, BLOCK):
            four = start // 4 + tl.arange(0, FOURS)
            v = four[:, None] * 4 + tl.arange(0, 4)[None, :]
            x = _scaled(_clean(row, grammar, v, v < vocabulary), top, temperature)
            kept = _key(x) <= limit
            if tl.max(tl.max(kept.to(tl.int32), 1), 0) > 0:
                score = tl.where(kept, x - race_of_four(seed, position, four), float("-inf"))
                highest = tl.max(tl.max(score, 1), 0)
                if highest > best:
                    winner = tl.min(tl.min(tl.where(score == highest, v, NOWHERE), 1), 0)
                    best = highest
    return winner


@triton.jit
def _younger(links, at, nodes):
    """The node that ``links`` has at ``at``: larger than ``at``, or -1. Every walk along links ends."""
    node = tl.load(links + at)
    return tl.where((node > at) & (node < nodes), node, -1).to(tl.int32)


@triton.jit
def _weights(
    v, x, limit, total, without, candidates, next_sibling, draft_row, nodes, vocabulary, start, listed,
    MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Mass of the tokens of one step: w where kept; ``without`` >= 0: less what the children from it on stand for."""
    w = tl.where(_key(x) <= limit, tl.exp(x), 0.0)
    if MODE == TARGET_ONLY:
        child = without
        while child >= 0:
            token = tl.load(candidates + child)
            if listed | ((token >= start) & (token < start + BLOCK)):
                w = tl.where(v == token, 0.0, w)
            child = _younger(next_sibling, child, nodes)
    if MODE == CHAIN:
        if without >= 0:
            q = tl.load(draft_row + v, mask=(v >= 0) & (v < vocabulary), other=0.0)
            q = tl.where((q >= 0.0) & (q <= 1.0), q, 0.0)
            w = tl.maximum(tl.div_rn(w, total.to(tl.float32) + tl.zeros_like(w)) - q, 0.0)
    return w


@triton.jit
def _invert(
    row, grammar, few, few_ids, count, top, temperature, limit, total, without, candidates, next_sibling, draft_row,
    nodes, vocabulary, u, MODE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First token whose cumulative mass exceeds u of the whole; the last with mass if rounding leaves none; or -1."""
    steps = vocabulary if count < 0 else count
    lanes = tl.zeros((BLOCK // 8,), tl.float64)
    for start in range(0, steps, BLOCK):
        v, x = _tile(row, grammar, few, few_ids, count, top, temperature, start, vocabulary, BLOCK)
        w = _weights(
            v, x, limit, total, without, candidates, next_sibling, draft_row, nodes, vocabulary, start, count >= 0,
            MODE, BLOCK,
        )  # fmt: skip
        lanes += _lanes(w, BLOCK)
    wanted = tl.sum(lanes, 0) * u
    token = tl.full((), -1, tl.int32)
    upto = tl.zeros((), tl.float64)
    start = 0
    while (start < steps) & (upto <= wanted):
        v, x = _tile(row, grammar, few, few_ids, count, top, temperature, start, vocabulary, BLOCK)
        w = _weights(
            v, x, limit, total, without, candidates, next_sibling, draft_row, nodes, vocabulary, start, count >= 0,
            MODE, BLOCK,
        )  # fmt: skip
        here = tl.sum(_lanes(w, BLOCK), 0)
        if here > 0.0:
            token = tl.max(tl.where(w > 0.0, v, -1), 0)
            if upto + here > wanted:
                beyond = (upto + tl.cumsum(w.to(tl.float64), 0) > wanted) & (w > 0.0)
                token = tl.minimum(token, tl.min(tl.where(beyond, v, NOWHERE), 0))
        upto += here
        start += BLOCK
    return token


# Grid: (requests). A program walks one tree from its root; at each node it passes over that node's row: once for the
# maximum, 5 times for top_k, as often for top_p alone (30 times where more than FEW tokens make up its mass), at most
# three times to draw; after a filter that leaves few tokens, over their list instead. Reads rows on the path, writes
# the S slots of its request. Links that would lead back are taken as ends, tokens outside the vocabulary are never
# accepted: nothing in memory can keep it from ending.
@triton.jit(do_not_specialize=["nodes", "width"])
def _verify_kernel(
    logits,
    candidates,
    next_token,
    next_sibling,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    coins,
    final_coins,
    draft_probs,
    grammar_bits,
    few,
    few_ids,
    tokens,
    accept_index,
    accept_length,
    token_logprobs,
    logits_request,
    logits_node,
    draft_request,
    draft_node,
    grammar_request,
    grammar_node,
    nodes,
    vocabulary,
    width,
    MODE: tl.constexpr,
    LOGPROB: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    candidates += b * nodes
    next_token += b * nodes
    next_sibling += b * nodes
    few += b * FEW
    few_ids += b * FEW
    tokens += b * width
    accept_index += b * width
    heat = tl.load(temperature + b)
    greedy = heat == 0.0
    first_position = tl.zeros((), tl.int64)
    key = tl.zeros((), tl.int64)
    if seed is not None:
        key = tl.load(seed + b)
    if position is not None:
        first_position = tl.load(position + b)

    node = tl.zeros((), tl.int32)
    depth = tl.zeros((), tl.int32)
    going = True
    while going:
        row = logits + b * logits_request + node.to(tl.int64) * logits_node
        grammar = grammar_bits
        if grammar_bits is not None:
            grammar = grammar_bits + b * grammar_request + node.to(tl.int64) * grammar_node
        draft_row = draft_probs
        if draft_probs is not None:
            draft_row = draft_probs + b * draft_request + node.to(tl.int64) * draft_node
        first_child = tl.full((), -1, tl.int32)
        if depth + 1 < width:
            first_child = _younger(next_token, node, nodes)

        top, token = _maximum(row, grammar, vocabulary, BLOCK)
        accepted = tl.full((), -1, tl.int32)
        logprob = tl.zeros((), tl.float64)
        if top == float("-inf"):
            token = tl.full((), -1, tl.int32)
            first_child = tl.full((), -1, tl.int32)
        elif (MODE != GREEDY) and (not greedy):
            limit = tl.full((), LARGEST, tl.int32)
            count = tl.full((), -1, tl.int32)
            if top_k is not None:
                k = tl.load(top_k + b)
                if (k > 0) & (k < vocabulary):
                    limit = _top_k_limit(row, grammar, top, heat, k, vocabulary, BLOCK)
                    if _count(row, grammar, top, heat, limit, vocabulary, BLOCK) <= FEW:
                        count = _gather(row, grammar, few, few_ids, top, heat, limit, vocabulary, BLOCK)
            if top_p is not None:
                share = tl.load(top_p + b)
                if share < 1.0:
                    wanted = share.to(tl.float64) * _mass(
                        row, grammar, few, few_ids, count, top, heat, limit, vocabulary, BLOCK
                    )
                    if count < 0:
                        near = tl.minimum(_few_limit(row, grammar, top, heat, vocabulary, FEW, BLOCK), limit)
                        if _mass(row, grammar, few, few_ids, -1, top, heat, near, vocabulary, BLOCK) >= wanted:
                            limit = near
                            count = _gather(row, grammar, few, few_ids, top, heat, limit, vocabulary, BLOCK)
                    if count >= 0:
                        limit = _top_p_limit_of_few(few, count, limit, wanted, FEW)
                    else:
                        limit = _top_p_limit(row, grammar, few, few_ids, top, heat, limit, wanted, vocabulary, BLOCK)
            if min_p is not None:
                least = tl.load(min_p + b)
                if least > 0.0:
                    limit = tl.minimum(limit, _min_p_limit(least))

            total = tl.zeros((), tl.float64)
            if (MODE != COUPLED) or (LOGPROB == SAMPLING):
                total = _mass(row, grammar, few, few_ids, count, top, heat, limit, vocabulary, BLOCK)
            here = first_position + depth
            if MODE == COUPLED:
                token = _race_winner(row, grammar, few, few_ids, count, top, heat, limit, key, here, vocabulary, BLOCK)
            else:
                if coins is not None:
                    u = tl.load(coins + b * nodes + node)
                else:
                    u = coin(key, here, NODE_COIN)
                mass = tl.zeros((), tl.float64)
                child = first_child
                while child >= 0:
                    proposed = tl.load(candidates + child)
                    known = (proposed >= 0) & (proposed < vocabulary)
                    if MODE == TARGET_ONLY:
                        elder = first_child
                        while (elder >= 0) & (elder < child):
                            known = known & (tl.load(candidates + elder) != proposed)
                            elder = _younger(next_sibling, elder, nodes)
                    x = _scaled(_clean(row, grammar, tl.where(known, proposed, 0), known), top, heat)
                    p = tl.where(_key(x) <= limit, tl.exp(x).to(tl.float64) / total, 0.0)
                    if MODE == TARGET_ONLY:
                        mass += p
                        yes = (p > 0.0) & (u < mass)
                        following = _younger(next_sibling, child, nodes)
                    else:
                        q = tl.load(draft_row + tl.where(known, proposed, 0), mask=known, other=0.0)
                        yes = (q > 0.0) & (q <= 1.0) & (u * q.to(tl.float64) < p)
                        following = tl.full((), -1, tl.int32)
                    if yes:
                        accepted = child
                        token = proposed.to(tl.int32)
                        following = tl.full((), -1, tl.int32)
                    child = following
                if accepted < 0:
                    if final_coins is not None:
                        u = tl.load(final_coins + b)
                    else:
                        u = coin(key, here, FINAL_COIN)
                    without = first_child
                    token = tl.full((), -1, tl.int32)
                    while (token < 0) & (without >= -1):  # without mass beside the children's: the law itself
                        token = _invert(
                            row, grammar, few, few_ids, count, top, heat, limit, total, without, candidates,
                            next_sibling, draft_row, nodes, vocabulary, u, MODE, BLOCK,
                        )  # fmt: skip
                        without = tl.where(without >= 0, -1, -2).to(tl.int32)
            if LOGPROB == SAMPLING:
                x = _scaled(_clean(row, grammar, token, token >= 0), top, heat)
                logprob = x.to(tl.float64) - tl.log(total)
        if (MODE == GREEDY) or (MODE == COUPLED) or greedy:
            child = first_child
            while child >= 0:
                following = _younger(next_sibling, child, nodes)
                if tl.load(candidates + child) == token:
                    accepted = child
                    following = tl.full((), -1, tl.int32)
                child = following
        if LOGPROB == RAW:
            if token >= 0:
                highest, _ = _maximum(row, None, vocabulary, BLOCK)
                whole = _mass(row, None, few, few_ids, -1, highest, 1.0, LARGEST, vocabulary, BLOCK)
                z = _clean(row, None, token, token >= 0)
                logprob = z.to(tl.float64) - highest.to(tl.float64) - tl.log(whole)

        tl.store(tokens + depth, token.to(tl.int64))
        tl.store(accept_index + depth, node)
        if LOGPROB != NONE:
            tl.store(token_logprobs + b * width + depth, logprob.to(tl.float32))
        going = accepted >= 0
        if going:
            node = accepted
            depth += 1

    tl.store(accept_length + b, depth)
    for start in range(0, width, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        unused = (slot > depth) & (slot < width)
        tl.store(tokens + slot, tl.full((BLOCK_S,), -1, tl.int64), mask=unused)
        tl.store(accept_index + slot, tl.full((BLOCK_S,), -1, tl.int32), mask=unused)
        if LOGPROB != NONE:
            tl.store(token_logprobs + b * width + slot, tl.zeros((BLOCK_S,), tl.float32), mask=unused)


def warps(mode: str, *, amd: bool) -> int:
    return min(PASS[mode][1], AMD_WARPS) if amd else PASS[mode][1]


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
    requests, nodes, vocabulary = logits.shape
    device = logits.device
    tokens = torch.empty(requests, width, dtype=torch.int64, device=device)
    accept_index = torch.empty(requests, width, dtype=torch.int32, device=device)
    accept_length = torch.empty(requests, dtype=torch.int32, device=device)
    asked = logprobs != "none"
    token_logprobs = torch.empty(requests, width if asked else 0, dtype=torch.float32, device=device)
    few = torch.empty(requests, FEW, dtype=torch.float32, device=device)
    few_ids = torch.empty(requests, FEW, dtype=torch.int32, device=device)
    rows = [(0, 0) if tensor is None else tensor.stride()[:2] for tensor in (logits, draft_probs, grammar_bits)]
    drawn = mode in ("target_only", "chain")
    launch(
        _verify_kernel,
        (requests,),
        logits,
        logits, candidates, next_token, next_sibling, temperature, top_k, top_p, min_p, seed, position,
        coins if drawn else None, final_coins if drawn else None, draft_probs if mode == "chain" else None,
        grammar_bits, few, few_ids, tokens, accept_index, accept_length, token_logprobs if asked else None,
        *(stride for pair in rows for stride in pair), nodes, vocabulary, width,
        MODE=MODES.index(mode),
        LOGPROB=LOGPROBS.index(logprobs),
        BLOCK=block(vocabulary, PASS[mode][0]),
        FEW=FEW,
        BLOCK_S=block(width, 64),
        num_warps=warps(mode, amd=torch.version.hip is not None) if vocabulary > 1024 else 4,
    )  # fmt: skip
    return tokens, accept_index, accept_length, token_logprobs


# -- what is compiled without a GPU -----------------------------------------------------------------------------------
def cases(target: str) -> list[CompileCase]:
    """Each mode with everything it may be given, on 16-bit and fp32 logits, and plain."""
    filters = "top_k *i32, top_p *fp32, min_p *fp32, "
    noise, coins = "seed *i64, position *i64, ", "coins *fp64, final_coins *fp64, "
    grammar, draft = "grammar_bits *i32, ", "draft_probs *fp32, "
    return [
        verify_case(target, "bf16", "greedy", grammar, "raw"),
        verify_case(target, "bf16", "target_only", filters + noise + grammar, "sampling"),
        verify_case(target, "fp32", "target_only", coins),
        verify_case(target, "bf16", "chain", filters + noise + grammar + draft, "raw"),
        verify_case(target, "bf16", "coupled", filters + noise + grammar, "sampling"),
        verify_case(target, "fp16", "coupled", noise),
    ]


def verify_case(target: str, dtype: str, mode: str, given: str, logprobs: str = "none") -> CompileCase:
    return case(
        f"verify_{mode}_{dtype}{'_full' if logprobs != 'none' else ''}",
        _verify_kernel,
        f"logits *{dtype}, candidates *i64, next_token *i64, next_sibling *i64, temperature *fp32, {given}few *fp32, "
        f"few_ids *i32, tokens *i64, accept_index *i32, accept_length *i32, "
        f"{'token_logprobs *fp32, ' if logprobs != 'none' else ''}logits_request i32:16, logits_node i32:16, "
        "draft_request i32:16, draft_node i32:16, grammar_request i32:16, grammar_node i32:16, nodes i32, "
        "vocabulary i32:16, width i32",
        warps(mode, amd=target.startswith("gfx")),
        MODE=MODES.index(mode),
        LOGPROB=LOGPROBS.index(logprobs),
        BLOCK=PASS[mode][0],
        FEW=FEW,
        BLOCK_S=16,
    )
