"""Losslessness: the exact law of what tree_verify emits is that of plain sampling, and rules that are not are caught.

The coins are inputs, so the law is integrated, not sampled (m3kernels/spec_decode/exact_law.py). Mode "coupled" has no
coins: it is shown to be plain sampling with the same seed, and its noise to be exponential.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import law, tree_speculative_sampling_target_only, tree_verify
from m3kernels.spec_decode.exact_law import Law, exact_law, target_law, total_variation
from tests.kernels.spec_decode_batches import IN_TRITON
from tests.kernels.spec_decode_cases import (
    SAMPLINGS,
    Sampling,
    SmallTree,
    chains,
    completed,
    law_of_row,
    laws_of_rows,
    random_tree,
    star,
)

LOSSLESS = 1e-6  # total variation
LARGEST = 1 - 2.0**-53  # below 1

each_room = pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
interpreted = pytest.mark.parametrize("backend", [IN_TRITON], indirect=True)


# -- target_only ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "seed"),
    [("reference", 0), ("reference", 1), *(("cpu", seed) for seed in range(8))],
    indirect=["backend"],
)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_target_only_has_the_law_of_plain_sampling(backend, sampling, seed):
    tree = random_tree(seed)
    found = exact_law(tree.verifier("target_only", sampling), *tree.shape, resolution=2.0**-32)
    assert total_variation(found, tree.target(sampling)) <= LOSSLESS


@interpreted
@pytest.mark.parametrize(
    ("seed", "name"),
    [(0, "plain"), pytest.param(1, "all", marks=pytest.mark.slow), pytest.param(3, "top-p", marks=pytest.mark.slow)],
)
def test_target_only_has_the_law_of_plain_sampling_in_triton(backend, seed, name):
    tree = random_tree(seed, nodes=4, vocabulary=7, depth=2)
    found = exact_law(tree.verifier("target_only", SAMPLINGS[name]), *tree.shape, resolution=2.0**-26)
    assert total_variation(found, tree.target(SAMPLINGS[name])) <= LOSSLESS


@each_room
def test_grammar_bits_are_part_of_the_law(backend):
    tree = random_tree(2)
    bits = torch.tensor([0b1010101010101010, 0b0110011001100110, *[0xFFFF] * 6], dtype=torch.int32)[:, None]
    allowed = SmallTree(tree.logits.masked_fill(~law.allowed(bits, 16), -torch.inf), *tree.shape)
    found = exact_law(tree.verifier("target_only", Sampling(), grammar_bits=bits), *tree.shape, resolution=2.0**-32)
    assert total_variation(found, allowed.target(Sampling())) <= LOSSLESS
    assert total_variation(found, tree.target(Sampling())) > 0.05


@each_room
def test_a_sibling_that_repeats_another_is_not_counted_twice(backend):
    tree = star([0.3, 0.25, 0.2, 0.25], [1, 1, 2])
    found = exact_law(tree.verifier("target_only", Sampling()), *tree.shape, resolution=2.0**-32)
    assert total_variation(found, tree.target(Sampling())) <= LOSSLESS


# -- chain ------------------------------------------------------------------------------------------------------------
def law_of_chain(draft_law: str, sampling: Sampling, vocabulary: int = 4) -> tuple[Law, Law]:
    """(law of the first three tokens, plain law): two drafts from the draft's law, verified, then plain sampling.

    draft_law: "true": draft_probs are the law that the drafts have; "raw": the drafts come from another, sharper one.
    """
    target, draft = chains(vocabulary, 2, seed=5)
    rows = {prefix: law_of_row(row.tolist(), sampling) for prefix, row in target.items()}
    sharp = {prefix: row.square() / row.square().sum() for prefix, row in draft.items()}
    drawn_from = draft if draft_law == "true" else sharp
    emitted: Law = {}
    for path in itertools.product(range(vocabulary), repeat=2):
        weight = float(drawn_from[()][path[0]] * drawn_from[path[:1]][path[1]])
        if weight == 0:
            continue
        prefixes = [(), path[:1], path]
        tree = SmallTree(
            torch.stack([target[prefix] for prefix in prefixes]),
            torch.tensor([0, *path]),
            torch.tensor([1, 2, -1]),
            torch.full((3,), -1),
        )
        probs = torch.stack([draft[prefix] for prefix in prefixes])
        found = exact_law(tree.verifier("chain", sampling, draft_probs=probs), *tree.shape, resolution=2.0**-30)
        for tokens, mass in found.items():
            emitted[tokens] = emitted.get(tokens, 0.0) + weight * mass
    return completed(emitted, rows, 3), completed({(): 1.0}, rows, 3)


@each_room
@pytest.mark.parametrize("name", ["plain", "all"])
def test_chain_has_the_law_of_plain_sampling_over_drafts_from_the_law_given(backend, name):
    assert total_variation(*law_of_chain("true", SAMPLINGS[name])) <= LOSSLESS


@interpreted
@pytest.mark.slow
def test_chain_has_the_law_of_plain_sampling_in_triton(backend):
    tree = star([0.5, 0.2, 0.3], [1])
    probs = torch.tensor([0.2, 0.7, 0.1])
    emitted: Law = {}
    for token, q in enumerate(probs.tolist()):
        one = star([0.5, 0.2, 0.3], [token])
        verifier = one.verifier("chain", Sampling(), draft_probs=probs.expand(2, 3))
        for tokens, mass in exact_law(verifier, *one.shape, resolution=2.0**-26).items():
            emitted[tokens] = emitted.get(tokens, 0.0) + q * mass
    row = laws_of_rows(tree.logits, Sampling())[0].tolist()
    rows = {(): row, **{(v,): row for v in range(3)}}
    assert total_variation(completed(emitted, rows, 2), completed({(): 1.0}, rows, 2)) <= LOSSLESS


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_draft_law_that_is_not_the_proposal_is_caught(backend):
    assert total_variation(*law_of_chain("raw", Sampling())) > 0.02


# -- corners of the coins ---------------------------------------------------------------------------------------------
@each_room
@pytest.mark.parametrize("final", [0.0, 0.5, LARGEST], ids=["0", "half", "largest"])
@pytest.mark.parametrize("coin", [0.0, LARGEST], ids=["0", "largest"])
@pytest.mark.parametrize("mode", ["target_only", "chain"])
def test_no_coin_emits_a_token_of_probability_zero(backend, mode, coin, final):
    tree = star([0.0, 0.0, 0.6, 0.4, 0.0], [0, 2, 4])
    options = {"draft_probs": torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).expand(4, 5)} if mode == "chain" else {}
    run = tree.verifier(mode, Sampling(), **options)
    tokens = run(torch.full((1, 4), coin, dtype=torch.float64), torch.tensor([final], dtype=torch.float64))
    assert set(tokens[tokens >= 0].tolist()) <= {2, 3}


# -- rules that are not lossless --------------------------------------------------------------------------------------
PROBS = [0.4, 0.05, 0.25, 0.3]
DRAFT = [0.1, 0.6, 0.2, 0.1]  # from which the most likely tokens are proposed: 1, 2


def judged(
    rule: Callable[[list[float], float], int], *, coin_of: str = "node", tokens: tuple[int, ...] = (1, 2)
) -> float:
    """Total variation of a rule on a star. The rule gets the coins (of the nodes) and the final coin, returns a token.

    A token among the children is taken as accepted, unless it comes back as ~token.
    """
    tree = star(PROBS, list(tokens))

    def run(coins: Tensor, final_coins: Tensor) -> Tensor:
        rows = []
        for row, final in zip(coins.tolist(), final_coins.tolist(), strict=True):
            token = rule(row, final)
            rows.append([token, 0] if token in tokens else [token if token >= 0 else ~token, -1])
        return torch.tensor(rows)

    found = exact_law(run, *tree.shape, resolution=2.0**-30, coin_of=coin_of)
    first: Law = {}
    for emitted, mass in found.items():
        first[emitted[:1]] = first.get(emitted[:1], 0.0) + mass
    return total_variation(first, {(v,): p for v, p in enumerate(PROBS)})


def draw(weights: list[float], coin: float) -> int:
    total = itertools.accumulate(weights)
    return next((v for v, upto in enumerate(total) if upto > coin * sum(weights)), len(weights) - 1)


def without(*tokens: int) -> list[float]:
    return [0.0 if v in tokens else p for v, p in enumerate(PROBS)]


def lossless(coins: list[float], final: float) -> int:
    if coins[0] < PROBS[1]:
        return 1
    return 2 if coins[0] < PROBS[1] + PROBS[2] else ~draw(without(1, 2), final)


def sibling_ratio(coins: list[float], final: float) -> int:
    """min(1, p / q) for each deterministic sibling, a fresh coin each, correction from relu(p - q)."""
    for node, token in ((1, 1), (2, 2)):
        if coins[node] < PROBS[token] / DRAFT[token]:
            return token
    return ~draw([max(p - q, 0.0) for p, q in zip(PROBS, DRAFT, strict=True)], final)


def fresh_coin_without_renormalising(coins: list[float], final: float) -> int:
    for node, token in ((1, 1), (2, 2)):
        if coins[node] < PROBS[token]:
            return token
    return ~draw(without(1, 2), final)


def residual_with_rejected(coins: list[float], final: float) -> int:
    token = lossless(coins, final)
    return token if token >= 0 else ~draw(PROBS, final)


def coin_used_twice(coins: list[float], final: float) -> int:
    token = lossless(coins, final)
    return token if token >= 0 else ~draw(without(1, 2), coins[0])


def elder_forgotten(coins: list[float], final: float) -> int:
    """One coin compared with each sibling's own probability instead of the mass so far."""
    return next((token for token in (1, 2) if coins[0] < PROBS[token]), ~draw(without(1, 2), final))


