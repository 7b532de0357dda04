"""The drop-in set by itself: cases worked by hand, its law, half precision, strides, 1024 nodes, rooms that agree."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from sglang_cases import (
    LARGEST,
    MODES,
    SHAPES,
    TREES,
    Selection,
    Walks,
    buffers,
    chains,
    check_equal,
    expand,
    ours,
    outputs,
    selections,
    sizes,
    walks,
)
from torch import Tensor

from m3kernels import spec_decode
from m3kernels.testing import bitwise_equal

ROOMS = ("reference", "cpu")
every_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)


# -- cases worked by hand ---------------------------------------------------------------------------------------------
def small_tree(requests: int) -> tuple[Tensor, ...]:
    """candidates and links of a root (token 9) with children 1 and 2, 1 with children 3 and 4, and 5 under 3."""
    candidates = torch.tensor([[9, 1, 2, 3, 4, 5]]).repeat(requests, 1)
    next_token = torch.tensor([[1, 3, -1, 5, -1, -1]]).repeat(requests, 1)
    next_sibling = torch.tensor([[-1, 2, -1, 4, -1, -1]]).repeat(requests, 1)
    return candidates, torch.arange(requests * 6).view(requests, 6), next_token, next_sibling


def written(requests: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    predicts = torch.full((requests * 6,), -7, dtype=torch.int32)
    return predicts, torch.full((requests, width), -7, dtype=torch.int32), torch.full((requests,), -7).int()


def law(**tokens: float) -> list[float]:
    """law(t3=0.5, ...): ten probabilities."""
    return [tokens.get(f"t{token}", 0.0) for token in range(10)]


@every_room
def test_greedy_walk_by_hand(backend: str) -> None:
    """Request 0 follows 1 and 4 and ends there; request 1 predicts no child; request 2 runs out of width."""
    target = torch.tensor([[1, 4, 0, 0, 8, 0], [3, 1, 1, 1, 1, 1], [1, 3, 0, 5, 0, 7]])
    predicts, path, accepted = written(3, 3)
    spec_decode.verify_tree_greedy(predicts, path, accepted, *small_tree(3), target)
    assert accepted.tolist() == [2, 0, 2]
    assert path.tolist() == [[0, 1, 4], [6, -7, -7], [12, 13, 15]]
    assert predicts.view(3, 6).tolist() == [[1, 4, -7, -7, 8, -7], [3, -7, -7, -7, -7, -7], [1, 3, -7, 5, -7, -7]]


@every_room
@pytest.mark.parametrize(
    ("coins", "single", "path", "predicts"),
    (
        ((0.25, 0.0), 1.0, [0, 2, -7], [2, -7, 0]),  # 0.25 is not below the mass of 1; the final coin 0 takes token 0
        ((0.25, 0.5), 1.0, [0, 2, -7], [2, -7, 6]),  # cumulative 0.5 does not exceed 0.5
        ((0.25, LARGEST), 1.0, [0, 2, -7], [2, -7, 8]),
        ((0.5, 0.0), 1.0, [0, -7, -7], [7, -7, -7]),  # both rejected: what is left is 7
        ((0.0, 0.75), 1.0, [0, 1, -7], [1, 6, -7]),  # 3 and 4 have no probability: never accepted, whatever the coin
        ((0.5, 0.0), 0.25, [0, 1, -7], [1, 5, -7]),  # accepted for its own probability
    ),
    ids=("coin_0", "boundary", "largest_coin", "rejected", "no_probability", "single_threshold"),
)
def test_tree_sampler_by_hand(
    backend: str, coins: tuple[float, float], single: float, path: list[int], predicts: list[int]
) -> None:
    rows = [law(t1=0.25, t2=0.25, t7=0.5), law(t5=0.5, t6=0.5), law(t0=0.5, t6=0.25, t8=0.25), *([law()] * 3)]
    out = written(1, 3)
    given = (torch.full((1, 6), coins[0]), torch.tensor([coins[1]]), torch.tensor([rows]))
    spec_decode.tree_speculative_sampling_target_only(*out, *small_tree(1), *given, None, single)
    assert out[1].tolist() == [path]
    assert out[0][:3].tolist() == predicts
    assert out[2].tolist() == [sum(node > 0 for node in path)]


@every_room
def test_build_by_hand(backend: str) -> None:
    """Candidates 0, 1 under the root, 2 and 3 under candidate 0, 6 under candidate 2."""
    requests = (torch.tensor([[-1, 0, 1, 2, 3]]), torch.tensor([[0, 1, 2, 3, 6]]), torch.tensor([2]))
    chosen = Selection(*requests, topk=2, depth=3, nodes=6)
    rows = ["1 00000", "1 10000", "1 01000", "1 10100", "1 10010", "1 10101"]
    square = [[int(digit) for digit in row.replace(" ", "")] for row in rows]
    built = {mode: ours(chosen, number) for mode, number in MODES.items()}
    assert built["queries"]["tree_mask"].view(6, 6).int().tolist() == square
    assert built["full"]["tree_mask"].view(6, 8).int().tolist() == [[1, 1, *row] for row in square]
    assert built["packed"]["tree_mask"].tolist() == [sum(bit << j for j, bit in enumerate(row)) for row in square]
    assert built["full"]["positions"].tolist() == [2, 3, 3, 4, 4, 5]
    assert built["full"]["retrive_index"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert built["full"]["retrive_next_token"].tolist() == [[1, 3, -1, 5, -1, -1]]
    assert built["full"]["retrive_next_sibling"].tolist() == [[-1, 2, -1, 4, -1, -1]]


def test_chain_sampler_has_sglangs_name_too() -> None:
    assert spec_decode.chain_speculative_sampling_triton is spec_decode.chain_speculative_sampling


# -- rooms agree ------------------------------------------------------------------------------------------------------
def native_and_reference(op: str, arguments: Callable[[], tuple[object, ...]]) -> None:
    """Both rooms leave the same in every argument."""
    left = []
    for room in ("_cpu", "reference"):
        given = arguments()
        getattr(importlib.import_module(f"m3kernels.spec_decode.{room}"), op)(*given)
        left.append([value for value in given if isinstance(value, Tensor)])
    assert [bitwise_equal(a, b) for a, b in zip(*left, strict=True)] == [True] * len(left[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_rooms_build_alike(shape: str, mode: str) -> None:
    chosen = selections(20, *SHAPES[shape])

    def arguments() -> tuple[object, ...]:
        return *chosen[:3], *buffers(chosen, MODES[mode]).values(), *sizes(chosen, MODES[mode])

    native_and_reference("build_tree_kernel_efficient", arguments)


@pytest.mark.parametrize("tree", TREES)
def test_rooms_walk_trees_alike(tree: str) -> None:
    case = walks(21, 4, **TREES[tree])
    slots = min(5, case.candidates.shape[1])
    target = case.target_probs.argmax(-1)
    native_and_reference("verify_tree_greedy", lambda: (*outputs(case, slots).values(), *case.links, target))

    def arguments() -> tuple[object, ...]:
        laws = (*case.coins, case.target_probs, torch.zeros_like(case.target_probs))
        return *outputs(case, slots).values(), *case.links, *laws, 0.9, 0.8, True

    native_and_reference("tree_speculative_sampling_target_only", arguments)


@pytest.mark.parametrize("block_verification", (False, True), ids=("token", "block"))
def test_rooms_walk_chains_alike(block_verification: bool) -> None:
    case, draft = chains(22, 24, 6, 12)

    def arguments() -> tuple[object, ...]:
        given = (*outputs(case, 6).values(), *case.links, *case.coins, case.target_probs, draft)
        return *given, 1.0, 1.0, True, block_verification

    native_and_reference("chain_speculative_sampling", arguments)


# -- the law of chains ------------------------------------------------------------------------------------------------
SIZE = 3  # tokens; two drafts, so 9 chains


class Chains(NamedTuple):
    """Every chain of two drafts at once: the target's law after 0, 1 and 2 drafts, the draft's after 0 and 1."""

    drafts: Tensor  # (9, 2)
    target: Tensor  # (9, 3, SIZE)
    draft: Tensor  # (9, 2, SIZE)

    def run(self, coins: Tensor, final: Tensor, block: bool) -> tuple[Tensor, Tensor]:
        """(accepted drafts, last token) of each chain; coins (9, 2) and final (9,), fp64."""
        out = [torch.zeros(27).int(), torch.zeros(9, 3).int(), torch.zeros(9).int()]
        index = torch.arange(27).view(9, 3)
        tokens = torch.cat([torch.zeros(9, 1, dtype=torch.int64), self.drafts], 1)
        given = (tokens, index, index, index, coins.float(), final.float(), self.target, self.draft)
        spec_decode.chain_speculative_sampling(*out, *given, block_verification=block)
        return out[2].long(), out[0][index.gather(1, out[2].long()[:, None])[:, 0]].long()


def breakpoint_of(holds: Callable[[Tensor], Tensor]) -> Tensor:
    """(9,) fp64: up to which coin something holds that holds below a breakpoint and not above it."""
    low, high = torch.zeros(9, dtype=torch.float64), torch.ones(9, dtype=torch.float64)
    for _ in range(25):
        middle = ((low + high) / 2).clamp(max=LARGEST)
        true = holds(middle)
        low, high = torch.where(true, middle, low), torch.where(true, high, middle)
    return (low + high) / 2


@every_room
@pytest.mark.parametrize("block", (False, True), ids=("token", "block"))
@pytest.mark.parametrize("seed", range(2))
def test_chains_emit_the_targets_law(backend: str, block: bool, seed: int) -> None:
    """The breakpoints of every coin, found by bisection, give the joint law of three tokens: the target's, to 1e-6."""
    generator = torch.Generator().manual_seed(seed)

    def laws(*shape: int) -> Tensor:
        return (torch.randn(*shape, SIZE, generator=generator) * 2).softmax(-1)

    p, q = (laws(), laws(SIZE), laws(SIZE, SIZE)), (laws(), laws(SIZE))
    drafts = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE))
    first, second = drafts.unbind(1)
    case = Chains(
        drafts,
        torch.stack([p[0].expand(9, SIZE), p[1][first], p[2][first, second]], 1),
        torch.stack([q[0].expand(9, SIZE), q[1][first]], 1),
    )
    zero = torch.zeros(9, dtype=torch.float64)
    pass_all = torch.stack([zero, zero], 1)

    def coins(slot: int, coin: Tensor, other: float) -> Tensor:
        both = torch.full((9, 2), other, dtype=torch.float64)
        both[:, slot] = coin
        return both

    both = breakpoint_of(lambda u: case.run(coins(1, u, 0.0), zero, block)[0] == 2)
    one = breakpoint_of(lambda u: case.run(coins(0, u, LARGEST), zero, block)[0] >= 1)
    if block:  # the second coin decides first
        chances = torch.stack([(1 - both) * (1 - one), (1 - both) * one, both], 1)
    else:
        chances = torch.stack([1 - one, one * (1 - both), one * both], 1)
    reached = {2: pass_all, 1: coins(1, zero + LARGEST, 0.0), 0: coins(0, zero + LARGEST, LARGEST)}
    weight = (q[0][first] * q[1][first, second]).double()
    joint = torch.zeros(SIZE, SIZE, SIZE, dtype=torch.float64)
    for accepted, given in reached.items():
        upto = [
            breakpoint_of(lambda u, token=token, given=given: case.run(given, u, block)[1] <= token)
            for token in range(SIZE - 1)
        ]
        final = torch.stack([*upto, zero + 1], 1).diff(dim=1, prepend=zero[:, None])
        for chain, (x, y) in enumerate(drafts.tolist()):
            mass = weight[chain] * chances[chain, accepted] * final[chain]
            if accepted == 2:
                joint[x, y] += mass
            elif accepted == 1:
                joint[x] += mass[:, None] * p[2][x].double()
            else:
                joint += mass[:, None, None] * (p[1][:, :, None] * p[2]).double()
    exact = (p[0][:, None, None] * p[1][:, :, None] * p[2]).double()
    assert float((joint - exact).abs().sum()) / 2 < 1e-6


