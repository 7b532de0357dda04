"""The Triton kernels of spec_decode: run on a GPU, or interpreted where there is none, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_device import here, there
from triton_tiles import DEVICE, in_triton

from m3kernels.spec_decode import law, reference
from m3kernels.spec_decode.reference import make_inputs
from m3kernels.testing import bitwise_equal, uninitialized_is_nan

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

_triton = pytest.importorskip("m3kernels.spec_decode._triton")
arithmetic = pytest.importorskip("m3kernels.spec_decode.triton_arithmetic")

# The interpreter computes both sides of a select: what is masked off meets the branch not taken.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


# -- noise ------------------------------------------------------------------------------------------------------------
@triton.jit
def _noise_kernel(seed, position, tokens, out, race, fours, coins, N: tl.constexpr):
    i = tl.arange(0, N)
    key, at = tl.load(seed), tl.load(position)
    o0, o1, o2, o3 = arithmetic.words(key, at, i, 2)
    tl.store(out + i * 4, o0.to(tl.int64))
    tl.store(out + i * 4 + 1, o1.to(tl.int64))
    tl.store(out + i * 4 + 2, o2.to(tl.int64))
    tl.store(out + i * 4 + 3, o3.to(tl.int64))
    tl.store(race + i, arithmetic.race(key, at, tl.load(tokens + i)))
    tl.store(fours + i[:, None] * 4 + tl.arange(0, 4)[None, :], arithmetic.race_of_four(key, at, i))
    tl.store(coins, arithmetic.coin(key, at, 2))
    tl.store(coins + 1, arithmetic.coin(key, at, 3))


@in_triton
@pytest.mark.parametrize(("seed", "position"), ((0, 0), (-1, 2**31 + 5), (-(2**63), 2**40 + 3)))
def test_noise_is_that_of_the_law(seed: int, position: int) -> None:
    key, at = torch.tensor([seed]), torch.tensor([position])
    tokens = torch.tensor([0, 1, 2, 3, 7, 151935, 2**31 - 1, 128256])
    words = torch.empty(8, 4, dtype=torch.int64, device=DEVICE)
    race, fours = torch.empty(8, device=DEVICE), torch.empty(8, 4, device=DEVICE)
    coins = torch.empty(2, dtype=torch.float64, device=DEVICE)
    _noise_kernel[(1,)](*there([key, at, tokens]), words, race, fours, coins, N=8)
    mask = 0xFFFFFFFF
    counter = (torch.arange(8), at & mask, (at >> 32) & mask, torch.tensor([2]))
    wanted = torch.stack(torch.broadcast_tensors(*law.philox((key & mask, (key >> 32) & mask), counter)), 1)
    assert torch.equal(words.cpu(), wanted)
    torch.testing.assert_close(race.cpu().double(), law.race(key, at, tokens).log(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        fours.cpu().double(), law.race(key, at, torch.arange(32)).log().view(8, 4), rtol=0, atol=1e-6
    )
    assert torch.equal(coins.cpu(), torch.cat([law.coin(key, at, law.NODE_COIN), law.coin(key, at, law.FINAL_COIN)]))


@triton.jit
def _log_kernel(words, refined, out, N: tl.constexpr):
    i = tl.arange(0, N)
    word = tl.load(words + i).to(tl.uint32)
    tl.store(out + i, arithmetic.log_exponential(word, tl.load(refined + i).to(tl.uint32)))


@in_triton
def test_noise_is_accurate_at_both_ends() -> None:
    words = torch.tensor(
        [0, 0, 1, 255, 256, 257, 2**16, 2**31 - 1, 2**31, 2**32 - 257, 2**32 - 2, 2**32 - 1, 3 * 2**30, 7, 8, 9]
    )
    refined = torch.tensor([0, 2**32 - 1] + [5] * 14)
    out = torch.empty(16, device=DEVICE)
    _log_kernel[(1,)](*there([words, refined]), out, N=16)
    u = (words.double() + 0.5) * 2.0**-32
    u = torch.where(words < 256, (words + (refined + 0.5) * 2.0**-32) * 2.0**-32, u).clamp(max=1 - 2.0**-24)
    torch.testing.assert_close(out.cpu().double(), (-torch.log1p(-u)).log(), rtol=2e-7, atol=5e-7)


# -- tree_verify ------------------------------------------------------------------------------------------------------
def verify_inputs(
    mode: str,
    *,
    requests: int = 3,
    nodes: int = 8,
    vocabulary: int = 40,
    width: int = 4,
    filters: bool = False,
    coins: bool = False,
    grammar: bool = False,
    logprobs: str = "none",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    tree = make_inputs(requests, nodes, vocabulary, sharpness=1.5, dtype=dtype)
    ks = torch.tensor([0, 7, vocabulary // 2, 3])[:requests].int()
    temperature = torch.full((requests,), 0.8)
    temperature[-1] = 0.0
    return {
        **{name: tree[name] for name in ("logits", "candidates", "next_token", "next_sibling")},
        "temperature": temperature,
        "top_k": ks if filters else None,
        "top_p": torch.tensor([0.9, 1.0, 0.6, 0.5])[:requests] if filters else None,
        "min_p": torch.tensor([0.05, 0.0, 0.2, 0.1])[:requests] if filters else None,
        "seed": torch.arange(requests) * 7919 - 1,
        "position": torch.arange(requests) * 2**33 + 5,
        "coins": torch.rand(requests, nodes).double() if coins else None,
        "final_coins": torch.rand(requests).double() if coins else None,
        "draft_probs": torch.randn(requests, nodes, vocabulary).softmax(-1) if mode == "chain" else None,
        "grammar_bits": torch.randint(-(2**31), 2**31, (requests, nodes, -(-vocabulary // 32))).int()
        if grammar
        else None,
        "mode": mode,
        "width": width,
        "logprobs": logprobs,
    }


def check_verified(call: dict[str, Any]) -> None:
    with uninitialized_is_nan():
        got = here(_triton.tree_verify(*there(list(call.values()))))
    wanted = reference.tree_verify(**call)
    for ours, truth in zip(got[:3], wanted[:3], strict=True):
        assert torch.equal(ours, truth)
    torch.testing.assert_close(got[3], wanted[3], rtol=0, atol=2e-6)


VERIFY: dict[str, dict[str, Any]] = {
    "plain": dict(coins=True, width=3),
    "filters": dict(filters=True, logprobs="sampling"),
    "grammar_fp16": dict(grammar=True, dtype=torch.float16, logprobs="raw", requests=2),
    "one_token": dict(vocabulary=1, nodes=1, width=1, logprobs="sampling"),
}


@in_triton
@pytest.mark.parametrize("mode", ("greedy", "target_only", "chain", "coupled"))
@pytest.mark.parametrize("case", VERIFY)
def test_verify(mode: str, case: str) -> None:
    check_verified(verify_inputs(mode, **VERIFY[case]))


@in_triton
@pytest.mark.parametrize("mode", ("target_only", "chain", "coupled"))
def test_verify_with_ties_and_logits_of_every_kind(mode: str) -> None:
    call = verify_inputs(mode, filters=True, coins=True)
    call["logits"] = call["logits"].round()
    call["logits"][:, :, 3] = torch.nan
    call["logits"][:, :, 5] = -torch.inf
    call["logits"][0, :, 6] = torch.finfo(torch.float32).min
    call["logits"][1, :, 7] = torch.inf
    check_verified(call)


@in_triton
@pytest.mark.parametrize("mode", ("greedy", "target_only", "coupled"))
def test_verify_where_nothing_is_allowed(mode: str) -> None:
    call = verify_inputs(mode, coins=True, logprobs="raw")
    call["logits"][0, 0] = -torch.inf
    call["logits"][1] = torch.nan
    check_verified(call)


@in_triton
def test_verify_with_fewer_tokens_than_top_k() -> None:
    call = verify_inputs("coupled", filters=True, logprobs="sampling")
    call["logits"][..., 4:] = -torch.inf
    call["temperature"].fill_(1.0)
    check_verified(call)


@in_triton
def test_verify_with_siblings_that_are_alike_and_tokens_of_nothing() -> None:
    call = verify_inputs("target_only", requests=4, coins=True)
    call["candidates"][:, 2:5] = call["candidates"][:, 1:2]
    call["candidates"][:, 6] = -1
    call["candidates"][:, 7] = 2**40
    check_verified(call)


@in_triton
@pytest.mark.parametrize("u", (0.0, 1 - 2.0**-53))
@pytest.mark.parametrize("mode", ("target_only", "chain"))
def test_verify_at_the_ends_of_the_coins(mode: str, u: float) -> None:
    call = verify_inputs(mode, coins=True, requests=2)
    call["coins"].fill_(u)
    call["final_coins"].fill_(u)
    check_verified(call)


@in_triton
def test_verify_when_the_children_have_all_the_mass() -> None:
    call = verify_inputs("target_only", requests=2, coins=True, logprobs="sampling")
    call["temperature"].fill_(1.0)
    call["logits"].fill_(-torch.inf)
    call["logits"].scatter_(2, call["candidates"].roll(-1, 1)[..., None], 0.0)
    call["coins"].fill_(1 - 2.0**-53)
    check_verified(call)


@in_triton
def test_verify_follows_no_link_back() -> None:
    """What a CPU refuses beforehand ends the walk: links to the node itself, to its elders, outside the tree."""
    call = verify_inputs("greedy", requests=4)
    for b, node in enumerate((0, -5, 2**40, 99)):
        call["next_token"][b].fill_(node)
        call["next_sibling"][b].fill_(node)
    _, accept_index, accept_length, _ = here(_triton.tree_verify(*there(list(call.values()))))
    assert accept_length.tolist() == [0, 0, 0, 0]
    assert accept_index[:, 0].tolist() == [0, 0, 0, 0]


@in_triton
def test_verify_reads_rows_of_the_path_only() -> None:
    call = verify_inputs("coupled", requests=2)
    wanted = here(_triton.tree_verify(*there(list(call.values()))))
    visited = torch.zeros(2, 8, dtype=torch.bool)
    for b in range(2):
        visited[b, wanted[1][b][wanted[1][b] >= 0].long()] = True
    call["logits"][~visited] = torch.nan
    strided = torch.full((8, 2, 80), torch.nan)
    strided[..., :40] = call["logits"].transpose(0, 1)
    call["logits"] = strided.transpose(0, 1)[..., :40]
    got = here(_triton.tree_verify(*there(list(call.values()))))
    assert all(torch.equal(ours, truth) for ours, truth in zip(got[:3], wanted[:3], strict=True))


# -- draft_topk -------------------------------------------------------------------------------------------------------
DRAFT: dict[str, dict[str, Any]] = {
    "first_step": dict(requests=2, frontier=1, vocabulary=50, k=5, step=0),
    "noise_and_d2t": dict(requests=2, frontier=3, vocabulary=33, k=3, step=1, noise=True, d2t=True),
    "noise_fp16": dict(requests=1, frontier=4, vocabulary=300, k=4, step=2, noise=True, dtype=torch.float16),
    "whole_vocabulary": dict(requests=1, frontier=2, vocabulary=3, k=3, step=1, d2t=True),
    "three_spans": dict(requests=1, frontier=2, vocabulary=9000, k=2, step=1),
}


@in_triton
@pytest.mark.parametrize("case", DRAFT)
def test_draft_topk(case: str) -> None:
    call = {"noise": False, "d2t": False, "dtype": torch.float32, **DRAFT[case]}
    requests, frontier, vocabulary = call["requests"], call["frontier"], call["vocabulary"]
    logits = 3 * torch.randn(requests, frontier, vocabulary)
    logits[0, 0] = logits[0, 0].round()
    logits[..., 1] = torch.nan
    arguments = [
        logits.to(call["dtype"]),
        torch.randn(requests, frontier),
        torch.arange(vocabulary) * 2 if call["d2t"] else None,
        torch.arange(requests) - 3 if call["noise"] else None,
        torch.arange(requests) + 2**35 if call["noise"] else None,
        call["k"],
        call["step"],
    ]
    with uninitialized_is_nan():
        got = here(_triton.draft_topk(*there(arguments)))
    wanted = reference.draft_topk(*arguments)
    for index in (0, 2, 4, 5):
        assert torch.equal(got[index], wanted[index])
    for index in (1, 3):
        torch.testing.assert_close(got[index], wanted[index], rtol=3e-7, atol=2e-6)


# -- trees ------------------------------------------------------------------------------------------------------------
def candidate_inputs(requests: int, topk: int, steps: int, nodes: int, *, budget: bool = False) -> list[Any]:
    count = topk + (steps - 1) * topk**2
    columns = [torch.full((requests, 1), -1)]
    for step in range(steps - 1):
        base, among = (0, topk) if step == 0 else (topk + (step - 1) * topk**2, topk**2)
        columns.append(torch.stack([base + torch.randperm(among)[:topk] for _ in range(requests)]))
    scores = (2 * torch.randn(requests, count)).round() / 2
    scores[0, :2] = torch.nan
    return [
        scores,
        torch.randint(0, 100, (requests, count)),
        torch.cat(columns, 1),
        torch.arange(requests) + 50,
        torch.arange(requests) * 3 + 7,
        torch.randint(-1, nodes + 3, (requests,)).int() if budget else None,
        topk,
        nodes,
    ]


TREES: dict[str, dict[str, Any]] = {
    "ties": dict(requests=2, topk=3, steps=3, nodes=8),
    "budget": dict(requests=3, topk=4, steps=3, nodes=33, budget=True),
    "root_alone": dict(requests=1, topk=2, steps=1, nodes=1),
    "more_nodes_than_candidates": dict(requests=1, topk=3, steps=2, nodes=40),
}


@in_triton
@pytest.mark.parametrize("case", TREES)
def test_finalize(case: str) -> None:
    arguments = candidate_inputs(**TREES[case])
    with uninitialized_is_nan():
        got = here(_triton.tree_finalize(*there(arguments)))
    for ours, truth in zip(got, reference.tree_finalize(*arguments), strict=True):
        assert torch.equal(ours, truth)


@in_triton
def test_finalize_of_parents_that_are_nowhere() -> None:
    arguments = candidate_inputs(2, 3, 4, 20)
    arguments[2][0, 3] = 10**9
    arguments[2][0, 4:6] = -7
    arguments[2][1, 5:] = 20
    got = here(_triton.tree_finalize(*there(arguments)))
    for ours, truth in zip(got, reference.tree_finalize(*arguments), strict=True):
        assert torch.equal(ours, truth)


def link_buffers(requests: int, nodes: int) -> list[Tensor]:
    return [torch.zeros(requests * nodes, dtype=torch.int64), *(torch.full((requests, nodes), -1) for _ in range(3))]


@in_triton
@pytest.mark.parametrize("mode", (0, 1, 2))
def test_build_tree_and_back(mode: int) -> None:
    requests, nodes = 2, 11
    arguments = candidate_inputs(requests, 3, 3, nodes)
    selected = reference.tree_finalize(*arguments)[-1]
    size = (nodes * (int(arguments[4].sum()) + nodes * requests), requests * nodes**2, requests * nodes * 2)[mode]
    results = []
    for room in (_triton, reference):
        mask = torch.full((size,), 0 if mode == 2 else 1, dtype=torch.uint8)
        buffers = there([mask, *link_buffers(requests, nodes)])
        room.build_tree_kernel_efficient(*there([arguments[2], selected, arguments[4]]), *buffers, 3, 3, nodes, mode)
        results.append(here(tuple(buffers)))
    for ours, truth in zip(*results, strict=True):
        assert torch.equal(ours, truth)
    if mode == 1:
        back = there(link_buffers(requests, nodes))
        given = there([results[1][0], arguments[4]])
        _triton.reconstruct_indices_from_tree_mask(*given, *back, requests, nodes)
        again = link_buffers(requests, nodes)
        reference.reconstruct_indices_from_tree_mask(results[1][0], arguments[4], *again, requests, nodes)
        for ours, truth in zip(here(tuple(back)), again, strict=True):
            assert torch.equal(ours, truth)


# -- tree_commit ------------------------------------------------------------------------------------------------------
@in_triton
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_commit(dtype: torch.dtype) -> None:
    accept_index = torch.tensor([[0, 1, 3, 6], [0, 2, -1, -1], [0, -1, -1, -1]]).int()
    accept_length, seqlens = torch.tensor([3, 1, 0]).int(), torch.tensor([3, 9, 0]).int()
    block_table = torch.randperm(18).view(3, 6).int()
    caches = [torch.randn(20, 4, 2, 5).to(dtype) for _ in range(6)]
    ours, truth = ([cache.clone() for cache in caches] for _ in range(2))
    ours[4:] = [torch.empty(2, 20, 4, 5, dtype=dtype).permute(1, 2, 0, 3).copy_(cache) for cache in caches[4:]]
    ours = there(ours)
    hidden = torch.randn(3, 7, 6).to(dtype)
    plan = [accept_index, accept_length]
    with uninitialized_is_nan():
        got = here(_triton.tree_commit(*there(plan), ours[::2], ours[1::2], *there([block_table, seqlens, hidden])))
    wanted = reference.tree_commit(*plan, truth[::2], truth[1::2], block_table, seqlens, hidden)
    for a, b in zip((*got, *map(here, ours)), (*wanted, *truth), strict=True):
        assert torch.equal(a, b)


@in_triton
def test_commit_leaves_impossible_blocks_alone() -> None:
    cache = torch.randn(4, 2, 1, 3)
    after = there(cache.clone())
    table = torch.tensor([[0, 77, -1]]).int()
    plan = there([torch.tensor([[0, 2, 5]]).int(), torch.tensor([2]).int()])
    seqlens, hidden = _triton.tree_commit(
        *plan, [after], [after.clone()], there(table), there(torch.tensor([0]).int()), None
    )
    assert bitwise_equal(after.cpu(), cache)
    assert seqlens.tolist() == [3]
    assert hidden.shape == (0,)


# -- sgl-kernel's sampling --------------------------------------------------------------------------------------------
def walk_inputs(*, width: int = 4) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(outputs, candidates and links, target probabilities) of three trees of 9 nodes."""
    tree = make_inputs(3, 9, 40, sharpness=1.0)
    links = [tree["candidates"], torch.arange(27).view(3, 9), tree["next_token"], tree["next_sibling"]]
    outputs = [torch.full((27,), -7).int(), torch.full((3, width), -1).int(), torch.full((3,), -1).int()]
    return outputs, links, tree["logits"].softmax(-1)


