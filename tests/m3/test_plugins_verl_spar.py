"""verl's registries with our names, against the real wheel: rewards of tokens, the estimator, the losses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed, or not wholly")
pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="verl is not installed wholly")
import numpy as np
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.distillation.losses import distillation_loss
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import ActorConfig, DistillationConfig, FSDPActorConfig

from m3.algorithms import grpo, spar
from m3.plugins import verl as plugin
from m3.plugins import verl_registrations, verl_spar

ROOT = Path(__file__).parent.parent.parent


# -- registration -----------------------------------------------------------------------------------------------------
def import_of_verl(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process where m3-clinical is installed as far as verl's loader can see."""
    info = folder / "m3_clinical_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: m3-clinical-probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\nm3 = {plugin.REGISTRATIONS}\n")
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_entry_point_registers_when_verl_is_imported(tmp_path):
    """No word of m3 in the process but the check itself; so it is in verl's workers."""
    code = (
        "import verl\n"
        "from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as losses\n"
        "assert {'spar', 'spar_step'} <= set(losses)\n"
        "from m3.plugins.verl import assert_registered\n"
        "assert_registered()"
    )
    done = import_of_verl(tmp_path, code)
    assert done.returncode == 0, done.stderr


def test_process_without_the_entry_point_is_told(tmp_path):
    code = "from m3.plugins.verl import assert_registered\nassert_registered()"
    done = import_of_verl(tmp_path, code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert "RuntimeError: assert_registered: want verl to load m3.plugins.verl_registrations by itself" in done.stderr


def test_names_are_ours_and_a_taken_one_is_named(monkeypatch):
    assert verl_registrations.missing() == []
    from verl.trainer.ppo import core_algos

    monkeypatch.setitem(core_algos.POLICY_LOSS_REGISTRY, "spar", core_algos.POLICY_LOSS_REGISTRY["gspo"])
    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "spar")
    assert verl_registrations.missing() == ["advantage estimator spar", "policy loss spar"]
    with pytest.raises(RuntimeError, match="got others: advantage estimator spar, policy loss spar"):
        plugin.assert_registered()


# -- rewards of tokens ------------------------------------------------------------------------------------------------
MASK = torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 1, 0])
FACTORS = [1.0, 0.1, 0.5]


def test_running_sum_is_the_penalised_return_of_the_step():
    found = verl_spar.token_rewards(0.8, FACTORS, MASK)
    wanted = [0.8, 0.8, 0.8, 0.8, 0.08, 0.08, 0.4, 0.4, 0.4, 0.8]
    assert found.cumsum(0).tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.nonzero()[:, 0].tolist() == [0, 4, 6, 9], "the first tokens of steps, and the last of all"


def test_last_step_of_one_token_keeps_reward_and_penalty_apart():
    scores = verl_spar.token_rewards(0.8, [1.0, 0.1], torch.tensor([1, 0, 1, 0]))
    rewards, penalised = verl_spar.returns(scores[None], torch.tensor([[1, 0, 1, 0]]))
    assert rewards.tolist() == pytest.approx([0.8], abs=1e-6)
    assert penalised[0].tolist() == pytest.approx([0.8, 0.0, 0.08, 0.0], abs=1e-6)


def test_tokens_masked_later_change_no_other_return():
    """As a filter of importance weights does: a step that is cut in two stays one step."""
    scores, mask = verl_spar.token_rewards(0.8, FACTORS, MASK), MASK.clone()
    mask[7] = 0
    _, penalised = verl_spar.returns(scores[None], mask[None])
    assert penalised[0, 6:9].tolist() == pytest.approx([0.4, 0.0, 0.4], abs=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1.0])
def test_sum_of_equal_rewards_is_equal_to_the_bit(reward):
    """Else a group of equal rewards would have a deviation, and every clean step an advantage."""
    clean = verl_spar.token_rewards(reward, [1.0] * 3, MASK)
    worse = verl_spar.token_rewards(reward, [0.9, 0.1, 0.5], MASK)
    rewards, _ = verl_spar.returns(torch.stack([clean, worse]), torch.stack([MASK, MASK]))
    assert rewards[0] == rewards[1] == pytest.approx(reward, abs=1e-6)


def test_reward_of_nothing_is_nothing():
    assert not verl_spar.token_rewards(0.0, FACTORS, MASK).any()