# -- law, dtypes, strides, sizes --------------------------------------------------------------------------------------
@every_room
def test_the_tree_sampler_has_the_targets_law(backend: str) -> None:
    """Over a grid of coins that no breakpoint divides, each token after the root comes as often as its probability."""
    p = torch.tensor([5, 0, 3, 2, 4, 2]) / 16
    drafts, rest = [4, 1, 3], 10  # sixteenths that are left when all three are rejected
    grid = list(itertools.product(range(16), range(rest)))
    requests = len(grid)
    candidates = torch.tensor([[0, *drafts]]).expand(requests, 4)
    index = torch.arange(requests * 4).view(requests, 4)
    next_token = torch.tensor([[1, -1, -1, -1]]).expand(requests, 4)
    next_sibling = torch.tensor([[-1, 2, 3, -1]]).expand(requests, 4)
    coins = torch.tensor([(u + 0.5) / 16 for u, _ in grid])[:, None].expand(requests, 4)
    final = torch.tensor([(v + 0.5) / rest for _, v in grid])
    laws = p.expand(requests, 4, 6)
    case = Walks(candidates, index, next_token, next_sibling, coins, final, laws)
    out = outputs(case, 2)
    spec_decode.tree_speculative_sampling_target_only(*out.values(), *case.links, coins, final, laws)
    emitted = out["predicts"][index[:, 0]]
    assert (torch.bincount(emitted, minlength=6) / requests).tolist() == p.tolist()
    assert float((out["accept_token_num"] == 1).float().mean()) == float(p[drafts].sum())


