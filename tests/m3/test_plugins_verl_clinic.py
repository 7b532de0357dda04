"""The clinic as verl's agent loop, against the real wheel: tokens kept as drawn, R and what steps violate in the row.

The server stands in for verl's: it "draws" the letters of what a scripted physician says, byte by byte.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="verl is not installed wholly")
import numpy as np
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap, _agent_loop_registry
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.protocol import DataProto
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput
from verl_cases import byte_tokenizer

from m3.environment.case import Phase, own_cases
from m3.environment.consultation import SimulatedConsultation
from m3.environment.episode import run_consultation, run_inquiry
from m3.environment.modes import draw
from m3.environment.patient import ScriptedPatient
from m3.environment.physicians import Good, Repeat
from m3.environment.seeds import derive_seed
from m3.environment.segment import Context
from m3.plugins import verl_clinic, verl_spar
from m3.rewards.spans import violations
from m3.rewards.stage_rewards import rule_rewards
from m3.rewards.step_verifier import StepVerifier

CASE = own_cases("train")[0]
TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


class Spoken:
    """A server that draws what a scripted physician would say to the dialogue it reads out of the prompt's bytes."""

    def __init__(self, texts: list[str], logprobs: bool = True) -> None:
        self.texts, self.logprobs = iter(texts), logprobs
        self.prompts: list[list[int]] = []
        self.limits: list[int] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        self.prompts.append(list(prompt_ids))
        self.limits.append(sampling_params["max_tokens"])
        ids = [*TOKENIZER.encode(next(self.texts)), END][: sampling_params["max_tokens"]]
        version = len(self.prompts)
        return TokenOutput(
            token_ids=ids,
            log_probs=[-(i % 7) / 8 for i in ids] if self.logprobs else None,
            stop_reason="completed",
            extra_fields={"min_global_steps": version, "max_global_steps": version},
        )


def loop_of(server: Any, *, room: int = 20000, use_v1: bool = True, **settings: Any) -> verl_clinic.ConsultationLoop:
    config = OmegaConf.create(
        {
            "trainer": {"use_v1": use_v1},
            "actor_rollout_ref": {"rollout": {"prompt_length": 4096, "response_length": room}},
            "data": {"apply_chat_template_kwargs": {}},
        }
    )
    return verl_clinic.ConsultationLoop(
        DictConfigWrap(config), server, TOKENIZER, None, RLHFDataset, DictConfigWrap(config.data), "qwen3", **settings
    )


async def scripted(physician: Any, stages: str, turns: int) -> Any:
    """The same consultation with the physician in this process, no verl."""
    play = run_inquiry if stages == "inquiry" else run_consultation
    patient = ScriptedPatient(CASE, seed=derive_seed(5, "patient"))
    return await play(CASE, physician, patient, seed=5, max_turns=turns, mode=draw(CASE, seed=5))


def drawn(trajectory: Any) -> list[Any]:
    """The physician's messages behind what the consultation began with: seed 5 begins in the midst of one."""
    snippet = draw(CASE, seed=5).snippet
    assert any(m.role == "assistant" for m in snippet)
    return [m for m in trajectory.messages[1 + len(snippet) :] if m.role == "assistant"]


def played(physician: Any, *, stages: str = "all", turns: int = 6, **settings: Any) -> tuple[Any, Spoken, Any]:
    """(the trajectory that is wanted, the server, what the loop returned)."""

    async def both() -> tuple[Any, Spoken, Any]:
        wanted = await scripted(physician, stages, turns)
        server = Spoken([m.content for m in drawn(wanted)])
        loop = loop_of(server, stages=stages, max_turns=turns, **settings)
        params = {"temperature": 1.0, "logprobs": True}
        found = await loop.run(params, extra_info={"case": CASE.id, "seed": 5}, session_id=0, raw_prompt=[])
        return wanted, server, found

    return asyncio.run(both())


@pytest.fixture(scope="module")
def repeated() -> tuple[Any, Spoken, Any]:
    return played(Repeat(CASE))


