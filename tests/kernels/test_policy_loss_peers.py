"""The losses of TRL, Liger and verl on the same numbers as ours: value and gradient, by their own code.

In the first part the definitions agree, and a LossSpec is named for each setting of theirs. In the second they do not,
and each test holds the difference as a number. docs/numerics.md has the table. In fp64 on log-probabilities, so that
agreement is to the last few digits.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from m3kernels.policy_loss import LossSpec, policy_loss_from_logprobs

B, L = 4, 8
ROWS = torch.tensor([[1.0] * 8, [1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]]).double()


def batch() -> dict[str, Tensor]:
    """Streams whose ratios leave the usual clip ranges on both sides, and whose mask has holes."""
    generator = torch.Generator().manual_seed(11)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(B, L, generator=generator, dtype=torch.float64)

    logprobs = -noise(1.0).abs() - 0.1
    return dict(
        logprobs=logprobs.requires_grad_(),
        advantages=torch.tensor([1.0, -0.7, 0.4, -1.3], dtype=torch.float64),
        old=logprobs.detach() + noise(0.4),
        ref=logprobs.detach() + noise(0.5),
        sampler=logprobs.detach() + noise(0.6),
        entropy=noise(1.0).abs().requires_grad_(),
        mask=ROWS.clone(),
    )


def ours(data: dict[str, Tensor], spec: LossSpec, normaliser: float | None = None) -> tuple[Tensor, ...]:
    """(loss, its gradient by the log-probabilities)."""
    loss, _ = policy_loss_from_logprobs(
        data["logprobs"],
        data["advantages"],
        data["old"],
        data["ref"],
        data["sampler"],
        data["mask"],
        spec=spec,
        entropy=data["entropy"],
        normaliser=normaliser,
    )
    return loss.detach(), *torch.autograd.grad(loss, data["logprobs"])


def alike(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], rtol: float = 1e-10) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.double(), rtol=rtol, atol=1e-12)
    assert found[1].any()


# -- how each of them is called ---------------------------------------------------------------------------------------
class Trl:
    """TRL's ``GRPOTrainer._compute_loss`` itself, given log-probabilities instead of a model."""

    def __init__(self) -> None:
        trl = pytest.importorskip("trl", reason="trl is not installed")
        accelerate = importlib.import_module("accelerate")
        self.accelerator = accelerate.Accelerator(cpu=True)
        self.trainer = trl.GRPOTrainer

    def __call__(self, data: dict[str, Tensor], ratio: Tensor | None = None, **settings: Any) -> tuple[Tensor, ...]:
        stated = dict(
            loss_type="dapo",
            beta=0.0,
            epsilon_low=0.2,
            epsilon_high=0.2,
            delta=None,
            importance_sampling_level="token",
            use_bias_correction_kl=False,
            max_completion_length=None,
            entropy_coef=0.0,
            items=data["mask"].sum(),
        )
        stated |= settings
        here = object.__new__(self.trainer)
        here.__dict__.update(
            stated,
            args=SimpleNamespace(**stated, steps_per_generation=1),
            accelerator=self.accelerator,
            model=SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            use_vllm=ratio is not None,
            vllm_importance_sampling_correction=True,
            use_adaptive_entropy=False,
            _entropy_bonus_enabled=stated["entropy_coef"] > 0,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _get_per_token_logps_and_entropies=lambda *args, **kwargs: (data["logprobs"], data["entropy"], None),
        )
        inputs = dict(
            prompt_ids=data["mask"][:, :0],
            prompt_mask=data["mask"][:, :0],
            completion_ids=torch.zeros_like(data["mask"]),
            completion_mask=torch.ones_like(data["mask"]),
            tool_mask=data["mask"],
            advantages=data["advantages"],
            old_per_token_logps=data["old"],
            ref_per_token_logps=data["ref"],
            importance_sampling_ratio=ratio,
            num_items_in_batch=stated["items"],
        )
        loss = here._compute_loss(None, inputs)
        return loss.detach(), *torch.autograd.grad(loss, data["logprobs"])


