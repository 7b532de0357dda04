"""The four stages of a consultation: what each asks for, the context it starts from, and how its answer is rewarded.

Stages in order: inquiry, differential, lab, diagnosis (K = 4). Stage k draws y_k ~ pi(. | x_k) (Eq 3) and has a reward
G_k of its own (Eq 4). The next stage starts from all that was said, and its instruction:

    x_{k+1} = [x_k, y_k, p_{k+1}]                                                               (Eq 5)

Source: Baichuan-M3, arXiv 2602.06570, on the segmented pipeline. The words of the instructions are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from m3.environment.case import Phase
from m3.environment.trajectory import Message
from m3kernels.checks import refuse

PHASES: tuple[Phase, ...] = tuple(Phase)

INSTRUCTIONS: Mapping[Phase, str] = MappingProxyType(
    {
        Phase.inquiry: (
            "You are the physician in a consultation. Take the patient's history: one or two short questions at a "
            "time, in plain words, never one that is already answered. Ask about warning signs early, and say so at "
            "once if the patient needs urgent care. Give no diagnosis and order no tests yet. When you know enough, "
            'reply "I have no further questions." and ask nothing.'
        ),
        Phase.differential: (
            "The history is complete. Give your differential diagnosis as a numbered list, the most likely first, at "
            'most ten lines, each line "1. name of the diagnosis". Include the dangerous ones that must be excluded.'
        ),
        Phase.lab: (
            "Order the examinations that you need now, one a line, each line "
            '"- name of the test". Order only what changes what you do next.'
        ),
        Phase.diagnosis: (
            'The results are in. On the first line write "Diagnosis: " and the one diagnosis. Then, on a line that '
            'starts with "Advice: ", say what the patient should do now, whether and how urgently care must be '
            "escalated, and what would bring the patient back."
        ),
    }
)


def following(phase: Phase) -> Phase | None:
    """The stage after one; None after the last."""
    at = PHASES.index(phase) + 1
    return PHASES[at] if at < len(PHASES) else None


def instruction(phase: Phase, turn: int, *, results: str = "") -> Message:
    """p_k as a message: of role "system" for the inquiry, before the patient speaks, else "user".

    Args:
        phase: the stage it opens.
        turn: the exchange it belongs to: the answer to it has the same number.
        results: what the ordered examinations showed, told before the instruction.
    """
    text = f"{results}\n\n{INSTRUCTIONS[phase]}" if results else INSTRUCTIONS[phase]
    role = "system" if phase == Phase.inquiry else "user"
    return Message(role=role, content=text, turn=turn, phase=phase, meta={"instruction": str(phase)})


def next_context(
    context: Sequence[Message], answer: Sequence[Message], phase: Phase, *, results: str = ""
) -> tuple[Message, ...]:
    """x_{k+1} = [x_k, y_k, p_{k+1}] (Eq 5): the same messages, nothing summarised and nothing left out.

    Args:
        context: x_k.
        answer: y_k, at least one message.
        phase: the stage that begins, k + 1.
        results: as in ``instruction``.
    Raises:
        ValueError: no answer; or the answer is not of the stage before ``phase``.
    """
    if not answer:
        raise refuse("next_context", "answer", "at least one message", "none")
    if following(answer[-1].phase) != phase:
        raise refuse("next_context", "phase", f"the stage after {answer[-1].phase}", str(phase))
    said = (*context, *answer)
    turn = 1 + max(message.turn for message in said)
    return (*said, instruction(phase, turn, results=results))
