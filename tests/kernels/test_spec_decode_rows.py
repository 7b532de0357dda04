"""Native tree_verify and draft_topk: the reference's decisions, laws to 1e-7, one row's bits, hostile arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import _cpu, law, reference
from m3kernels.testing import bitwise_equal, uninitialized_is_nan
from tests.kernels.spec_decode_rows_cases import (
    DRAFTS,
    FILTERS,
    MODES,
    ROWS,
    drafting,
    single,
    star,
    verification,
)

LAW = 1e-7  # of cumulative probabilities
LOG = dict(atol=1e-6, rtol=2.0**-24)  # of log-probabilities in nats, which fp32 rounds


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(map(bitwise_equal, found, expected))


def check_verified(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert same(found[:3], expected[:3])
    torch.testing.assert_close(found[3], expected[3], rtol=1e-6, atol=1e-5)


def check_drafts(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    tokens, cum_scores, next_ids, next_scores, src_row, parents = range(6)
    assert same([found[i] for i in (tokens, next_ids, src_row, parents)], [expected[i] for i in (0, 2, 4, 5)])
    for i in (cum_scores, next_scores):
        torch.testing.assert_close(found[i], expected[i], rtol=1e-6, atol=2e-6)


# -- tree_verify ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ROWS)
def test_filtered_rows_decide_as_the_reference(rows: str, mode: str) -> None:
    args = verification(mode, FILTERS["all"], logprobs="sampling", **ROWS[rows])
    check_verified(_cpu.tree_verify(*args), reference.tree_verify(*args))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", ["ties", "infinite", "lowest"])
def test_extreme_filters_decide_as_the_reference(rows: str, mode: str) -> None:
    args = verification(mode, FILTERS["extreme"], logprobs="raw", coins=False, **ROWS[rows])
    check_verified(_cpu.tree_verify(*args), reference.tree_verify(*args))


@pytest.mark.parametrize("logprobs", ["raw", "sampling"])
@pytest.mark.parametrize("mode", MODES)
def test_grammar_decides_as_the_reference(mode: str, logprobs: str) -> None:
    args = verification(mode, FILTERS["top_p"], vocabulary=1031, grammar=True, logprobs=logprobs, coins=False)
    check_verified(_cpu.tree_verify(*args), reference.tree_verify(*args))


@pytest.mark.parametrize("width", [1, 2, 9])
@pytest.mark.parametrize("mode", MODES)
def test_width_decides_as_the_reference(mode: str, width: int) -> None:
    args = verification(mode, FILTERS["top_k"], vocabulary=37, width=width)
    check_verified(_cpu.tree_verify(*args), reference.tree_verify(*args))


def test_a_token_that_repeats_an_elder_sibling_counts_once() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 4, 3)
    coins = torch.tensor([[0.55, 0, 0, 0], [0.7, 0, 0, 0]], dtype=torch.float64)
    tree, one = star(2, [0, 0, 1]), torch.ones(2)
    args = [logits, *tree, one, *[None] * 5, coins, torch.zeros(2).double(), None, None, "target_only", 4, "none"]
    assert _cpu.tree_verify(*args)[1].tolist() == [[0, 3, -1, -1], [0, 3, -1, -1]]


@pytest.mark.parametrize("token", [-1, 3, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("mode", MODES)
def test_a_candidate_outside_the_vocabulary_is_not_accepted(mode: str, token: int) -> None:
    args = verification(mode, FILTERS["plain"], vocabulary=3)
    args[1] = torch.full_like(args[1], token)
    assert _cpu.tree_verify(*args)[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("mode", MODES)
def test_rows_off_the_path_have_no_influence(mode: str) -> None:
    args = verification(mode, FILTERS["all"], vocabulary=515)
    expected = _cpu.tree_verify(*args)
    visited = torch.zeros(3, 7, dtype=torch.bool)
    for b, path in enumerate(expected[1].tolist()):
        visited[b, [node for node in path if node >= 0]] = True
    assert not bool(visited.all())
    args[0] = args[0].masked_fill(~visited[..., None], 1e9)
    args[12] = args[12].masked_fill(~visited[..., None], torch.nan)
    assert same(_cpu.tree_verify(*args), expected)


# -- the law ----------------------------------------------------------------------------------------------------------
def language_like(vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A row with a few likely tokens over a broad floor."""
    row = torch.randn(vocabulary) * 2
    row[torch.randint(vocabulary, (40,))] += torch.rand(40) * 9
    return row.to(dtype)


