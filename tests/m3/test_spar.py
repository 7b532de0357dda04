"""SPAR: equations 7 and 8 by hand, what follows from them, the rule for groups of little variance, and every error."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3.algorithms import grpo, spar
from m3kernels.policy_loss import LossSpec, linear_policy_loss

REWARDS_P_R = torch.tensor([[0.2, 0.9, 0.5, 0.4], [0.0, 1.0, 1.0, 0.5]])
CLEAN_P_R_S = torch.ones(2, 4, 3)


def penalised(prompt: int, rollout: int, step: int, factor: float) -> torch.Tensor:
    factors = CLEAN_P_R_S.clone()
    factors[prompt, rollout, step] = factor
    return factors


# -- equation 7 -------------------------------------------------------------------------------------------------------
FACTORS = {
    "clean": ([], 1.0),
    "mild": (["rigid_phrasing"], 0.9),
    "severe": (["redundant_question"], 0.1),
    "the_worst_alone_counts": (["rigid_phrasing", "redundant_question", "rigid_phrasing"], 0.1),
}


@pytest.mark.parametrize(("violations", "factor"), FACTORS.values(), ids=FACTORS)
def test_factor_of_a_step(violations, factor):
    assert spar.step_factor(violations) == factor


def test_factors_are_padded_with_clean_steps():
    config = spar.Config(penalties={"a": 0.5, "b": 0.25})
    found = spar.step_factors([[[{"a"}, set(), {"a", "b"}], []], [[set()], [{"b"}, set()]]], config)
    wanted = [[[0.5, 1.0, 0.25], [1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [0.25, 1.0, 1.0]]]
    assert found.equal(torch.tensor(wanted))


def test_factors_of_nothing():
    assert spar.step_factors([]).shape == (0, 0, 0)


# -- equation 8 -------------------------------------------------------------------------------------------------------
def test_advantages_are_equation_8():
    """Statistics of the unpenalised rewards: 0.2 0.9 0.5 0.4 have mean 0.5, variance 0.26 / 3."""
    factors = torch.tensor([[[1.0, 0.1], [0.9, 1.0], [1.0, 0.5], [0.1, 0.1]]])
    found = spar.advantages(REWARDS_P_R[:1].double(), factors)
    mean, std = 0.5, math.sqrt(0.26 / 3)
    effective = torch.tensor([[[0.2, 0.02], [0.81, 0.9], [0.5, 0.25], [0.04, 0.04]]], dtype=torch.float64)
    torch.testing.assert_close(found, (effective - mean) / (std + 1e-6), rtol=1e-6, atol=1e-6)


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=3))
def test_without_violations_it_is_grpo_exactly(rewards):
    rewards_P_R = torch.tensor(rewards)
    found = spar.advantages(rewards_P_R, torch.ones(*rewards_P_R.shape, 3))
    assert found.equal(grpo.advantages(rewards_P_R).unsqueeze(2).expand_as(found))


def test_without_reward_a_violation_changes_nothing():
    assert spar.advantages(REWARDS_P_R, penalised(1, 0, 2, 0.1)).equal(spar.advantages(REWARDS_P_R, CLEAN_P_R_S))


def test_violation_costs_its_own_step_only():
    clean = spar.advantages(REWARDS_P_R, CLEAN_P_R_S)
    found = spar.advantages(REWARDS_P_R, penalised(0, 1, 2, 0.1))
    assert found[0, 1, 2] < 0 < clean[0, 1, 2], "the best rollout's bad step is discouraged, its others are not"
    found[0, 1, 2] = clean[0, 1, 2]
    assert found.equal(clean)


@given(st.floats(0.01, 1), st.floats(0.01, 1))
def test_worse_violation_costs_more(one, other):
    mild, severe = sorted((one, other), reverse=True)
    found = [spar.advantages(REWARDS_P_R.double(), penalised(0, 1, 0, factor))[0, 1, 0] for factor in (mild, severe)]
    assert found[0] >= found[1]


def test_mild_violation_hides_in_a_group_of_large_variance():
    """The paper's implicit curriculum: as rewards of the group draw together, the same violation weighs more."""
    far, near = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[0.6, 0.9, 0.75]])
    factors = torch.tensor([[[1.0], [0.9], [1.0]]])
    cost = [
        (spar.advantages(rewards, factors) - spar.advantages(rewards, torch.ones(1, 3, 1)))[0, 1, 0].item()
        for rewards in (far, near)
    ]
    assert cost == pytest.approx([-0.09 / 0.4, -0.09 / 0.15], rel=1e-4)