class Liger:
    """Liger's loss of log-probabilities, the part of its GRPO loss after the head."""

    def __init__(self) -> None:
        name = "liger_kernel.chunked_loss.grpo_loss"
        module = pytest.importorskip(name, reason="liger-kernel is not installed")
        self.function = module.LigerFusedLinearGRPOFunction.ppo_loss_fn

    def __call__(self, data: dict[str, Tensor], ratio: Tensor | None = None, **settings: Any) -> tuple[Tensor, ...]:
        loss, _ = self.function(
            data["logprobs"],
            data["mask"],
            data["advantages"],
            data["mask"],
            ref_per_token_logps=data["ref"],
            old_per_token_logps=data["old"],
            vllm_is_ratio=ratio,
            **{"beta": 0.0, **settings},
        )
        return loss.detach(), *torch.autograd.grad(loss, data["logprobs"])


class Verl:
    """verl's registered policy losses, its KL penalties and its aggregation."""

    def __init__(self) -> None:
        name = "verl.trainer.ppo.core_algos"
        self.algorithms = pytest.importorskip(name, reason="verl is not installed, or not wholly")
        self.config = importlib.import_module("verl.workers.config").ActorConfig

    def __call__(
        self,
        data: dict[str, Tensor],
        loss: str = "vanilla",
        aggregation: str = "token-mean",
        kl: tuple[str, float] | None = None,
        weights: Tensor | None = None,
        **settings: Any,
    ) -> tuple[Tensor, ...]:
        config = self.config(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **settings)
        advantages = data["advantages"]
        value, _ = self.algorithms.get_policy_loss_fn(loss)(
            data["old"],
            data["logprobs"],
            advantages if advantages.ndim == 2 else advantages[:, None].expand_as(data["mask"]),
            data["mask"],
            aggregation,
            config,
            weights,
        )
        if kl is not None:
            penalty = self.algorithms.kl_penalty(data["logprobs"], data["ref"], kl[0])
            value = value + kl[1] * self.aggregate(penalty, data, aggregation, config)
        if config.entropy_coeff:
            value = value - config.entropy_coeff * self.aggregate(data["entropy"], data, aggregation, config)
        return value.detach(), *torch.autograd.grad(value, data["logprobs"])

    def aggregate(self, values: Tensor, data: dict[str, Tensor], aggregation: str, config: Any) -> Tensor:
        return self.algorithms.agg_loss(values, data["mask"], aggregation, **config.global_batch_info)


@pytest.fixture
def trl() -> Trl:
    return Trl()


@pytest.fixture
def liger() -> Liger:
    return Liger()


@pytest.fixture
def verl() -> Verl:
    return Verl()


# -- where the definitions agree --------------------------------------------------------------------------------------
COMMON: dict[str, tuple[dict[str, Any], LossSpec, float | None]] = {
    "grpo": (dict(loss_type="grpo"), LossSpec(aggregation="sequence_mean"), None),
    "bnpo": (dict(loss_type="bnpo"), LossSpec(), None),
    "dapo": (dict(loss_type="dapo", epsilon_high=0.28), LossSpec(clip_high=0.28), None),
    "dr_grpo": (
        dict(loss_type="dr_grpo", max_completion_length=16),
        LossSpec(aggregation="constant", constant_length=16),
        None,
    ),
    "k3_in_the_loss": (dict(loss_type="grpo", beta=0.04), LossSpec(kl_coef=0.04, aggregation="sequence_mean"), None),
    "k3_times_the_ratio": (
        dict(loss_type="dapo", beta=0.04, use_bias_correction_kl=True),
        LossSpec(kl_coef=0.04, kl_ratio_weighted=True),
        None,
    ),
    "delta": (dict(loss_type="dapo", delta=1.5), LossSpec(dual_clip=1.5), None),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.3), LossSpec(clip="one_sided", clip_high=0.3), None),
    "sequence_ratio": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.06),
        LossSpec(ratio_level="sequence", clip_low=0.05, clip_high=0.06, aggregation="sequence_mean"),
        None,
    ),
    "sequence_ratio_over_tokens": (
        dict(loss_type="dapo", importance_sampling_level="sequence", beta=0.1),
        LossSpec(ratio_level="sequence", kl_coef=0.1),
        None,
    ),
    "luspo": (
        dict(loss_type="luspo", importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.05),
        LossSpec(ratio_level="sequence", clip_low=0.05, clip_high=0.05),
        float(B),
    ),
}


