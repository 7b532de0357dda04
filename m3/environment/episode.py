"""Who takes part in a consultation, and how one runs: the inquiry alone, or all four stages.

A *policy* is the physician: it sees a ``CaseView`` (what is on the patient's card) and the messages so far. A *patient*
sees the dialogue without the snippet of an interruption-injected mode (modes.py). The inquiry ends when

- the physician closes: its message asks for nothing, or says that it has enough ("I have no further questions.";
  asking.is_closing); the patient does not answer that message;
- ``max_turns`` messages of the physician are spent;
- the patient leaves (``meta["gone"]``).

The later stages each are one message: the context of stage k and its answer, then the next instruction
(stages.next_context, Eq 5). What was ordered is answered from the case's examinations (results.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from m3.environment.asking import is_closing
from m3.environment.case import Case, Phase
from m3.environment.modes import PASSIVE, Mode
from m3.environment.results import answer_orders
from m3.environment.seeds import derive_seed
from m3.environment.stages import PHASES, instruction, next_context
from m3.environment.trajectory import Action, Message, Trajectory
from m3kernels.checks import refuse

MAX_TURNS = 30  # ours: the paper's physicians take about 21 turns on average; some room above
_ACTIONS = {
    Phase.inquiry: Action.ask,
    Phase.differential: Action.differential,
    Phase.lab: Action.order,
    Phase.diagnosis: Action.diagnose,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseView:
    """What a physician knows before the first word; nothing that must be found out."""

    chief_complaint: str
    age: float | None
    sex: str
    setting: str
    lang: str


def view_of(case: Case) -> CaseView:
    """The card of a case's patient."""
    return CaseView(
        chief_complaint=case.chief_complaint, age=case.age, sex=case.sex, setting=case.setting, lang=case.lang
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """A message of the physician whose tokens are known; one stream of tokens runs through all of a consultation.

    ``text``: as others hear it. ``given_ids``: what the sampler was given after the last tokens it drew in this
    consultation (or from its beginning): words of others, and the template's. ``token_ids``: what it then drew, the
    token that ended the message included; ``logprobs`` (nats, filters included) and ``versions`` (of the weights) of
    each. ``finish``: "stop" or "length".
    """

    text: str
    given_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]
    finish: str

    def message(self, **fields: Any) -> Message:
        """It as a message; ``meta["sampled"]`` holds what Message has no field for."""
        sampled = {
            "given_ids": list(self.given_ids),
            "logprobs": list(self.logprobs),
            "versions": list(self.versions),
            "finish": self.finish,
        }
        return Message(
            role="assistant", content=self.text, token_ids=self.token_ids, meta={"sampled": sampled}, **fields
        )

    @classmethod
    def of(cls, message: Message) -> Said | None:
        """What ``message`` was made of; None where its tokens are not known."""
        sampled = message.meta.get("sampled")
        if sampled is None or message.token_ids is None:
            return None
        return cls(
            text=message.content,
            given_ids=tuple(sampled["given_ids"]),
            token_ids=message.token_ids,
            logprobs=tuple(sampled["logprobs"]),
            versions=tuple(sampled["versions"]),
            finish=sampled["finish"],
        )


def said_message(said: str | Said, *, turn: int, phase: Phase, action: Action) -> Message:
    """What a policy said, as a message."""
    if isinstance(said, Said):
        return said.message(turn=turn, phase=phase, action=action)
    return Message(role="assistant", content=said, turn=turn, phase=phase, action=action)


@runtime_checkable
class Patient(Protocol):
    """Whoever plays the patient. Messages it is given end with the physician's; turns it sets are its own count."""

    async def open(self) -> Message:
        """The first words."""
        ...

    async def answer(self, messages: Sequence[Message]) -> Message:
        """The answer to the last message; ``meta["gone"]`` true ends the inquiry."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Whoever plays the physician."""

    @property
    def name(self) -> str:
        """As reports call it."""

    async def act(self, view: CaseView, messages: Sequence[Message], phase: Phase, seed: int) -> str | Said:
        """The physician's next message; messages end with the patient's or with a stage's instruction."""
        ...


def message_seed(seed: int, case: Case, rollout: int, turn: int, phase: Phase) -> int:
    """The seed of one message: a function of its place alone."""
    return derive_seed(seed, case.id, rollout, str(phase), turn)


