"""A recipe in the words of other engines: what to give verl, vLLM and TRL, so that they run the same stage.

    vllm_arguments(recipe)   keyword arguments of vllm.EngineArgs
    trl_arguments(recipe)    of m3.plugins.trl.SPARConfig, or of trl.GRPOConfig for its own algorithms
    verl_overrides(recipe)   Hydra overrides of verl.trainer.main_ppo's ppo_trainer configuration

Names as of verl 0.9.1, vLLM 0.32, TRL 1.16. Nothing of them is imported here. The clinic in verl is m3.plugins.verl.
"""

from __future__ import annotations

import json
from typing import Any

from m3.algorithms import dapo, dr_grpo, grpo, gspo, spar
from m3.train.recipe import Recipe
from m3kernels.checks import refuse
from m3kernels.policy_loss.types import LossSpec

DTYPE = "bfloat16"  # of sampling
NO_DUAL_CLIP = 1e9  # beyond e^20, the largest ratio of verl: it has a dual clip of 3 unless told otherwise
AGGREGATION = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "constant": "seq-mean-token-sum-norm",
}
TRL_LOSS = {
    spar.Config: "grpo",
    grpo.Config: "grpo",
    dapo.Config: "dapo",
    dr_grpo.Config: "dr_grpo",
    gspo.Config: "grpo",
}


def vllm_arguments(recipe: Recipe) -> dict[str, Any]:
    """Of a server of the policy: log-probabilities are those of the distribution that was sampled."""
    return {
        "model": recipe.model.name,
        "dtype": DTYPE,
        "max_model_len": recipe.rollout.context,
        "max_num_seqs": recipe.rollout.max_running,
        "tensor_parallel_size": recipe.scale.tensor_parallel,
        "seed": recipe.seed,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
    }


def trl_arguments(recipe: Recipe) -> dict[str, Any]:
    """Of a trainer of one process a GPU. ``output_dir`` is the caller's.

    Raises:
        ValueError: another stage than task-rl; a batch that the devices cannot share.
    """
    loss = _policy_loss(recipe, "trl_arguments")
    config = recipe.algorithm_config()
    sequences, devices = recipe.source.groups * recipe.source.rollouts, recipe.scale.devices
    if sequences % (devices * recipe.optim.minibatches):
        want = f"a multiple of {devices} devices * {recipe.optim.minibatches} minibatches"
        raise refuse("trl_arguments", "source.groups * rollouts", want, sequences)
    if loss.constant_length not in (None, recipe.rollout.context):
        want = f"rollout.context = {recipe.rollout.context}: TRL divides by its longest completion"
        raise refuse("trl_arguments", "objective.numbers['length']", want, loss.constant_length)
    optim = recipe.optim
    found = {
        "num_generations": recipe.source.rollouts,
        "per_device_train_batch_size": 1,  # ours: consultations are long; more of them only if they fit
        "gradient_accumulation_steps": sequences // devices // optim.minibatches,
        "steps_per_generation": sequences // devices,
        "num_iterations": optim.epochs,
        "max_steps": optim.steps * optim.minibatches * optim.epochs,
        "max_completion_length": recipe.rollout.context,
        "temperature": recipe.rollout.temperature,
        "top_p": recipe.rollout.top_p,
        "top_k": recipe.rollout.top_k,
        "learning_rate": optim.lr,
        "warmup_steps": optim.warmup,
        "lr_scheduler_type": "constant_with_warmup" if optim.schedule == "constant" else optim.schedule,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.eps,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.clip,
        "beta": loss.kl_coef,
        "epsilon": loss.clip_low,
        "epsilon_high": loss.clip_high,
        "importance_sampling_level": loss.ratio_level,
        "vllm_importance_sampling_correction": loss.sampler_level is not None,
        "vllm_importance_sampling_mode": f"{loss.sampler_level or 'token'}_truncate",
        "vllm_importance_sampling_clip_max": loss.sampler_high,
        "loss_type": TRL_LOSS[type(config)],
        "bf16": recipe.model.dtype == "bfloat16",
        "gradient_checkpointing": recipe.model.gradient_checkpointing,
        "save_steps": recipe.checkpoint.every * optim.minibatches * optim.epochs,
        "save_total_limit": recipe.checkpoint.keep,
        "seed": recipe.seed,
    }
    if isinstance(config, spar.Config):
        found |= {"penalties": dict(config.penalties), "min_std": config.min_std}
    if isinstance(config, dr_grpo.Config):
        found["scale_rewards"] = "none"
    return found