@pytest.mark.parametrize(("settings", "spec", "normaliser"), COMMON.values(), ids=COMMON)
def test_trl_agrees(trl, settings, spec, normaliser):
    data = batch()
    alike(ours(data, spec, normaliser), trl(data, **settings))


@pytest.mark.parametrize(("settings", "spec", "normaliser"), COMMON.values(), ids=COMMON)
def test_liger_agrees(liger, settings, spec, normaliser):
    data = batch()
    alike(ours(data, spec, normaliser), liger(data, **settings))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_agrees_on_advantages_of_tokens_at_token_level(trl, level):
    """Advantages (B, T), with a token's own ratio; with a sequence's ratio only where they are constant in it."""
    data = batch()
    spread = torch.linspace(-1, 1, L).double() if level == "token" else torch.zeros(L).double()
    data["advantages"] = data["advantages"][:, None] + spread
    spec = LossSpec(ratio_level=level, aggregation="sequence_mean")
    alike(ours(data, spec), trl(data, loss_type="grpo", importance_sampling_level=level))


def test_trl_agrees_on_the_entropy_bonus_over_tokens(trl):
    data = batch()
    found, wanted = ours(data, LossSpec(entropy_coef=0.05)), trl(data, loss_type="bnpo", entropy_coef=0.05)
    alike(found, wanted)


