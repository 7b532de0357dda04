"""Every algorithm: its advantages against numbers by hand or by Python's statistics, its spec, its errors."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics

import pytest
import torch

from m3.algorithms import clip_forward_kl, dapo, dr_grpo, grpo, gspo, mopd
from m3kernels.policy_loss import DistillSpec, LossSpec, linear_distill_loss, linear_policy_loss

REWARDS_P_R = torch.tensor([[0.0, 1.0, 0.5, 0.5], [0.25, 0.5, 0.75, 1.0], [-1.0, 1.0, 1.0, 1.0]])
STANDARDISED = {"grpo": grpo.advantages, "dapo": dapo.advantages, "gspo": gspo.advantages}
GROUPED = {**STANDARDISED, "dr_grpo": dr_grpo.advantages, "keep": dapo.keep}


def named(functions):
    return pytest.mark.parametrize("function", functions.values(), ids=functions)


# -- advantages of a group --------------------------------------------------------------------------------------------
@named(STANDARDISED)
def test_advantages_are_rewards_standardised_by_the_unbiased_deviation(function):
    wanted = []
    for row in REWARDS_P_R.double().tolist():
        mean, std = statistics.fmean(row), statistics.stdev(row)
        wanted.append([(reward - mean) / (std + 1e-6) for reward in row])
    torch.testing.assert_close(function(REWARDS_P_R), torch.tensor(wanted))


def test_dr_grpo_does_not_divide():
    wanted = torch.tensor([[-0.5, 0.5, 0.0, 0.0], [-0.375, -0.125, 0.125, 0.375], [-1.5, 0.5, 0.5, 0.5]])
    assert dr_grpo.advantages(REWARDS_P_R).equal(wanted)


@named({**STANDARDISED, "dr_grpo": dr_grpo.advantages})
def test_equal_rewards_have_no_advantage_at_all(function):
    """Not rounding error over eps: three times 0.1 do not sum to 0.3."""
    rewards = torch.tensor([[0.1] * 3, [0.7] * 3], dtype=torch.float64)
    assert not function(rewards).any()


@named({**STANDARDISED, "dr_grpo": dr_grpo.advantages})
def test_group_does_not_depend_on_its_neighbours_or_its_order(function):
    order = torch.tensor([3, 0, 2, 1])
    assert function(REWARDS_P_R[1:2, order]).equal(function(REWARDS_P_R)[1:2, order])


@named({**STANDARDISED, "dr_grpo": dr_grpo.advantages})
def test_no_prompts_have_no_advantages(function):
    assert function(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@named(STANDARDISED)
def test_advantages_keep_the_dtype_of_the_rewards(function, dtype):
    wide = function(REWARDS_P_R.double())
    assert function(REWARDS_P_R.to(dtype)).equal(wide.to(dtype))


REFUSED = {
    "a_group_of_one": (torch.zeros(3, 1), "want (P, R >= 2) floating; got (3, 1) float32"),
    "no_groups": (torch.zeros(3), "want (P, R >= 2) floating; got (3,) float32"),
    "integers": (torch.zeros(3, 2, dtype=torch.int64), "want (P, R >= 2) floating; got (3, 2) int64"),
    "a_list": ([[0.0, 1.0]], "want (P, R >= 2) floating; got list"),
    "nan": (torch.tensor([[0.0, math.nan]]), "want finite numbers; got nan or inf"),
    "infinity": (torch.tensor([[0.0, math.inf]]), "want finite numbers; got nan or inf"),
}


@pytest.mark.parametrize(("rewards", "message"), REFUSED.values(), ids=REFUSED)
@named(GROUPED)
def test_rewards_out_of_contract(function, rewards, message):
    op = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    with pytest.raises(ValueError, match=re.escape(f"{op}: rewards: {message}")):
        function(rewards)


# -- specs ------------------------------------------------------------------------------------------------------------
SPECS = {
    "grpo": (grpo.loss_spec(), LossSpec(kl_coef=0.04, aggregation="sequence_mean")),
    "grpo_config": (
        grpo.loss_spec(grpo.Config(clip_low=0.1, clip_high=0.3, kl_coef=0.0)),
        LossSpec(clip_low=0.1, clip_high=0.3, aggregation="sequence_mean"),
    ),
    "dr_grpo": (
        dr_grpo.loss_spec(dr_grpo.Config(length=3000)),
        LossSpec(aggregation="constant", constant_length=3000),
    ),
    "dapo": (dapo.loss_spec(), LossSpec(clip_high=0.28)),
    "gspo": (
        gspo.loss_spec(),
        LossSpec(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence_mean"),
    ),
    "clip_forward_kl": (clip_forward_kl.loss_spec(), DistillSpec(divergence="clip_forward")),
}


@pytest.mark.parametrize(("found", "wanted"), SPECS.values(), ids=SPECS)
def test_spec(found, wanted):
    assert found == wanted


@pytest.mark.parametrize(
    "config", [grpo.Config(), dapo.Config(), gspo.Config(), mopd.Config(), dr_grpo.Config(length=9)]
)
def test_config_is_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clip_low = 0.5


# -- dapo -------------------------------------------------------------------------------------------------------------
def test_dapo_keeps_groups_that_teach():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.1, 0.1, 0.1 + 1e-7]])
    assert dapo.keep(rewards).tolist() == [False, False, True, True]


LENGTHS = {0: 0.0, 16384: 0.0, 16385: -1 / 4096, 18432: -0.5, 20480: -1.0, 20481: -1.0, 10**6: -1.0}


@pytest.mark.parametrize(("length", "wanted"), LENGTHS.items())
def test_dapo_punishes_overlong_answers_softly(length, wanted):
    assert dapo.overlong_punishment(torch.tensor([[length]])).tolist() == [[wanted]]


@pytest.mark.parametrize("lengths", [torch.tensor([-1]), torch.tensor([1.0])], ids=["negative", "floating"])
def test_dapo_lengths_out_of_contract(lengths):
    with pytest.raises(ValueError, match=re.escape("dapo.overlong_punishment: lengths: want integers >= 0; got ")):
        dapo.overlong_punishment(lengths)


@pytest.mark.parametrize("cache", [0, 101])
def test_dapo_cache_out_of_contract(cache):
    message = f"dapo.Config: cache: want tokens in (0, max_length = 100]; got {cache}"
    with pytest.raises(ValueError, match=re.escape(message)):
        dapo.Config(max_length=100, cache=cache)


# -- clip_forward_kl --------------------------------------------------------------------------------------------------
def head(tokens: int, vocabulary: int = 11, width: int = 5):
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,))
    return hidden, weight, ids


def logprobs_of(hidden, weight, ids):
    return (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def test_clip_forward_kl_is_equation_2():
    hidden, weight, ids = head(9)
    with torch.no_grad():
        here = logprobs_of(hidden, weight, ids)
        teacher = here + torch.tensor([0.5, -0.5, 0.0, 1.0, -1.0, 0.1, -0.1, 2.0, -2.0])
    loss, metrics = linear_distill_loss(
        hidden, weight, ids, teacher, torch.ones(9), clip_forward_kl.loss_spec(), aggregation="token_mean"
    )
    loss.backward()
    found = [hidden.grad.clone(), weight.grad.clone()]
    student = logprobs_of(hidden, weight, ids)
    teaches = clip_forward_kl.teaches(student, teacher)
    assert teaches.tolist() == [True, False, False, True, False, True, False, True, False]
    equation = -student[teaches].sum() / 9
    torch.testing.assert_close(loss, equation)
    torch.testing.assert_close(found, list(torch.autograd.grad(equation, [hidden, weight])))
    assert metrics["rows_differentiated"] == 4


def test_clip_forward_kl_errors():
    with pytest.raises(ValueError, match=re.escape("clip_forward_kl.Config: aggregation: want 'token_mean' or")):
        clip_forward_kl.Config(aggregation="mean")
    with pytest.raises(ValueError, match=re.escape("teacher_logprobs: want the shape of logprobs; got (2,) float32")):
        clip_forward_kl.teaches(torch.zeros(3), torch.zeros(2))


# -- mopd -------------------------------------------------------------------------------------------------------------
BOUNDS = torch.tensor([0, 4, 5, 9])


def mopd_streams(hidden, weight, ids):
    """Teacher, sampler and outcome of 9 tokens in 3 sequences; weights inside and outside of [0.5, 5]."""
    with torch.no_grad():
        here = logprobs_of(hidden, weight, ids)
    teacher = here + torch.tensor([0.5, -0.5, 0.0, 3.0, -3.0, 0.2, 1.0, -1.0, 0.1])
    sampler = here - torch.tensor([0.1, -0.1, 2.0, -2.0, 0.0, 0.7, -0.7, 1.6, -0.69])
    outcome = torch.tensor([1.0, -0.5, 0.0])
    return teacher, sampler, outcome


def test_mopd_advantages_by_hand():
    student, teacher = torch.tensor([[-1.0, -2.0], [-3.0, -0.5]]), torch.tensor([[-1.5, -1.0], [-40.0, -0.5]])
    config = mopd.Config(alpha=0.5)
    wanted = torch.tensor([[-0.5 + 1.0, 1.0 + 1.0], [-20.0 - 0.5, 0.0 - 0.5]])
    outcome = torch.tensor([2.0, -1.0])
    assert mopd.token_advantages(student.requires_grad_(), teacher, outcome, config).equal(wanted)
    assert mopd.token_advantages(student, teacher, outcome[:, None].expand(2, 2), config).equal(wanted)


def test_mopd_weights_by_hand():
    sampler = torch.zeros(5)
    student = torch.tensor([0.0, 0.4, 0.6, 5.0, 5.1]).clamp(min=1e-9).log()
    wanted = torch.tensor([0.0, 0.0, 0.6, 5.0, 0.0])
    torch.testing.assert_close(mopd.token_weights(student, sampler), wanted)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.3])
def test_mopd_spec_is_its_formula(alpha):
    """The LossSpec, with the teacher as reference, has the gradient of -E[1/|y| sum w A log pi]."""
    config = mopd.Config(alpha=alpha)
    hidden, weight, ids = head(9)
    teacher, sampler, outcome = mopd_streams(hidden, weight, ids)
    loss, metrics = linear_policy_loss(
        hidden,
        weight,
        ids,
        mopd.outcome_advantages(outcome, config),
        ref_logprobs=teacher,
        sampler_logprobs=sampler,
        mask=torch.ones(9),
        spec=mopd.loss_spec(config),
        cu_seqlens=BOUNDS,
    )
    loss.backward()
    student = logprobs_of(hidden, weight, ids)
    lengths = BOUNDS.diff()
    of_tokens = outcome.repeat_interleave(lengths)
    advantages = mopd.token_advantages(student, teacher, of_tokens, config)
    weights = mopd.token_weights(student, sampler, config)
    assert (weights == 0).tolist() == [False, False, True, True, False, False, True, False, False]
    share = 1 / lengths.repeat_interleave(lengths) / 3
    formula = -(share * weights * advantages * student).sum()
    wanted = torch.autograd.grad(formula, [hidden, weight])
    torch.testing.assert_close([hidden.grad, weight.grad], list(wanted))
    torch.testing.assert_close(loss.detach(), -(share * weights * advantages).sum())
    torch.testing.assert_close(metrics["kl"], (student - teacher).detach().mean().double(), rtol=1e-5, atol=1e-6)


MOPD_ERRORS = {
    "alpha": (lambda: mopd.Config(alpha=-1.0), "mopd.Config: alpha: want a number >= 0; got -1.0"),
    "weights": (
        lambda: mopd.Config(weight_low=6.0),
        "mopd.Config: weight_low: want in [0, weight_high = 5.0); got 6.0",
    ),
    "teacher": (
        lambda: mopd.token_advantages(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)),
        "mopd.token_advantages: teacher_logprobs: want (2, 3), like logprobs; got (3,) float32",
    ),
    "outcome": (
        lambda: mopd.token_advantages(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)),
        "mopd.token_advantages: outcome: want (2, 3), like logprobs, or one a sequence; got (3,) float32",
    ),
    "sampler": (
        lambda: mopd.token_weights(torch.zeros(2, 3), torch.zeros(3)),
        "mopd.token_weights: sampler_logprobs: want (2, 3), like logprobs; got (3,) float32",
    ),
}


@pytest.mark.parametrize(("call", "message"), MOPD_ERRORS.values(), ids=MOPD_ERRORS)
def test_mopd_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