def check_walk(op: str, outputs: list[Tensor], *rest: Any, extra: Tensor | None = None) -> None:
    """The same buffers from both rooms; ``extra`` is one that the op changes too."""
    results = []
    for room, where in ((_triton, there), (reference, lambda value: value)):
        buffers = where([buffer.clone() for buffer in outputs])
        changed = None if extra is None else where(extra.clone())
        getattr(room, op)(
            *buffers, *(changed if value is extra and extra is not None else where(value) for value in rest)
        )
        results.append(here(tuple(buffers if changed is None else [*buffers, changed])))
    for ours, truth in zip(*results, strict=True):
        assert torch.equal(ours, truth)


@in_triton
def test_verify_tree_greedy() -> None:
    outputs, links, _ = walk_inputs()
    predict = torch.randint(0, 40, (3, 9))
    predict[:2, 0] = links[0].gather(1, links[2][:, :1].clamp(min=0))[:2, 0]
    check_walk("verify_tree_greedy", outputs, *links, predict)


@in_triton
@pytest.mark.parametrize("thresholds", ((1.0, 1.0), (0.3, 0.7)), ids=("exact", "relaxed"))
@pytest.mark.parametrize("draft", (True, False), ids=("draft_probs", "none"))
def test_tree_sampling(thresholds: tuple[float, float], draft: bool) -> None:
    outputs, links, target = walk_inputs()
    draft_probs = torch.zeros_like(target) if draft else None
    rest = [*links, torch.rand(3, 9), torch.rand(3), target, draft_probs, *thresholds, True]
    check_walk("tree_speculative_sampling_target_only", outputs, *rest, extra=draft_probs)


