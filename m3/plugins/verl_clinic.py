"""The clinic inside verl: an agent loop that consults a simulated patient, and a reward manager for single stages.

``m3_clinic`` plays one consultation a rollout: the model that verl serves is the physician, a scripted patient answers
(m3/environment), rules score each stage and name what each step violates (m3/rewards). Token in, token out: what the
server drew is kept as drawn, and the template's tokens come around it. What verl stores carries the penalties in the
rewards of tokens (verl_spar.py). A consultation that cannot be judged raises; verl then drops its group.

A row of the dataset names its case in ``extra_info``; ``dataset_rows`` makes rows of cases. Settings of the loop stand
in the YAML file of ``rollout.agent.agent_loop_config_path``:

    - name: m3_clinic
      _target_: m3.plugins.verl_clinic.ConsultationLoop
      cases: cases.jsonl        # default: the project's own
      max_turns: 12
      stages: inquiry           # default: all four

Tested with verl 0.9.1, ``trainer.use_v1=True``.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.experimental.reward_loop.reward_manager import register as register_reward_manager
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from m3.algorithms.spar import step_factor
from m3.environment.case import Case, Phase, own_cases, read_cases
from m3.environment.episode import MAX_TURNS, CaseView, run_consultation, run_inquiry
from m3.environment.modes import draw
from m3.environment.patient import ScriptedPatient
from m3.environment.seeds import derive_seed
from m3.environment.segment import Context, StageScore
from m3.environment.stages import PHASES, instruction
from m3.environment.trajectory import Message, Trajectory, chat, to_line
from m3.plugins.verl_spar import token_rewards
from m3.rewards.spans import violations
from m3.rewards.stage_rewards import rule_rewards
from m3.rewards.step_verifier import StepVerifier
from m3kernels.checks import refuse

MAX_TOKENS = 400  # ours: of one message of the physician, as m3.environment.consultation.ChatPolicy
STAGES = {"inquiry": PHASES[:1], "all": PHASES}


class ConsultationOutput(AgentLoopOutput):
    """A rollout as verl stores it; ``reward_score`` is R, ``step_factors`` gamma of each step (run of the mask)."""

    step_factors: list[float]

    def as_dict(self) -> dict[str, Any]:
        """verl's row, its ``rm_scores`` those of ``token_rewards``."""
        row = super().as_dict()
        assert self.reward_score is not None
        row["rm_scores"] = token_rewards(self.reward_score, row.pop("step_factors"), row["response_mask"])
        return row


class OutOfRoomError(RuntimeError):
    """The response holds as many tokens as ``rollout.response_length`` allows."""


class ServerPhysician:
    """The policy of a consultation, drawn from verl's servers; keeps the tokens, their mask and log-probabilities.

    Args:
        loop: the agent loop: its server, its tokenizer, its template.
        sampling: verl's sampling parameters.
        max_tokens: of one message.
    """

    name = "verl"

    def __init__(self, loop: AgentLoopBase, sampling: Mapping[str, Any], max_tokens: int) -> None:
        self._loop, self._sampling, self._max_tokens = loop, dict(sampling), max_tokens
        self._request = uuid4().hex  # one a consultation: its turns go to the server that has their prefix
        self.prompt = 0  # tokens before the first that was drawn
        self.ids: list[int] = []
        self.mask: list[int] = []  # of the tokens behind the prompt
        self.logprobs: list[float] | None = [] if sampling.get("logprobs") else None
        self.turns: list[int] = []  # of the messages that were drawn
        self.said: tuple[Message, ...] = ()  # the consultation up to the last of them
        self.server: dict[str, Any] = {}  # what the server says beside tokens: versions of the weights
        self.seconds = 0.0

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        """The next message. Raises OutOfRoomError."""
        loop, spoken = self._loop, chat(messages)
        if not self.ids:
            self.ids = await loop.ct_build_initial_tokens(spoken)
            self.prompt = len(self.ids)
            ids, mask, logprobs = self.ids, self.mask, self.logprobs
        else:
            merged, mask, logprobs = await loop.ct_merge_context_msg(
                chat(self.said), spoken, self.ids, self.mask, self.logprobs
            )
            ids = merged.token_ids
        room = loop.rollout_config.response_length - len(mask) - 1  # one token stays for the end of the response
        if room < 1:
            raise OutOfRoomError(f"response_length {loop.rollout_config.response_length} is spent")
        began = time.monotonic()
        drawn = await loop.server_manager.generate(
            request_id=self._request,
            prompt_ids=ids,
            sampling_params={**self._sampling, "max_tokens": min(room, self._max_tokens)},
        )
        self.seconds += time.monotonic() - began
        if not drawn.token_ids or drawn.stop_reason == "aborted":
            raise RuntimeError(f"m3_clinic: the server drew {len(drawn.token_ids)} tokens and {drawn.stop_reason}")
        if logprobs is not None and drawn.log_probs is None:
            raise RuntimeError("m3_clinic: log-probabilities were asked for; the server gave none")
        merged, self.mask, self.logprobs = await loop.ct_merge_assistant_token(
            ids, drawn.token_ids, mask, logprobs, assistant_logprobs=drawn.log_probs
        )
        self.ids = merged.token_ids
        self.server = {**drawn.extra_fields, **{k: v for k, v in self.server.items() if k != "max_global_steps"}}
        text = loop.tokenizer.decode(drawn.token_ids, skip_special_tokens=True).strip() or "..."
        said = Message(role="assistant", content=text, turn=messages[-1].turn, phase=phase)
        self.said = (*messages, said)
        self.turns.append(said.turn)
        return text