@every_room
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_laws_in_half_precision_are_taken_as_they_are(backend: str, dtype: torch.dtype) -> None:
    case = walks(12, 6, **TREES["mixed"])
    exact, half = outputs(case, 5), outputs(case, 5)
    spec_decode.tree_speculative_sampling_target_only(*exact.values(), *case.links, *case.coins, case.target_probs)
    laws = case.target_probs.to(dtype)
    draft = torch.zeros_like(laws)
    spec_decode.tree_speculative_sampling_target_only(*half.values(), *case.links, *case.coins, laws, draft)
    check_equal(half, exact)
    assert bitwise_equal(draft, draft.where(draft == 0, laws))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_half_precision_number_is_read_right(dtype: torch.dtype) -> None:
    """A row that holds all finite numbers of a dtype: the token drawn is that of the same row in fp32."""
    row = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    row = row.where(row.isfinite(), 0).abs()[None, None]
    coins = torch.rand(64, generator=torch.Generator().manual_seed(13))
    tree = torch.zeros(1, 1, dtype=torch.int64)
    drawn: dict[torch.dtype, list[int]] = {}
    for laws in (row, row.float()):
        for coin in coins:
            out = [torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)]
            args = (out[0], out[1], torch.zeros(1, dtype=torch.int32), tree, tree, tree - 1, tree - 1)
            spec_decode.tree_speculative_sampling_target_only(*args, torch.zeros(1, 1), coin[None], laws)
            drawn.setdefault(laws.dtype, []).append(int(out[0]))
    assert drawn[dtype] == drawn[torch.float32]


