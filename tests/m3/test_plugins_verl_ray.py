"""One node of Ray, verl's own processes on it: consultations through its agent loop worker, its queue, its advantages.

Real: Ray, TransferQueue, the worker, the client and its load balancer, the trainer's ``_compute_advantage``, the whole
configuration. Ours: the server at the end, which asks at random, for verl serves models on GPUs alone.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("verl.trainer.ppo.v1.agent_loop_tq", reason="verl is not installed wholly")
import ray
import transfer_queue as tq
from hydra import compose, initialize_config_module
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.router import GlobalRequestLoadBalancer
from verl_cases import byte_tokenizer

from m3.algorithms import spar
from m3.environment.case import own_cases
from m3.plugins import verl as plugin
from m3.plugins.verl_clinic import dataset_rows

ROOT = Path(__file__).parent.parent.parent
ROLLOUTS, ROOM = 3, 700


@ray.remote
class Server:
    """Draws one of a few questions, the bytes of it and the end; asks again what it has asked."""

    def __init__(self) -> None:
        self.random, self.tokenizer = random.Random(2), byte_tokenizer()

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> Any:
        text = self.random.choice(["Do you have a fever?", "Do you have a cough?", "Have you had a fever?"])
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id][: sampling_params["max_tokens"]]
        return TokenOutput(token_ids=ids, log_probs=[-1.0] * len(ids), stop_reason="completed", extra_fields={})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """verl's, for a tiny model's folder and our loop over the inquiry."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("verl")
    byte_tokenizer().save_pretrained(folder / "model")
    LlamaConfig(
        vocab_size=260, hidden_size=16, num_attention_heads=2, architectures=["LlamaForCausalLM"]
    ).save_pretrained(folder / "model")
    (folder / "loop.yaml").write_text(
        "- name: m3_clinic\n  _target_: m3.plugins.verl_clinic.ConsultationLoop\n  stages: inquiry\n  max_turns: 3\n"
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(
            "ppo_trainer",
            overrides=[
                f"actor_rollout_ref.model.path={folder / 'model'}",
                "actor_rollout_ref.rollout.name=vllm",
                f"actor_rollout_ref.rollout.n={ROLLOUTS}",
                "actor_rollout_ref.rollout.calculate_log_probs=True",
                f"actor_rollout_ref.rollout.response_length={ROOM}",
                "actor_rollout_ref.rollout.prompt_length=2048",
                f"actor_rollout_ref.rollout.agent.agent_loop_config_path={folder / 'loop.yaml'}",
                "actor_rollout_ref.rollout.agent.default_agent_loop=m3_clinic",
                "algorithm.adv_estimator=spar",
                "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
            ],
        )


@pytest.fixture(scope="module")
def node(config: Any) -> Any:
    """Ray and TransferQueue on this machine; in its processes verl loads our names by itself."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "VERL_USE_EXTERNAL_MODULES": plugin.REGISTRATIONS,
    }
    ray.init(num_cpus=8, runtime_env={"env_vars": variables}, include_dashboard=False, logging_level="ERROR")
    tq.init(config.transfer_queue)
    yield
    tq.close()
    ray.shutdown()


def prompts(config: Any) -> TensorDict:
    """Two cases, as the trainer hands rows to its workers."""
    rows = dataset_rows(own_cases("train")[:2], seed=5)
    stacks = {
        "uid": NonTensorStack("first", "second"),
        "raw_prompt": NonTensorStack(*(row["prompt"] for row in rows)),
        "extra_info": NonTensorStack(*(row["extra_info"] for row in rows)),
        "data_source": NonTensorStack("m3", "m3"),
        "index": torch.arange(2),
        "global_steps": NonTensorData(1),
    }
    return TensorDict(stacks, batch_size=2)


@pytest.mark.slow
def test_consultations_through_verls_worker_queue_and_advantages(node, config):
    balancer = ray.remote(GlobalRequestLoadBalancer).remote({"server": Server.remote()})
    worker = AgentLoopWorkerTQ.remote(config, LLMServerClient(config, balancer), None, None)
    ray.get(worker.generate_sequences.remote(prompts(config)))
    deadline = time.monotonic() + 120
    known: dict[str, Any] = {}
    while time.monotonic() < deadline:
        known = tq.kv_list(partition_id="train").get("train", {})
        if [known.get(uid, {}).get("status") for uid in ("first", "second")] == ["finished", "finished"]:
            break
        time.sleep(0.5)
    keys = sorted(key for key in known if key.count("_") == 2)
    assert keys == [f"{uid}_{n}_0" for uid in ("first", "second") for n in range(ROLLOUTS)], known

    batch = tq.KVBatchMeta(keys=keys, partition_id="train", tags=[known[key] for key in keys])
    drawn = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["rollout_log_probs"])
    again = TensorDict({"old_log_probs": drawn["rollout_log_probs"]}, batch_size=len(keys))  # the actor's, on-policy
    tq.kv_batch_put(keys=keys, partition_id="train", fields=again)
    metrics: dict[str, Any] = {}
    PPOTrainer._compute_advantage(SimpleNamespace(config=config), batch, metrics)
    fields = ["response_mask", "rm_scores", "advantages", "extra_fields", "rollout_log_probs"]
    found = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=fields)
    told = [row["reward_extra_info"] for row in found["extra_fields"]]
    assert any(row["steps_penalised"] for row in told)

    for uid in range(2):
        rows = range(uid * ROLLOUTS, (uid + 1) * ROLLOUTS)
        rewards = torch.tensor([[told[row]["reward"] for row in rows]])
        masks = [found["response_mask"][row] for row in rows]
        scores = [found["rm_scores"][row] for row in rows]
        for place, row in enumerate(rows):
            returns = scores[place].cumsum(0)
            reward = told[row]["reward"]
            assert scores[place].sum().item() == pytest.approx(reward, abs=1e-6)
            factors = torch.where(masks[place] != 0, returns / reward if reward else torch.ones_like(returns), 1.0)
            every = torch.ones(1, ROLLOUTS, len(factors))
            every[0, place] = factors.clamp(max=1)  # R is rounded to 2^-20 on its way
            wanted = spar.advantages(rewards, every)[0, place] * (masks[place] != 0)
            torch.testing.assert_close(found["advantages"][row], wanted, rtol=1e-3, atol=1e-4)
            assert set(found["rollout_log_probs"][row][masks[place] != 0].tolist()) == {-1.0}
