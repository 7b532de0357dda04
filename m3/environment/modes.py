"""How a consultation begins: passively, or with a dialogue the physician has already had and the patient has not.

- passive (3 of 4): it starts from the patient's opening line;
- interruption-injected (1 of 4): it starts from a snippet that ends in the patient's question, often an anxious one.
  Visibility is asymmetric: the physician sees the snippet, the simulated patient does not (episode.py passes it the
  messages after the snippet alone). Half of these ask at the end of a turn, half inside an ongoing one.

Rendering. *End of turn*: the physician's last question is whole, and the patient answers it and asks in one message.
*Mid turn*: the exchange is still under way: the physician's last message breaks off after half its words with a dash,
and the patient's message is the question alone. Both come from one snippet: the case's own, or one that seeded
templates build from the opening line and what the patient tells unasked.

Source: Baichuan-M3, arXiv 2602.06570, on the patient simulator. The rendering and the templates are ours.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from m3.environment.case import Case, Disclosure, Phase
from m3.environment.trajectory import Action, Message
from m3.text.words import sentences
from m3kernels.checks import refuse

PASSIVE_MODE = "passive"
END_OF_TURN = "interruption:end_of_turn"
MID_TURN = "interruption:mid_turn"
BREAK = " —"  # ends a message that was interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModeConfig:
    """Shares of the modes."""

    interruption: float = 0.25  # the paper: passive 0.75, interruption-injected 0.25
    mid_turn: float = 0.5  # the paper: half end-of-turn, half mid-turn

    def __post_init__(self) -> None:
        for name in ("interruption", "mid_turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise refuse("ModeConfig", name, "a share in [0, 1]", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """How one consultation begins. ``snippet``: what the physician alone sees; empty when passive."""

    name: str = PASSIVE_MODE
    snippet: tuple[Message, ...] = ()


PASSIVE = Mode()

_QUESTIONS = (
    "Is it something serious, doctor?",
    "Am I going to be all right?",
    "Should I be worried about this?",
    "Do you already know what it is?",
    "Will I need treatment for this?",
    "Do I have to go to hospital?",
)
_LEADS = (
    "I see, thank you for telling me. Let me ask you about it step by step, so that I understand it well.",
    "Thank you for coming in. I would like to go through it with you step by step. Please go on in your own words.",
    "I understand. Before I say anything I need to know a little more. Please tell me how it has been since then.",
)
_ANSWERS = ("It has been on my mind all day.", "I really don't know what to make of it.", "It isn't like me at all.")


def draw(case: Case, *, seed: int, config: ModeConfig | None = None) -> Mode:
    """The mode of a case under a seed; rollouts of one case and seed begin alike, as a group must."""
    config = config or ModeConfig()
    rng = random.Random(f"{seed}/{case.id}/mode")
    if rng.random() >= config.interruption:
        return PASSIVE
    name = MID_TURN if rng.random() < config.mid_turn else END_OF_TURN
    return interruption(case, name, seed=seed)


def interruption(case: Case, name: str, *, seed: int) -> Mode:
    """The mode of a name, its snippet the case's own or built.

    Raises:
        ValueError: no such mode.
    """
    if name not in (END_OF_TURN, MID_TURN):
        raise refuse("modes.interruption", "name", f"{END_OF_TURN!r} or {MID_TURN!r}", repr(name))
    dialogue = list(case.snippet) or _build(case, random.Random(f"{seed}/{case.id}/snippet"))
    if name == MID_TURN:
        dialogue = _break_off(dialogue)
    return Mode(name=name, snippet=_messages(case, dialogue))


def _build(case: Case, rng: random.Random) -> list[tuple[str, str]]:
    unasked = [
        fact.said
        for fact in case.facts
        if fact.disclosure == Disclosure.volunteer and fact.id not in case.opening_facts and fact.section != "exam"
    ]
    answer = " ".join(unasked[:2]) or rng.choice(_ANSWERS)
    return [
        ("user", case.opening_line),
        ("assistant", rng.choice(_LEADS)),
        ("user", f"{answer} {rng.choice(_QUESTIONS)}"),
    ]


def _break_off(dialogue: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same dialogue with the patient's question before the physician's last message was whole."""
    *before, (role, last) = dialogue
    asks = [sentence for sentence in sentences(last) if "?" in sentence] or sentences(last)[-1:]
    if not before or before[-1][0] != "assistant":
        said = [sentence for sentence in sentences(last) if sentence not in asks]
        before = [*before, *([(role, " ".join(said))] if said else []), ("assistant", _LEADS[0])]
    words = before[-1][1].split()
    half = " ".join(words[: (len(words) + 1) // 2]).rstrip(".,;:?! ")
    return [*before[:-1], ("assistant", half + BREAK), (role, " ".join(asks))]


def _messages(case: Case, dialogue: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """Numbered by exchange and marked as snippet: not a word of it was drawn from the policy."""
    told = {fact.said: fact.id for fact in case.facts}
    found: list[Message] = []
    for role, content in dialogue:
        turn = found[-1].turn + (found[-1].role == "assistant") if found else 0
        facts = [fact for said, fact in told.items() if role == "user" and said in content]
        if role == "user" and content.startswith(case.opening_line):
            facts = list(dict.fromkeys([*case.opening_facts, *facts]))
        found.append(
            Message(
                role=role,
                content=content,
                turn=turn,
                phase=Phase.inquiry,
                action=Action.ask if role == "assistant" else None,
                facts=tuple(facts),
                meta={"snippet": True},
            )
        )
    return tuple(found)
