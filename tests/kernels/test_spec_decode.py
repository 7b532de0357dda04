"""tree_verify in every room: the same seed gives the same tokens for every tree, and log-probabilities are right.

Plain sampling is the op on a tree of one node; it is checked here against a second writing of the law and the noise.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from m3kernels.spec_decode import law, tree_verify
from m3kernels.spec_decode.reference import TOLERANCE, make_inputs
from m3kernels.testing import bitwise_equal, check_error
from tests.kernels.spec_decode_batches import IN_TRITON, INTERPRETED
from tests.kernels.spec_decode_cases import SAMPLINGS, Sampling, laws_of_rows

ROOMS = ["reference", "cpu", IN_TRITON]
each_room = pytest.mark.parametrize("backend", ROOMS, indirect=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def size_for(backend: str, small: int, large: int) -> int:
    """A size that the room can take in a test: large natively, small in plain torch or the interpreter."""
    return large if backend == "cpu" else small


@dataclasses.dataclass(frozen=True)
class Batch:
    """Random trees with their logits, seeds and positions."""

    given: dict[str, Tensor]
    drawn: dict[str, Tensor]

    @staticmethod
    def make(requests: int, nodes: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
        x = make_inputs(requests, nodes, vocabulary, depth=5, seed=seed, dtype=dtype)
        given = {name: x[name] for name in ("logits", "candidates", "next_token", "next_sibling")}
        seeds = torch.arange(requests) * 2_654_435_761 - 7
        return Batch(given, {"seed": seeds, "position": torch.arange(requests) % 5 + 100})


def plain_sampling(batch: Batch, sampling: Sampling, steps: int, **options: object) -> list[list[int]]:
    """Tokens of token-by-token sampling, by the op on trees of one node, along the tree as long as it goes."""
    logits, candidates, first, sibling = batch.given.values()
    requests = len(logits)
    node, going = torch.zeros(requests, dtype=torch.int64), torch.ones(requests, dtype=torch.bool)
    alone = torch.full((requests, 1), -1)
    found: list[list[int]] = [[] for _ in range(requests)]
    for step in range(steps):
        rows = logits[torch.arange(requests), node][:, None]
        drawn = {"seed": batch.drawn["seed"], "position": batch.drawn["position"] + step}
        out = tree_verify(rows, torch.zeros_like(alone), alone, alone, **sampling.tensors(requests), **drawn, **options)
        token = out.tokens[:, 0]
        child = first[torch.arange(requests), node]
        following = torch.full_like(node, -1)
        for b in going.nonzero()[:, 0].tolist():
            found[b].append(int(token[b]))
            at = int(child[b])
            while at >= 0 and int(candidates[b, at]) != int(token[b]):
                at = int(sibling[b, at])
            following[b] = at
        going &= following >= 0
        node = following.clamp(min=0)
    return found


def emitted(tokens: Tensor) -> list[list[int]]:
    return [[token for token in row if token != -1] for row in tokens.tolist()]


# -- seed-exactness ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "sampling"),
    [
        *(pytest.param(room, SAMPLINGS[name], id=f"{room}-{name}") for room in ROOMS[:2] for name in SAMPLINGS),
        pytest.param("spec_decode=triton", SAMPLINGS["plain"], marks=INTERPRETED, id="triton-plain"),
        pytest.param("spec_decode=triton", SAMPLINGS["all"], marks=(*INTERPRETED, pytest.mark.slow), id="triton-all"),
        pytest.param(
            "spec_decode=triton", SAMPLINGS["top-p"], marks=(*INTERPRETED, pytest.mark.slow), id="triton-top-p"
        ),
    ],
    indirect=["backend"],
)
def test_coupled_tokens_are_those_of_plain_sampling_with_the_same_seed(backend, sampling):
    requests = size_for(backend, 6, 700)
    batch = Batch.make(requests, 9, 23, seed=1)
    found = tree_verify(**batch.given, mode="coupled", **sampling.tensors(requests), **batch.drawn)
    assert emitted(found.tokens) == plain_sampling(batch, sampling, 9, mode="coupled")
    assert int(found.accept_length.sum()) > 0


@each_room
def test_greedy_tokens_are_those_of_plain_greedy_decoding(backend):
    requests = size_for(backend, 6, 700)
    batch = Batch.make(requests, 9, 23, seed=2)
    found = tree_verify(**batch.given, mode="greedy")
    assert emitted(found.tokens) == plain_sampling(batch, Sampling(), 9, mode="greedy")


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("vocabulary", [49152, 151936])
def test_coupled_tokens_are_those_of_plain_sampling_in_a_real_vocabulary(backend, vocabulary):
    batch = Batch.make(6, 8, vocabulary, seed=3)
    for sampling in (SAMPLINGS["plain"], SAMPLINGS["all"]):
        found = tree_verify(**batch.given, mode="coupled", **sampling.tensors(6), **batch.drawn)
        assert emitted(found.tokens) == plain_sampling(batch, sampling, 8, mode="coupled")


@each_room
@pytest.mark.parametrize("name", ["plain", "all", "top-p"])
def test_a_token_drawn_is_the_winner_of_the_race(backend, name):
    """argmin over v of E(seed, position, v) / p_v, both written a second time."""
    requests, vocabulary = size_for(backend, 8, 500), 29
    batch = Batch.make(requests, 1, vocabulary, seed=4)
    p = laws_of_rows(batch.given["logits"][:, 0], SAMPLINGS[name])
    noise = law.race(batch.drawn["seed"][:, None], batch.drawn["position"][:, None], torch.arange(vocabulary)[None])
    found = tree_verify(**batch.given, mode="coupled", **SAMPLINGS[name].tensors(requests), **batch.drawn)
    times = torch.where(p > 0, noise / p, torch.inf)
    runner_up = times.sort(dim=1).values[:, :2]
    clear = runner_up[:, 1] > runner_up[:, 0] * (1 + 1e-5)
    assert int(clear.sum()) >= requests - 1
    assert torch.equal(found.tokens[:, 0][clear], times.argmin(1)[clear])


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_seeds_and_positions_give_different_tokens(backend):
    batch = Batch.make(1, 1, 1000, seed=5)
    given = {name: value.expand(200, *value.shape[1:]) for name, value in batch.given.items()}
    same = torch.zeros(200, dtype=torch.int64)
    for drawn in ({"seed": torch.arange(200), "position": same}, {"seed": same, "position": torch.arange(200)}):
        tokens = tree_verify(**given, mode="coupled", temperature=torch.full((200,), 3.0), **drawn).tokens
        assert len(tokens.unique()) > 50


# -- rooms agree ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["cpu", IN_TRITON], indirect=True)
@pytest.mark.parametrize("mode", ["greedy", "target_only", "chain", "coupled"])
def test_a_room_walks_as_the_reference(backend, mode, monkeypatch):
    from m3kernels.spec_decode import reference

    requests = size_for(backend, 5, 60)
    batch = Batch.make(requests, 8, 37, seed=6)
    sampling = SAMPLINGS["all"].tensors(requests)
    sampling["temperature"][::3] = 0.0
    probs = batch.given["logits"].softmax(-1) if mode == "chain" else None
    found = tree_verify(**batch.given, mode=mode, **sampling, **batch.drawn, draft_probs=probs, logprobs="sampling")
    flat = (*sampling.values(), *batch.drawn.values(), None, None, probs, None, mode, 8, "sampling")
    wanted = reference.tree_verify(*batch.given.values(), *flat)
    assert torch.equal(found.tokens, wanted[0])
    assert torch.equal(found.accept_index, wanted[1])
    assert torch.equal(found.accept_length, wanted[2])
    torch.testing.assert_close(found.logprobs, wanted[3], rtol=1e-5, atol=2e-6)


@each_room
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_raw_logprobs_keep_the_error_rule(backend, dtype):
    if backend == "spec_decode=triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 wrongly")
    requests = size_for(backend, 4, 50)
    batch = Batch.make(requests, 6, 301, seed=7, dtype=dtype)
    found = tree_verify(**batch.given, mode="coupled", **batch.drawn, logprobs="raw")
    used = found.tokens >= 0
    rows = batch.given["logits"].gather(
        1, found.accept_index.clamp(min=0).long()[..., None].expand(-1, -1, 301)
    )  # (B, S, V)
    tokens = found.tokens.clamp(min=0)[..., None]
    exact = rows.double().log_softmax(-1).gather(2, tokens)[..., 0]
    torch32 = rows.float().log_softmax(-1).gather(2, tokens)[..., 0]
    check_error(found.logprobs[used], exact[used], torch32[used], TOLERANCE)
    assert not found.logprobs[~used].any()


@each_room
def test_width_bounds_the_path(backend):
    batch = Batch.make(3, 5, 3, seed=8)
    logits = torch.zeros(3, 5, 3)
    chain = torch.tensor([[1, 2, 3, 4, -1]]).expand(3, 5).contiguous()
    given = {"logits": logits, "candidates": torch.zeros(3, 5, dtype=torch.int64), "next_token": chain}
    alone = torch.full((3, 5), -1)
    found = tree_verify(**given, next_sibling=alone, mode="greedy", width=3, **batch.drawn)
    assert found.tokens.tolist() == [[0, 0, 0]] * 3
    assert found.accept_index.tolist() == [[0, 1, 2]] * 3
    assert found.accept_length.tolist() == [2] * 3
    assert found.bonus_token.tolist() == [0] * 3


@each_room
@pytest.mark.parametrize("mode", ["greedy", "target_only", "coupled"])
def test_a_row_that_allows_no_token_emits_minus_one(backend, mode):
    logits = torch.full((2, 1, 5), -torch.inf)
    logits[1, 0, 3] = 0.0
    link = torch.full((2, 1), -1)
    drawn = {"seed": torch.zeros(2, dtype=torch.int64), "position": torch.zeros(2, dtype=torch.int64)}
    found = tree_verify(logits, torch.zeros_like(link), link, link, mode=mode, **drawn, logprobs="raw")
    assert found.tokens.tolist() == [[-1], [3]]
    assert found.logprobs.tolist() == [[0.0], [0.0]]


@each_room
def test_logits_that_are_not_finite_have_a_meaning(backend):
    """NaN is never drawn; an infinite logit takes all the mass."""
    logits = torch.tensor([[[0.0, torch.nan, 1.0]], [[0.0, torch.inf, 1.0]]])
    link = torch.full((2, 1), -1)
    found = tree_verify(logits, torch.zeros_like(link), link, link, mode="greedy")
    assert found.tokens.tolist() == [[2], [1]]


# -- row-invariance ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_request_does_not_depend_on_its_neighbours(backend):
    batch = Batch.make(9, 8, 5003, seed=9)
    sampling = SAMPLINGS["all"].tensors(9)
    whole = tree_verify(**batch.given, **sampling, **batch.drawn, logprobs="sampling")
    for b in range(9):
        one = {name: value[b : b + 1] for name, value in (batch.given | sampling | batch.drawn).items()}
        alone = tree_verify(**one, logprobs="sampling")
        assert all(bitwise_equal(x[b : b + 1], y) for x, y in zip(whole, alone, strict=True))
