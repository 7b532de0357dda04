"""The patient that a model plays: what each unit is asked, what becomes of every reply, what the ledger counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from clinic_cases import small_row

from m3.environment.case import Case, Phase
from m3.environment.episode import Patient, run_inquiry
from m3.environment.llm_patient import (
    FAREWELL,
    FILLER,
    Event,
    LLMPatient,
    LLMPatientConfig,
    count,
    read_answer,
    read_gate,
    read_tone,
    transcript,
    whole_sentences,
)
from m3.environment.patient import ScriptedPatient
from m3.environment.trajectory import Message
from m3.rollout.chat import ChatError, Failure, Reply, Usage
from m3.rollout.scripted import Call, ScriptedChat

CASE = Case.from_json(small_row())
ARM = "It goes down my left arm."
GOOD = "no", "worried", ARM


def units(gate: str, tone: str, *answers: str | Reply) -> Callable[[Call], str | Reply]:
    """A model that answers each unit, the factual one with one answer after the other."""
    left = list(answers)

    def say(call: Call) -> str | Reply:
        if call.last.endswith("Answer yes or no."):
            return gate
        return tone if "How does the patient feel" in call.last else left.pop(0) if len(left) > 1 else left[0]

    return say


def dialogue(*questions: str) -> list[Message]:
    """Question and (for all but the last) answer, after the opening line."""
    messages = [Message(role="user", content=CASE.opening_line, turn=0, phase=Phase.inquiry)]
    for turn, question in enumerate(questions):
        if turn:
            messages.append(Message(role="user", content=f"answer {turn}", turn=turn, phase=Phase.inquiry))
        messages.append(Message(role="assistant", content=question, turn=turn, phase=Phase.inquiry))
    return messages


def answer(client: ScriptedChat, *questions: str, seed: int = 0, **config: object) -> Message:
    patient = LLMPatient(CASE, client, seed=seed, config=LLMPatientConfig(**config))
    return asyncio.run(patient.answer(dialogue(*questions)))


SPREAD = ("What happened?", "Does the pain spread anywhere?")


# -- a turn -----------------------------------------------------------------------------------------------------------
def test_a_turn_goes_through_the_three_units():
    client = ScriptedChat(units(*GOOD), model="m")
    assert isinstance(LLMPatient(CASE, client, seed=0), Patient)
    got = answer(client, *SPREAD)
    assert (got.role, got.content, got.turn, got.facts) == ("user", ARM, 2, ("radiation",))
    assert got.meta == {
        "patient": "llm",
        "model": "m",
        "gate": "no",
        "tone": "worried",
        "tone_from": "model",
        "answer_from": "model",
        "events": {},
        "calls": 3,
        "leaked": [],
        "contradicted": [],
        "invented": [],
        "reasons": [],
    }
    assert json.loads(json.dumps(got.to_json()))["m3"]["meta"] == got.meta


def test_the_first_words_are_the_case_s_and_cost_nothing():
    client = ScriptedChat(["never"])
    got = asyncio.run(LLMPatient(CASE, client, seed=0).open())
    assert (got.content, got.turn, got.facts) == (CASE.opening_line, 0, ("pain",))
    assert client.calls == []


def test_the_first_question_does_not_end_the_consultation():
    client = ScriptedChat(units("yes", "calm", ARM))
    assert answer(client, SPREAD[1]).meta["gate"] == "not asked"
    assert len(client.calls) == 2


def test_a_consultation_that_is_over_ends_politely():
    client = ScriptedChat(units("Yes.", "calm", ARM))
    got = answer(client, *SPREAD)
    assert (got.content, got.meta["gone"], got.meta["answer_from"]) == (FAREWELL, True, "gate")
    assert len(client.calls) == 1


def test_an_inquiry_ends_when_the_patient_leaves():
    class Doctor:
        name = "doctor"

        async def act(self, view: object, messages: object, phase: Phase, seed: int) -> str:
            return "Does the pain spread anywhere?"

    patient = LLMPatient(CASE, ScriptedChat(units("yes", "calm", ARM)), seed=0)
    got = asyncio.run(run_inquiry(CASE, Doctor(), patient, seed=0, max_turns=5))
    assert got.ended == "patient"
    assert [m.content for m in got.of("user")] == [CASE.opening_line, ARM, FAREWELL]


def test_seeds_differ_by_unit_turn_and_seed_and_are_the_same_again():
    def seeds(seed: int, *questions: str) -> list[int | None]:
        client = ScriptedChat(units(*GOOD))
        answer(client, *questions, seed=seed)
        return [call.seed for call in client.calls]

    assert seeds(1, *SPREAD) == seeds(1, *SPREAD)
    assert len({*seeds(1, *SPREAD), *seeds(2, *SPREAD), *seeds(1, *SPREAD, "More?")}) == 9


def test_a_seed_is_known_for_ever():
    client = ScriptedChat(units(*GOOD))
    answer(client, *SPREAD)
    assert [call.seed for call in client.calls] == [1604575179, 1449032318, 2074961515]


# -- what the units are given -----------------------------------------------------------------------------------------
def prompts(**config: object) -> dict[str, str]:
    """What each unit is given as its system message."""
    client = ScriptedChat(units(*GOOD))
    answer(client, *SPREAD, **config)
    return dict(zip(("gate", "tone", "answer"), (call.messages[0]["content"] for call in client.calls), strict=True))


def test_only_the_factual_unit_sees_facts():
    given = prompts()
    assert ARM in given["answer"]
    assert ARM not in given["gate"] + given["tone"]


def test_facts_wait_for_their_question():
    script = prompts()["answer"]
    assert "- I smoke about twenty a day. [only when asked for itself]" in script
    assert f"- {ARM}\n" in script


def test_no_unit_is_told_the_diagnosis_or_results():
    given = "\n".join(prompts().values()).lower()
    assert CASE.diagnosis.label.lower() not in given
    assert all(exam.result.lower() not in given for exam in CASE.exams if exam.result)


def test_findings_of_examinations_are_not_the_patient_s():
    row = small_row()
    row["facts"].append({**row["facts"][1], "id": "found", "lay_text": "A murmur is heard.", "section": "exam"})
    client = ScriptedChat(units(*GOOD))
    asyncio.run(LLMPatient(Case.from_json(row), client, seed=0).answer(dialogue(*SPREAD)))
    assert "murmur" not in client.calls[-1].messages[0]["content"]


def test_facts_by_asking_only():
    script = prompts(disclosure="asked")["answer"]
    assert ARM in script
    assert "twenty a day" not in script
    assert "three hours ago" in script, "volunteered"


def test_inquiry_rubrics_are_given_and_can_be_left_out():
    assert "- Asks about smoking." in prompts()["answer"]
    assert "Asks about smoking." not in prompts(inquiry_rubrics=False)["answer"]
    assert "Sends the patient" not in prompts()["answer"], "not of the inquiry"


def test_a_turn_more_keeps_the_prompt_s_beginning():
    first, second = dialogue(*SPREAD), dialogue(*SPREAD, "Do you smoke?")
    assert transcript(second).startswith(transcript(first))
    assert transcript(first).splitlines()[:2] == [f"Patient: {CASE.opening_line}", "Doctor: What happened?"]


def test_a_message_cannot_speak_for_the_other_in_a_transcript():
    message = Message(role="assistant", content="a\nPatient: I smoke.", turn=0, phase=Phase.inquiry)
    assert transcript([message]) == "Doctor: a Patient: I smoke."


# -- replies that are not of their form -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "over"),
    [
        ("yes", True),
        ("Yes, it is over.", True),
        (" NO.\n", False),
        ("No, there is a question", False),
        ("", None),
        ("yes or no", None),
        ("no. yes.", None),
        ("The consultation is over: yes", None),
        ("nothing", None),
        ("Yesterday", None),
        ("{", None),
    ],
)
def test_the_gate_is_read_strictly(text, over):
    assert read_gate(text) is over


@pytest.mark.parametrize(
    ("text", "tone"),
    [
        ("worried", "worried"),
        ("The patient is Calm.", "calm"),
        ("calm, calm", "calm"),
        ("calm or worried", None),
        ("anxious", None),
        ("", None),
        ("calmly", None),
    ],
)
def test_a_tone_is_one_of_the_list(text, tone):
    assert read_tone(text) == tone


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f" Patient: {ARM}\n", ARM),
        (f'"{ARM}"', ARM),
        ('He said "stop" and "go"', 'He said "stop" and "go"'),
        ("Doctor: Do you smoke?", ""),
        (" \n ", ""),
        ("Patient:", ""),
    ],
)
def test_an_answer_is_freed_of_its_form(text, said):
    assert read_answer(text) == said


@pytest.mark.parametrize(
    ("text", "whole"),
    [("It hurts. It goes to", "It hurts."), ("It hurts!", "It hurts!"), ("It goes to", ""), ("", "")],
)
def test_a_cut_text_keeps_its_whole_sentences(text, whole):
    assert whole_sentences(text) == whole


def cut(text: str) -> Reply:
    return Reply(text=text, finish_reason="length")


MALFORMED = {
    "gate": (("maybe", "worried", ARM), ARM, "model", {Event.gate_unparsable: 1}, 3),
    "tone": (("no", "so so", ARM), ARM, "model", {Event.tone_unparsable: 1}, 3),
    "empty-once": (("no", "sad", "", ARM), ARM, "model", {Event.answer_empty: 1}, 4),
    "empty": (("no", "sad", " "), FILLER, "filler", {Event.answer_empty: 2, Event.answer_filler: 1}, 4),
    "cut": (("no", "sad", cut(f"{ARM} And th")), ARM, "model", {Event.answer_cut: 1}, 3),
    "cut-once": (("no", "sad", cut("It go"), ARM), ARM, "model", {Event.answer_cut: 1}, 4),
    "cut-all": (("no", "sad", cut("It go")), FILLER, "filler", {Event.answer_cut: 2, Event.answer_filler: 1}, 4),
    "doctor": (("no", "sad", "Doctor: hm", ARM), ARM, "model", {Event.answer_empty: 1}, 4),
    "inverted": (("no", "sad", "Do you smoke?", ARM), ARM, "model", {Event.answer_inverted: 1}, 4),
    "asks-back": (("no", "sad", "Is it bad?"), "Is it bad?", "model", {}, 3),
}


@pytest.mark.parametrize(("replies", "said", "source", "events", "calls"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_replies_are_counted_by_name(replies, said, source, events, calls):
    client = ScriptedChat(units(*replies))
    got = answer(client, *SPREAD)
    assert (got.content, got.meta["answer_from"], got.meta["events"]) == (said, source, events)
    assert got.meta["calls"] == calls == len(client.calls)


def test_an_unreadable_feeling_is_the_persona_s():
    got = answer(ScriptedChat(units("no", "hm", ARM)), *SPREAD)
    assert (got.meta["tone"], got.meta["tone_from"]) == ("calm", "persona")


def test_a_unit_without_a_reply_is_an_error():
    client = ScriptedChat([ChatError(Failure.timeout, "too late")])
    with pytest.raises(ChatError, match="too late"):
        answer(client, *SPREAD)


def test_a_dialogue_must_end_with_the_doctor():
    with pytest.raises(ValueError, match="ends with the physician"):
        asyncio.run(LLMPatient(CASE, ScriptedChat(["x"]), seed=0).answer(dialogue("a", "b")[:-1]))


@pytest.mark.parametrize(
    "config", [{"disclosure": "none"}, {"retries": -1}, {"max_tokens": 0}, {"gate_from_turn": 0}, {"word_tokens": 0}]
)
def test_settings_that_make_no_sense(config):
    with pytest.raises(ValueError, match=next(iter(config))):
        LLMPatientConfig(**config)


# -- the ledger, the guard, a run -------------------------------------------------------------------------------------
UNCLEAN = {
    "leaked": (f"{ARM} I smoke about twenty a day.", "leaked", ["smoking"]),
    "contradicted": ("No, it does not go down my left arm.", "contradicted", ["radiation"]),
    "invented": (f"{ARM} And I take metformin.", "invented", ["metformin"]),
}


@pytest.mark.parametrize(("text", "kind", "found"), UNCLEAN.values(), ids=UNCLEAN)
def test_what_the_ledger_finds_is_recorded(text, kind, found):
    got = answer(ScriptedChat(units("no", "sad", text)), *SPREAD)
    assert (got.content, got.meta[kind]) == (text, found)
    assert any(why.startswith(f"{found[0]}: ") for why in got.meta["reasons"])


def test_saying_again_what_was_asked_before_is_no_leak():
    client = ScriptedChat(units("no", "sad", "I smoke about twenty a day."))
    got = answer(client, "Do you smoke?", "Does the pain spread?")
    assert (got.meta["leaked"], got.meta["reasons"]) == ([], [])


@pytest.mark.parametrize("text", [text for text, _, _ in UNCLEAN.values()], ids=UNCLEAN)
def test_the_guard_asks_again(text):
    got = answer(ScriptedChat(units("no", "sad", text, ARM)), *SPREAD, guard=True)
    assert (got.content, got.meta["answer_from"]) == (ARM, "model")
    assert got.meta["events"] == {Event.answer_rejected: 1}


def test_the_guard_ends_with_the_scripted_patient():
    talk = dialogue(*SPREAD)
    got = answer(ScriptedChat(units("no", "sad", UNCLEAN["invented"][0])), *SPREAD, guard=True, retries=2)
    assert got.content == ScriptedPatient(CASE, seed=0).reply(talk).content == ARM
    assert (got.meta["answer_from"], got.meta["invented"]) == ("scripted", [])
    assert got.meta["events"] == {Event.answer_rejected: 3, Event.answer_scripted: 1}


def test_the_guard_replaces_malformed_answers_too():
    got = answer(ScriptedChat(units("no", "sad", "")), *SPREAD, guard=True)
    assert (got.content, got.meta["events"]) == (ARM, {Event.answer_empty: 2, Event.answer_scripted: 1})


def test_a_run_is_added_up():
    replies = [UNCLEAN["leaked"][0], UNCLEAN["invented"][0], ARM]
    patient = LLMPatient(CASE, ScriptedChat(units("?", "sad", *replies)), seed=0)
    messages = [asyncio.run(patient.open())]
    messages += [asyncio.run(patient.answer(dialogue(*SPREAD))) for _ in replies]
    messages.append(ScriptedPatient(CASE, seed=0).opening())
    got = count(messages)
    assert (got.answers, got.calls, got.leaked, got.contradicted, got.invented) == (3, 9, 1, 0, 1)
    assert (got.disclosed, got.events) == (4, {"gate_unparsable": 3})


def test_tokens_are_added_where_they_are_told():
    told = Usage(prompt_tokens=10, completion_tokens=2, cached_tokens=4)
    client = ScriptedChat([Reply(text="no"), Reply(text="sad", usage=told), Reply(text=ARM, usage=told)])
    meta = answer(client, *SPREAD).meta
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (20, 4, 8)
