"""Gradients of every policy loss against finite differences in fp64, and what a held ratio is for.

A loss with quantities held constant (a sequence's ratio, the advantage with its KL, the weight of a one-sided clip) is
not the function whose gradient it gives. ``Surrogate`` is that function: written here again, from the formulas, with
those quantities computed once. Its finite differences must be the gradients that linear_policy_loss formed.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.policy_loss import LossSpec, linear_policy_loss, policy_loss_from_logprobs

LEVELS = ("token", "step", "sequence")
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")
KLS = ("none", *(f"{k}_{where}" for k in ("k1", "k2", "k3") for where in ("loss", "reward")), "k3_weighted")
CLIPS = ("two_sided", "dual", "one_sided", "none")
SIZES, HIDDEN, VOCABULARY = (4, 3, 5), 3, 6  # tokens of three sequences
STEPS = torch.tensor([0, 0, 1, 1, 0, 0, 0, 3, 3, 4, 4, 4])


def make_case() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    rows = sum(SIZES)
    double = dict(generator=g, dtype=torch.float64)
    case = {
        "hidden": torch.randn(rows, HIDDEN, **double),
        "weight": torch.randn(VOCABULARY, HIDDEN, **double),
        "ids": torch.randint(0, VOCABULARY, (rows,), generator=g),
        "advantages": torch.randn(rows, **double),
        "mask": torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0]).bool(),
        "segment_ids": STEPS,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(SIZES)]),
    }
    here = logprobs_of(case["hidden"], case["weight"], case["ids"])
    case["old_logprobs"] = here + 0.3 * torch.randn(rows, **double)
    case["ref_logprobs"] = here + 0.5 * torch.randn(rows, **double)
    return case


def logprobs_of(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def spec_of(level: str, aggregation: str, kl: str, clip: str) -> LossSpec:
    fields: dict[str, Any] = dict(ratio_level=level, aggregation=aggregation, clip_low=0.1, clip_high=0.15)
    fields |= dict(constant_length=7) if aggregation == "constant" else {}
    fields |= dict(dual_clip=1.2) if clip == "dual" else dict(clip=clip)
    if kl != "none":
        estimator, where = kl.split("_")
        fields |= dict(kl_coef=0.4, kl_estimator=estimator, kl_in="reward" if where == "reward" else "loss")
        fields |= dict(kl_ratio_weighted=where == "weighted")
    return LossSpec(**fields)


def groups(level: str, case: dict[str, Tensor]) -> list[list[int]]:
    """Indices of the tokens whose ratios are averaged together."""
    bounds = case["cu_seqlens"].tolist()
    on = case["mask"].tolist()
    found = []
    for start, stop in itertools.pairwise(bounds):
        inside = range(start, stop)
        if level == "sequence":
            found.append([t for t in inside if on[t]])
        elif level == "step":
            runs = itertools.groupby(inside, key=lambda t: int(case["segment_ids"][t]))
            found += [[t for t in run if on[t]] for _, run in runs]
        else:
            found += [[t] for t in inside if on[t]]
    return [group for group in found if group]


def weights_of(spec: LossSpec, case: dict[str, Tensor]) -> Tensor:
    """What each token counts."""
    weights = torch.zeros(sum(SIZES), dtype=torch.float64)
    for group in groups("sequence", case):
        count = {"token_mean": int(case["mask"].sum()), "sequence_mean": 3 * len(group), "constant": 3 * 7}
        weights[group] = 1 / count[spec.aggregation]
    return weights


def kl(policy: Tensor, ref: Tensor, estimator: str) -> Tensor:
    ratio = ref - policy
    return {"k1": -ratio, "k2": ratio**2 / 2, "k3": ratio.exp() - 1 - ratio}[estimator]


class Surrogate:
    """The function of (hidden, weight) that has the gradient of a loss where the case stands."""

    def __init__(self, spec: LossSpec, case: dict[str, Tensor]) -> None:
        self.spec, self.case, self.weights = spec, case, weights_of(spec, case)
        self.base = logprobs_of(case["hidden"], case["weight"], case["ids"])
        self.ratio = torch.ones_like(self.base)
        for group in groups(spec.ratio_level, case):
            self.ratio[group] = (self.base - case["old_logprobs"])[group].mean().exp()
        self.advantages = case["advantages"]
        if spec.kl_coef and spec.kl_in == "reward":
            penalty = kl(case["old_logprobs"], case["ref_logprobs"], spec.kl_estimator)
            self.advantages = self.advantages - spec.kl_coef * penalty

    def __call__(self, hidden: Tensor, weight: Tensor) -> Tensor:
        spec, a = self.spec, self.advantages
        logp = logprobs_of(hidden, weight, self.case["ids"])
        ratio = self.ratio * (logp - self.base).exp()
        low, high = 1 - spec.clip_low, 1 + spec.clip_high
        if spec.clip == "one_sided":
            gain = self.ratio.clamp(max=high) * a * logp
        elif spec.clip == "none":
            gain = ratio * a
        else:
            gain = torch.where(a > 0, ratio.clamp(max=high), ratio.clamp(min=low)) * a
            if spec.dual_clip:
                gain = torch.where(a > 0, gain, ratio.clamp(min=low, max=spec.dual_clip) * a)
        loss = -gain
        if spec.kl_coef and spec.kl_in == "loss":
            term = kl(logp, self.case["ref_logprobs"], spec.kl_estimator)
            loss = loss + spec.kl_coef * term * (ratio if spec.kl_ratio_weighted else 1)
        return (loss * self.weights).sum()


class Probe(torch.autograd.Function):
    """Forward: a surrogate. Backward: the gradients that linear_policy_loss formed. gradcheck compares the two."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, surrogate: Surrogate) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.surrogate = surrogate
        return surrogate(hidden, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            loss, _ = linear_policy_loss(
                **{**ctx.surrogate.case, "hidden": hidden, "weight": weight}, spec=ctx.surrogate.spec
            )
        return *torch.autograd.grad(loss, (hidden, weight), grad), None


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("estimator", KLS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck(level, aggregation, estimator, clip):
    case, spec = make_case(), spec_of(level, aggregation, estimator, clip)
    surrogate = Surrogate(spec, case)
    value, _ = linear_policy_loss(**case, spec=spec)
    torch.testing.assert_close(value, surrogate(case["hidden"], case["weight"]), rtol=1e-12, atol=1e-14)
    leaves = (case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_())
    assert torch.autograd.gradcheck(Probe.apply, (*leaves, surrogate), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_the_case_is_clipped_on_both_sides():
    case = make_case()
    ratio = Surrogate(LossSpec(), case).ratio[case["mask"]]
    a = case["advantages"][case["mask"]]
    assert ((ratio < 0.9) & (a < 0)).any()
    assert ((ratio > 1.15) & (a > 0)).any()
    assert ((ratio > 1.2) & (a < 0)).any()


# -- why a step's or sequence's ratio is held -------------------------------------------------------------------------
def gradients_of(advantages: Tensor, *, held: bool) -> Tensor:
    """d loss / d log pi of one sequence on policy, with the sequence ratio held, or differentiated."""
    logp = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    old = torch.full((4,), -1.0, dtype=torch.float64)
    if held:
        spec = LossSpec(ratio_level="sequence", aggregation="sequence_mean")
        loss, _ = policy_loss_from_logprobs(logp, advantages, old, mask=torch.ones(4), spec=spec)
    else:
        ratio = (logp - old).mean().exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return torch.autograd.grad(loss, logp)[0]


def test_a_differentiated_sequence_ratio_gives_every_token_the_mean_advantage():
    step_wise = torch.tensor([1.0, 1.0, -0.5, -0.5], dtype=torch.float64)
    differentiated = gradients_of(step_wise, held=False)
    torch.testing.assert_close(differentiated, torch.full((4,), -0.25 / 4, dtype=torch.float64))
    torch.testing.assert_close(gradients_of(step_wise, held=True), -step_wise / 4)


def test_both_forms_agree_where_a_sequence_has_one_advantage():
    constant = torch.full((4,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(gradients_of(constant, held=True), gradients_of(constant, held=False))


def test_on_policy_the_three_levels_have_one_gradient():
    """With old = pi every ratio is 1, whatever its level, and what differs is only what gets clipped later."""
    case = make_case()
    del case["old_logprobs"]
    found = []
    for level in LEVELS:
        hidden = case["hidden"].clone().requires_grad_()
        linear_policy_loss(**{**case, "hidden": hidden}, spec=LossSpec(ratio_level=level))[0].backward()
        found.append(hidden.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