BAD = {
    "no end": ((0.5, [1.0], torch.tensor([1, 1])), "mask: want (L,) that begins with a step and ends outside any"),
    "no start": ((0.5, [1.0], torch.tensor([0, 1, 0])), "mask: want (L,) that begins with a step"),
    "steps": ((0.5, [1.0], MASK), "factors: want 3 numbers in (0, 1], one a step; got [1.0]"),
    "factor": ((0.5, [1.0, 0.0, 1.0], MASK), "factors: want 3 numbers in (0, 1], one a step; got [1.0, 0.0, 1.0]"),
    "reward": ((1.5, FACTORS, MASK), "reward: want a number in [0, 1]; got 1.5"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_token_rewards_refuses(arguments, message):
    with pytest.raises(ValueError, match=re.escape(f"token_rewards: {message}")):
        verl_spar.token_rewards(*arguments)


FOREIGN = {
    "reward at the last token alone": [0.0] * 9 + [0.75],
    "a penalty of KL on every token": [0.7501] + [-0.0001] * 9,
    "a negative reward": [-0.5] + [0.0] * 9,
    "a return above the reward": [0.75] + [0.0] * 8 + [-0.25],
}


@pytest.mark.parametrize("row", FOREIGN.values(), ids=FOREIGN)
def test_estimator_refuses_rewards_that_another_wrote(row):
    message = "spar: token_level_rewards[1]: want those of m3's agent loop (trainer.use_v1=True, no KL in the reward)"
    scores = torch.stack([verl_spar.token_rewards(0.8, FACTORS, MASK), torch.tensor(row)])
    with pytest.raises(ValueError, match=re.escape(message)):
        verl_spar.advantages(scores, MASK.expand(2, -1), index=["a", "a"])


# -- the estimator, through verl's dispatcher -------------------------------------------------------------------------
REWARDS = [0.25, 1.0, 0.5, 0.0]
STEPS = [[1.0, 0.1, 1.0], [0.9, 1.0, 0.5], [1.0, 1.0, 1.0], [0.1, 1.0, 1.0]]


def batch(factors: list[list[float]], names: list[str]) -> DataProto:
    scores = torch.stack([verl_spar.token_rewards(r, f, MASK) for r, f in zip(REWARDS, factors, strict=True)])
    tensors = {"token_level_rewards": scores, "response_mask": MASK.expand(4, -1).clone()}
    return DataProto(batch=TensorDict(tensors, batch_size=4), non_tensor_batch={"uid": np.array(names, dtype=object)})


def test_advantages_are_those_of_spar_token_by_token():
    data = compute_advantage(batch(STEPS, ["a"] * 4), adv_estimator="spar", config=None)
    rewards, factors = torch.tensor([REWARDS]), torch.tensor([STEPS])
    wanted = spar.token_advantages(spar.advantages(rewards, factors)[0], spar.step_ids(MASK.expand(4, -1)))
    torch.testing.assert_close(data.batch["advantages"], wanted, rtol=1e-4, atol=1e-5)
    assert data.batch["returns"][0, 4].item() == pytest.approx(0.025, abs=1e-6)


def test_clean_rollouts_have_the_advantages_of_grpo():
    clean = [[1.0] * 3] * 4
    data = compute_advantage_for_multi_trajectories(
        batch(clean, ["a", "b", "a", "b"]), batch_keys=["a_0_0", "b_0_0", "a_1_0", "b_1_0"], adv_estimator="spar"
    )
    pairs = grpo.advantages(torch.tensor([[0.25, 0.5], [1.0, 0.0]]))
    wanted = torch.stack([pairs[0, 0], pairs[1, 0], pairs[0, 1], pairs[1, 1]])
    torch.testing.assert_close(data.batch["advantages"], wanted[:, None] * MASK, rtol=1e-4, atol=1e-5)


def test_estimator_needs_groups():
    scores = verl_spar.token_rewards(0.8, FACTORS, MASK)[None]
    with pytest.raises(ValueError, match=re.escape("spar: index: want 1 names of groups; got None")):
        verl_spar.advantages(scores, MASK[None])
    with pytest.raises(ValueError, match=re.escape("want (P, R >= 2) floating")):
        get_adv_estimator_fn("spar")(scores, MASK[None], index=["alone"])


# -- the losses -------------------------------------------------------------------------------------------------------
def actor(**settings: Any) -> ActorConfig:
    stated: dict[str, Any] = dict(
        strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, clip_ratio_low=3e-4, clip_ratio_high=4e-4,
        use_dynamic_bsz=True,
    )  # fmt: skip
    return FSDPActorConfig(**stated | settings)


def streams(offset: float) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 1]])
    new = (-torch.rand(2, 8, generator=generator)).requires_grad_()
    old = new.detach() + offset * torch.randn(2, 8, generator=generator)
    taken = torch.tensor([[0.5, -1.0], [0.2, 2.0]])
    advantages = spar.token_advantages(taken, spar.step_ids(mask))
    return dict(old_log_prob=old, log_prob=new, advantages=advantages, response_mask=mask), new