@register("m3_clinic")
class ConsultationLoop(AgentLoopBase):
    """One consultation a rollout.

    Args:
        cases: file or folder of cases; None: the project's own.
        stages: "all" four, none gated, or the "inquiry" alone. R is the mean of their rewards.
        max_turns: most messages of the physician in the inquiry.
        max_tokens: of one message.
        The others: as of verl's AgentLoopBase.
    """

    def __init__(
        self,
        *args: Any,
        cases: str | None = None,
        stages: str = "all",
        max_turns: int = MAX_TURNS,
        max_tokens: int = MAX_TOKENS,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        op = "m3_clinic"
        if not self.config.trainer.use_v1:
            raise refuse(op, "trainer.use_v1", "True (the other trainer drops rewards of tokens)", False)
        if stages not in STAGES:
            raise refuse(op, "stages", f"of {sorted(STAGES)}", repr(stages))
        self._cases = {case.id: case for case in (own_cases() if cases is None else read_cases(cases))}
        self._stages, self._max_turns, self._max_tokens = STAGES[stages], max_turns, max_tokens
        self._rewards = rule_rewards(StepVerifier())

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> ConsultationOutput:
        """Play and score the consultation of a row.

        Args:
            sampling_params: verl's.
            kwargs: the row; ``extra_info`` has the id of a "case" and the "seed" of its patient; ``session_id`` counts
                rollouts of the row, which share the patient and how it begins.
        """
        told = kwargs["extra_info"]
        if told.get("case") not in self._cases:
            raise refuse("m3_clinic", "extra_info.case", f"an id of the {len(self._cases)} cases", told.get("case"))
        case, seed = self._cases[told["case"]], int(told.get("seed", 0))
        physician = ServerPhysician(self, sampling_params, self._max_tokens)
        trajectory = await self.consult(case, physician, seed, int(kwargs.get("session_id", 0)))
        scores = {phase: await self._rewards[phase](case, trajectory, phase) for phase in self._stages}
        return self.output(physician, trajectory, scores)

    async def consult(self, case: Case, physician: ServerPhysician, seed: int, rollout: int) -> Trajectory:
        """The consultation, whole or up to where the response had no more room."""
        play = run_inquiry if self._stages == PHASES[:1] else run_consultation
        mode = draw(case, seed=seed)
        patient = ScriptedPatient(case, seed=derive_seed(seed, "patient"))
        try:
            return await play(
                case, physician, patient, seed=seed, rollout=rollout, max_turns=self._max_turns, mode=mode
            )
        except OutOfRoomError:
            if not physician.mask:
                raise
            return Trajectory(
                case=case.id, case_version=case.version, policy=physician.name, seed=seed, rollout=rollout,
                messages=physician.said, mode=mode.name, ended="room",
            )  # fmt: skip

    def output(
        self, physician: ServerPhysician, trajectory: Trajectory, scores: Mapping[Phase, StageScore]
    ) -> ConsultationOutput:
        """The rollout for verl: its tokens and one that is masked behind them, R, and gamma of each step."""
        reward = sum(score.reward for score in scores.values()) / len(scores)
        named = violations([span for score in scores.values() for span in score.spans], trajectory.turns)
        factors = [step_factor(named[turn]) for turn in physician.turns]
        facts = {
            "reward": reward,
            "steps": len(factors),
            "steps_penalised": sum(factor < 1 for factor in factors),
            **{f"reward_{phase}": score.reward for phase, score in scores.items()},
        }
        return ConsultationOutput(
            prompt_ids=physician.ids[: physician.prompt],
            response_ids=[*physician.ids[physician.prompt :], self.tokenizer.eos_token_id],
            response_mask=[*physician.mask, 0],
            response_logprobs=None if physician.logprobs is None else [*physician.logprobs, 0.0],
            reward_score=reward,
            step_factors=factors,
            num_turns=len(trajectory.messages),
            metrics=AgentLoopMetrics(generate_sequences=physician.seconds),
            extra_fields={**physician.server, "reward_extra_info": facts, "turn_scores": [], "tool_rewards": []},
        )


# -- single stages ----------------------------------------------------------------------------------------------------
@register_reward_manager("m3_stage")
class StageRewardManager(RewardManagerBase):
    """Scores one message of one stage, as verl's single-turn loop draws it from a row of ``stage_row``.

    The reward is that of m3's rules for the stage, without what its one step violates: use it with verl's own
    estimators. ``reward.custom_reward_function`` is not used.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._cases = {case.id: case for case in own_cases()}
        self._rewards = rule_rewards()

    async def run_single(self, data: Any) -> dict[str, Any]:
        """{"reward_score": R in [0, 1], "reward_extra_info": {"reward": R}} of the last item of data."""
        item = data[-1]
        told = item.non_tensor_batch["extra_info"]
        if told.get("case") not in self._cases:
            raise refuse("m3_stage", "extra_info.case", f"an id of the {len(self._cases)} cases", told.get("case"))
        ids = item.batch["responses"]
        drawn = ids[item.batch["attention_mask"][-len(ids) :] != 0]
        text = await asyncio.to_thread(self.tokenizer.decode, drawn, skip_special_tokens=True)
        case, phase = self._cases[told["case"]], Phase(told["phase"])
        context = [Message.from_json(json.loads(line)) for line in told["context"]]
        said = Message(role="assistant", content=text.strip() or "...", turn=context[-1].turn, phase=phase)
        trajectory = Trajectory(
            case=case.id, case_version=case.version, policy="verl", seed=0, messages=(*context, said)
        )
        score = await self._rewards[phase](case, trajectory, phase)
        return {"reward_score": score.reward, "reward_extra_info": {"reward": score.reward}}


# -- rows of a dataset ------------------------------------------------------------------------------------------------
def dataset_rows(cases: Iterable[Case], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row of verl's dataset for each case: its consultation is played by ``m3_clinic``.

    The prompt is what ``m3_clinic`` opens with but the patient's words; verl filters rows by its length alone.
    """
    return [
        {
            "data_source": "m3",
            "agent_name": "m3_clinic",
            "prompt": chat([instruction(Phase.inquiry, 0)]),
            "reward_model": {"style": "rule", "ground_truth": ""},
            "extra_info": {"index": index, "case": case.id, "seed": seed},
        }
        for index, case in enumerate(cases)
    ]


def stage_row(context: Context, *, index: int = 0) -> dict[str, Any]:
    """A row for one message of a later stage (Eq 3: y_k from x_k), scored by ``m3_stage``."""
    return {
        "data_source": "m3",
        "agent_name": "single_turn_agent",
        "prompt": chat(context.messages),
        "reward_model": {"style": "rule", "ground_truth": ""},
        "extra_info": {
            "index": index,
            "case": context.case.id,
            "phase": str(context.phase),
            "context": [to_line(message.to_json()) for message in context.messages],
        },
    }