def test_the_right_rule_is_not_rejected():
    assert judged(lossless) <= LOSSLESS


@pytest.mark.parametrize(
    ("rule", "coin_of"),
    [
        (sibling_ratio, "child"),
        (fresh_coin_without_renormalising, "child"),
        (residual_with_rejected, "node"),
        (coin_used_twice, "node"),
        (elder_forgotten, "node"),
    ],
)
def test_a_wrong_rule_is_rejected(rule, coin_of):
    assert judged(rule, coin_of=coin_of) > 1000 * LOSSLESS


def test_a_sibling_counted_twice_is_rejected():
    def rule(coins: list[float], final: float) -> int:
        return 1 if coins[0] < 2 * PROBS[1] else ~draw(without(1), final)

    assert judged(rule, tokens=(1,)) > 1000 * LOSSLESS


def law_with_thresholds(single: float, acc: float) -> float:
    tree = star(PROBS, [1, 2])
    probs = laws_of_rows(tree.logits, Sampling()).float()

    def run(coins: Tensor, final_coins: Tensor) -> Tensor:
        count = len(coins)
        predicts = torch.full((count * 3,), -1, dtype=torch.int32)
        accept_index, length = torch.full((count, 2), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
        shape = [value.expand(count, 3).contiguous() for value in tree.shape]
        index = torch.arange(count * 3).view(count, 3)
        tree_speculative_sampling_target_only(
            *(predicts, accept_index, length, shape[0], index, *shape[1:]),
            *(coins.float(), final_coins.float(), probs.expand(count, 3, 4).contiguous(), None, single, acc),
        )
        path = accept_index.where(accept_index >= 0, 0).long()
        return predicts[path].where(accept_index >= 0, -1)

    return total_variation(exact_law(run, *tree.shape, resolution=2.0**-23), tree.target(Sampling()))


@each_room
def test_the_drop_in_sampler_is_lossless_without_thresholds(backend):
    assert law_with_thresholds(1.0, 1.0) <= LOSSLESS


@each_room
@pytest.mark.parametrize(("single", "acc"), [(1.0, 0.7), (0.2, 1.0)], ids=["threshold_acc", "threshold_single"])
def test_thresholds_below_one_are_rejected(backend, single, acc):
    assert law_with_thresholds(single, acc) > 0.05


def test_a_verifier_that_is_no_walk_is_refused():
    tree = star(PROBS, [1, 2])
    with pytest.raises(ValueError, match="want a walk"):
        exact_law(lambda coins, final: torch.where((final > 0.5)[:, None], 1, 3).expand(-1, 2), *tree.shape)


def test_coin_of_must_be_known():
    tree = star(PROBS, [1, 2])
    with pytest.raises(ValueError, match="exact_law: coin_of: want 'node' or 'child'; got 'sibling'"):
        exact_law(lambda coins, final: coins.long(), *tree.shape, coin_of="sibling")


def test_target_law_sums_to_one_and_ends_where_the_tree_ends():
    tree = star([0.5, 0.25, 0.25], [2])
    assert tree.target(Sampling()) == pytest.approx(
        {(0,): 0.5, (1,): 0.25, (2, 0): 0.125, (2, 1): 0.0625, (2, 2): 0.0625}
    )
    assert target_law(laws_of_rows(tree.logits, Sampling()), *tree.shape, width=1) == pytest.approx(
        {(0,): 0.5, (1,): 0.25, (2,): 0.25}
    )


# -- noise ------------------------------------------------------------------------------------------------------------
KNOWN = {  # Random123's known answers for philox4x32-10: counter, key, words
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN.values(), ids=KNOWN)
def test_philox_gives_the_known_answers(counter, key, words):
    found = law.philox(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert [int(word) for word in found] == words


def test_race_is_exponential_and_refined_near_zero():
    seeds = torch.arange(40)
    noise = law.race(seeds[:, None], torch.tensor(3), torch.arange(5000)[None]).flatten()
    assert float(noise.mean()) == pytest.approx(1, abs=0.01)
    ranked = (-noise).exp().sort().values
    steps = torch.arange(1, len(ranked) + 1) / len(ranked)
    assert float((ranked - steps).abs().max()) < 1.63 / math.sqrt(len(ranked))  # Kolmogorov-Smirnov, 1 %


def test_coins_differ_by_seed_position_and_stream():
    seeds, positions = torch.tensor([0, 1, -1, 2**40]), torch.tensor([0, 1, 2**33])
    coins = torch.stack(
        [law.coin(seeds[:, None], positions[None], stream) for stream in (law.NODE_COIN, law.FINAL_COIN)]
    )
    assert len(coins.unique()) == coins.numel()
    assert bool(((coins >= 0) & (coins < 1)).all())


# -- many draws -------------------------------------------------------------------------------------------------------
def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Wilson-Hilferty's normal score of Pearson's statistic."""
    statistic, freedom = float(((counts - expected).square() / expected).sum()), len(counts) - 1
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def test_chi_square_score_is_small_for_the_law_and_large_for_another():
    expected = torch.full((50,), 100.0)
    counts = torch.distributions.Multinomial(5000, expected).sample()
    assert chi_square(counts, expected) < 4
    assert chi_square(counts * torch.linspace(0.8, 1.2, 50), expected) > 4


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("mode", ["coupled", "target_only"])
def test_draws_from_a_real_vocabulary_have_the_law_of_the_row(backend, mode):
    vocabulary, draws, bins = 151936, 4096, 40
    row = torch.randn(vocabulary) * 2
    p = row.double().softmax(0)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    bin_of = torch.bucketize(p.cumsum(0), edges)
    link = torch.full((draws, 1), -1)
    drawn = {"seed": torch.arange(draws), "position": torch.full((draws,), 11)}
    tokens = tree_verify(
        row.expand(draws, 1, vocabulary), torch.zeros_like(link), link, link, mode=mode, **drawn
    ).tokens
    counts = torch.bincount(bin_of[tokens[:, 0]], minlength=bins)
    expected = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, p) * draws
    assert abs(chi_square(counts, expected)) < 4.5


@each_room
def test_draws_through_a_tree_have_the_law_of_plain_sampling(backend):
    tree, draws = random_tree(4, nodes=6, vocabulary=5, depth=2), 400 if backend == "reference" else 20000
    given = [value.expand(draws, *value.shape) for value in (tree.logits, *tree.shape)]
    drawn = {"seed": torch.arange(draws) + 7, "position": torch.zeros(draws, dtype=torch.int64)}
    emitted = [tuple(t for t in row if t >= 0) for row in tree_verify(*given, mode="coupled", **drawn).tokens.tolist()]
    target = tree.target(Sampling())
    assert set(emitted) <= set(target)
    likely = sorted(target, key=target.__getitem__, reverse=True)[:12]
    counts = torch.tensor([emitted.count(tokens) for tokens in likely])
    counts = torch.cat([counts, torch.tensor([draws - int(counts.sum())])])
    expected = torch.tensor([target[tokens] for tokens in likely], dtype=torch.float64)
    expected = torch.cat([expected, 1 - expected.sum(0, keepdim=True)]) * draws
    assert chi_square(counts, expected) < 4.5