CALLS = {
    "alone": (dict(), {}),
    "one of two ranks": (dict(dp_size=2, global_batch_size=6, batch_num_tokens=31), {}),
    "weights of the sampler": (dict(), {"rollout_is_weights": torch.rand(2, 8)}),
}


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize("offset", [0.0, 3e-4, 0.3])
@pytest.mark.parametrize(("everywhere", "more"), CALLS.values(), ids=CALLS)
def test_spar_loss_is_gspo_of_verl_in_value_and_gradient(mode, offset, everywhere, more):
    """verl's "gspo" holds the ratio constant, as ours: unlike TRL's, it keeps the advantages of steps apart."""
    config = actor()
    config.global_batch_info.update(everywhere)
    found = []
    for name in ("spar", "gspo"):
        given, leaf = streams(offset)
        loss, metrics = get_policy_loss_fn(name)(**given, loss_agg_mode=mode, config=config, **more)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics["actor/ppo_kl"] is not None))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_step_ratio_differs_where_steps_moved_differently():
    given, leaf = streams(1.0)
    by_sequence, _ = get_policy_loss_fn("spar")(**given, config=actor(clip_ratio_low=9.0, clip_ratio_high=9.0))
    by_step, _ = get_policy_loss_fn("spar_step")(**given, config=actor(clip_ratio_low=9.0, clip_ratio_high=9.0))
    mask, ratio = given["response_mask"], (leaf - given["old_log_prob"]).detach()
    steps = spar.step_ids(mask)
    means = torch.stack([torch.where(steps == s, ratio, 0).sum(1) / (steps == s).sum(1) for s in (0, 1)], 1)
    wanted = -((spar.token_advantages(means, steps).exp() * given["advantages"] * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(by_step.detach(), wanted, rtol=1e-4, atol=1e-6)
    assert (by_step - by_sequence).abs() > 1e-3


def test_loss_refuses_another_aggregation():
    given, _ = streams(0.0)
    message = "spar: loss_agg_mode: want of ['seq-mean-token-mean', 'token-mean']; got 'token-sum'"
    with pytest.raises(ValueError, match=re.escape(message)):
        get_policy_loss_fn("spar")(**given, loss_agg_mode="token-sum", config=actor())


# -- distillation, through verl's own call ----------------------------------------------------------------------------
def distilling(**settings: Any) -> Any:
    stated: dict[str, Any] = dict(loss_mode="clip_forward_kl", use_policy_gradient=False, loss_max_clamp=None)
    config = DistillationConfig()
    object.__setattr__(config.distillation_loss, "_mutable_fields", set((stated | settings).keys()))
    for name, value in (stated | settings).items():
        object.__setattr__(config.distillation_loss, name, value)
    return config


def packed() -> tuple[dict[str, Tensor], TensorDict, Tensor]:
    """(model_output, data, leaf): prompts of 2 and 1 tokens, responses of 3 and 2, packed as verl's engines do."""
    leaf = torch.tensor([-9.0, -1.0, -3.0, -2.0, -9.0, -0.5, -20.0, -9.0], requires_grad=True)
    teacher = torch.tensor([-9.0, -2.0, -1.0, -1.0, -9.0, -1.0, -1.0, -9.0])

    def nested(rows: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    model_output = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, 5, 8]))}
    data = TensorDict(
        {
            "prompts": nested([torch.tensor([1, 2]), torch.tensor([3])]),
            "responses": nested([torch.tensor([4, 5, 6]), torch.tensor([7, 8])]),
            "response_mask": nested([torch.tensor([1, 0, 1]), torch.tensor([1, 1])]),
            "teacher_logprobs": torch.nested.nested_tensor_from_jagged(teacher[:, None], torch.tensor([0, 5, 8])),
        },
        batch_size=2,
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": 4, "global_batch_size": 2}.items():
        data.set_non_tensor(name, value)
    return model_output, data, leaf


def test_distillation_teaches_what_is_less_likely_than_under_the_teacher():
    """Tokens of the policy: (-1 against -2), (-2 against -1), (-.5 against -1), (-20 against -1): two are taught."""
    model_output, data, leaf = packed()
    config = actor(loss_agg_mode="token-mean")
    loss, metrics = distillation_loss(config, distilling(), model_output, data)
    assert loss.item() == pytest.approx((2.0 + 20.0) / 4)
    assert torch.autograd.grad(loss, leaf)[0].tolist() == pytest.approx([0, 0, 0, -0.25, 0, 0, -0.25, 0])
    assert metrics["distillation/tokens_taught"] == 0.5


REFUSED = {
    "use_policy_gradient": (True, "use_policy_gradient: want False; got True"),
    "loss_max_clamp": (10.0, "loss_max_clamp: want None; got 10.0"),
}


@pytest.mark.parametrize(("name", "value", "message"), [(n, *v) for n, v in REFUSED.items()], ids=REFUSED)
def test_distillation_refuses_settings_that_would_change_it(name, value, message):
    model_output, data, _ = packed()
    with pytest.raises(ValueError, match=re.escape(f"clip_forward_kl: distillation_loss.{message}")):
        distillation_loss(actor(), distilling(**{name: value}), model_output, data)
