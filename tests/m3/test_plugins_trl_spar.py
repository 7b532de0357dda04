"""SPARTrainer in real TRL: two steps on the CPU, the advantage of every token, and the gradient that follows from it.

Rollouts are consultations of two to four steps with the words of a patient between them. Advantages are compared with
Eq 8 written out here; the gradient with that of full logits.
"""

from __future__ import annotations

import inspect
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
import trl
from datasets import Dataset
from torch import Tensor
from trl_cases import tiny_model, tokenizer

from m3.algorithms import spar
from m3.plugins import trl as plugin

PENALTY = {"redundant_question": 0.1, "safety_risk": 0.1, "illogical_order": 0.5, "rigid_phrasing": 0.9}
REWARDS = [0.25, 1.0, 0.5, 0.0]  # of the rollouts of every prompt
VIOLATIONS: list[list[list[str]]] = [
    [[], ["redundant_question", "rigid_phrasing"]],
    [["rigid_phrasing"], [], ["illogical_order"]],
    [[], [], [], []],
    [["safety_risk"], []],
]
POLICY, PATIENT = 3, 2  # tokens of a step, and of what the patient says before the next


def consultations(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
    """Random letters, seeded by the trainer's step: rollouts as a clinic would return them."""
    letters, generator = trainer.processing_class, random.Random(trainer.state.global_step)
    out: dict[str, list[Any]] = {
        name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "violations", "turn")
    }
    for row, prompt in enumerate(prompts):
        steps = VIOLATIONS[row % 4]
        mask = ([1] * POLICY + [0] * PATIENT) * (len(steps) - 1) + [1] * POLICY
        out["prompt_ids"].append(letters(prompt)["input_ids"])
        out["completion_ids"].append([generator.randrange(2, 39) for _ in mask])
        out["logprobs"].append([0.0] * len(mask))
        out["env_mask"].append(mask)
        out["violations"].append(steps)
        out["turn"].append(row % 4)
    return out


def reward(completions: list[str], turn: list[int], **_: Any) -> list[float]:
    return [REWARDS[row] for row in turn]


class Watched(plugin.SPARTrainer):
    """Keeps what TRL hands to the loss."""

    seen: list[dict[str, Any]]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.seen = [*getattr(self, "seen", []), dict(inputs)]
        return super()._compute_loss(model, inputs)


def settings(folder: Path, **changed: Any) -> plugin.SPARConfig:
    quiet: dict[str, Any] = dict(report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, bf16=False)
    stated: dict[str, Any] = dict(
        max_steps=2, logging_steps=1, per_device_train_batch_size=8, num_generations=4, max_completion_length=20,
        learning_rate=1e-2, seed=5, max_grad_norm=1e9,
    )  # fmt: skip
    return plugin.SPARConfig(output_dir=str(folder), **quiet | stated | changed)