@in_triton
@pytest.mark.parametrize("blocks", (True, False), ids=("blocks", "tokens"))
def test_chain_sampling(blocks: bool) -> None:
    outputs, links, target = walk_inputs(width=9)
    draft = target[:, :8] + 0.3 * torch.rand(3, 8, 40) / 40
    draft /= draft.sum(-1, keepdim=True)
    drawn = torch.multinomial(draft.flatten(0, 1), 1).view(3, 8)
    links[0] = torch.cat([links[0][:, :1], drawn], 1)
    rest = [*links, torch.rand(3, 8), torch.rand(3), target, draft, 1.0, 1.0, True, blocks]
    check_walk("chain_speculative_sampling", outputs, *rest)


# -- the room ---------------------------------------------------------------------------------------------------------
def test_room_says_what_it_cannot() -> None:
    q, table = torch.zeros(1, 1, 320, device=DEVICE), torch.zeros(1, 1)
    assert "256" in _triton.unsupported("tree_attention", q, q, q, table)
    logits = torch.zeros(1, 1, 500, device=DEVICE)
    assert "128" in _triton.unsupported("draft_topk", logits, logits, None, None, None, 200, 0)
    assert "meta" in _triton.unsupported("tree_verify", torch.zeros(1, device="meta"))
    assert _triton.unsupported("tree_verify", logits) == ""


@in_triton
@pytest.mark.parametrize("requests", (0,))
def test_no_requests(requests: int) -> None:
    call = verify_inputs("coupled", requests=1)
    empty = {name: value[:requests] if isinstance(value, Tensor) else value for name, value in call.items()}
    tokens, accept_index, accept_length, _ = _triton.tree_verify(*there(list(empty.values())))
    assert (tokens.shape, accept_index.shape, accept_length.shape) == ((0, 4), (0, 4), (0,))
