"""Stages: their order, their instructions, and the context of the next one (Eq 5)."""

from __future__ import annotations

import pytest

from m3.environment.case import Phase
from m3.environment.stages import INSTRUCTIONS, PHASES, following, instruction, next_context
from m3.environment.trajectory import Message, chat

OPENING = (
    instruction(Phase.inquiry, 0),
    Message(role="user", content="My chest hurts.", turn=0, phase=Phase.inquiry, facts=("pain",)),
)
ASKED = (
    Message(role="assistant", content="Since when?", turn=0, phase=Phase.inquiry),
    Message(role="user", content="Three hours.", turn=1, phase=Phase.inquiry),
    Message(role="assistant", content="I have no further questions.", turn=1, phase=Phase.inquiry),
)


def test_there_are_four_stages_in_order_and_each_says_what_it_wants():
    assert [str(phase) for phase in PHASES] == ["inquiry", "differential", "lab", "diagnosis"]
    assert [following(phase) for phase in PHASES] == [*PHASES[1:], None]
    assert set(INSTRUCTIONS) == set(PHASES)
    assert "Diagnosis: " in INSTRUCTIONS[Phase.diagnosis] and "- name" in INSTRUCTIONS[Phase.lab]


def test_the_next_context_is_all_that_was_said_and_the_instruction():
    found = next_context(OPENING, ASKED, Phase.differential)
    assert found[:-1] == OPENING + ASKED
    assert chat(found[-1:]) == [{"role": "user", "content": INSTRUCTIONS[Phase.differential]}]
    assert (found[-1].turn, found[-1].phase) == (2, Phase.differential)


def test_a_context_keeps_the_one_before_as_its_prefix():
    """Nothing is told twice to a cache of prefixes: x_2 begins with x_1, x_3 with x_2."""
    second = next_context(OPENING, ASKED, Phase.differential)
    listed = (Message(role="assistant", content="1. Angina", turn=2, phase=Phase.differential),)
    third = next_context(second, listed, Phase.lab)
    assert third[: len(second)] == second and [m.turn for m in third] == [0, 0, 0, 1, 1, 2, 2, 3]


def test_results_are_told_before_the_instruction():
    ordered = (Message(role="assistant", content="- ECG", turn=3, phase=Phase.lab),)
    found = next_context(OPENING, ordered, Phase.diagnosis, results="ECG: ST elevation.")
    assert found[-1].content == f"ECG: ST elevation.\n\n{INSTRUCTIONS[Phase.diagnosis]}"


@pytest.mark.parametrize("phase", [Phase.inquiry, Phase.lab, Phase.diagnosis])
def test_only_the_stage_after_follows(phase):
    with pytest.raises(ValueError, match="next_context: phase: want the stage after inquiry"):
        next_context(OPENING, ASKED, phase)


def test_no_answer_is_refused():
    with pytest.raises(ValueError, match="next_context: answer: want at least one message; got none"):
        next_context(OPENING, (), Phase.differential)