# -- groups of little variance ----------------------------------------------------------------------------------------
def test_group_of_equal_rewards_keeps_a_bounded_penalty():
    """Clean steps have no advantage; (0.1 - 1) * 0.8 is divided by the floor of 0.1, not by eps."""
    factors = torch.tensor([[[1.0, 0.1], [1.0, 0.9], [1.0, 1.0]]])
    found = spar.advantages(torch.full((1, 3), 0.8), factors)
    torch.testing.assert_close(found, torch.tensor([[[0.0, -7.2], [0.0, -0.8], [0.0, 0.0]]]))
    assert not found[:, :, 0].any()


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.floats(1e-3, 1))
def test_advantages_are_bounded_whatever_the_variance(rewards, factor):
    rewards_P_R = torch.tensor([rewards], dtype=torch.float64)
    found = spar.advantages(rewards_P_R, torch.full((1, 4, 1), factor))
    assert found.abs().max() <= 3 / math.sqrt(4) + 1 / 0.1 + 1e-9


def test_floor_touches_the_penalty_alone():
    """0.50 and 0.51 are a hundredth apart: the relative part still is GRPO's, only the penalty is held back."""
    rewards = torch.tensor([[0.50, 0.51]], dtype=torch.float64)
    factors = torch.tensor([[[1.0, 0.5], [1.0, 0.5]]])
    found = spar.advantages(rewards, factors)
    assert found[0, :, 0].equal(grpo.advantages(rewards)[0])
    torch.testing.assert_close(found[0, :, 1] - found[0, :, 0], torch.tensor([-2.5, -2.55], dtype=torch.float64))


def test_floor_can_be_set():
    factors = torch.tensor([[[0.5], [1.0]]])
    found = spar.advantages(torch.ones(1, 2), factors, spar.Config(min_std=0.25))
    assert found.tolist() == [[[-2.0], [0.0]]]


# -- from steps to tokens ---------------------------------------------------------------------------------------------
def test_steps_are_runs_of_the_mask():
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    wanted = [[-1, 0, 0, -1, 1, -1, -1, 2], [0] * 8, [-1] * 8]
    assert spar.step_ids(mask).tolist() == wanted


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_steps_of_nothing(shape):
    assert spar.step_ids(torch.ones(shape)).shape == shape


def test_tokens_have_the_advantage_of_their_step():
    steps = torch.tensor([[0.5, -1.0], [2.0, 3.0]])
    ids = torch.tensor([[-1, 0, 0, -1, 1], [1, 1, -1, 0, -1]])
    wanted = [[0.0, 0.5, 0.5, 0.0, -1.0], [3.0, 3.0, 0.0, 2.0, 0.0]]
    assert spar.token_advantages(steps, ids).tolist() == wanted