LAWS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "warm": dict(temperature=1.9),
    "cold": dict(temperature=0.21),
    "top_k": dict(top_k=50),
    "large_top_k": dict(top_k=5000),
    "top_p": dict(top_p=0.95),
    "little_top_p": dict(top_p=0.1),
    "large_top_p": dict(top_p=0.9999),
    "min_p": dict(min_p=1e-4),
    "all": dict(temperature=1.3, top_k=9000, top_p=0.97, min_p=1e-5),
}


@pytest.mark.parametrize(("vocabulary", "dtype"), [(997, torch.float32), (50257, torch.bfloat16)], ids=["997", "50257"])
@pytest.mark.parametrize("name", LAWS)
def test_tokens_invert_the_cumulative_law(name: str, vocabulary: int, dtype: torch.dtype) -> None:
    row, coins = language_like(vocabulary, dtype), torch.linspace(0, 1, 130, dtype=torch.float64)[:-1]
    given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **LAWS[name]}
    given = {key: float(torch.tensor(value)) if key != "top_k" else value for key, value in given.items()}
    p = law.probabilities(law.clean(row, None), **given)
    tokens, _, _, logprobs = _cpu.tree_verify(*single(row, "target_only", final_coins=coins, **LAWS[name]))
    upto, drawn = p.cumsum(0), tokens[:, 0]
    assert bool((coins < upto[drawn] + LAW).all())
    assert bool((coins >= upto[drawn] - p[drawn] - LAW).all())
    assert bool((p[drawn] > 0).all())
    torch.testing.assert_close(logprobs[:, 0].double(), p[drawn].log(), **LOG)


@pytest.mark.parametrize("mode", ["target_only", "chain"])
@pytest.mark.parametrize("name", ["plain", "top_k", "top_p"])
def test_what_is_left_after_a_rejection_is_drawn_by_its_law(name: str, mode: str) -> None:
    vocabulary, row = 20011, language_like(20011)
    p = law.probabilities(law.clean(row, None), 1.0, LAWS[name].get("top_k", 0), float(torch.tensor(0.95)))
    rejected = p.topk(3).indices.tolist()
    coins = torch.linspace(0, 1, 66, dtype=torch.float64)[:-1]
    args = single(row, mode, final_coins=coins, **{"top_p": 0.95, **LAWS[name]})
    q = (row + torch.randn(vocabulary)).softmax(-1)
    q[7], q[8], q[rejected[0]] = torch.nan, -1.0, 2.0
    args[0] = args[0].expand(-1, 4, -1)
    args[1:4] = star(len(coins), rejected)
    args[10], args[12], args[15] = (
        torch.full((len(coins), 4), 1 - 2.0**-53, dtype=torch.float64),
        q.expand(len(coins), 4, -1),
        2,
    )
    if mode == "chain":
        rest = (p - q.double().where((q >= 0) & (q <= 1), 0.0)).clamp(min=0)
    else:
        rest = p.index_fill(0, torch.tensor(rejected), 0.0)
    rest = rest / rest.sum()
    tokens, path, length, _ = _cpu.tree_verify(*args)
    assert not bool(length.any()) and bool((path[:, 1] == -1).all())
    upto, drawn = rest.cumsum(0), tokens[:, 0]
    assert bool((coins < upto[drawn] + 2 * LAW).all())
    assert bool((coins >= upto[drawn] - rest[drawn] - 2 * LAW).all())
    assert bool((rest[drawn] > 0).all())