@every_room
def test_strided_arguments_give_what_contiguous_ones_give(backend: str) -> None:
    case, draft = chains(14, 7, 5, 33)

    def spread(value: Tensor) -> Tensor:
        """The same values with a gap behind every row, or every element of what has none."""
        wide = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 99, dtype=value.dtype)
        return wide[..., : value.shape[-1]].copy_(value) if value.ndim == 3 else wide[..., ::2].copy_(value)

    given = (*case.links, *case.coins, case.target_probs)
    plain, strided = outputs(case, 5), outputs(case, 5)
    spec_decode.chain_speculative_sampling(*plain.values(), *given, draft)
    spec_decode.chain_speculative_sampling(*strided.values(), *map(spread, given), spread(draft))
    check_equal(strided, plain)
    spec_decode.tree_speculative_sampling_target_only(*plain.values(), *given)
    zeros = spread(torch.zeros_like(case.target_probs))
    spec_decode.tree_speculative_sampling_target_only(*strided.values(), *map(spread, given), zeros)
    check_equal(strided, plain)


@every_room
@pytest.mark.parametrize("mode", MODES)
def test_build_takes_1024_nodes(backend: str, mode: str) -> None:
    """Mask and links are the same in every mode; bits of 32 words a row."""
    nodes, topk, depth = 1024, 33, 33
    rng = random.Random(15)
    parents, selected = expand(rng, topk, depth, nodes)
    chosen = Selection(torch.tensor([parents]), torch.tensor([selected]), torch.tensor([2]), topk, depth, nodes)
    out = buffers(chosen, MODES["queries"])
    spec_decode.build_tree_kernel_efficient(*chosen[:3], *out.values(), *sizes(chosen, MODES["queries"]))
    square = out["tree_mask"].view(nodes, nodes)
    mask = torch.zeros(nodes * 32, dtype=torch.int32)
    if mode == "full":
        mask = torch.ones(nodes * (nodes + 2), dtype=torch.bool)
    elif mode == "queries":
        mask = torch.ones(nodes * nodes, dtype=torch.bool)
    again = {**buffers(chosen, 1), "tree_mask": mask}
    spec_decode.build_tree_kernel_efficient(*chosen[:3], *again.values(), *sizes(chosen, MODES[mode]))
    if mode == "packed":
        bits = (mask.view(nodes, 32, 1) >> torch.arange(32)) & 1
        assert torch.equal(bits.view(nodes, nodes).bool(), square)
    else:
        assert torch.equal(mask.view(nodes, -1)[:, -nodes:], square)
    links = {name: value for name, value in out.items() if name != "tree_mask"}
    check_equal({name: again[name] for name in links}, links)
    assert square.sum(1).max() > 4
