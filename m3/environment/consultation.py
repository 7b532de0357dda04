"""Consultations of a policy with simulated patients, stage by stage: what the pipeline's slots do.

A group's rollouts share their context: the mode (passive or interrupted), the opening line and the patient's seed are
drawn once for each context of an inquiry, and only the policy's seed differs between rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from m3.environment.case import Case, Phase
from m3.environment.episode import MAX_TURNS, CaseView, Patient, Policy, run_inquiry, run_stage
from m3.environment.modes import PASSIVE_MODE, Mode, ModeConfig, draw
from m3.environment.patient import ScriptedPatient
from m3.environment.pipeline import Answer
from m3.environment.seeds import derive_seed
from m3.environment.segment import Context
from m3.environment.stages import instruction
from m3.environment.trajectory import Message, chat
from m3.rollout.chat import ChatClient
from m3kernels.checks import refuse


class PatientFactory(Protocol):
    """Makes the patient of a case."""

    def __call__(self, case: Case, *, seed: int) -> Patient: ...


class PolicyFactory(Protocol):
    """Makes the physician of a case: of scripts that are written for one."""

    @property
    def name(self) -> str:
        """The policy's name, the same for every case."""

    def __call__(self, case: Case) -> Policy: ...


class ChatPolicy:
    """A physician who is a chat model: sees instructions and the dialogue, nothing of the case.

    Args:
        client: who answers.
        temperature: of its sampling.
        max_tokens: of one message.
    """

    def __init__(self, client: ChatClient, *, temperature: float = 0.7, max_tokens: int = 400) -> None:
        self._client, self._temperature, self._max_tokens = client, temperature, max_tokens
        self.name = client.model

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str:
        reply = await self._client.chat(
            chat(messages), temperature=self._temperature, max_tokens=self._max_tokens, seed=seed
        )
        return reply.text.strip() or "..."


class _Opened:
    """A patient whose first words are said."""

    def __init__(self, patient: Patient, first: Message | None) -> None:
        self._patient, self._first = patient, first

    async def open(self) -> Message:
        assert self._first is not None  # a snippet opens the consultation, and nobody asks
        return self._first

    async def answer(self, messages: Sequence[Message]) -> Message:
        return await self._patient.answer(messages)


class SimulatedConsultation:
    """The ``Consultation`` of a policy and simulated patients.

    Args:
        policy: the physician, or what makes the physician of a case.
        patient: makes patients; the scripted ones by default.
        max_turns: most messages of the physician in an inquiry.
        modes: shares of passive and interrupted beginnings.
        version: tells the policy's version; 0 throughout by default.
        patient_name: what else tells this consultation from another of the same policy.
    """

    def __init__(
        self,
        policy: Policy | PolicyFactory,
        patient: PatientFactory = ScriptedPatient,
        *,
        max_turns: int = MAX_TURNS,
        modes: ModeConfig | None = None,
        version: Callable[[], int] | None = None,
        patient_name: str = "scripted",
    ) -> None:
        if max_turns < 1:
            raise refuse("SimulatedConsultation", "max_turns", "an integer >= 1", max_turns)
        self._physician, self._patient, self._version = policy, patient, version
        self._max_turns, self._modes = max_turns, modes or ModeConfig()
        self.policy = policy.name
        shares = f"interruption {self._modes.interruption:g}, mid-turn {self._modes.mid_turn:g}"
        self.name = f"{policy.name} with {patient_name} patients, {max_turns} turns, {shares}"

    def _policy(self, case: Case) -> Policy:
        return self._physician(case) if callable(self._physician) else self._physician

    @property
    def version(self) -> int:
        """The policy's version now."""
        return self._version() if self._version is not None else 0

    async def open(self, case: Case, *, seed: int) -> tuple[Message, ...]:
        """x_1: the instruction, and the snippet or the patient's opening line."""
        mode = draw(case, seed=seed, config=self._modes)
        first = mode.snippet or (await self._patient(case, seed=_patient_seed(seed)).open(),)
        *before, last = (instruction(Phase.inquiry, 0), *first)
        return (*before, _marked(last, mode.name, seed))

    async def answer(self, context: Context, *, seed: int, rollout: int) -> Answer:
        """y_k: the rest of the inquiry, or one message."""
        case, messages = context.case, context.messages
        if context.phase != Phase.inquiry:
            said = await run_stage(case, self._policy(case), messages, context.phase, seed=seed, rollout=rollout)
            return Answer(messages=(said,))
        snippet = () if messages[-1].meta["mode"] == PASSIVE_MODE else messages[1:]
        return await self._inquire(context, seed=seed, rollout=rollout, snippet=snippet, max_turns=self._max_turns)

    async def _inquire(
        self, context: Context, *, seed: int, rollout: int, snippet: tuple[Message, ...], max_turns: int
    ) -> Answer:
        """The rest of an inquiry. ``snippet``: messages of the context that the patient has not heard."""
        case, messages = context.case, context.messages
        began = next(message.meta for message in messages if "opened" in message.meta)
        patient = _Opened(self._patient(case, seed=_patient_seed(began["opened"])), None if snippet else messages[-1])
        trajectory = await run_inquiry(
            case,
            self._policy(case),
            patient,
            seed=seed,
            rollout=rollout,
            max_turns=max_turns,
            mode=Mode(name=began["mode"], snippet=snippet),
        )
        return Answer(messages=trajectory.messages[len(messages) :], ended=trajectory.ended)


def _patient_seed(seed: int) -> int:
    return derive_seed(seed, "patient")


def _marked(message: Message, mode: str, seed: int) -> Message:
    """The last message of x_1 carries how the consultation began, and the seed the group's patients come from."""
    return dataclasses.replace(message, meta={**message.meta, "mode": mode, "opened": seed})