def trainer_of(folder: Path, rewards: Any = reward, rollout: Any = consultations, **changed: Any) -> Watched:
    tiny_model().save_pretrained(folder / "model")
    prompts = Dataset.from_dict({"prompt": ["abcd", "xy", "KJIHG", "q"]})
    return Watched(
        str(folder / "model"), rewards, settings(folder, **changed), train_dataset=prompts,
        processing_class=tokenizer(), rollout_func=rollout,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    trainer = trainer_of(tmp_path_factory.mktemp("spar"))
    trainer.train()
    return trainer


# -- advantages, token by token ---------------------------------------------------------------------------------------
def gamma(violations: list[str]) -> float:
    return min((PENALTY[name] for name in violations), default=1.0)


def written_out(row: int, width: int) -> list[float]:
    """Eq 8 for each token of a rollout, 0 where the patient speaks and behind the end."""
    mean = sum(REWARDS) / 4
    deviation = math.sqrt(sum((r - mean) ** 2 for r in REWARDS) / 3) + 1e-6
    steps = [(gamma(names) * REWARDS[row] - mean) / deviation for names in VIOLATIONS[row]]
    tokens = [value for step in steps for value in [step] * POLICY + [0.0] * PATIENT]
    return tokens[:-PATIENT] + [0.0] * (width - len(tokens) + PATIENT)


@pytest.mark.parametrize("step", [0, 1])
def test_every_token_has_the_advantage_of_its_step(trained, step):
    """TRL shuffles rollouts before the loss: a rollout is known by its number of steps and by its first advantage."""
    found = trained.seen[step]["advantages"]
    width = found.shape[1]
    wanted = sorted(written_out(row, width) for row in (0, 1, 2, 3) * 2)
    torch.testing.assert_close(torch.tensor(sorted(found.tolist())), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_tokens_of_the_patient_and_padding_have_none(trained):
    batch = trained.seen[0]
    silent = (batch["completion_mask"] * batch["tool_mask"]) == 0
    assert silent.any()
    assert not batch["advantages"][silent].any()


def test_two_steps_were_taken_and_logged(trained):
    log = trained.state.log_history[:-1]
    assert [entry["step"] for entry in log] == [1, 2]
    moved = zip(trained.model.parameters(), tiny_model().parameters(), strict=True)
    assert max((after - before).abs().max().item() for after, before in moved) > 1e-3
    assert [entry["spar/rollouts_penalised"] for entry in log] == [0.75, 0.75]
    assert [entry["clip_ratio/low_mean"] for entry in log] == [0.0, 0.0], "on-policy: every ratio is 1"
    assert all(entry["entropy"] > 1 for entry in log)


def test_adding_no_violation_is_grpo_of_trl(tmp_path):
    def clean(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        out = consultations(prompts, trainer)
        return out | {"violations": [[[] for _ in steps] for steps in out["violations"]]}

    ours = trainer_of(tmp_path, rollout=clean, max_steps=1)
    ours.train()
    mean, deviation = 0.4375, torch.tensor(REWARDS).std().item() + 1e-4  # TRL's eps
    drawn = ours.seen[0]["advantages"][:, 0]
    wanted = torch.tensor(sorted((r - mean) / deviation for r in REWARDS * 2))
    torch.testing.assert_close(drawn.sort().values, wanted, rtol=1e-3, atol=1e-6)


# -- the loss ---------------------------------------------------------------------------------------------------------
def logprobs_of(model: Any, batch: dict[str, Any]) -> Tensor:
    """(B, T) of the completions' tokens, by full logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits
    width = batch["completion_ids"].shape[1]
    found = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return found[:, -width:]


def gradients(trainer: Watched, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(trainer.model.parameters())))


def test_gradient_is_that_of_gspo_in_its_token_form(trained):
    batch = trained.seen[1]
    mask = batch["completion_mask"] * batch["tool_mask"]
    own = logprobs_of(trained.model, batch)
    wanted = -((own * batch["advantages"] * mask).sum(1) / mask.sum(1)).mean()
    trained.current_gradient_accumulation_steps = 1
    loss = plugin.SPARTrainer._compute_loss(trained, trained.model, batch)
    torch.testing.assert_close(gradients(trained, loss), gradients(trained, wanted), rtol=1e-3, atol=1e-5)


def test_stock_sequence_ratio_would_give_every_token_the_mean(trained):
    """Why the loss is ours: TRL's has the gradient of the mean advantage of the completion, whatever its steps."""
    batch = trained.seen[1]
    mask = batch["completion_mask"] * batch["tool_mask"]
    mean = (batch["advantages"] * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    own = logprobs_of(trained.model, batch)
    flat = -((own * mean * mask).sum(1) / mask.sum(1)).mean()
    trained.current_gradient_accumulation_steps = 1
    stock = trl.GRPOTrainer._compute_loss(trained, trained.model, batch)
    ours = plugin.SPARTrainer._compute_loss(trained, trained.model, batch)
    theirs = gradients(trained, stock)
    torch.testing.assert_close(theirs, gradients(trained, flat), rtol=1e-3, atol=1e-5)
    assert max((a - b).abs().max().item() for a, b in zip(gradients(trained, ours), theirs, strict=True)) > 1e-2


def test_second_update_on_the_same_rollouts_is_clipped(tmp_path):
    """With old log-probabilities the ratio of a sequence leaves the narrow clip at once."""
    trainer = trainer_of(tmp_path, num_iterations=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["clip_ratio/low_mean"] == first["clip_ratio/high_mean"] == 0.0
    assert second["clip_ratio/low_mean"] + second["clip_ratio/high_mean"] > 0.05


def test_accumulation_takes_the_same_step(tmp_path):
    whole, parts = (
        trainer_of(
            tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1
        )
        for name, size in (("whole", 8), ("parts", 4))
    )
    whole.train()
    parts.train()
    assert len(parts.seen) == 2
    torch.testing.assert_close(
        [p.detach() for p in parts.model.parameters()], [p.detach() for p in whole.model.parameters()],
        rtol=1e-3, atol=1e-5,
    )  # fmt: skip


def test_kl_to_the_reference_joins_the_loss(tmp_path):
    trainer = trainer_of(tmp_path, beta=0.1)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] > 1e-5


# -- groups -----------------------------------------------------------------------------------------------------------
def test_unjudged_rollout_has_no_part_in_its_group():
    rewards = torch.tensor([0.0, torch.nan, 1.0, 0.5, 0.25, 0.25, torch.nan, torch.nan])
    factors = torch.ones(4, 2)
    found = plugin.local_advantages(rewards, factors, 0, 4, spar.Config())
    assert found[:, 0].tolist() == pytest.approx([-1.0, 0.0, 1.0, 0.0], abs=1e-5)
    other = plugin.local_advantages(rewards, torch.tensor([[0.5, 1.0]] * 4), 4, 4, spar.Config())
    assert other[0].tolist() == pytest.approx([-0.125 / 0.1, 0.0]), "the second process's rollouts, by its gammas"
    assert not other[2:].any()


class Clinic:
    """An environment, as its trainer sees it after the rollout."""

    def __init__(self, violations: list[list[str]]) -> None:
        self.violations = violations


def test_violations_come_from_the_rollout_before_its_environment():
    clinics = [Clinic([["safety_risk"]]), Clinic([[]])]
    inputs: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "a", "violations": [["rigid_phrasing"]]}]
    found = [plugin.found_violations(row, inputs, clinics) for row in (0, 1)]
    assert found == [[["safety_risk"]], [["rigid_phrasing"]]]


# -- what is refused --------------------------------------------------------------------------------------------------
def test_refuses_rollouts_that_say_nothing_of_violations(tmp_path):
    def silent(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        return {name: value for name, value in consultations(prompts, trainer).items() if name != "violations"}

    message = "SPARTrainer: violations: want a field of the rollout, or an attribute of its environment; got neither"
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer_of(tmp_path, rollout=silent).train()


def test_refuses_a_completion_with_other_steps():
    steps = torch.tensor([[0, -1, 1], [-1, -1, -1]])
    plugin.check_steps([[[], []], [[]]], steps)
    message = "SPARTrainer: violations[0]: want 2 steps, as the completion has; got 3"
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.check_steps([[[], [], []], [[]]], steps)


def test_refuses_rewards_beyond_the_unit_interval(tmp_path):
    def negative(completions: list[str], **_: Any) -> list[float]:
        return [-1.0] * len(completions)

    with pytest.raises(ValueError, match=re.escape("spar.advantages: rewards: want numbers in [0, 1]")):
        trainer_of(tmp_path, rewards=negative).train()


REFUSED = {
    "loss_type": (dict(loss_type="dapo"), "args.loss_type: want 'grpo'; got 'dapo'"),
    "scale": (dict(scale_rewards="none"), "args.scale_rewards: want 'group'; got 'none'"),
    "entropy": (dict(entropy_coef=0.1), "args.entropy_coef: want 0.0; got 0.1"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_settings_that_spar_leaves_no_room_for(tmp_path, changed, message):
    with pytest.raises(ValueError, match=re.escape(f"SPARTrainer: {message}")):
        plugin.SPARTrainer("none", reward, settings(tmp_path, **changed))


def test_refuses_settings_of_the_stock_trainer(tmp_path):
    with pytest.raises(ValueError, match=re.escape("SPARTrainer: args: want a SPARConfig; got ")):
        plugin.SPARTrainer(
            "none", reward, trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        )


# -- the contract with TRL --------------------------------------------------------------------------------------------
SIGNATURES = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_get_per_token_logps_and_entropies": [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", *plugin.MODEL_INPUTS,
    ],
}  # fmt: skip


@pytest.mark.parametrize(("method", "names"), SIGNATURES.items(), ids=SIGNATURES)
def test_methods_of_trl_are_as_overridden(method, names):
    found = inspect.signature(getattr(trl.GRPOTrainer, method)).parameters
    assert sorted(found) == sorted(names)


def test_version_of_trl():
    major, minor = (int(part) for part in trl.__version__.split(".")[:2])
    assert (1, 16) <= (major, minor) < (2, 0)


LINES = {
    "extra fields reach the inputs": ("_generate_and_score_completions", "inp[key] = values[i]"),
    "rewards are of all processes": ("_calculate_rewards", "rewards_per_func = gather(rewards_per_func)"),
    "advantages are under this name": ("_generate_and_score_completions", '"advantages": advantages'),
    "advantages may be (B, T)": ("_compute_loss", "if advantages.dim() == 1:"),
    "the policy's tokens are under this name": ("_generate_and_score_completions", 'output["tool_mask"] = tool_mask'),
    "order of a group": ("_generate_and_score_completions", "rewards.view(-1, num_generations)"),
    "the sampler's weight": ("_compute_loss", 'per_token_loss * inputs["importance_sampling_ratio"]'),
    "mean of a micro-batch": ("_compute_loss", "mask.sum(-1).clamp(min=1.0)).mean()"),
}


@pytest.mark.parametrize(("method", "line"), LINES.values(), ids=LINES)
def test_trl_is_written_as_taken_to_be(method, line):
    assert line in inspect.getsource(getattr(trl.GRPOTrainer, method))


# -- a real model -----------------------------------------------------------------------------------------------------
def spoken(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
    """Consultations that the model draws itself, step by step, POLICY tokens each."""
    out = consultations(prompts, trainer)
    patient = trainer.processing_class(" It hurts.", add_special_tokens=False)["input_ids"][:PATIENT]
    for row, prompt in enumerate(out["prompt_ids"]):
        ids: list[int] = []
        for step in range(len(VIOLATIONS[row % 4])):
            context = torch.tensor([[*prompt, *ids, *(patient if step else [])]])
            drawn = trainer.model.generate(
                context, attention_mask=torch.ones_like(context), do_sample=True,
                min_new_tokens=POLICY, max_new_tokens=POLICY,
            )  # fmt: skip
            ids = drawn[0, len(prompt) :].tolist()
        out["completion_ids"][row] = ids
    return out


@pytest.mark.slow
def test_two_steps_of_smollm2(tmp_path):
    from m3.models.hub import resolve

    prompts = Dataset.from_dict({"prompt": ["I have a headache.", "My chest hurts.", "I cough.", "I feel dizzy."]})
    chosen = settings(tmp_path, per_device_train_batch_size=4, learning_rate=1e-5)
    trainer = Watched(str(resolve("SmolLM2-135M-Instruct")), reward, chosen, train_dataset=prompts, rollout_func=spoken)
    before = trainer.model.model.norm.weight.detach().clone()
    trainer.train()
    assert len(trainer.seen) == 2
    for batch in trainer.seen:
        width = batch["advantages"].shape[1]
        wanted = sorted(written_out(row, width) for row in range(4))
        torch.testing.assert_close(torch.tensor(sorted(batch["advantages"].tolist())), torch.tensor(wanted))
    assert not trainer.model.model.norm.weight.equal(before)