@pytest.mark.parametrize("coin", [0.0, 0.4, 1 - 2.0**-53])
@pytest.mark.parametrize("vocabulary", [3, 5000])
def test_children_with_all_the_mass_leave_a_token_to_draw(vocabulary: int, coin: float) -> None:
    row = torch.full((vocabulary,), -torch.inf)
    row[:2] = torch.tensor([0.1, 0.3])
    args = single(row, "target_only", final_coins=torch.tensor([coin], dtype=torch.float64))
    args[0] = args[0].expand(-1, 3, -1)
    args[1:4] = star(1, [0, 1])
    args[10], args[15] = torch.full((1, 3), 1 - 2.0**-53, dtype=torch.float64), 2
    assert _cpu.tree_verify(*args)[0][0, 0] in (0, 1)


THRESHOLDS: dict[str, Callable[[], Tensor]] = {
    "constant": lambda: torch.zeros(20000),
    "two_values": lambda: torch.where(torch.rand(20000) < 0.5, 1.0, 0.5),
    "integers": lambda: torch.randint(-6, 7, (20000,)).float(),
    "neighbours": lambda: torch.nextafter(torch.ones(9000), torch.rand(9000).round() * 2),
    "powers": lambda: 0.5 ** torch.randint(0, 50, (9000,)).float(),
    "one_far_above": lambda: torch.cat([torch.randn(9000) * 1e-6, torch.tensor([20.0])]),
    "steep": lambda: torch.linspace(0, 800, 9000),
    "ascending": lambda: torch.linspace(-4, 4, 9000),
}


@pytest.mark.parametrize("top_p", [1e-3, 0.6, 0.99999])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_top_p_finds_its_threshold_in_any_row(name: str, top_p: float) -> None:
    """The log-probability of the likeliest token tells the mass of the tokens kept."""
    row, given = THRESHOLDS[name](), float(torch.tensor(top_p))
    p = law.probabilities(law.clean(row, None), 1.0, 0, given)
    args = single(row, "target_only", final_coins=torch.zeros(1).double(), top_p=top_p)
    tokens, _, _, logprobs = _cpu.tree_verify(*args)
    assert p[tokens[0, 0]] > 0
    torch.testing.assert_close(logprobs[0].double(), p[tokens[0]].log(), **LOG)


@pytest.mark.parametrize("top_k", [1, 255, 1025, 8999])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_top_k_finds_its_threshold_in_any_row(name: str, top_k: int) -> None:
    row = THRESHOLDS[name]()
    p = law.probabilities(law.clean(row, None), 1.0, top_k)
    tokens, _, _, logprobs = _cpu.tree_verify(
        *single(row, "target_only", final_coins=torch.zeros(1).double(), top_k=top_k)
    )
    assert p[tokens[0, 0]] > 0
    torch.testing.assert_close(logprobs[0].double(), p[tokens[0]].log(), **LOG)


# -- draft_topk: small ones are in test_spec_decode_rows_isa.py -------------------------------------------------------
@pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
def test_drafts_of_a_large_vocabulary_are_those_of_the_reference(noise: bool) -> None:
    args = drafting(frontier=1, vocabulary=151936, k=10, noise=noise, dtype=torch.bfloat16)
    check_drafts(_cpu.draft_topk(*args), reference.draft_topk(*args))


def test_drafts_with_noise_begin_with_what_coupled_verification_emits() -> None:
    args = drafting(frontier=1, vocabulary=9001, k=3, noise=True)
    drafts = _cpu.draft_topk(*args)
    none, one = torch.full((2, 1), -1), torch.ones(2)
    tokens, *_ = _cpu.tree_verify(
        args[0], none, none, none, one, *[None] * 3, *args[3:5], *[None] * 4, "coupled", 1, "none"
    )
    assert tokens[:, 0].tolist() == drafts[0][:, 0, 0].tolist()


# -- one row's bits ---------------------------------------------------------------------------------------------------
def moved(x: Tensor, shift: int, pad: int) -> Tensor:
    """x with rows `pad` elements apart that begin `shift` elements into a buffer of large numbers."""
    lead, columns = x.shape[:-1], x.shape[-1]
    buffer = torch.full((lead.numel() * (columns + pad) + shift + 64,), 1e4, dtype=x.dtype)
    inside = buffer[shift : shift + lead.numel() * (columns + pad)].view(*lead, columns + pad)[..., :columns]
    return inside.copy_(x)