def consultation(spec: LossSpec):
    """Gradients of 2 sequences of 2 steps through a loss; advantages +1 and -1 in the first, 0 in the second."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, 7, 4, generator=generator, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator)
    ids = torch.randint(9, (2, 7), generator=generator)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1]])
    old = (hidden @ weight.T).detach().log_softmax(-1).gather(2, ids[..., None])[..., 0]
    step_ids = spar.step_ids(mask)
    advantages = spar.token_advantages(torch.tensor([[1.0, -1.0], [0.0, 0.0]]), step_ids)
    loss, metrics = linear_policy_loss(hidden, weight, ids, advantages, old, mask=mask, segment_ids=step_ids, spec=spec)
    return torch.autograd.grad(loss, hidden)[0], metrics, (hidden, weight, ids)


@pytest.mark.parametrize("ratio_level", ["sequence", "step"])
def test_loss_moves_each_step_its_own_way(ratio_level):
    """Under the loss of SPAR the clean step's tokens become likelier, the bad step's less likely."""
    grad, metrics, (hidden, weight, ids) = consultation(spar.loss_spec(spar.Config(ratio_level=ratio_level)))
    logits = hidden @ weight.T
    taken = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    own = torch.autograd.grad(taken.sum(), hidden)[0]
    share = 1 / 4 / 2  # 1 / tokens of the sequence / sequences
    signs = torch.tensor([[-1, -1, 0, 0, 1, 1, 0], [0] * 7])
    torch.testing.assert_close(grad, share * signs[..., None] * own)
    assert metrics["rows_differentiated"] == 4, "the second consultation has advantage 0 and costs nothing"


def test_spec():
    wanted = LossSpec(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean")
    assert spar.loss_spec() == wanted


# -- errors -----------------------------------------------------------------------------------------------------------
PENALTY = "spar.Config: penalties['a']: want a number in (0, 1); got "
ERRORS = {
    "penalty_of_one": (lambda: spar.Config(penalties={"a": 1.0}), f"{PENALTY}1.0"),
    "penalty_of_zero": (lambda: spar.Config(penalties={"a": 0.0}), f"{PENALTY}0.0"),
    "penalty_nan": (lambda: spar.Config(penalties={"a": math.nan}), f"{PENALTY}nan"),
    "eps_nan": (lambda: spar.Config(eps=math.nan), "spar.Config: eps: want a number > 0; got nan"),
    "min_std": (lambda: spar.Config(min_std=0.0), "spar.Config: min_std: want a number > 0; got 0.0"),
    "unknown_violation": (
        lambda: spar.step_factor(["redundant_questions"]),
        "spar.step_factor: violations: want of ['illogical_order', 'redundant_question', 'rigid_phrasing', "
        "'safety_risk']; got 'redundant_questions'; nearest is 'redundant_question'",
    ),
    "violation_like_none": (
        lambda: spar.step_factor(["zzz"], spar.Config(penalties={"a": 0.5})),
        "spar.step_factor: violations: want of ['a']; got 'zzz'",
    ),
    "ragged_rollouts": (
        lambda: spar.step_factors([[[]], [[], []]]),
        "spar.step_factors: violations: want as many rollouts of every prompt; got [1, 2]",
    ),
    "negative_reward": (
        lambda: spar.advantages(REWARDS_P_R - 0.5, CLEAN_P_R_S),
        "spar.advantages: rewards: want numbers in [0, 1] (a penalty would raise a negative one); got -0.5 to 0.5",
    ),
    "reward_above_one": (
        lambda: spar.advantages(REWARDS_P_R * 2, CLEAN_P_R_S),
        "spar.advantages: rewards: want numbers in [0, 1] (a penalty would raise a negative one); got 0 to 2",
    ),
    "nan_reward": (
        lambda: spar.advantages(REWARDS_P_R.log().log(), CLEAN_P_R_S),
        "spar.advantages: rewards: want finite numbers; got nan or inf",
    ),
    "factor_of_zero": (
        lambda: spar.advantages(REWARDS_P_R, CLEAN_P_R_S * 0),
        "spar.advantages: factors: want numbers in (0, 1]; got (2, 4, 3) float32",
    ),
    "factor_above_one": (
        lambda: spar.advantages(REWARDS_P_R, CLEAN_P_R_S * 1.01),
        "spar.advantages: factors: want numbers in (0, 1]; got (2, 4, 3) float32",
    ),
    "factors_of_others": (
        lambda: spar.advantages(REWARDS_P_R, CLEAN_P_R_S[:1]),
        "spar.advantages: factors: want (2, 4, S); got (1, 4, 3) float32",
    ),
    "mask": (lambda: spar.step_ids(torch.ones(4)), "spar.step_ids: mask: want (B, L); got (4,) float32"),
    "step_without_advantage": (
        lambda: spar.token_advantages(torch.zeros(1, 2), torch.tensor([[-1, 0, 2]])),
        "spar.token_advantages: step_ids: want integers in [-1, 2), 2 steps having an advantage; got -1 to 2",
    ),
    "step_ids": (
        lambda: spar.token_advantages(torch.zeros(1, 2), torch.zeros(2, 3, dtype=torch.int64)),
        "spar.token_advantages: step_ids: want (1, L) integers; got (2, 3) int64",
    ),
    "advantages": (
        lambda: spar.token_advantages(torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64)),
        "spar.token_advantages: advantages: want (B, S); got (2,) float32",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