def verl_overrides(recipe: Recipe, *, train_files: str = "cases.parquet", agent_loop: str = "agent.yaml") -> list[str]:
    """Of one run of task-rl on the clinic. One update a minibatch; reward and steps come from the agent loop.

    Args:
        train_files: rows of m3.plugins.verl_clinic.dataset_rows, as parquet.
        agent_loop: YAML of ``agent_loop_yaml``.
    Raises:
        ValueError: another stage than task-rl; an algorithm that verl has no estimator for.
    """
    loss = _policy_loss(recipe, "verl_overrides")
    config = recipe.algorithm_config()
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    sequences = recipe.source.groups * recipe.source.rollouts
    response = recipe.rollout.context - prompt_length(recipe)
    if not isinstance(config, (spar.Config, grpo.Config, gspo.Config, dr_grpo.Config)):
        raise refuse("verl_overrides", "objective.algorithm", "spar, grpo, dr_grpo or gspo", repr(recipe.algorithm))
    estimator = "spar" if isinstance(config, spar.Config) else "grpo"
    mode = "vanilla"
    if isinstance(config, spar.Config):
        mode = {"sequence": "spar", "step": "spar_step"}.get(config.ratio_level, "vanilla")
    elif isinstance(config, gspo.Config):
        mode = "gspo"
    given: dict[str, Any] = {
        "algorithm.adv_estimator": estimator,
        "algorithm.norm_adv_by_std_in_grpo": not isinstance(config, dr_grpo.Config),
        "actor_rollout_ref.model.path": recipe.model.name,
        "actor_rollout_ref.model.enable_gradient_checkpointing": recipe.model.gradient_checkpointing,
        "actor_rollout_ref.model.lora_rank": recipe.model.lora_rank,
        f"{actor}.policy_loss.loss_mode": mode,
        f"{actor}.clip_ratio_low": loss.clip_low,
        f"{actor}.clip_ratio_high": loss.clip_high,
        f"{actor}.clip_ratio_c": loss.dual_clip or NO_DUAL_CLIP,
        f"{actor}.loss_agg_mode": AGGREGATION[loss.aggregation],
        f"{actor}.entropy_coeff": loss.entropy_coef,
        f"{actor}.use_kl_loss": loss.kl_coef > 0,
        f"{actor}.kl_loss_coef": loss.kl_coef,
        f"{actor}.ppo_mini_batch_size": max(recipe.source.groups // recipe.optim.minibatches, 1),
        f"{actor}.ppo_epochs": recipe.optim.epochs,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": recipe.scale.max_tokens,
        f"{actor}.grad_clip": recipe.optim.clip,
        f"{actor}.optim.lr": recipe.optim.lr,
        f"{actor}.optim.lr_warmup_steps": recipe.optim.warmup,
        f"{actor}.optim.weight_decay": recipe.optim.weight_decay,
        f"{actor}.fsdp_config.param_offload": recipe.scale.offload,
        f"{actor}.fsdp_config.optimizer_offload": recipe.scale.offload,
        f"{rollout}.name": "vllm",
        f"{rollout}.n": recipe.source.rollouts,
        f"{rollout}.temperature": recipe.rollout.temperature,
        f"{rollout}.top_p": recipe.rollout.top_p,
        f"{rollout}.top_k": recipe.rollout.top_k or -1,
        f"{rollout}.max_model_len": recipe.rollout.context,
        f"{rollout}.max_num_seqs": recipe.rollout.max_running,
        f"{rollout}.tensor_model_parallel_size": recipe.scale.tensor_parallel,
        f"{rollout}.free_cache_engine": recipe.scale.offload,
        f"{rollout}.calculate_log_probs": True,
        f"{rollout}.multi_turn.enable": True,
        f"{rollout}.agent.default_agent_loop": "m3_clinic",
        f"{rollout}.agent.agent_loop_config_path": agent_loop,
        "data.train_files": train_files,
        "data.val_files": train_files,
        "data.train_batch_size": sequences // recipe.source.rollouts,
        "data.max_prompt_length": prompt_length(recipe),
        "data.max_response_length": response,
        "data.return_raw_chat": True,
        "trainer.nnodes": recipe.scale.nodes,
        "trainer.n_gpus_per_node": recipe.scale.gpus_per_node,
        "trainer.total_training_steps": recipe.optim.steps,
        "trainer.save_freq": recipe.checkpoint.every,
        "trainer.max_actor_ckpt_to_keep": recipe.checkpoint.keep,
    }
    if loss.constant_length is not None:
        given[f"{actor}.loss_scale_factor"] = loss.constant_length
    if recipe.objective.sampler_level != "none":
        given |= {
            "algorithm.rollout_correction.rollout_is": recipe.objective.sampler_level,
            "algorithm.rollout_correction.rollout_is_threshold": recipe.objective.sampler_high,
        }
    return [f"{key}={_hydra(value)}" for key, value in given.items()]


def agent_loop_yaml(recipe: Recipe) -> str:
    """The file that ``verl_overrides`` names as agent_loop. Stages: the inquiry alone, or all four."""
    rows = ["- name: m3_clinic", "  _target_: m3.plugins.verl_clinic.ConsultationLoop"]
    rows += [f"  cases: {json.dumps(recipe.source.cases)}"] if recipe.source.cases else []
    rows += [f"  max_turns: {recipe.source.max_turns}"]
    rows += ["  stages: inquiry"] if recipe.source.stages == ("inquiry",) else []
    return "\n".join(rows) + "\n"


def prompt_length(recipe: Recipe) -> int:
    """Tokens for what opens a consultation: an eighth of the context."""
    return recipe.rollout.context // 8  # ours: instructions and the patient's first words are short


def _policy_loss(recipe: Recipe, op: str) -> LossSpec:
    spec = recipe.loss().spec
    if recipe.stage != "task-rl" or not isinstance(spec, LossSpec):
        raise refuse(op, "stage", "'task-rl'", repr(recipe.stage))
    return spec


def _hydra(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (bool, str)) else f"{value}"