@pytest.mark.parametrize(("shift", "pad"), [(1, 0), (7, 61)])
@pytest.mark.parametrize("mode", MODES)
def test_place_and_strides_change_no_bit(mode: str, shift: int, pad: int) -> None:
    args = verification(mode, FILTERS["top_p"], vocabulary=1031, logprobs="sampling", grammar=mode == "coupled")
    expected = _cpu.tree_verify(*args)
    for i in (0, 12):
        args[i] = moved(args[i], shift, pad)
    assert same(_cpu.tree_verify(*args), expected)


@pytest.mark.parametrize(("shift", "pad"), [(1, 0), (7, 64)])
@pytest.mark.parametrize("name", ["second_step", "noise", "holes"])
def test_place_and_strides_change_no_draft(name: str, shift: int, pad: int) -> None:
    args = drafting(**DRAFTS[name])
    expected = _cpu.draft_topk(*args)
    args[0] = moved(args[0], shift, pad)
    assert same(_cpu.draft_topk(*args), expected)


@pytest.mark.parametrize("mode", MODES)
def test_threads_change_no_bit(mode: str, threads: Callable[[int], None]) -> None:
    args = verification(mode, FILTERS["top_p"], vocabulary=2051, logprobs="raw")
    drafts = drafting(**DRAFTS["noise"])
    found = []
    for count in (1, 3):
        threads(count)
        found.append((*_cpu.tree_verify(*args), *_cpu.draft_topk(*drafts)))
    assert same(*found)


@pytest.mark.parametrize("mode", MODES)
def test_results_are_written_whole(mode: str) -> None:
    args = verification(mode, FILTERS["top_k"], vocabulary=37, logprobs="raw", width=20)
    drafts = drafting(**DRAFTS["nothing"])
    expected = (*_cpu.tree_verify(*args), *_cpu.draft_topk(*drafts))
    with uninitialized_is_nan():
        found = (*_cpu.tree_verify(*args), *_cpu.draft_topk(*drafts))
    assert same(found, expected)
    tokens, path, length, logprobs = found[:4]
    beyond = torch.arange(20) > length[:, None]
    assert bool((tokens[beyond] == -1).all()) and bool((path[beyond] == -1).all()) and not logprobs[beyond].any()


def test_no_requests_give_nothing() -> None:
    args = verification("chain", FILTERS["all"], vocabulary=9, logprobs="raw")
    found = _cpu.tree_verify(*[x[:0] if isinstance(x, Tensor) else x for x in args])
    assert [tuple(x.shape) for x in found] == [(0, 7), (0, 7), (0,), (0, 7)]
    drafts = drafting(**DRAFTS["noise"])
    found = _cpu.draft_topk(*[x[:0] if isinstance(x, Tensor) else x for x in drafts])
    assert [len(x) for x in found] == [0] * 6


# -- hostile arguments ------------------------------------------------------------------------------------------------
def replaced(args: list[Any], index: int, value: Any) -> list[Any]:
    return [*args[:index], value, *args[index + 1 :]]


LINK = r"want -1, or an index greater than the node's own and below 7; got {}"


@pytest.mark.parametrize(("argument", "index"), [("next_token", 2), ("next_sibling", 3)])
@pytest.mark.parametrize("link", [-2, 3, 2, 7, 2**40, -(2**63)], ids=["below", "itself", "back", "N", "far", "lowest"])
def test_links_that_do_not_lead_on_are_refused(argument: str, index: int, link: int) -> None:
    args = verification("greedy", FILTERS["plain"], vocabulary=9)
    links = args[index].clone()
    links[1, 3] = link
    with pytest.raises(ValueError, match=f"tree_verify: {argument}: {LINK.format(link)}"):
        _cpu.tree_verify(*replaced(args, index, links))


