"""How a consultation begins: shares of the modes, their rendering, and who sees the snippet."""

from __future__ import annotations

import asyncio
import re

import pytest
from clinic_cases import small_case
from clinic_policies import Script

from m3.environment.case import own_cases
from m3.environment.episode import run_inquiry
from m3.environment.modes import BREAK, END_OF_TURN, MID_TURN, PASSIVE, Mode, ModeConfig, draw, interruption
from m3.environment.patient import ScriptedPatient

CASE = small_case()
SNIPPET = (
    ("user", "My chest hurts."),
    ("assistant", "Since when? Tell me what you were doing at that very moment."),
    ("user", "Since this morning, I was asleep. Am I having a heart attack?"),
)
WITH_SNIPPET = small_case(
    presentation={
        "chief_complaint": "chest pain",
        "opening_line": "My chest hurts.",
        "snippet": [{"role": role, "content": content} for role, content in SNIPPET],
    }
)


def test_shares_of_the_modes():
    """Of 2,000 seeds 1,500, 250 and 250 are due; four standard deviations are 78 and 60."""
    names = [draw(CASE, seed=seed).name for seed in range(2000)]
    assert abs(names.count("passive") - 1500) < 78
    assert abs(names.count(END_OF_TURN) - 250) < 60
    assert abs(names.count(MID_TURN) - 250) < 60
    assert len(names) == names.count("passive") + names.count(END_OF_TURN) + names.count(MID_TURN)


ALWAYS = {
    "never": (ModeConfig(interruption=0), {"passive"}),
    "always_mid_turn": (ModeConfig(interruption=1, mid_turn=1), {MID_TURN}),
    "always_end_of_turn": (ModeConfig(interruption=1, mid_turn=0), {END_OF_TURN}),
}


@pytest.mark.parametrize(("config", "wanted"), ALWAYS.values(), ids=ALWAYS)
def test_shares_can_be_set(config, wanted):
    assert {draw(CASE, seed=seed, config=config).name for seed in range(30)} == wanted


def test_mode_of_a_seed_is_the_same_again_and_of_cases_not_the_same():
    drawn = [[draw(case, seed=seed) for seed in range(60)] for case in (CASE, WITH_SNIPPET)]
    assert drawn[0] == [draw(CASE, seed=seed) for seed in range(60)]
    different = small_case(id="other")
    assert [mode.name for mode in drawn[0]] != [draw(different, seed=seed).name for seed in range(60)]


def texts(mode: Mode) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in mode.snippet]


def test_snippet_of_a_case_at_the_end_of_a_turn():
    mode = interruption(WITH_SNIPPET, END_OF_TURN, seed=0)
    assert texts(mode) == list(SNIPPET)
    assert [message.turn for message in mode.snippet] == [0, 0, 1]


def test_snippet_of_a_case_inside_a_turn():
    """The physician's message breaks off after half of its eleven words; the question comes alone."""
    wanted = [
        SNIPPET[0],
        ("assistant", "Since when? Tell me what you" + BREAK),
        ("user", "Am I having a heart attack?"),
    ]
    assert texts(interruption(WITH_SNIPPET, MID_TURN, seed=0)) == wanted


def test_snippet_without_a_physician_gets_one_to_interrupt():
    alone = small_case(
        presentation={
            "chief_complaint": "pain",
            "opening_line": "It hurts.",
            "snippet": [{"role": "user", "content": "It hurts. Is it bad?"}],
        }
    )
    roles = [role for role, _ in texts(interruption(alone, MID_TURN, seed=0))]
    assert roles == ["user", "assistant", "user"]
    assert texts(interruption(alone, MID_TURN, seed=0))[2] == ("user", "Is it bad?")


@pytest.mark.parametrize("name", [END_OF_TURN, MID_TURN])
@pytest.mark.parametrize("case", [CASE, *own_cases()], ids=lambda case: case.id)
def test_every_snippet_ends_in_the_patients_question(case, name):
    mode = interruption(case, name, seed=7)
    last = mode.snippet[-1]
    assert last.role == "user"
    assert "?" in last.content
    assert all(message.meta["snippet"] for message in mode.snippet)
    assert mode.snippet[-2].content.endswith(BREAK) == (name == MID_TURN)
    assert mode == interruption(case, name, seed=7)


def test_built_snippet_tells_what_the_patient_tells_unasked():
    row = {"chief_complaint": "pain", "opening_line": "It hurts.", "facts": []}
    mode = interruption(small_case(presentation=row), END_OF_TURN, seed=1)
    assert mode.snippet[0].content == "It hurts."
    assert mode.snippet[2].content.startswith("It started about three hours ago. ")
    assert mode.snippet[2].facts == ("pain",)


class Listening(ScriptedPatient):
    """A patient that keeps what it was given."""

    def __init__(self, case, *, seed):
        super().__init__(case, seed=seed)
        self.heard = []

    async def answer(self, messages):
        self.heard.append(tuple(messages))
        return await super().answer(messages)


@pytest.mark.parametrize("name", [END_OF_TURN, MID_TURN])
def test_physician_sees_the_snippet_and_the_patient_does_not(name):
    mode = interruption(WITH_SNIPPET, name, seed=0)
    script = Script("I will come to that. Do you smoke?", "Any fever?", "I have no further questions.")
    patient = Listening(WITH_SNIPPET, seed=0)
    trajectory = asyncio.run(run_inquiry(WITH_SNIPPET, script, patient, seed=0, mode=mode))
    assert script.seen[0][1][1:] == mode.snippet
    assert trajectory.messages[1 : 1 + len(mode.snippet)] == mode.snippet
    assert [[m.content for m in messages] for messages in patient.heard] == [
        ["I will come to that. Do you smoke?"],
        [
            "I will come to that. Do you smoke?",
            "I smoke about twenty a day. It started about three hours ago.",
            "Any fever?",
        ],
    ]
    assert trajectory.mode == name
    assert [message.turn for message in trajectory.messages] == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_passive_starts_from_the_opening_line():
    script = Script("I have no further questions.")
    trajectory = asyncio.run(run_inquiry(CASE, script, ScriptedPatient(CASE, seed=0), seed=0, mode=PASSIVE))
    assert [m.content for m in trajectory.of("user")] == [CASE.opening_line]
    assert trajectory.mode == "passive"


def test_unknown_mode():
    with pytest.raises(ValueError, match=re.escape("modes.interruption: name: want 'interruption:end_of_turn' or ")):
        interruption(CASE, "passive", seed=0)


@pytest.mark.parametrize("name", ["interruption", "mid_turn"])
def test_share_out_of_range(name):
    with pytest.raises(ValueError, match=re.escape(f"ModeConfig: {name}: want a share in [0, 1]; got 2")):
        ModeConfig(**{name: 2})