# -- tokens -----------------------------------------------------------------------------------------------------------
def runs(output: AgentLoopOutput) -> list[str]:
    """Text of each run of the mask."""
    texts, before = [], 0
    for token, inside in zip(output.response_ids, output.response_mask, strict=True):
        if inside and not before:
            texts.append([])
        if inside:
            texts[-1].append(token)
        before = inside
    return [TOKENIZER.decode(ids) for ids in texts]


def test_tokens_of_the_policy_are_what_the_server_drew(repeated):
    wanted, _, found = repeated
    said = [m.content + "<|im_end|>" for m in drawn(wanted)]
    assert len(said) == 6 + 3, "six messages of the inquiry and one of each stage behind it"
    assert runs(found) == said
    assert found.response_mask[-1] == 0


def test_whole_response_is_the_template_of_the_consultation(repeated):
    wanted, _, found = repeated
    messages = [{"role": m.role, "content": m.content} for m in wanted.messages]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert TOKENIZER.decode([*found.prompt_ids, *found.response_ids[:-1]]) == text


def test_every_prompt_begins_with_all_tokens_before_it(repeated):
    _, server, found = repeated
    whole = [*found.prompt_ids, *found.response_ids]
    assert all(whole[: len(prompt)] == prompt for prompt in server.prompts)
    assert [len(prompt) for prompt in server.prompts] == sorted({len(prompt) for prompt in server.prompts})


def test_logprobs_lie_beside_their_tokens_and_are_0_elsewhere(repeated):
    _, _, found = repeated
    wanted = [-(i % 7) / 8 if m else 0.0 for i, m in zip(found.response_ids, found.response_mask, strict=True)]
    assert found.response_logprobs == wanted


def test_row_has_the_first_version_of_the_weights_and_the_last(repeated):
    _, _, found = repeated
    assert (found.extra_fields["min_global_steps"], found.extra_fields["max_global_steps"]) == (1, 9)


# -- rewards ----------------------------------------------------------------------------------------------------------
def judged(trajectory: Any, phases: tuple[Phase, ...]) -> tuple[float, list[float]]:
    """R and gammas of a trajectory by the clinic's own parts."""
    rewards, verifier = rule_rewards(), StepVerifier()
    reward = sum(rewards[phase].score(CASE, trajectory).reward for phase in phases) / len(phases)
    named = violations(
        [span for phase in phases for span in verifier.verify(CASE, trajectory, phase)], trajectory.turns
    )
    lambdas = verifier.config.penalties
    turns = [m.turn for m in drawn(trajectory)]
    return reward, [min((lambdas[name] for name in named[turn]), default=1.0) for turn in turns]


def test_stored_row_carries_reward_and_penalties(repeated):
    wanted, _, found = repeated
    reward, factors = judged(wanted, tuple(Phase))
    assert found.reward_score == pytest.approx(reward)
    assert found.step_factors == factors
    assert min(factors) == 0.1, "it repeats itself"
    row = found.as_dict()
    rewards, penalised = verl_spar.returns(row["rm_scores"][None], row["response_mask"][None])
    assert rewards.item() == pytest.approx(reward, abs=1e-6)
    first = [
        i
        for i in range(len(row["response_mask"]))
        if row["response_mask"][i] and not row["response_mask"][:i][-1:].any()
    ]
    assert penalised[0, first].tolist() == pytest.approx([factor * reward for factor in factors], abs=1e-6)
    assert "step_factors" not in row
    assert row["extra_fields"]["reward_extra_info"]["steps_penalised"] == sum(f < 1 for f in factors)


def test_inquiry_alone_is_scored_alone():
    wanted, _, found = played(Good(CASE), stages="inquiry", turns=4)
    reward, factors = judged(wanted, (Phase.inquiry,))
    assert reward > 0
    assert found.reward_score == pytest.approx(reward)
    assert found.step_factors == factors
    assert set(found.extra_fields["reward_extra_info"]) == {"reward", "steps", "steps_penalised", "reward_inquiry"}