BAD: dict[str, tuple[int, Any, str]] = {
    "temperature_cold": (4, torch.tensor([1.0, 1e-7, 1.0]), "temperature: want 0, or a finite number of at least 1e-6"),
    "temperature_nan": (4, torch.tensor([1.0, torch.nan, 1.0]), "temperature: want 0, or a finite number"),
    "temperature_short": (4, torch.ones(2), "temperature: want 3 elements; got 2"),
    "temperature_double": (4, torch.ones(3).double(), r"temperature: want contiguous float32 .*; got \(3,\) float64"),
    "top_k_short": (5, torch.ones(2, dtype=torch.int32), "top_k: want 3 elements; got 2"),
    "top_p_zero": (6, torch.zeros(3), r"top_p: want values in \(0, 1\]; got 0"),
    "min_p_large": (7, torch.full((3,), 1.5), r"min_p: want values in \[0, 1\]; got 1.5"),
    "coins_one": (10, torch.ones(3, 7).double(), r"coins: want values in \[0, 1\); got 1"),
    "coins_short": (10, torch.zeros(3, 6).double(), "coins: want 21 elements; got 18"),
    "final_coins_nan": (11, torch.full((3,), torch.nan).double(), r"final_coins: want values in \[0, 1\)"),
    "draft_probs_none": (12, None, "draft_probs: want probabilities for mode 'chain'; got None"),
    "draft_probs_narrow": (12, torch.zeros(3, 7, 8), r"draft_probs: want \(3, 7, 9\)"),
    "grammar_bits_narrow": (13, torch.zeros(3, 7, 0, dtype=torch.int32), r"grammar_bits: want \(3, 7, 1\)"),
    "mode": (14, "fast", "mode: want 'greedy', 'target_only', 'chain', 'coupled'; got fast"),
    "width_zero": (15, 0, r"width: want an integer in 1..2\*\*31 - 1; got 0"),
    "logprobs": (16, "all", "logprobs: want 'none', 'raw', 'sampling'; got all"),
    "logits_step": (0, torch.zeros(3, 7, 18)[..., ::2], "logits: want rows of contiguous elements"),
    "logits_double": (0, torch.zeros(3, 7, 9).double(), "logits: want a tensor of three dimensions, float32 or"),
    "logits_empty": (0, torch.zeros(3, 7, 0), "logits: want a row or more of each request, a vocabulary of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_tree_verify_are_refused(name: str) -> None:
    index, value, message = BAD[name]
    args = verification("chain", FILTERS["plain"], vocabulary=9)
    with pytest.raises(ValueError, match=f"tree_verify: {message}"):
        _cpu.tree_verify(*replaced(args, index, value))


@pytest.mark.parametrize(("mode", "coins"), [("coupled", True), ("target_only", False)])
def test_a_mode_without_noise_is_refused(mode: str, coins: bool) -> None:
    args = verification(mode, FILTERS["plain"], vocabulary=9, coins=coins)
    with pytest.raises(ValueError, match="tree_verify: seed: want seed and position, or coins where they serve"):
        _cpu.tree_verify(*replaced(args, 9, None))


BAD_DRAFTS: dict[str, tuple[int, Any, str]] = {
    "scores_short": (1, torch.zeros(2, 2), "scores: want 6 elements; got 4"),
    "d2t_short": (2, torch.zeros(39, dtype=torch.int64), "d2t: want 40 elements; got 39"),
    "seed_none": (3, None, "position: want both seed and position, or neither; got one"),
    "position_short": (4, torch.zeros(1, dtype=torch.int64), "position: want 2 elements; got 1"),
    "k_zero": (5, 0, "k: want an integer in 1..40; got 0"),
    "k_large": (5, 41, "k: want an integer in 1..40; got 41"),
    "step_negative": (6, -1, r"step: want an integer in 0..2\*\*31 - 1; got -1"),
}


@pytest.mark.parametrize("name", BAD_DRAFTS)
def test_bad_arguments_of_draft_topk_are_refused(name: str) -> None:
    index, value, message = BAD_DRAFTS[name]
    args = drafting(frontier=3, vocabulary=40, k=4, noise=True, offsets=True)
    with pytest.raises(ValueError, match=f"draft_topk: {message}"):
        _cpu.draft_topk(*replaced(args, index, value))


def test_d2t_may_hold_anything() -> None:
    args = drafting(frontier=3, vocabulary=40, k=40, noise=True, offsets=True)
    args[2] = torch.where(torch.arange(40) % 2 == 0, 2**63 - 1, -(2**63))
    assert _cpu.draft_topk(*args)[0].shape == (2, 3, 40)