async def run_inquiry(
    case: Case,
    policy: Policy,
    patient: Patient,
    *,
    seed: int,
    rollout: int = 0,
    max_turns: int = MAX_TURNS,
    mode: Mode = PASSIVE,
) -> Trajectory:
    """The first stage: from its instruction (role "system") to the end of the inquiry.

    Args:
        case: the case the patient plays.
        policy: the physician.
        patient: a patient of this case; told what the physician says after the mode's snippet.
        seed: the run's; each message has its own (``message_seed``).
        rollout: counts rollouts of the same case and seed.
        max_turns: most messages drawn from the policy, at least 1.
        mode: of modes.draw.
    Returns:
        The trajectory; ``ended`` is "closed", "turns" or "patient".
    Raises:
        ValueError: max_turns below 1.
    """
    if max_turns < 1:
        raise refuse("run_inquiry", "max_turns", "an integer >= 1", max_turns)
    heard: list[Message] = []  # what the patient knows of
    seen = [instruction(Phase.inquiry, 0), *mode.snippet]  # what the physician knows of
    if not mode.snippet:
        first = await patient.open()
        heard.append(first)
        seen.append(first)
    view = view_of(case)
    turn = seen[-1].turn
    ended = "turns"
    for count in range(1, max_turns + 1):
        spoken = await policy.act(
            view, tuple(seen), Phase.inquiry, message_seed(seed, case, rollout, turn, Phase.inquiry)
        )
        closing = is_closing(spoken if isinstance(spoken, str) else spoken.text)
        action = Action.close if closing else Action.ask
        said = said_message(spoken, turn=turn, phase=Phase.inquiry, action=action)
        seen.append(said)
        heard.append(said)
        if closing:
            ended = "closed"
            break
        if count == max_turns:
            break
        answer = dataclasses.replace(await patient.answer(tuple(heard)), turn=turn + 1)
        turn += 1
        seen.append(answer)
        heard.append(answer)
        if answer.meta.get("gone"):
            ended = "patient"
            break
    return Trajectory(
        case=case.id,
        case_version=case.version,
        policy=policy.name,
        seed=seed,
        rollout=rollout,
        messages=tuple(seen),
        mode=mode.name,
        ended=ended,
    )


async def run_stage(
    case: Case, policy: Policy, context: Sequence[Message], phase: Phase, *, seed: int, rollout: int = 0
) -> Message:
    """The physician's one message of a stage after the inquiry; ``context`` ends with the stage's instruction."""
    turn = context[-1].turn
    said = await policy.act(view_of(case), tuple(context), phase, message_seed(seed, case, rollout, turn, phase))
    return said_message(said, turn=turn, phase=phase, action=_ACTIONS[phase])


def open_stage(case: Case, context: Sequence[Message], answer: Sequence[Message], phase: Phase) -> tuple[Message, ...]:
    """The context of a stage (Eq 5); the diagnosis is told what was ordered showed.

    The instruction's message carries ``meta["orders"]``, one {"order", "event", "exam", "facts"} for each order.
    """
    if phase != Phase.diagnosis:
        return next_context(context, answer, phase)
    found = answer_orders(case, answer[-1].content)
    said = "\n".join(one.said for one in found)
    *before, last = next_context(
        context, answer, phase, results=f"Results:\n{said}" if said else "No test was ordered."
    )
    return (*before, dataclasses.replace(last, meta={**last.meta, "orders": [one.to_json() for one in found]}))


async def run_consultation(
    case: Case,
    policy: Policy,
    patient: Patient,
    *,
    seed: int,
    rollout: int = 0,
    max_turns: int = MAX_TURNS,
    mode: Mode = PASSIVE,
) -> Trajectory:
    """All four stages, none gated; arguments, ``ended`` and errors as in ``run_inquiry``."""
    trajectory = await run_inquiry(case, policy, patient, seed=seed, rollout=rollout, max_turns=max_turns, mode=mode)
    messages = trajectory.messages
    at = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=0)
    context, answer = messages[:at], messages[at:]
    for phase in PHASES[1:]:
        context = open_stage(case, context, answer, phase)
        answer = (await run_stage(case, policy, context, phase, seed=seed, rollout=rollout),)
    return dataclasses.replace(trajectory, messages=(*context, *answer))