def test_response_without_room_ends_the_consultation():
    """What was said is scored; no token is cut off that the server drew."""
    _, _, whole = played(Good(CASE), stages="inquiry", turns=6)
    gap = whole.response_mask.index(0)
    second = whole.response_mask.index(1, gap)
    _, server, found = played(Good(CASE), stages="inquiry", turns=6, room=second + 8)
    assert len(found.response_ids) == second + 8
    assert found.response_mask[-8:] == [1] * 7 + [0]
    assert server.limits[-1] == 7
    assert found.step_factors[0] == whole.step_factors[0]
    assert len(found.step_factors) == 2


# -- what is refused --------------------------------------------------------------------------------------------------
def test_no_room_for_a_word_is_an_error():
    with pytest.raises(verl_clinic.OutOfRoomError, match="response_length 1 is spent"):
        played(Good(CASE), room=1)


def test_server_without_logprobs_is_an_error():
    async def run() -> None:
        loop = loop_of(Spoken(["Where does it hurt?"], logprobs=False))
        await loop.run({"logprobs": True}, extra_info={"case": CASE.id})

    with pytest.raises(RuntimeError, match="log-probabilities were asked for; the server gave none"):
        asyncio.run(run())


def test_old_trainer_is_refused():
    message = "m3_clinic: trainer.use_v1: want True (the other trainer drops rewards of tokens); got False"
    with pytest.raises(ValueError, match=re.escape(message)):
        loop_of(Spoken([]), use_v1=False)


def test_unknown_case_is_refused():
    with pytest.raises(ValueError, match=re.escape("m3_clinic: extra_info.case: want an id of the ")):
        asyncio.run(loop_of(Spoken([])).run({}, extra_info={"case": "nobody"}))


def test_registry_makes_our_loop():
    assert _agent_loop_registry["m3_clinic"] == {"_target_": "m3.plugins.verl_clinic.ConsultationLoop"}


# -- one stage, by the reward manager ---------------------------------------------------------------------------------
def test_manager_scores_one_message_of_a_stage():
    consultation = SimulatedConsultation(Good(CASE))

    async def diagnosis() -> tuple[dict[str, Any], str]:
        whole = await scripted(Good(CASE), "all", 6)
        *before, last = whole.messages
        assert consultation.policy
        return verl_clinic.stage_row(
            Context(id="x", case=CASE, phase=Phase.diagnosis, messages=tuple(before))
        ), last.content

    row, said = asyncio.run(diagnosis())
    ids = torch.tensor([[*TOKENIZER.encode(said), END, 0, 0]])
    prompt = torch.ones(1, 3, dtype=torch.int64)
    attention = torch.cat([prompt, (ids != 0).long()], 1)
    data = DataProto(
        batch=TensorDict({"responses": ids, "attention_mask": attention}, batch_size=1),
        non_tensor_batch={"extra_info": np.array([row["extra_info"]], dtype=object)},
    )

    async def scored() -> dict[str, Any]:
        manager = get_reward_manager_cls("m3_stage")(OmegaConf.create({}), TOKENIZER, None)
        return await manager.run_single(data)

    found = asyncio.run(scored())
    assert found["reward_score"] > 0.5
    assert found["reward_extra_info"] == {"reward": found["reward_score"]}
    assert row["agent_name"] == "single_turn_agent"
    assert row["prompt"][-1]["role"] == "user"


def test_rows_name_their_cases():
    rows = verl_clinic.dataset_rows(own_cases("train")[:2], seed=5)
    assert [row["extra_info"] for row in rows] == [
        {"index": index, "case": case.id, "seed": 5} for index, case in enumerate(own_cases("train")[:2])
    ]
    assert rows[0]["agent_name"] == "m3_clinic"
    assert rows[0]["prompt"][0]["role"] == "system"


def test_cases_of_a_file_are_played(tmp_path: Path):
    from m3.environment.case import write_cases

    write_cases(tmp_path / "one.jsonl", [CASE])
    loop = loop_of(Spoken([]), cases=str(tmp_path / "one.jsonl"))
    assert list(loop._cases) == [CASE.id]