@pytest.mark.parametrize("peer", ["trl", "liger"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_weights_of_the_sampler_stand_before_the_kl(request, peer, beta):
    """TRL's "token_truncate" and "token_mask" modes; the weight multiplies the policy term and not the KL."""
    data = batch()
    weight = (data["old"] - data["sampler"]).exp()
    call = request.getfixturevalue(peer)
    spec = dict(sampler_level="token", kl_coef=beta)
    truncated = LossSpec(**spec, sampler_mode="truncate", sampler_high=1.2)
    alike(ours(data, truncated), call(data, ratio=weight.clamp(max=1.2), beta=beta))
    kept = weight.where((weight >= 0.6) & (weight <= 1.2), 0.0)
    masked = LossSpec(**spec, sampler_mode="mask", sampler_low=0.6, sampler_high=1.2)
    alike(ours(data, masked), call(data, ratio=kept, beta=beta))


AGGREGATIONS = {
    "token_mean": ("token-mean", dict(aggregation="token_mean"), {}),
    "sequence_mean": ("seq-mean-token-mean", dict(aggregation="sequence_mean"), {}),
    "constant": (
        "seq-mean-token-sum-norm",
        dict(aggregation="constant", constant_length=16),
        dict(loss_scale_factor=16),
    ),
}
VERL = {
    "vanilla": (dict(loss="vanilla"), dict(dual_clip=3.0)),
    "vanilla_dual_clip": (
        dict(loss="vanilla", clip_ratio_low=0.1, clip_ratio_high=0.28, clip_ratio_c=1.4),
        dict(clip_low=0.1, clip_high=0.28, dual_clip=1.4),
    ),
    "gspo": (
        dict(loss="gspo", clip_ratio_low=0.03, clip_ratio_high=0.04),
        dict(ratio_level="sequence", clip_low=0.03, clip_high=0.04),
    ),
    "cispo": (
        dict(loss="cispo", clip_ratio_low=1.0, clip_ratio_high=0.28),
        dict(clip="one_sided", clip_high=0.28),
    ),
    "k1": (dict(kl=("k1", 0.1)), dict(dual_clip=3.0, kl_coef=0.1, kl_estimator="k1")),
    "k2": (dict(kl=("k2", 0.1)), dict(dual_clip=3.0, kl_coef=0.1, kl_estimator="k2")),
    "k3": (dict(kl=("low_var_kl", 0.1)), dict(dual_clip=3.0, kl_coef=0.1, kl_estimator="k3")),
    "entropy": (dict(entropy_coeff=0.05), dict(dual_clip=3.0, entropy_coef=0.05)),
}


@pytest.mark.parametrize(("mode", "aggregation", "info"), AGGREGATIONS.values(), ids=AGGREGATIONS)
@pytest.mark.parametrize(("settings", "spec"), VERL.values(), ids=VERL)
@pytest.mark.parametrize("of_tokens", [False, True], ids=["of_sequences", "of_tokens"])
def test_verl_agrees(verl, settings, spec, mode, aggregation, info, of_tokens):
    """Advantages of tokens too, at every ratio level: verl's sequence ratio is held constant, as ours is."""
    data = batch()
    if of_tokens:
        data["advantages"] = data["advantages"][:, None] + torch.linspace(-1, 1, L).double()
    wanted = verl(data, aggregation=mode, global_batch_info=info, **settings)
    alike(ours(data, LossSpec(**spec, **aggregation)), wanted, rtol=1e-7)


def test_verl_leaves_out_empty_sequences_as_we_do(verl):
    data = batch()
    data["mask"][1] = 0
    wanted = verl(data, aggregation="seq-mean-token-mean")
    alike(ours(data, LossSpec(dual_clip=3.0, aggregation="sequence_mean")), wanted, rtol=1e-7)


GLOBAL = {
    "tokens": ("token_mean", dict(batch_num_tokens=50, dp_size=2), 25.0),
    "sequences": ("sequence_mean", dict(global_batch_size=16, dp_size=2), 8.0),
    "constant": ("constant", dict(global_batch_size=16, loss_scale_factor=16), 256.0),
}


@pytest.mark.parametrize(("aggregation", "info", "normaliser"), GLOBAL.values(), ids=GLOBAL)
def test_normaliser_is_the_global_count_of_verl(verl, aggregation, info, normaliser):
    """What a rank divides by: the count of the whole batch over dp_size, since gradients are then averaged."""
    data = batch()
    mode, spec, _ = AGGREGATIONS[aggregation]
    wanted = verl(data, aggregation=mode, global_batch_info=info)
    alike(ours(data, LossSpec(dual_clip=3.0, **spec), normaliser), wanted, rtol=1e-7)


def test_normaliser_is_the_number_of_items_of_trl(trl):
    data = batch()
    alike(ours(data, LossSpec(), normaliser=50.0), trl(data, items=torch.tensor(50.0)))


SAMPLERS = {
    "token_truncate": (("token", 1.2), dict(sampler_level="token", sampler_high=1.2)),
    "sequence_truncate": (("sequence", 1.2), dict(sampler_level="sequence", sampler_high=1.2)),
    "token_mask": (
        ("token", "0.6_1.2"),
        dict(sampler_level="token", sampler_mode="mask", sampler_low=0.6, sampler_high=1.2),
    ),
    "sequence_mask": (
        ("sequence", "0.6_2.5"),
        dict(sampler_level="sequence", sampler_mode="mask", sampler_low=0.6, sampler_high=2.5),
    ),
}


@pytest.mark.parametrize(("theirs", "spec"), SAMPLERS.values(), ids=SAMPLERS)
def test_verl_agrees_on_weights_of_the_sampler(verl, theirs, spec):
    data = batch()
    correction = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    weights, _ = correction.compute_rollout_correction_weights(data["old"] - data["sampler"], data["mask"], *theirs)
    assert ((weights == 0) & (data["mask"] > 0)).any() == ("sampler_mode" in spec)
    alike(ours(data, LossSpec(dual_clip=3.0, **spec)), verl(data, weights=weights), rtol=1e-7)


# -- where they part --------------------------------------------------------------------------------------------------
def single(**streams: list[float]) -> dict[str, Tensor]:
    """One sequence of the given streams; advantages and mask are 1, and the rest 0, unless given."""
    length = len(streams["logprobs"])
    names = ("logprobs", "old", "ref", "sampler", "entropy", "advantages", "mask")
    default = {"advantages": 1.0, "mask": 1.0}
    data = {name: torch.tensor([streams.get(name, [default.get(name, 0.0)] * length)]).double() for name in names}
    data["logprobs"].requires_grad_()
    data["entropy"].requires_grad_()
    return data


def log_ratio(ratio: float) -> dict[str, list[float]]:
    """Streams of one token of this ratio."""
    return dict(logprobs=[-1.0], old=[-1.0 - math.log(ratio)])


def test_differentiated_sequence_ratio_gives_every_token_the_mean_advantage(trl):
    """TRL takes advantages (B, T); +1, +1, -0.5 of three tokens become +0.5 each. Held, each token keeps its own."""
    data = single(logprobs=[-1.0, -2.0, -3.0], old=[-1.0, -2.0, -3.0], advantages=[1.0, 1.0, -0.5])
    _, theirs = trl(data, loss_type="grpo", importance_sampling_level="sequence")
    _, mine = ours(data, LossSpec(ratio_level="sequence", aggregation="sequence_mean"))
    torch.testing.assert_close(theirs, torch.tensor([[-1 / 6, -1 / 6, -1 / 6]]).double())
    torch.testing.assert_close(mine, torch.tensor([[-1 / 3, -1 / 3, 1 / 6]]).double())


def test_correction_of_the_kl_differs_with_a_sequence_ratio(trl):
    """TRL spreads the gradient of that ratio over the sequence; ours stays with the token. The value is the same."""
    data = batch()
    wide = dict(clip_low=0.9, clip_high=9.0)
    mine = ours(data, LossSpec(ratio_level="sequence", kl_coef=1.0, kl_ratio_weighted=True, **wide))
    settings = dict(importance_sampling_level="sequence", epsilon_low=0.9, epsilon_high=9.0)
    theirs = trl(data, beta=1.0, use_bias_correction_kl=True, **settings)
    torch.testing.assert_close(mine[0], theirs[0])
    torch.testing.assert_close(mine[1].sum(1), theirs[1].sum(1))
    assert (mine[1] - theirs[1]).abs().max() > 1e-3


@pytest.mark.parametrize("peer", ["trl", "liger"])
def test_sequences_without_a_token_count_in_their_mean_over_sequences(request, peer):
    """4 sequences, one empty: they divide by 4, we by 3; an explicit normaliser of 4 gives theirs."""
    data = batch()
    data["mask"][1] = 0
    spec = LossSpec(aggregation="sequence_mean")
    theirs = request.getfixturevalue(peer)(data, loss_type="grpo")
    torch.testing.assert_close(ours(data, spec)[0] / theirs[0], torch.tensor(4 / 3).double())
    alike(ours(data, spec, normaliser=4.0), theirs)


@pytest.mark.parametrize("peer", ["trl", "liger"])
@pytest.mark.parametrize(("bound", "weight"), [(1.3, 1.3), (0.3, 0.3)])
def test_bound_of_the_one_sided_clip_is_epsilon_high_itself(request, peer, bound, weight):
    """A ratio of 2 counts epsilon_high in theirs, and 1 + clip_high in ours."""
    data = single(**log_ratio(2.0))
    data["advantages"] = data["advantages"][:, 0]
    _, gradient = request.getfixturevalue(peer)(data, loss_type="cispo", epsilon_high=bound)
    assert gradient.item() == pytest.approx(-weight)
    _, gradient = ours(data, LossSpec(clip="one_sided", clip_high=bound))
    assert gradient.item() == pytest.approx(-min(1 + weight, 2.0))


def test_verl_bounds_the_one_sided_clip_below_too(verl):
    """A ratio of 0.5 counts 0.8 in verl's cispo at clip_ratio_low=0.2, and 0.5 in ours."""
    data = single(**log_ratio(0.5))
    assert verl(data, loss="cispo", clip_ratio_low=0.2)[1].item() == pytest.approx(-0.8)
    assert ours(data, LossSpec(clip="one_sided"))[1].item() == pytest.approx(-0.5)


def test_trl_clips_at_delta_whatever_the_sign_of_the_advantage(trl):
    """delta below 1 + epsilon_high also cuts positive advantages there; a dual clip never does, and is refused."""
    data = single(**log_ratio(1.15))
    assert trl(data, delta=1.1)[0].item() == pytest.approx(-1.1)
    assert ours(data, LossSpec())[0].item() == pytest.approx(-1.15)
    with pytest.raises(ValueError, match=r"LossSpec: dual_clip: want a finite number >= 1\.2; got 1\.1"):
        LossSpec(dual_clip=1.1)


def test_verl_always_clips_twice(verl):
    """A ratio of 4 with advantage -1 costs 3 in verl by default, and 4 in ours unless dual_clip is given."""
    data = single(**log_ratio(4.0), advantages=[-1.0])
    assert verl(data)[0].item() == pytest.approx(3.0)
    assert ours(data, LossSpec())[0].item() == pytest.approx(4.0)


def test_log_ratio_is_held_within_20_nats_and_not_in_trl(trl):
    """A token 25 nats likelier than before, of negative advantage: e^25 in TRL, e^20 without a gradient in ours."""
    data = single(logprobs=[-1.0], old=[-26.0], advantages=[-1.0])
    value, gradient = trl(data)
    assert [value.log().item(), gradient.log().item()] == pytest.approx([25.0, 25.0])
    value, gradient = ours(data, LossSpec())
    assert [value.log().item(), gradient.item()] == pytest.approx([20.0, 0.0])


def test_verl_holds_the_log_of_a_sequence_ratio_below_10(verl):
    """A sequence 12 nats a token likelier, of negative advantage: e^10 without a gradient in verl, e^12 in ours."""
    data = single(logprobs=[-1.0], old=[-13.0], advantages=[-1.0])
    value, gradient = verl(data, loss="gspo")
    assert [value.log().item(), gradient.item()] == pytest.approx([10.0, 0.0])
    value, gradient = ours(data, LossSpec(ratio_level="sequence"))
    assert [value.log().item(), gradient.log().item()] == pytest.approx([12.0, 12.0])


def test_verl_cuts_the_k3_estimate_at_10(verl):
    """At d = -5, k3 = e^5 - 6 = 142.4: in verl 10, and no gradient."""
    data = single(logprobs=[-6.0], old=[-6.0], ref=[-1.0], advantages=[0.0])
    value, gradient = verl(data, kl=("low_var_kl", 1.0))
    assert [value.item(), gradient.item()] == pytest.approx([10.0, 0.0])
    value, gradient = ours(data, LossSpec(kl_coef=1.0))
    assert [value.item(), gradient.item()] == pytest.approx([math.exp(5) - 6, 1 - math.exp(5)])


def test_trl_means_its_entropy_bonus_over_tokens_whatever_the_loss(trl):
    """Ours is aggregated like the loss it stands in. Sequences of entropy 3 and 1, of 1 and 3 tokens: 1.5 against 2."""
    data = single(logprobs=[-1.0] * 3)
    data = {name: stream.detach().expand(2, 3).clone() for name, stream in data.items()}
    data["mask"] = torch.tensor([[1.0, 0, 0], [1, 1, 1]]).double()
    data["entropy"] = torch.tensor([[3.0], [1.0]]).double().expand(2, 3)
    data["advantages"], data["old"] = torch.zeros(2).double(), data["logprobs"].clone()
    data["logprobs"].requires_grad_()
    assert trl(data, loss_type="grpo", entropy_coef=1.0)[0].item() == pytest.approx(-1.5)
    mine = ours(data, LossSpec(entropy_coef=1.0, aggregation="sequence_mean"))
    assert mine[0].item() == pytest.approx(-2.0)
